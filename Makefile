# Everything starts with `make setup`: it makes .venv and installs what pyproject.toml names.
# PYTHON chooses the interpreter (3.11 to 3.13).

PYTHON ?= $(shell command -v python3.12 || command -v python3.11 || command -v python3)
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: setup serve test test-all lint format rows bench clean

setup: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; ok = (3, 11) <= sys.version_info[:2] <= (3, 13); ok or sys.exit(f"lockstep needs Python 3.11 to 3.13, and {sys.executable} is {sys.version.split()[0]}: run make PYTHON=python3.12")'
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
	$(BIN)/python -m tests.bench.bench_engine

clean:
	rm -rf .venv .helm-venv .pytest_cache .ruff_cache .hypothesis build *.egg-info
