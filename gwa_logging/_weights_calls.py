"""The part of `Monitor` that returns the weights of the best epoch."""

from typing import Any

from gwa_logging.best_weights import BestWeights
from gwa_logging.errors import InvalidInputError
from gwa_logging.forks import Owned
from gwa_logging.recording import Recording


class WeightsCalls(Owned):
    """Base class of `Monitor`."""

    _recording: Recording

    def best_weights(self) -> Any:
        """The weights of the best epoch so far, or their running average, on the host: see `watch(keep_best=)`.

        Reads the file in the run's folder, and waits until it is complete. Works after `close` too. In a distributed run every
        process must call this, and all get the weights (PyTorch).

        Returns:
            PyTorch: a state_dict. JAX: the pytree that was passed to the monitor, with NumPy arrays for its arrays.

        Raises:
            InvalidInputError: they are not kept, no epoch was the best so far, or the file cannot be read.
        """
        self._refuse_copy("best_weights()")
        return self._kept("best_weights()").load()

    def restore_best(self) -> int:
        """Loads the weights of the best epoch into the model; see `best_weights`. The optimizer's state remains as it is.

        In a distributed run every process must call this; the weights of sharded models are distributed again.

        Returns:
            The epoch that the weights are of, from 0.

        Raises:
            InvalidInputError: as `best_weights`; or the model was deleted, has other parameters by now, or does not contain
                its parameters (JAX, except Keras): use `best_weights`.
        """
        self._refuse_copy("restore_best()")
        return self._kept("restore_best()").restore()

    def _check_params(self, call: str, params: Any) -> None:
        """Checks the parameters that a user passes. None passes.

        Raises:
            InvalidInputError: they are not kept, or cannot be.
        """
        if params is not None:
            self._kept(call).check(params)

    def _kept(self, call: str) -> BestWeights:
        kept = self._recording.best_weights
        if kept is None:
            raise InvalidInputError(f"{call}: the weights are not kept; use watch(model, keep_best=True)")
        return kept
