"""What to check when no training step has passed the probe."""

from torch import nn

from gwa_logging.integrations.torch.fused_losses import culprit
from gwa_logging.integrations.torch.probe import HeadProbe


def no_observation_hint(head: str, changes: str, probe: HeadProbe | None, model: nn.Module | None) -> str:
    """The most probable reasons, in sentences.

    Args:
        head: description of the head.
        changes: a sentence about the last replacement of the head, without a full stop; empty if it was not replaced.
        probe: the probe; None if there is none at present.
        model: the model; None if it was deleted.
    """
    sentences = [f"Watched: {head}", changes]
    if probe is not None and probe.saw_evaluation:
        sentences.append(
            "There were passes with the head in eval mode, which are not counted: call model.train(), or train() on the head "
            "alone"
        )
    if model is not None:
        layer = None if probe is None else probe.layer._module()
        sentences.append(culprit(model, layer, is_called=probe is not None and probe.saw_call))
    known = "".join(f"{sentence}. " for sentence in sentences if sentence)
    return (
        f"{known}Check that loss.backward() runs on "
        "the output of this model in training mode with gradients enabled; that the head is called as a module (not "
        "through F.linear on its weight, nor in a fused loss other than linear_cross_entropy); and that watch() came "
        "before the first call of a compiled model. If a compiled model's head can only be found in a first pass, pass "
        "its path: watch(model, head='dotted.path'). Gradients that a compiled model computes by torch.autograd.grad, "
        "backward(inputs=) or torch.func transforms are not observed."
    )
