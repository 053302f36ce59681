PYTHON  ?= python3
VENV    ?= .venv
BIN     := $(VENV)/bin
READY   := $(VENV)/.ready
PYTEST  := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal
# make setup LOCKED=1 installs the versions that CI ran with (constraints.txt), to the bit those of the documents.
LOCKED  ?=
# make test ONE=tests/store/test_shard.py runs that file (or TEST::NAME) alone, slow tests too.
ONE     ?=
# make test-peers RECORD=1 writes the result into docs/records/peers.md.
RECORD  ?=

.PHONY: help demo setup test test-slow test-deep test-peers gpu check lint format types docs reference clean
.DEFAULT_GOAL := demo

help:    ## print what each target does
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(READY)    ## harvest the shipped language model, train SA-GSAE and Gated SAEs on it, write a report
	$(BIN)/sagsae demo --out demo

setup: $(READY)    ## make the virtual environment; LOCKED=1: with the versions that CI ran with

ifneq ($(ONE),)
test: $(READY)    ## lint, types and the test suite; ONE=tests/x.py: that file alone
	$(BIN)/python -m pytest $(ONE)
else
test: check
	$(PYTEST) -m "not slow and not gpu"
	$(BIN)/python -m pytest -m gpu tests/gpu tests/train/test_plan.py    # one after the other: they share a device; skipped without one
endif

test-slow: $(READY)    ## the tests that take longer than about 15 seconds each
	$(PYTEST) -m "slow and not deep"

test-deep: $(READY)    ## the longest tests: more kills, torch.compile, whole steps in Triton's interpreter
	$(PYTEST) -m deep

test-peers: $(READY)    ## load exports with SAELens, dictionary_learning, SAEBench and sparsify, in an environment of their own
	$(BIN)/python tests/exchange/peers/run.py .peers $(if $(RECORD),--record)

gpu: $(READY)    ## GPU tests, benchmarks and a run of 16,000,000 tokens on one GPU in 8 minutes; writes gpu.md
	@$(BIN)/python tests/gpu/run.py --out gpu.md

check: lint types    ## lint and types

lint: $(READY)    ## look for mistakes and for lines that are not formatted
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)    ## format every file, and mend what can be mended without a risk
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(READY)    ## check all types, those of the tests too
	$(BIN)/mypy

docs: $(READY)    ## build the site into site/; a broken link or an unknown name is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

reference: $(READY)    ## rewrite docs/reference/settings.md and cli.md from the schemas and from --help
	$(BIN)/sagsae reference docs/reference

clean:    ## remove what these targets have made
	rm -rf $(VENV) demo build site gpu.md *.egg-info

# A machine that already has torch (a GPU image) keeps its own build: the venv then sees the system's packages. Those of
# a virtual environment that happens to be active are not seen by another.
$(READY): pyproject.toml
	@echo "Installing into $(VENV): about 2 minutes and 3.4 GB"
	$(PYTHON) -m venv $(VENV) $(shell $(PYTHON) -c 'import importlib.util as u, sys; print("--system-site-packages" * (sys.prefix == sys.base_prefix and bool(u.find_spec("torch"))))')
	$(BIN)/python -m pip install --quiet --editable '.[dev,docs]' $(if $(LOCKED),--constraint constraints.txt)
	touch $@
	@echo "Installed. Now: source $(BIN)/activate"
