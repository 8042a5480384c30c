.PHONY: setup demo test check bench clean
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

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest

# BackPACK is for the benchmark only and goes to a folder of its own; without it its rows say so.
bench: setup
	-$(BIN)/pip install --quiet --no-deps --target build/peers backpack-for-pytorch einops unfoldNd
	PYTHONPATH=build/peers $(BIN)/python -m benchmarks

clean:
	rm -rf .venv demo_output gwa_runs build dist *.egg-info
