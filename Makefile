# The two commands; each sets everything up on a fresh machine. And one for every change.
#   make demo    dense network -> TPP -> pruned -> finetuned, beside plain L1 (3 to 7 minutes)
#   make test    lint, types, tests (WORKERS=5 for five tests at a time)
#   make check   lint, types, and the quick tests: one process, no large network (under 4 minutes)
# One worker more than two cores, as there always is one that waits for jobs of the cluster.
WORKERS ?= 3
CHECKERS ?= 2
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test check setup lint types unit quick clean

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

test: lint
	@$(MAKE) --no-print-directory -j2 types unit

check: lint
	@$(MAKE) --no-print-directory -j2 types quick

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

# Most tests are one thread of arithmetic; the ones that start several processes bring their own.
# Files are begun in the order of tests/conftest.py, the longest first.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --dist loadfile --no-loadscope-reorder

unit: setup
	$(PYTEST) -n $(WORKERS) $(PYTEST_ARGS)

quick: setup
	$(PYTEST) -n $(CHECKERS) -m "no_process and not large" $(PYTEST_ARGS)

clean:
	rm -rf runs .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis
