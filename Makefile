# Everything starts with `make setup`: it makes .venv and installs what pyproject.toml names.
# PYTHON chooses the interpreter (3.11 to 3.13).

# The first that runs (a name may be a shim without an interpreter behind it) and fits.
FITS := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for python in python3 python3.12 python3.11 python3.13; do \
	$$python -c '$(FITS)' 2>/dev/null && echo $$python && break; done)
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: setup serve test test-all lint format rows bench clean

setup: $(STAMP)

$(STAMP): pyproject.toml
	@test -n "$(PYTHON)" || { echo "lockstep needs Python 3.11 to 3.13 and found none: run make PYTHON=/path/to/python3.12"; exit 1; }
	@$(PYTHON) -c '$(FITS)' || { echo "lockstep needs Python 3.11 to 3.13, and $(PYTHON) is another"; exit 1; }
	@echo "lockstep: installing into .venv (PyTorch and Ray are large: about a minute on a fast line)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -q --progress-bar on -e '.[dev]'
	@touch $(STAMP)

serve: setup
	$(BIN)/lockstep serve $(ARGS)

test: setup lint
	$(BIN)/python -m pytest -m "not slow"

test-all: setup lint
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

rows: setup
	$(BIN)/python -m tests.rows $(ROWS)

bench: setup
	$(BIN)/python -m tests.bench.bench_driver

clean:
	rm -rf .venv .helm-venv .pytest_cache .ruff_cache .hypothesis build *.egg-info
