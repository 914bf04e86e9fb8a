# The two commands; each sets everything up on a fresh machine.
#   make demo   dense network -> TPP -> pruned -> finetuned, beside plain L1 (3 to 7 minutes)
#   make test   lint, types, tests (WORKERS=4 for four tests at a time)
WORKERS ?= 2
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

# Most tests are one thread of arithmetic; the ones that start several processes bring their own.
unit: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

clean:
	rm -rf runs .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis
