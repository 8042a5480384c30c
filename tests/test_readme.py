"""The README's code runs unchanged."""

import pytest

from tests.pages import ROOT, links, python_blocks, run_in_trainer

README = ROOT / "README.md"


def block(opening: str) -> str:
    (found,) = [code for code in python_blocks(README) if opening in code]
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
    run_in_trainer(trainer, block(f"gwa_logging.integrations.{trainer} import"), tmp_path)


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


@pytest.mark.parametrize("target", links(README))
def test_every_file_that_the_readme_links_exists(target):
    assert (ROOT / target).exists()
