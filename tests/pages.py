"""Shared by the tests of README and docs/: a page's code and links, and the setup that its code assumes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def python_blocks(page: Path) -> list[str]:
    """Returns the blocks of Python code of a page, in order."""
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)


def links(page: Path) -> list[str]:
    """Returns the targets of a page's links and pictures, except web addresses. Code is ignored."""
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", prose) if not target.startswith("http")]


def run(code: str, folder: Path) -> None:
    """Runs code as a separate program in a folder."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


TOGETHER = """
import json, linecache, os, sys
for name, code in json.load(sys.stdin).items():
    os.mkdir(name)
    os.chdir(name)
    linecache.cache[name] = len(code), None, code.splitlines(keepends=True), name  # for tracebacks
    exec(compile(code, name, "exec"), {"__name__": "__main__"})
    os.chdir("..")
"""


def run_together(programs: dict[str, str], folder: Path) -> None:
    """Runs programs one after the other in one process, each in a folder of its name: importing takes most of the time."""
    command = [sys.executable, "-c", TOGETHER]
    done = subprocess.run(command, input=json.dumps(programs), cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def in_trainer(trainer: str, code: str) -> str:
    """Returns a program that runs a trainer's lines for two epochs, with a model and data added."""
    return BEFORE[trainer] + code.replace("=20", "=2") + AFTER.get(trainer, "")


def assert_two_epochs(folder: Path) -> None:
    """Checks that the folder has one journal, of two epochs."""
    assert [len(journal.read_text().split('"kind":"epoch"')) for journal in folder.rglob("journal.jsonl")] == [3]


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
    "ignite": MODEL
    + """
from ignite.engine import Engine
def step(engine, batch):
    loss_of(model(batch["x"]), batch["labels"]).backward()
    optimizer.step()
trainer = Engine(step)
""",
    "fastai": MODEL
    + """
from tests.trainers.torchvision_operators import define_operators
define_operators()
from fastai.basics import DataLoaders, Learner
from fastai.callback import schedule
pairs = [(row["x"], row["labels"]) for row in data]
dls = DataLoaders.from_dsets(pairs, pairs, bs=20, device="cpu")
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
