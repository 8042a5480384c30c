"""One thread each: the models are tiny, and other tests may run beside these."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _compiled_anew():
    """Graphs of earlier tests count towards the compiler's limit per function, which older PyTorch shares between models."""
    torch._dynamo.reset()
