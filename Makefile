# Each goal sets itself up: a virtual environment with the pinned packages, made again when the pins change.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2
STAMP := $(VENV)/.installed

.PHONY: help test lint demo bench docs gpu clean

help: ## list the goals
	@awk -F ':.*## ' '/^[a-z]+:.*## / { print "make " $$1 "\t" $$2 }' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "dit_rope needs Python 3.11 or newer: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

test: $(STAMP) ## run the test suite, in JOBS processes: ARGS="-k cache" selects
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(STAMP) ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo: $(STAMP) ## generate a video with and without the patch: ARGS="--steps 10 --seed 3"
	$(BIN)/dit-rope demo $(ARGS)

bench: $(STAMP) ## measure this machine, and write a report: ARGS="--device cuda", "--quick", "--only tables"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[bench]'
	$(BIN)/dit-rope bench $(ARGS)

docs: $(STAMP) ## build the pages and the API reference into build/docs
	$(BIN)/python -m sphinx -W --keep-going -q -E -b html docs build/docs
	@echo "open build/docs/index.html"

# Where packages cannot be fetched, which is found out within seconds, the checks run on what PYTHON has, and say what of
# it is missing.
gpu: ## check and time what needs a GPU: ARGS="--only contract", "--peer-path DIR", "--rehearse"
	@PIP_RETRIES=0 PIP_TIMEOUT=5 $(MAKE) --no-print-directory $(STAMP) || echo "no environment could be set up in $(VENV): running with $(PYTHON)"
	@if test -e $(STAMP); then python=$(BIN)/python; else python=$(PYTHON); fi; $$python scripts/gpu_check.py $(ARGS)

clean: ## remove the virtual environment and what builds leave behind
	rm -rf $(VENV) build dist bench-output demo-output ./*.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
