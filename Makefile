# Everything runs in .venv, which the first target that needs it makes from pyproject.toml.
#
#   PYTHON  the interpreter that makes .venv, 3.10 or newer   (default: python3)
#   OUT     the folder that the demo writes to                (default: demo)
#   ARGS    more arguments for pytest, such as ARGS="-k data"
#   SECONDS how long to fuzz                                  (default: 600)
#   SEED    seed of the mutated files                         (default: 0)

PYTHON ?= python3
OUT ?= demo
ARGS ?=
SECONDS ?= 600
SEED ?= 0

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs

.DEFAULT_GOAL := help
.PHONY: help venv demo test fuzz lint typecheck docs dist format clean

help:  ## Show the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(STAMP)  ## Make .venv and install the package in it, with the tools of a developer

demo: $(STAMP)  ## Learn the digits two by two, with memories of as many bytes: condensed, raw and JPEG
	rm -f $(OUT)/results.json
	$(BIN)/python experiments/split_cifar100.py --data digits --experiences 5 --budget 2KiB \
	    --strategies fred,hmn,jpeg,raw,naive,joint --model convnet --width 32 --epochs 10 --out $(OUT)

test: $(STAMP)  ## Run the tests, a process for each core
	$(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

fuzz: $(STAMP)  ## Read mutated memory files for SECONDS=600
	$(BIN)/python tests/fuzz.py --seconds $(SECONDS) --seed $(SEED)

lint: $(STAMP)  ## Check style, formatting and who imports whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

typecheck: $(STAMP)  ## Check the types
	$(BIN)/mypy

docs: $(DOCS_STAMP)  ## Build the documentation into build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build  # --quiet would let warnings pass

dist: $(STAMP)  ## Build wheel and source distribution into dist, and check them
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

format: $(STAMP)  ## Mend what can be mended of style and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove .venv and all that the other targets wrote
	rm -rf $(VENV) demo build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Touched last, so that an installation cut short is done again.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "Python 3.10 or newer is needed: make PYTHON=/path/to/python3 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
	    echo "No virtual environment could be made (on Debian: apt install python3-venv)" >&2; \
	    exit 1; }
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[dev]'
	@touch $@

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[docs]'
	@touch $@
