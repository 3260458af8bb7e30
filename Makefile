# `make demo` and `make test` do all their own set-up: Python 3.11 or newer, pip and make are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo card test soak lint types clean

demo: $(VENV)/.demo
	$(BIN)/python jobs/demo.py

# The embedded model to NVFP4, the same questions to both, and the table: docs/evaluate.md has what came of it.
card: $(VENV)/.test
	$(BIN)/python jobs/card_demo.py

# Two processes: many tests wait for processes of their own. `tests/conftest.py` says which stay together.
# Hundreds of processes import batchgen, here and in Ray's copies of this folder: each would compile it anew where the
# environment forbids to keep what was compiled.
test: export PYTHONDONTWRITEBYTECODE =
test: lint types
	$(BIN)/python -m pytest -n 2

# Real kills by the dozen, and 100,000 seeded worlds on two cores: hours. It may be cut: each 1,000 worlds it tells with which
# SEEDS to go on. `.venv/bin/python -m pytest -m soak -s -k many_worlds` has the worlds alone.
SEEDS ?= 0:100000
soak: $(VENV)/.test
	BATCHGEN_SOAK=$(SEEDS) $(BIN)/python -m pytest -m soak -s

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/mypy --strict batchgen jobs

# torch alone and first: as a mere requirement of another package the resolver could choose another build of it.
$(VENV)/.demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt torch==2.13.0
	$(PIP) install --quiet --constraint constraints.txt --editable '.[local]'
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(PIP) install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) demo benchmark
