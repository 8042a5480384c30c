"""The part of `Monitor` that takes looks from users."""

from typing import Any

from gwa_logging.errors import InvalidInputError
from gwa_logging.forks import Owned
from gwa_logging.recording import Recording


class LookCalls(Owned):
    """Base class of `Monitor`."""

    _recording: Recording

    def look(self, logits: Any, ids: Any = None) -> None:
        """Passes the model's logits for some training inputs, for `EpochReport.consensus` (JAX, own loops).

        Call it before `end_epoch`, in every epoch, with logits that the model computes in evaluation mode for the same few
        hundred training inputs; if averaged parameters are kept, with these. Several calls in an epoch add up. In PyTorch,
        `watch(look=inputs)` does all of this. Waits for the device. In a distributed run every process must pass the same
        logits.

        Args:
            logits: float [inputs, classes], or [inputs] with a single logit.
            ids: int [inputs], at least 0, which inputs these are. None if the inputs are the same, in the same order, in
                every epoch.

        Raises:
            InvalidInputError: wrong type or shape, tracers (call it outside jit), or `watch(look=)` is set too.
        """
        if self._is_refused("look()"):
            return
        with self._recording.lock:
            if self._recording.is_closed:
                raise InvalidInputError("look(): this monitor is closed; call it before close()")
            self._recording.look.give(logits, ids)
