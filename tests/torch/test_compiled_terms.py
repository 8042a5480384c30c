"""The compiled terms against the formula in float64 NumPy, and what happens where they cannot be compiled."""

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import gwa_logging
from gwa_logging.alignment import DEAD, NOT_FINITE
from gwa_logging.faults import Faults
from gwa_logging.integrations.torch import background_compiler
from gwa_logging.integrations.torch.background_compiler import (
    Cancelled,
    CompilationError,
    _key,
    cache_directory,
    library_for,
)
from gwa_logging.integrations.torch.compile_worker import BY_LOGITS, Signature, check_results, random_inputs
from gwa_logging.integrations.torch.compile_worker import _ByLogits as ByLogits
from gwa_logging.integrations.torch.compiled_terms import SWITCH, CompiledTerms, terms_of
from gwa_logging.integrations.torch.head_layers import layer_of
from gwa_logging.integrations.torch.scores import alignment_scores

PATIENCE = 240
FEATURES = 24


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache for all tests of a session: each library is compiled once."""
    root = tmp_path_factory.getbasetemp()
    return (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "compiled"


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Switches the compilation on, with an empty cache."""
    monkeypatch.setenv(SWITCH, "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def on_with_cache(monkeypatch: pytest.MonkeyPatch, shared_cache: Path) -> None:
    monkeypatch.setenv(SWITCH, "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(shared_cache))


def compiled_terms(classes: int = 5, faults: Faults | None = None) -> CompiledTerms:
    terms = terms_of(layer_of(nn.Linear(FEATURES, classes)), faults or Faults())
    assert isinstance(terms, CompiledTerms)
    return terms


def batch(rows: int, classes: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """delta, logits, embeddings and dL/dh; the first rows hold zeros, NaN and infinities if there are enough."""
    generator = torch.Generator().manual_seed(rows)
    tensors = [torch.randn(rows, width, generator=generator) for width in (classes, classes, FEATURES, FEATURES)]
    if rows > 8:
        delta, logits, embeddings, gradient = tensors
        delta[0] = gradient[0] = 0
        embeddings[1] = 0
        delta[2, 0] = logits[3, 1] = embeddings[4, 2] = gradient[4, 1] = torch.nan
        delta[5, 1] = embeddings[6, 0] = torch.inf
        logits[7, 0], gradient[7, 0] = -torch.inf, torch.inf
    return [x.to(dtype) for x in tensors]


def oracle(product: np.ndarray, delta: torch.Tensor, embeddings: torch.Tensor, weight_norm: float) -> np.ndarray:
    """The scores of samples with these numerators, in float64."""
    with np.errstate(all="ignore"):
        delta_norms, embedding_norms = (np.linalg.norm(x.double().numpy(), axis=1) for x in (delta, embeddings))
        scores = -product / (delta_norms * embedding_norms * weight_norm)
        scores[embedding_norms == 0] = DEAD
        scores[delta_norms == 0] = np.nan
        scores[~np.isfinite(product + delta_norms + embedding_norms)] = NOT_FINITE
    return scores


def by_logits(terms, tensors: list[torch.Tensor], bias: torch.Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    delta, logits, embeddings, _ = tensors
    found = alignment_scores(terms.terms_by_logits(delta, logits, embeddings, bias, torch.tensor(2.0)))
    shift = 0.0 if bias is None else bias.double().numpy()
    with np.errstate(all="ignore"):
        product = (delta.double().numpy() * (logits.double().numpy() - shift)).sum(1)
    return found.numpy(), oracle(product, delta, embeddings, 2.0)


def by_embeddings(terms, tensors: list[torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    delta, _, embeddings, gradient = tensors
    norms = torch.linalg.vector_norm(delta.double(), dim=1).float()
    found = alignment_scores(terms.terms_by_embeddings(norms, gradient, embeddings, torch.tensor(2.0)))
    with np.errstate(all="ignore"):
        product = (gradient.double().numpy() * embeddings.double().numpy()).sum(1)
    return found.numpy(), oracle(product, delta, embeddings, 2.0)


@pytest.mark.parametrize(
    ("form", "dtype", "has_bias"),
    [
        (BY_LOGITS, torch.float32, True),
        (BY_LOGITS, torch.float32, False),
        (BY_LOGITS, torch.bfloat16, True),
        (BY_LOGITS, torch.float16, True),
        ("embeddings", torch.float32, False),
        ("embeddings", torch.bfloat16, False),
    ],
)
@pytest.mark.slow
@pytest.mark.usefixtures("on_with_cache")
def test_compiled_scores_are_those_of_the_formula_in_float64(form, dtype, has_bias):
    faults, classes = Faults(), 5 if form == BY_LOGITS else 40
    terms = compiled_terms(classes, faults)
    bias = torch.randn(classes) if has_bias else None

    def check(tensors: list[torch.Tensor]) -> None:
        found, expected = by_logits(terms, tensors, bias) if form == BY_LOGITS else by_embeddings(terms, tensors)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6)

    check(batch(33, classes, dtype))  # eager, and starts the compilation
    assert terms.join(PATIENCE), faults.take_notes()
    library = terms._by_logits if form == BY_LOGITS else terms._by_embeddings
    run, calls = library._run, []
    assert run is not None
    library._run = lambda arguments: calls.append(len(arguments[0])) or run(arguments)
    for rows in (1, 2, 3, 33, 129, 1_000_000):
        check(batch(rows, classes, dtype))
    assert calls == [2, 3, 33, 129, 1_000_000]  # one library for all of them; a single row stays eager
    tall = batch(64, classes, dtype)
    check([x.mT.contiguous().mT for x in tall])  # not contiguous
    check([x[::2] for x in tall])
    assert calls == [2, 3, 33, 129, 1_000_000]
    check([x[16:] for x in tall])
    assert not faults.take_notes()
    terms.close()


@pytest.mark.slow
@pytest.mark.usefixtures("on_with_cache")
def test_training_with_compiled_terms_has_the_same_statistics_and_the_same_weights(monkeypatch):
    def train(switch: str) -> tuple[list[gwa_logging.EpochReport], torch.Tensor]:
        monkeypatch.setenv(SWITCH, switch)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, FEATURES), nn.Tanh(), nn.Linear(FEATURES, 5))
        x, y = torch.randn(96, 8), torch.randint(0, 5, (96,))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with gwa_logging.watch(model) as monitor:
            terms = monitor._adapter._watching.terms
            assert isinstance(terms, CompiledTerms) == (switch == "1")
            for _ in monitor.epochs(3):
                for rows in (slice(0, 40), slice(40, 80), slice(80, 96)):
                    nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    if switch == "1":
                        assert terms.join(PATIENCE)
        assert not monitor.faults
        return monitor.history, model[2].weight.detach().clone()

    (eager, weight), (compiled, same_weight) = train("0"), train("1")
    assert torch.equal(weight, same_weight)
    for expected, found in zip(eager, compiled, strict=True):
        assert SWITCH not in str(found.notes)
        assert found.count == expected.count
        for name in ("mean", "std", "gwa", "stable_gwa", "negative_fraction"):
            assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-6, abs=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("on")
def test_a_compiled_model_fuses_the_layers_own_terms_and_starts_no_compilation():
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 5))
    with gwa_logging.watch(model) as monitor:
        torch.compile(model, fullgraph=True, backend="aot_eager")(torch.randn(9, 8)).square().sum().backward()
        terms = monitor._adapter._watching.terms
        assert monitor.end_epoch().count == 9
        assert not terms.join(0)
        assert terms._by_logits._thread is None


def test_without_the_switch_the_layer_computes_its_terms_itself(monkeypatch):
    layer, faults = layer_of(nn.Linear(3, 2)), Faults()
    for value in ("", "0"):
        monkeypatch.setenv(SWITCH, value)
        assert terms_of(layer, faults) is layer
    assert not faults.take_notes()
    monkeypatch.setenv(SWITCH, "yes")
    assert terms_of(layer, faults) is layer
    assert faults.take_notes() == (f"{SWITCH}: expected 0 or 1, found 'yes'. Set it to 1 to compile the scoring",)


def note_of(terms: CompiledTerms, faults: Faults, dtype: torch.dtype = torch.float32) -> str:
    """What is noted, once, about a compilation that fails; the scores must be right."""
    bias = torch.randn(5)
    for rows in (9, 12):
        np.testing.assert_allclose(*by_logits(terms, batch(rows, 5, dtype), bias), rtol=1e-5, atol=2e-6)
        assert not terms.join(PATIENCE)
    (note,) = faults.take_notes()
    return note


@pytest.mark.usefixtures("on")
def test_a_dtype_that_is_not_supported_stays_eager():
    faults = Faults()
    note = note_of(compiled_terms(faults=faults), faults, torch.float64)
    assert "torch.float64 is not supported" in note


@pytest.mark.usefixtures("on")
def test_a_device_that_is_not_supported_stays_eager():
    faults = Faults()
    terms = compiled_terms(faults=faults)
    inputs = [x.to("meta") for x in batch(4, 5, torch.float32)]  # stands for mps, xpu, ...
    for _ in range(2):
        assert terms.terms_by_logits(*inputs[:3], None, torch.ones((), device="meta")).product.shape == (4,)
        assert not terms.join(PATIENCE)
    (note,) = faults.take_notes()
    assert note.startswith(f"{SWITCH}: the scoring is not compiled, and continues in eager mode")
    assert "the device meta is not supported" in note


@pytest.mark.slow
@pytest.mark.usefixtures("on")
def test_without_a_compiler_the_scoring_stays_eager(monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    faults = Faults()
    note = note_of(compiled_terms(faults=faults), faults)
    assert "not compiled, and continues in eager mode: " in note
    assert "No working C++ compiler found" in note


def program(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.usefixtures("on")
def test_a_compilation_that_fails_leaves_its_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", program(tmp_path / "fails", "echo no space left >&2; exit 1"))
    faults, signature = Faults(), Signature(BY_LOGITS, "cpu", ("float32",) * 4, (5, 5, FEATURES, 5))
    (cache_directory() / f"{_key(signature)}-left").mkdir()  # by a process that was killed
    assert note_of(compiled_terms(faults=faults), faults).endswith("no space left")
    assert [path.suffix for path in cache_directory().iterdir()] == [".lock"]


@pytest.mark.usefixtures("on")
def test_a_compilation_that_takes_too_long_is_ended(monkeypatch, tmp_path):
    pid = tmp_path / "pid"
    monkeypatch.setattr(sys, "executable", program(tmp_path / "hangs", f"echo $$ > {pid}; exec sleep 1000"))
    with pytest.raises(CompilationError, match="took too long"):
        library_for(Signature(BY_LOGITS, "cpu", ("float32",) * 3, (5, 5, 8)), threading.Event(), 1.0)
    if pid.exists():  # else the machine was so busy that the program had not started
        wait_for(lambda: not is_running(int(pid.read_text())))


@pytest.mark.usefixtures("on")
def test_closing_the_monitor_ends_the_compilation(monkeypatch, tmp_path):
    pid = tmp_path / "pid"
    monkeypatch.setattr(sys, "executable", program(tmp_path / "hangs", f"echo $$ > {pid}; exec sleep 1000"))
    model = nn.Linear(8, 5)
    monitor = gwa_logging.watch(model)
    model(torch.randn(6, 8, requires_grad=True)).square().sum().backward()
    wait_for(lambda: pid.exists() and pid.read_text().endswith("\n"))
    monitor.close()
    wait_for(lambda: not is_running(int(pid.read_text())))
    assert SWITCH not in str(monitor.history[-1].notes)
    assert not monitor.faults


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it has not happened"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    """Returns True for a process that exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


KILLED = """
import sys, threading
from gwa_logging.integrations.torch import background_compiler
from gwa_logging.integrations.torch.compile_worker import Signature
background_compiler.library_for(Signature("logits", "cpu", ("float32",) * 3, (5, 5, 9)), threading.Event())
"""


@pytest.mark.slow
@pytest.mark.usefixtures("on")
def test_the_compilation_ends_with_a_training_process_that_is_killed():
    training = subprocess.Popen([sys.executable, "-c", KILLED])
    workers: list[int] = []

    def has_started() -> bool:
        children = Path(f"/proc/{training.pid}/task").glob("*/children")
        workers[:] = [int(pid) for path in children for pid in path.read_text().split()]
        assert training.poll() is None
        return bool(workers) and b"compile_worker" in Path(f"/proc/{workers[0]}/cmdline").read_bytes()

    wait_for(has_started)
    training.send_signal(signal.SIGKILL)
    training.wait()
    wait_for(lambda: not is_running(workers[0]))


@pytest.mark.usefixtures("on")
def test_a_cache_that_others_may_write_to_is_not_used():
    cache_directory().chmod(0o777)
    faults = Faults()
    assert "run chmod 700 on it" in note_of(compiled_terms(faults=faults), faults)


@pytest.mark.usefixtures("on")
def test_of_two_processes_one_waits_for_the_library_of_the_other(monkeypatch):
    monkeypatch.setattr(background_compiler, "_compile", lambda *_: pytest.fail("compiled twice"))
    signature, found = Signature(BY_LOGITS, "cpu", ("float32",) * 3, (5, 5, 8)), []
    library = cache_directory() / f"{_key(signature)}.pt2"
    with library.with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        waiting = threading.Thread(target=lambda: found.append(library_for(signature, threading.Event())))
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive()
        library.write_bytes(b"made by the other process")
    waiting.join(PATIENCE)
    assert found == [library]


@pytest.mark.usefixtures("on")
def test_waiting_for_another_process_ends_when_the_library_is_no_longer_needed():
    signature, cancelled = Signature(BY_LOGITS, "cpu", ("float32",) * 3, (5, 5, 8)), threading.Event()
    with (cache_directory() / f"{_key(signature)}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        cancelled.set()
        with pytest.raises(Cancelled):
            library_for(signature, cancelled)


@pytest.mark.usefixtures("on")
def test_a_library_that_cannot_be_loaded_stays_eager(monkeypatch):
    monkeypatch.setattr(background_compiler, "_compile", lambda _, library, *__: library.write_bytes(b"broken"))
    faults = Faults()
    assert "not compiled, and continues in eager mode" in note_of(compiled_terms(faults=faults), faults)


def fail(_: list[torch.Tensor]) -> list[torch.Tensor]:
    raise RuntimeError("out of memory")


@pytest.mark.usefixtures("on")
def test_a_library_that_fails_is_not_called_again(monkeypatch):
    monkeypatch.setattr(background_compiler, "_compile", lambda _, library, *__: library.touch())
    monkeypatch.setattr("gwa_logging.integrations.torch.compile_worker.load_library", lambda *_: fail)
    faults, bias = Faults(), torch.randn(5)
    terms = compiled_terms(faults=faults)
    by_logits(terms, batch(9, 5, torch.float32), bias)
    assert terms.join(PATIENCE)
    assert note_of(terms, faults).endswith("RuntimeError: out of memory")


def test_a_library_with_wrong_results_is_refused():
    signature, module = Signature(BY_LOGITS, "cpu", ("float32",) * 3, (5, 5, 8)), ByLogits()
    check_results(lambda inputs: list(module(*inputs)), module, signature)
    with pytest.raises(ArithmeticError, match="differ from those in float64"):
        check_results(lambda inputs: [x * 1.001 for x in module(*inputs)], module, signature)
    assert len(random_inputs(signature, 3)) == 3


@pytest.mark.usefixtures("on")
def test_the_key_of_a_library_depends_on_the_machine_and_the_signature(monkeypatch):
    signature = Signature(BY_LOGITS, "cpu", ("float32",) * 3, (5, 5, 8))
    keys = {_key(signature), _key(signature._replace(widths=(6, 6, 8)))}
    monkeypatch.setattr(background_compiler, "_processor", lambda: "another processor")
    keys.add(_key(signature))
    monkeypatch.setattr(torch, "__version__", "3.0")
    keys.add(_key(signature))
    assert len(keys) == 4
