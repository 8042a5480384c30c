"""The README's code runs as it stands there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), flags=re.DOTALL)


def block(opening: str) -> str:
    (found,) = [code for code in BLOCKS if opening in code]
    return found


def torch_names() -> dict:
    import torch
    from torch import nn

    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    dataset = torch.utils.data.TensorDataset(torch.randn(40, 8), torch.randint(0, 4, (40,)))
    return {
        "model": model,
        "dataset": dataset,
        "loader": torch.utils.data.DataLoader(dataset, batch_size=20),
        "criterion": nn.CrossEntropyLoss(),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
    }


def test_the_pytorch_quickstart(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    names = torch_names()
    exec(block('backend="wandb"').replace("epochs(100)", "epochs(3)"), names)
    assert [report.count for report in names["monitor"].history] == [40, 40, 40]
    assert names["monitor"].faults == {}


def test_the_jax_quickstart(monkeypatch, tmp_path):
    import jax
    import jax.numpy as jnp
    import optax
    from flax import linen as nn

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    model = nn.Dense(4)
    x, y = jnp.ones((10, 8)), jnp.zeros(10, jnp.int32)
    names = {
        "gwa_logging": __import__("gwa_logging"),
        "jax": jax,
        "model": model,
        "params": model.init(jax.random.key(0), x),
        "x": x,
        "y": y,
        "loss_fn": lambda p, x, y: optax.softmax_cross_entropy_with_integer_labels(model.apply(p, x), y).mean(),
        "update": lambda params, grads: jax.tree.map(lambda p, g: p - 0.1 * g, params, grads),
    }
    exec(block("monitor.value_and_grad"), names)
    assert names["monitor"].end_epoch().count == 10
    names["monitor"].close()
    assert names["monitor"].faults == {}


@pytest.mark.parametrize("trainer", ["lightning", "transformers", "keras", "accelerate"])
def test_the_lines_for_each_trainer(trainer, tmp_path):
    code = block(f"gwa_logging.integrations.{trainer} import").replace("=20", "=2")
    run = subprocess.run([sys.executable, "-c", BEFORE[trainer] + code + AFTER.get(trainer, "")], cwd=tmp_path)
    assert run.returncode == 0
    assert [len(journal.read_text().split('"kind":"epoch"')) for journal in tmp_path.rglob("journal.jsonl")] == [3]


MODEL = """
import torch
from torch import nn
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
data = [{"x": torch.randn(8), "labels": torch.tensor(i % 4)} for i in range(40)]
loader = torch.utils.data.DataLoader(data, batch_size=20)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
def loss_of(logits, labels):
    return nn.functional.cross_entropy(logits, labels)
"""
BEFORE = {
    "lightning": MODEL
    + """
from lightning import LightningModule, Trainer
logger = False
class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.model = model
    def training_step(self, batch, index):
        return loss_of(self.model(batch["x"]), batch["labels"])
    def configure_optimizers(self):
        return optimizer
module = Module()
""",
    "transformers": MODEL
    + """
from transformers import Trainer, TrainingArguments
class Model(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner
    def forward(self, x, labels):
        logits = self.inner(x)
        return {"loss": loss_of(logits, labels), "logits": logits}
model = Model(model)
training_arguments = TrainingArguments("out", num_train_epochs=2, use_cpu=True, report_to="none", save_strategy="no")
""",
    "keras": """
import os
os.environ["KERAS_BACKEND"] = "jax"
import keras, numpy as np
x, y = np.ones((40, 8), np.float32), np.arange(40) % 4
model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
""",
    "accelerate": MODEL + "from accelerate import Accelerator\naccelerator = Accelerator(cpu=True)\n",
}
AFTER = {
    "accelerate": """
for _ in monitor.epochs(2):
    for batch in loader:
        accelerator.backward(loss_of(model(batch["x"]), batch["labels"]))
        optimizer.step()
monitor.close()
"""
}


def test_the_suspects_of_the_readme():
    import gwa_logging

    names = {**torch_names(), "gwa_logging": gwa_logging}
    watching, tagging, asking = block("num_samples").split("...\n")
    exec(watching, names)
    for first in (0, 20):
        names["ids"] = __import__("torch").arange(first, first + 20)
        exec(tagging.strip(), names)
        x, y = names["dataset"].dataset[first : first + 20]
        names["criterion"](names["model"](x), y).backward()
    exec(asking, names)
    assert names["dataset"][3][-1] == 3
    assert names["suspect"].times_seen == 1


@pytest.mark.parametrize(
    "target", re.findall(r"\]\((?!http)([^)]+)\)", (Path(__file__).parents[1] / "README.md").read_text())
)
def test_every_file_that_the_readme_links_is_there(target):
    assert (Path(__file__).parents[1] / target).exists()
