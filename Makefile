# make demo   install, search merges of the built-in parents, export the best one (4 minutes on two cores)
# make test   install with dev tools, run the whole test suite
# make check  ruff (lint and format), mypy, then the tests

PYTHON ?= python3
# A release that is known to work. On a machine without a GPU,
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo
# takes the much smaller build without CUDA.
TORCH ?= torch==2.13.0
BIN := .venv/bin
# Python compiles a module when it is first imported; all of those that never are take pip half of its time.
INSTALL := $(BIN)/pip install --quiet --no-compile
DEMO := runs/demo

.PHONY: demo test check lint clean

demo: .venv/.core
	@$(BIN)/mergefront run experiments/chimera_mini/search.yaml --out $(DEMO)
	@if [ -e $(DEMO)/export ]; then echo "$(DEMO)/export is there already (delete it to export again)"; \
	else $(BIN)/mergefront export $(DEMO) --pick knee --out $(DEMO)/export; fi
	@echo
	@echo "Next, with $(BIN) on your PATH:"
	@echo "  mergefront front $(DEMO) --held-out"
	@echo "  mergefront run experiments/chimera_mini/search.yaml --out $(DEMO) --budget candidates=400"

test: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

check: lint test

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

.venv/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "expected Python 3.11 or newer, got $$($(PYTHON) --version); name another with make PYTHON=..."; exit 1; }
	@$(PYTHON) -m venv .venv || \
		{ echo "no virtual environment could be made: on Debian, apt-get install python3-venv"; rm -rf .venv; exit 1; }

.venv/.core: pyproject.toml | .venv/bin/pip
	$(INSTALL) "$(TORCH)" -e .
	@touch $@

.venv/.dev: pyproject.toml | .venv/bin/pip
	$(INSTALL) "$(TORCH)" -e ".[dev]"
	@touch $@ .venv/.core
