"""A stand-in for the model that PEFT puts around a model."""

from torch import nn


class PeftModel(nn.Module):
    """As PEFT's: its own forward cannot be traced, that of the model inside can."""

    __module__ = "peft.peft_model"

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = model

    def get_base_model(self) -> nn.Module:
        return self.base_model

    def forward(self, *args, **kwargs):
        return self.base_model(*args, **kwargs) if len(kwargs) < 9 else None
