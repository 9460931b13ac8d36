# make demo   the main job on the small model that is shipped, from nothing
# make test   everything that must hold, from nothing
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: demo test check format full-width clean help
.DEFAULT_GOAL := help

help:  ## Show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --editable '.[dev]'
	touch $@

demo: $(VENV)/.installed  ## Inspect, decompose, shard, verify and reconstruct the shipped model
	$(BIN)/python examples/demo.py

check: $(VENV)/.installed-dev  ## Format, lint, types, architecture
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check  ## Everything: check, then unit, property, integration and distributed tests
	$(BIN)/python -m pytest
	@echo "heavy checks are separate: make full-width (a checkpoint of DeepSeek-V2-Lite's width)"

format: $(VENV)/.installed-dev  ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

full-width: $(VENV)/.installed  ## Time and memory at DeepSeek-V2-Lite's width (8 GB of disk, minutes)
	$(BIN)/python benchmarks/full_width.py --write

clean:  ## Remove what the targets made
	rm -rf $(VENV) demo-output
