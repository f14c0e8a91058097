# One command per job, each complete in a fresh clone: it makes what it needs and no more.
# Needs GNU make 3.81 or newer and a Python from 3.11 to 3.14. Settings, all optional:
#   PYTHON=...      which Python makes .venv (default: the first suitable one found)
#   TORCH=...       what to install as torch on a fresh .venv: a requirement or a wheel file. On Linux
#                   PyPI's build is the CUDA one, of several GB; pip's own settings (PIP_INDEX_URL,
#                   PIP_FIND_LINKS) can point to a CPU build
#   VENV_FLAGS=...  for the machine's own torch: make setup VENV_FLAGS=--system-site-packages
#   WORKERS=...     processes that `make test` runs in (default 2)
#   TESTS=...       what `make test` collects: TESTS=tests/test_make.py (default: tests)
#   ARGS=...        handed on: make quickstart ARGS=seed=1, make test ARGS="-k golden"

SHELL := /bin/sh
TORCH ?= torch==2.13.0
WORKERS ?= 2
TESTS ?= tests
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
TEST_ENV := HF_HUB_OFFLINE=1 WANDB_MODE=disabled OMP_NUM_THREADS=1

PYTHON_CANDIDATES = $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python3.14)
IS_SUITABLE := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))
TORCH_RANGE = $(shell sed -n 's/^\(torch[<>=][^ ]*\).*/\1/p' requirements.txt)
# Empty when .venv is absent or its Python is gone (an upgraded system): then it is made again.
VENV_WORKS := $(shell $(PY) -c 'print("yes")' 2>/dev/null)

.PHONY: help setup quickstart test test-slow lint format benchmark clean FORCE

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

setup: $(VENV)/.core-installed  ## make .venv and install requirements.txt (once)
	@echo "$(VENV) is ready; to use it by hand: . $(VENV)/bin/activate"

quickstart: $(VENV)/.core-installed  ## train a small recurrent model on reasoning tasks and watch it answer
	@$(PY) -m scripts.quickstart $(ARGS)

test: $(VENV)/.dev-installed  ## the fast test suite, offline
	$(TEST_ENV) $(PY) -m pytest $(TESTS) -m "not slow and not gpu" -n $(WORKERS) --dist loadfile $(ARGS)

test-slow: $(VENV)/.dev-installed  ## the tests that take minutes, one at a time
	$(TEST_ENV) $(PY) -m pytest $(TESTS) -m "slow and not gpu" $(ARGS) \
	    || { code=$$?; [ $$code -eq 5 ] && echo "no slow test was selected" || exit $$code; }

lint: $(VENV)/.dev-installed  ## ruff (rules and format) and pyright (types)
	@code=0; \
	echo "ruff check"; $(PY) -m ruff check . || code=1; \
	echo "ruff format --check"; $(PY) -m ruff format --check . || code=1; \
	echo "pyright"; $(PY) -m pyright || code=1; \
	exit $$code

format: $(VENV)/.dev-installed  ## let ruff format and fix what it can
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

benchmark: $(VENV)/.core-installed  ## measure speed and memory against the ratios in benchmarks/
	@$(PY) -m scripts.run_benchmarks $(ARGS)

clean:  ## remove caches; keeps .venv, data and checkpoints
	rm -rf .pytest_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

# The stamps below are written last, so that whatever was interrupted is done again. A .venv that
# already works is kept, and so is a torch in it that satisfies requirements.txt.

$(VENV)/.created: $(if $(VENV_WORKS),,FORCE)
	@if $(PY) -c 'import pip; $(IS_SUITABLE)' 2>/dev/null; then touch $@; exit 0; fi; \
	too_old=; lacks_venv=; \
	for python in $(PYTHON_CANDIDATES); do \
	    command -v "$$python" >/dev/null 2>&1 || continue; \
	    if ! "$$python" -c '$(IS_SUITABLE)' 2>/dev/null; then \
	        too_old="$$too_old $$python ($$("$$python" --version 2>&1 | sed -n 1p))"; \
	    elif ! "$$python" -c 'import ensurepip, venv' 2>/dev/null; then \
	        lacks_venv="$$lacks_venv $$python"; \
	    else \
	        echo "making $(VENV) with $$python ($$("$$python" --version 2>&1))"; \
	        "$$python" -m venv --clear $(VENV_FLAGS) $(VENV) && touch $@; exit $$?; \
	    fi; \
	done; \
	if [ -n "$$lacks_venv" ]; then \
	    echo "These Pythons cannot make a virtual environment (no venv or ensurepip module):$$lacks_venv" >&2; \
	    echo "Install it, on Debian and Ubuntu: apt install python3-venv (for python3.12: python3.12-venv)" >&2; \
	else \
	    echo "A Python from 3.11 to 3.14 is needed; found:$${too_old:- none}" >&2; \
	    echo "Install one (Debian, Ubuntu: apt install python3.12 python3.12-venv; macOS: brew install python@3.12)" >&2; \
	    echo "or name one that you have: make setup PYTHON=/path/to/python3.12" >&2; \
	fi; \
	exit 1

$(VENV)/.core-installed: requirements.txt $(VENV)/.created
	@if $(PY) -c 'from importlib.metadata import version; version("torch")' 2>/dev/null \
	    && $(PIP) install --quiet --no-index --no-deps "$(TORCH_RANGE)" 2>/dev/null; then \
	    echo "keeping the torch that is installed"; \
	else \
	    echo "installing $(TORCH)"; $(PIP) install "$(TORCH)"; \
	fi
	$(PIP) install -r requirements.txt
	@touch $@

$(VENV)/.dev-installed: requirements-dev.txt requirements-trackers.txt $(VENV)/.core-installed
	$(PIP) install -r requirements-dev.txt
	@touch $@
