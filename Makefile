PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

.PHONY: demo test test-slow test-deep check setup clean

demo: $(READY)    ## harvest the shipped language model, train SA-GSAE and Gated SAEs on it, write a report
	$(BIN)/sagsae demo --out demo

test: check       ## lint, types and the test suite
	$(PYTEST) -m "not slow and not gpu"
	$(BIN)/python -m pytest -m gpu    # one after the other: they share a device; skipped without one

test-slow: $(READY)    ## the tests that take longer than half a minute each
	$(PYTEST) -m "slow and not deep"

test-deep: $(READY)    ## what would make those take too long: more kills, torch.compile, whole steps in Triton's interpreter
	$(PYTEST) -m deep

check: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

setup: $(READY)

clean:
	rm -rf $(VENV) demo build *.egg-info

# A machine that already has torch (a GPU image) keeps its own build: the venv then sees the system's packages. Those of
# a virtual environment that happens to be active are not seen by another.
$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV) $(shell $(PYTHON) -c 'import importlib.util as u, sys; print("--system-site-packages" * (sys.prefix == sys.base_prefix and bool(u.find_spec("torch"))))')
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@
