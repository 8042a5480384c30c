"""Finds the probe that watches a weight, for losses that use the head's weight without calling the head."""

import weakref
from itertools import count
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor


class WatchesWeight(Protocol):
    """A probe: `gwa_logging.integrations.torch.probe.HeadProbe`."""

    enabled: bool
    layer: Any


class _Registry:
    """The probes by a key, which is a text since the compiler does not guard on the value of a number.

    Attributes:
        latest: the key of the probe that was registered last. A graph that was compiled before is compiled again.
    """

    latest = ""
    probes: ClassVar["dict[str, weakref.ref[Any]]"] = {}
    keys: ClassVar["count[int]"] = count(1)


def register(probe: WatchesWeight) -> None:
    """Makes a probe known, until it is closed or garbage-collected."""
    for key, known in [*_Registry.probes.items()]:
        other = known()
        if other is None or not other.enabled:
            del _Registry.probes[key]
    _Registry.latest = str(next(_Registry.keys))
    _Registry.probes[_Registry.latest] = weakref.ref(probe)


def probe_of(weight: Tensor) -> Any:
    """The latest open probe whose head has this weight now; None if there is none.

    Sharded training puts another tensor at the head during a forward pass, so the head is looked at each time. The compiler
    evaluates the search while it traces, and traces the rest. It guards on `id` and `latest`: models of one class share graphs.
    """
    key = _key_of(weight, id(weight), _Registry.latest)
    probe = _Registry.probes[key]() if key else None
    return probe if probe is not None and probe.enabled else None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _key_of(weight: Tensor, identity: int, latest: str) -> str:
    """The key of the latest open probe that watches a weight; "" if there is none."""
    for key, known in reversed(_Registry.probes.items()):
        probe = known()
        if probe is not None and probe.enabled:
            module = probe.layer._module()
            if module is not None and any(each is weight for each in _weights(module)):
                return key
    return ""


def _weights(module: Any) -> tuple[Any, Any]:
    """What a module has as its weight: a parameter, or the plain tensor that FullyShardedDataParallel puts there in a pass.

    Not by `module.weight`, which would compute a parametrised weight.
    """
    return module._parameters.get("weight"), module.__dict__.get("weight")
