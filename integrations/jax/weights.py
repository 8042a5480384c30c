"""The parameters of a JAX model, or their running average, for `watch(keep_best=)`.

In JAX the parameters are values that the user's loop holds, so it passes them: `Monitor.update(scores, params=params)` after
each step or, unless they are averaged, `Monitor.end_epoch(params=params)`. The callback for Keras's `fit` passes them itself.

The average is an exponential moving average with a horizon of one epoch: at each step it moves by 1/N towards the parameters,
where N is the number of steps of the epoch before. In the first epoch N is the number of steps so far, so the average is the
plain mean. Averages of floats of 16 bits or fewer are float32, which 1/N needs. Arrays of integers are not averaged.
"""

import weakref
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np

from gwa_logging.errors import InvalidInputError
from gwa_logging.integrations.jax.accumulate import transfers_allowed

DTYPES = "dtypes"
"""Name of the file's array with the dtype of each other array: NumPy's format does not know JAX's own, such as bfloat16."""


@partial(jax.jit, donate_argnums=0)
def _moved(averages: Any, params: Any, share: Any) -> Any:
    """The averages, moved by `share` towards the parameters. Both are lists of arrays.

    Elements that are not finite begin again with the present value: otherwise, after a divergence, they would never recover.
    """

    def moved(average: Any, array: Any) -> Any:
        if not jnp.issubdtype(average.dtype, jnp.inexact):
            return jnp.copy(array)
        present = array.astype(average.dtype)
        return jnp.where(jnp.isfinite(average), average + (share * (present - average)).astype(average.dtype), present)

    return [moved(average, array) for average, array in zip(averages, params, strict=True)]


def _copied(array: Any) -> jax.Array:
    """A copy in the dtype of the average, which may be donated."""
    is_averaged = jnp.issubdtype(array.dtype, jnp.inexact)
    return jnp.array(array, jnp.promote_types(array.dtype, jnp.float32) if is_averaged else None, copy=True)


class ParameterTree:
    """A pytree taken apart into its arrays and the rest.

    Attributes:
        arrays: the arrays by path, in the order of the tree.
    """

    def __init__(self, tree: Any) -> None:
        leaves, self._structure = jax.tree_util.tree_flatten_with_path(tree)
        self.arrays = {jax.tree_util.keystr(path): leaf for path, leaf in leaves if _is_array(leaf)}
        # Everything else, such as an activation function of Equinox, is returned as it is.
        self._others = [(jax.tree_util.keystr(path), None if _is_array(leaf) else leaf) for path, leaf in leaves]

    def filled(self, arrays: dict[str, Any]) -> Any:
        """The tree with other arrays in it."""
        leaves = [arrays.get(path, leaf) for path, leaf in self._others]
        return jax.tree_util.tree_unflatten(self._structure, leaves)

    def check(self) -> None:
        """Checks that the arrays can be copied to the host.

        Raises:
            InvalidInputError: there is none, or one is a tracer, deleted, a key, or distributed over processes.
        """
        if not self.arrays:
            raise InvalidInputError("params: expected a pytree of arrays, found no array in it")
        for path, array in self.arrays.items():
            found = None
            if isinstance(array, jax.core.Tracer):
                found = "a tracer: pass the parameters outside jit"
            elif jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
                found = "a random key: pass the weights only"
            elif isinstance(array, jax.Array) and array.is_deleted():
                found = "a deleted array, which a jitted step has donated: pass the parameters that the step returned"
            elif isinstance(array, jax.Array) and not array.is_fully_addressable:
                found = "an array that is distributed over several processes: gather it first"
            if found:
                raise InvalidInputError(f"params{path}: found {found}")


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)


class JaxWeights:
    """Copies, writes and reads the parameters of one model. See `gwa_logging.best_weights.ModelWeights`."""

    suffix = ".npz"

    def __init__(self, model: Any, *, averaged: bool) -> None:
        """Copies nothing yet. Holds only a weak reference to the model."""
        self._keras = weakref.ref(model) if hasattr(model, "set_weights") else None
        self._is_averaged = averaged
        self._average: list[jax.Array] = []
        self._latest: Any = None  # of the last step in this epoch, if they are not averaged
        self._tree: ParameterTree | None = None  # of the last parameters, without their memory
        self._structure: Any = None  # of the parameters of the last step
        self._steps = 0  # in this epoch
        self._horizon: int | None = None  # steps of the last epoch; None in the first

    def check(self, params: Any) -> None:
        """Checks the parameters of `Monitor.end_epoch`.

        Raises:
            InvalidInputError: see `ParameterTree.check`; or the average of other parameters is kept.
        """
        if self._is_averaged:
            raise InvalidInputError(
                "end_epoch(params=): with keep_best='averaged' pass them after each step: update(scores, params=params)"
            )
        ParameterTree(params).check()

    def observe(self, params: Any) -> None:
        """Takes the parameters after a step. Does not wait for the device.

        Raises:
            InvalidInputError: see `ParameterTree.check`; or the average is of other arrays.
        """
        leaves, structure = jax.tree.flatten(params)
        is_new = self._structure is None or structure != self._structure
        if is_new or any(map(_is_unusable, leaves)):
            ParameterTree(params).check()  # takes milliseconds for hundreds of arrays
        if self._is_averaged:
            self._add([leaf for leaf in leaves if _is_array(leaf)])
            if is_new:
                self._tree = ParameterTree(jax.tree.map(_emptied, params))
            self._steps += 1
        else:
            self._latest = params
        self._structure = structure

    def _add(self, arrays: list[Any]) -> None:
        """Moves the average towards the parameters."""
        if not self._average:
            self._average = [_copied(array) for array in arrays]
        elif [array.shape for array in arrays] != [array.shape for array in self._average]:
            raise InvalidInputError("params: their number or shapes differ from those of the step before")
        else:
            with transfers_allowed():
                self._average = _moved(self._average, arrays, 1 / (self._horizon or self._steps + 1))

    def end_epoch(self, params: Any, *, is_best: bool) -> dict[str, np.ndarray] | None:
        """If the epoch is the best: the arrays by path, on the host, in the process that writes.

        Raises:
            InvalidInputError: no parameters were passed in this epoch, or they have been donated since.
        """
        steps = self._steps
        if steps:
            self._horizon, self._steps = steps, 0
        params, self._latest = self._latest if params is None else params, None  # not kept: it would fill the device
        if params is not None:
            self._tree = ParameterTree(jax.tree.map(_emptied, params))
        if not is_best:
            return None
        if self._is_averaged:
            found = self._average_on_host(steps)
        elif params is None:
            raise InvalidInputError("no parameters were passed: end_epoch(params=params)")
        else:
            tree = ParameterTree(params)
            tree.check()
            with transfers_allowed():  # copied, because the user's NumPy arrays may change while they are written
                found = {path: np.array(array) for path, array in tree.arrays.items()}
        return found if jax.process_index() == 0 else None

    def _average_on_host(self, steps: int) -> dict[str, np.ndarray]:
        """The average in the dtypes of the parameters; `steps` is the number of steps of this epoch that had parameters."""
        if self._tree is None or not steps:
            raise InvalidInputError("no parameters were passed: update(scores, params=params)")
        with transfers_allowed():
            return {
                path: np.asarray(average.astype(like.dtype))
                for (path, like), average in zip(self._tree.arrays.items(), self._average, strict=True)
            }

    def write(self, snapshot: dict[str, np.ndarray], file: BinaryIO) -> None:
        """Writes an archive that `numpy.load` reads: one array by path, and the names of their dtypes."""
        named: dict[str, Any] = {f"params{path}": array for path, array in snapshot.items()}
        named[DTYPES] = np.array([str(array.dtype) for array in snapshot.values()])
        np.savez(file, **named)

    def read(self, path: Path) -> Any:
        """Reads it, without executing code.

        Raises:
            InvalidInputError: the structure of the parameters is unknown, because none were passed in this process.
        """
        with np.load(path, allow_pickle=False) as file:
            names = [name for name in file.files if name != DTYPES]
            arrays = {
                name.removeprefix("params"): file[name].view(jnp.dtype(str(dtype)))
                for name, dtype in zip(names, file[DTYPES], strict=True)
            }
        model = self._keras() if self._keras is not None else None
        if self._tree is None and model is not None:
            self._tree = ParameterTree(model.get_weights())
        if self._tree is None:
            raise InvalidInputError(
                "their structure is unknown until this process has kept an epoch; the arrays are in the file, for numpy.load"
            )
        if self._tree.arrays.keys() != arrays.keys():
            raise InvalidInputError("it has other arrays than the parameters that were passed last")
        return self._tree.filled(arrays)

    def share(self, value: Any) -> Any:
        """Returns the value: the processes of JAX do not exchange weights, so only the first has them."""
        return value

    def restore(self, weights: Any) -> None:
        """Sets the weights of a Keras model.

        Raises:
            InvalidInputError: the model is another one, or was deleted.
        """
        if self._keras is None:
            raise InvalidInputError(
                "restore_best(): a JAX model does not contain its parameters; use params = monitor.best_weights()"
            )
        model = self._keras()
        if model is None:
            raise InvalidInputError(
                "restore_best(): the model was deleted; monitor.best_weights() still has its weights"
            )
        try:
            model.set_weights(weights)
        except (ValueError, TypeError) as error:
            raise InvalidInputError(
                f"restore_best(): the weights do not fit the model ({error}); use params = monitor.best_weights()"
            ) from error


def _emptied(leaf: Any) -> Any:
    """An array of the same dtype and shape without memory, which stands for the user's array; other leaves are kept."""
    return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape) if _is_array(leaf) else leaf


def _is_unusable(leaf: Any) -> bool:
    return isinstance(leaf, jax.core.Tracer) or (isinstance(leaf, jax.Array) and leaf.is_deleted())
