"""Lets torchvision be imported beside a build of PyTorch that its C++ operators do not fit.

That is so with PyPI's torchvision, which is built for CUDA, beside a PyTorch for CPUs. The tests use neither of the two
operators, but without them torchvision cannot be imported.
"""

from typing import Any

import torch

_defined: list[Any] = []  # a Library removes its operators when it is freed


def define_operators() -> None:
    """Declares torchvision's operators for boxes if its library does not do so."""
    if _defined:
        return
    try:
        import torchvision  # noqa: F401
    except ModuleNotFoundError:  # not needed then
        return
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _defined.append(library)
