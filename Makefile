# The two commands; each sets everything up on a fresh machine. And one for every change.
#   make demo    dense network -> TPP -> pruned -> finetuned, beside plain L1 (3 to 7 minutes)
#   make test    lint, types, tests (WORKERS=5 for five tests at a time)
#   make nightly the same, and what is left out there: large networks, of each kind of which there is
#                a smaller one in the tests; whole runs of rival methods; the benchmarks' scripts
#   make check   lint, types, and the quick tests: one process, no large network (under 5 minutes)
# One worker more than two cores, as there always is one that waits for jobs of the cluster.
WORKERS ?= 3
CHECKERS ?= 2
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SERVICES := $(VENV)/.services

# Tests start hundreds of processes, each of which would compile the same files again.
unexport PYTHONDONTWRITEBYTECODE
# Huge pages for what malloc gets, and Python's objects through malloc: on a virtual machine with little
# memory of its own a fresh page of 4 KiB can take microseconds, and an import of torch three times as
# long. The numbers are the same.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
export PYTHONMALLOC ?= malloc

.PHONY: demo test nightly check setup services lint types unit all quick clean

setup: $(READY)

# And the command tpp: this clone's, whatever folder it is called in.
$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python 3.11 or newer is needed; name one with: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 2; }
	@echo "Setting up $(VENV): about 7 GB of packages, a few minutes the first time"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $(READY)

# What tests run against beside: trackers, object storage. Compiled when they are first imported.
services: $(SERVICES)

$(SERVICES): $(READY) requirements-services.txt
	@echo "Adding the services that the tests run against"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile \
	  -r requirements.txt -r requirements-services.txt
	@touch $(SERVICES)

demo: setup
	@$(BIN)/accelerate launch --quiet --config_file launch/accelerate/one_process.yaml train/main.py

test: lint
	@$(MAKE) --no-print-directory -j2 types unit

nightly: lint
	@$(MAKE) --no-print-directory -j2 types all

check: lint
	@$(MAKE) --no-print-directory -j2 types quick

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: services
	$(BIN)/mypy

# Most tests are one thread of arithmetic; the ones that start several processes bring their own.
# Files are begun in the order of tests/conftest.py, the longest first.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --dist loadfile --no-loadscope-reorder

unit: services
	$(PYTEST) -n $(WORKERS) -m "not nightly" $(PYTEST_ARGS)

all: services
	$(PYTEST) -n $(WORKERS) $(PYTEST_ARGS)

quick: services
	$(PYTEST) -n $(CHECKERS) -m "no_process and not large" $(PYTEST_ARGS)

clean:
	rm -rf runs .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis
