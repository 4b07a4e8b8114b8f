# Two commands for a newcomer: `make demo` and `make test`. PYTHON, VENV and WORKERS may be set.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PORT ?= 8000
# A machine without an NVIDIA driver needs no CUDA libraries; PIP_ARGS may add what pip should know.
PIP_ARGS ?=
# How many processes share the tests, a file each at a time, in the order of `tests/conftest.py`: the longest first.
WORKERS ?= 2
SHARED := -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-long test-clients lint screenshot clean

demo: $(VENV)/.installed
	$(BIN)/ws serve demo --port $(PORT)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q $(SHARED)

test-long: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q $(SHARED) -m long --timeout 3600

# Codex, Claude Code, opencode, aider, LangChain, LiteLLM and the SDKs, each in an environment of its own (Node is needed).
test-clients: $(VENV)/.installed-dev
	$(BIN)/python tests/clients/run.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/mypy

# The README's picture: the demo under load, drawn by `ws top --svg`.
screenshot: $(VENV)/.installed
	$(BIN)/ws serve demo --device cpu --port 8377 --kv-cache-memory-bytes 64M --detach
	$(BIN)/ws bench serve --url http://127.0.0.1:8377 --num-prompts 60 --max-concurrency 12 --input-len 300 --output-len 400 & \
	  sleep 20; $(BIN)/ws top http://127.0.0.1:8377 --svg docs/dashboard.svg --size 120x40
	$(BIN)/ws stop 8377 --now

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
