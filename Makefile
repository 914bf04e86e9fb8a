# The two commands; each sets everything up on a fresh machine.
#   make demo   dense network -> TPP -> pruned -> finetuned, beside plain L1 (about 3 minutes)
#   make test   lint, types, tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test setup lint types unit clean

setup: $(READY)

$(READY): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python 3.11 or newer is needed; name one with: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 2; }
	@echo "Setting up $(VENV): about 6 GB of packages, a few minutes the first time"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $(READY)

demo: setup
	@$(BIN)/accelerate launch --quiet --config_file launch/accelerate/one_process.yaml train/main.py

test: lint types unit

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

unit: setup
	$(BIN)/python -m pytest $(PYTEST_ARGS)

clean:
	rm -rf runs .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis
