"""The README's code runs unchanged."""

import pytest

from tests.pages import ROOT, assert_two_epochs, in_trainer, links, python_blocks, run

README = ROOT / "README.md"


CHECK = """
assert monitor.faults == {}, monitor.faults
assert monitor.alert, "as the text says"
assert wrong[[suspect.id for suspect in monitor.suspects(100)]].float().mean() > 0.9
"""


def block(opening: str) -> str:
    (found,) = [code for code in python_blocks(README) if opening in code]
    return found


def test_the_script_runs_as_it_stands(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    code = block('backend="wandb"')
    assert len(code.splitlines()) <= 25
    run("import torch; torch.manual_seed(0); torch.set_num_threads(1)\n" + code + CHECK, tmp_path)
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_the_readme_is_short():
    assert len(README.read_text().split()) <= 900


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


def test_the_lines_for_a_trainer(tmp_path):
    run(in_trainer("lightning", block("gwa_logging.integrations.lightning import")), tmp_path)
    assert_two_epochs(tmp_path)


@pytest.mark.parametrize("target", links(README))
def test_every_file_that_the_readme_links_exists(target):
    assert (ROOT / target).exists()
