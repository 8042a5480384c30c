.PHONY: setup demo test check test-slow test-lowest test-newest release bench docs clean
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
DEMO_READY := .venv/.demo-ready
ENGINES_READY := .venv/.engines-ready

setup: $(READY)

# A complete setup includes what the demo needs. `make demo` alone installs only that; `make test` then adds the rest.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(READY) $(DEMO_READY)

# The engines that only slow tests use. DeepSpeed compiles nothing.
$(ENGINES_READY): $(READY)
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet -c constraints.txt -e '.[engines]'
	touch $(ENGINES_READY)

# fastai and Ultralytics need torchvision. That of PyPI is built for CUDA, and Lightning fails to import it beside a PyTorch for
# CPUs; MosaicML's streaming demands older versions of others. So they are installed into a folder that only their own tests see.
SEPARATE := build/separate
$(SEPARATE)/.ready: $(READY) tests/separate_packages.txt
	$(BIN)/pip install --quiet --no-deps --upgrade --target $(SEPARATE) -r tests/separate_packages.txt
	touch $(SEPARATE)/.ready

$(DEMO_READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile -c constraints.txt -e '.[demo]'
	touch $(DEMO_READY)

# Trains a small CNN on noisy digits, tracked in MLflow's embedded sqlite store, and writes the report.
demo: $(DEMO_READY)
	mkdir -p demo_output
	cd demo_output && OMP_NUM_THREADS=1 MLFLOW_TRACKING_URI=sqlite:///mlflow.db ../$(BIN)/python ../examples/pytorch_digits.py --backend mlflow
	cd demo_output && ../$(BIN)/gwa-logging report gwa_runs
	@echo
	@echo "See the run in MLflow:  cd demo_output && ../$(BIN)/mlflow ui --backend-store-uri sqlite:///mlflow.db"

# Two tests at a time, with one thread each: most of them start processes or wait for some.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

# Lint, types, and tests that cover every module and every claim once: 8 minutes on two cores.
test: check

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) -m "not slow"

# The other tests: full cross products, compilers, examples, benchmarks in small, killed and unreachable trackers, engines.
test-slow: $(ENGINES_READY) $(SEPARATE)/.ready
	$(PYTEST) -m slow
	PYTHONPATH=$(CURDIR)/$(SEPARATE) $(PYTEST) -m slow -k "fastai or ultralytics or streaming_data_set" tests/trainers/test_fastai.py \
		tests/trainers/test_ultralytics.py tests/test_examples.py tests/test_docs.py tests/core/test_dataset_streams.py

# The core with the lowest versions that pyproject.toml allows. PyTorch 2.6.0 brings CUDA: a download of gigabytes.
LOWEST := .venv-lowest/bin
test-lowest:
	$(PYTHON) -m venv .venv-lowest
	$(LOWEST)/pip install --quiet -e . torch==2.6.0 numpy==1.26.0 pydantic==2.7.0 plotly==6.0.0 pillow==10.1.0 scipy==1.12.0 \
		'pandas<2.3' tqdm build 'setuptools>=77' pytest hypothesis
	$(LOWEST)/pytest tests/core $(addprefix tests/torch/test_,accumulate.py scores.py probe.py ledger.py step_watchdog.py)
	$(LOWEST)/pip install --quiet jax==0.9.0 flax==0.12.0 optax equinox dm-haiku scikit-learn
	$(LOWEST)/pytest $(addprefix tests/jax/test_,accumulate.py value_and_grad.py ledger.py)

# All tests with the newest version of every dependency.
test-newest:
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/pip install --quiet --upgrade -e '.[dev]'
	OMP_NUM_THREADS=1 .venv-newest/bin/pytest -n 2 --dist worksteal

# Installs the wheel and the sdist with each extra into a fresh environment and runs a small training there: 15 minutes.
release: setup
	$(BIN)/python -m tests.release

# Only the benchmark needs BackPACK, so it is installed into build/peers. If that fails, its rows say "not installed".
bench: setup
	-$(BIN)/pip install --quiet --no-deps --target build/peers backpack-for-pytorch einops unfoldNd
	PYTHONPATH=build/peers $(BIN)/python -m benchmarks

# Builds the site in build/site. tests/test_docs.py runs the code on its pages.
docs:
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip install --quiet -e '.[docs]'
	.venv-docs/bin/mkdocs build --strict

clean:
	rm -rf .venv .venv-lowest .venv-newest .venv-docs demo_output gwa_runs build dist *.egg-info
