# make train, make test and make lint work on a fresh machine: each makes the
# environment if it is missing. PYTHON=... chooses the interpreter.

PYTHON ?= python3
ENV := .venv
BIN := $(ENV)/bin
READY := $(ENV)/.ready

.PHONY: train test lint format clean

train: $(READY)  ## train a DeltaProduct language model on Python source
	$(BIN)/python scripts/train.py configs/tiny.py --resume

test: $(READY)  ## run every test on 8 virtual CPU devices
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(READY)  ## style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

format: $(READY)  ## write the style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12))' || { \
	  echo "jaxlab needs Python 3.12 or newer, but '$(PYTHON)' is $$($(PYTHON) --version)."; \
	  echo "Install one (python.org, 'uv python install 3.12' or 'pyenv install 3.12')"; \
	  echo "and name it: make PYTHON=python3.12 ..."; \
	  exit 1; }
	$(PYTHON) -m venv $(ENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

clean:  ## remove the environment and caches, never runs/
	rm -rf $(ENV) .cache
