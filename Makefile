.PHONY: setup demo test check test-lowest test-newest release bench docs clean
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(READY)

# Trains a small CNN on noisy digits, tracked in MLflow's embedded sqlite store, and writes the report.
demo: setup
	mkdir -p demo_output
	cd demo_output && MLFLOW_TRACKING_URI=sqlite:///mlflow.db ../$(BIN)/python ../examples/pytorch_digits.py --backend mlflow
	cd demo_output && ../$(BIN)/gwa-logging report gwa_runs
	@echo
	@echo "See the run in MLflow:  cd demo_output && ../$(BIN)/mlflow ui --backend-store-uri sqlite:///mlflow.db"

test: check

# Two tests at a time, with one thread each: most of them start processes, or wait for some.
check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

# The core with the lowest versions that pyproject.toml claims. PyTorch of that age comes with CUDA: gigabytes.
LOWEST := .venv-lowest/bin
test-lowest:
	$(PYTHON) -m venv .venv-lowest
	$(LOWEST)/pip install --quiet -e . torch==2.6.0 numpy==1.26.0 pydantic==2.7.0 plotly==6.0.0 scipy==1.12.0 \
		'pandas<2.3' tqdm build 'setuptools>=77' pytest hypothesis
	$(LOWEST)/pytest tests/core $(addprefix tests/torch/test_,accumulate.py scores.py probe.py ledger.py step_watchdog.py)
	$(LOWEST)/pip install --quiet jax==0.9.0 flax==0.12.0 optax equinox dm-haiku scikit-learn
	$(LOWEST)/pytest $(addprefix tests/jax/test_,accumulate.py value_and_grad.py ledger.py)

# Everything with the newest versions that there are.
test-newest:
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/pip install --quiet --upgrade -e '.[dev]'
	OMP_NUM_THREADS=1 .venv-newest/bin/pytest -n 2 --dist worksteal

# The wheel and the sdist, tried with each extra in an environment of its own: a quarter of an hour.
release: setup
	$(BIN)/python -m tests.release

# BackPACK is for the benchmark only and goes to a folder of its own; without it its rows say so.
bench: setup
	-$(BIN)/pip install --quiet --no-deps --target build/peers backpack-for-pytorch einops unfoldNd
	PYTHONPATH=build/peers $(BIN)/python -m benchmarks

# The site, in build/site. Its code is run by tests/test_docs.py.
docs:
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip install --quiet -e '.[docs]'
	.venv-docs/bin/mkdocs build --strict

clean:
	rm -rf .venv .venv-lowest .venv-newest .venv-docs demo_output gwa_runs build dist *.egg-info
