# Two commands for a newcomer: `make demo` and `make test`. PYTHON and VENV may be set.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PORT ?= 8000
# A machine without an NVIDIA driver needs no CUDA libraries; PIP_ARGS may add what pip should know.
PIP_ARGS ?=

.PHONY: demo test test-long lint clean

demo: $(VENV)/.installed
	$(BIN)/ws serve demo --port $(PORT)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q

test-long: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -m long --timeout 3600

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf build dist *.egg-info $(VENV)

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make demo PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install $(PIP_ARGS) -e .
	touch $@

$(VENV)/.installed-dev: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install $(PIP_ARGS) -e '.[dev]'
	touch $@ $(VENV)/.installed
