# Each target works from a bare clone: the first one run creates .venv and installs into it.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint

# glibc gives every large tensor back to the system and clears it anew on the next step; kept, CPU steps are up to twice
# as fast. Other C libraries ignore the two names.
demo: export MALLOC_MMAP_THRESHOLD_ = 2000000000
demo: export MALLOC_TRIM_THRESHOLD_ = 4000000000
demo: .venv/installed
	$(BIN)/python training/demo.py

test: .venv/installed
	$(BIN)/python -m pytest

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed: make PYTHON=python3.12 ..."'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@
