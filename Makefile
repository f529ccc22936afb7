# Two commands for a newcomer: `make demo` and `make test`. Both set themselves up first.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: help setup demo test lint clean
help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/'

$(STAMP): setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[city,export,dev]"
	@touch $(STAMP)

setup: $(STAMP) ## virtual environment with everything installed

demo: setup ## city → caches → anchors → training → PDMS → latency → report, on two CPU cores
	$(BIN)/python tools/demo.py

test: setup ## the test suite
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: setup ## ruff
	$(BIN)/python -m ruff check .

clean: ## remove what the demo and the tests wrote (keeps the environment)
	rm -rf outputs data/city .pytest_cache
