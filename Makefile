# Every target sets up what it needs in .venv; a machine needs Python >= 3.11 with venv and headers,
# g++, make and git. No GPU; with nvcc on PATH the extension is built for GPUs too.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
export DS_BUILD_OPS := 0
export PYTHONPATH := $(CURDIR):$(CURDIR)/kernels

.DEFAULT_GOAL := help

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-6s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## install everything into .venv (5.7 GB, one to six minutes)

# deepspeed is a source distribution whose build imports torch, hence the second step
$(STAMP): requirements/constraints.txt pyproject.toml setup.py $(wildcard csrc/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kdengine needs Python >= 3.11, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade --constraint requirements/constraints.txt pip setuptools wheel packaging ninja pybind11
	$(BIN)/python -m pip install --quiet --constraint requirements/constraints.txt torch torchvision numpy
	DS_ACCELERATOR=cpu $(BIN)/python -m pip install --quiet --no-build-isolation --constraint requirements/constraints.txt --editable '.[dev]'
	touch $(STAMP)

demo: $(STAMP)  ## render data, train a teacher, distil a student, write runs/demo/report.html
	$(BIN)/python -m kdengine.cli demo

test: $(STAMP) lint  ## lint, types and the whole test suite
	$(BIN)/python -m pytest

lint: $(STAMP)  ## ruff, clang-format and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@files=$$(git ls-files '*.cu' '*.cuh' '*.cpp' '*.h'); [ -z "$$files" ] || $(BIN)/clang-format --dry-run --Werror $$files
	$(BIN)/mypy

bench: $(STAMP)  ## check and time kernels, loader and step against their peers, nine minutes at most, into runs/bench
	$(BIN)/python benchmarks/run_all.py --out runs/bench

.PHONY: help setup demo test lint bench
