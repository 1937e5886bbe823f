# make train, make test and make lint work on a fresh machine: each makes the
# environment if it is missing. PYTHON=... chooses the interpreter.

PYTHON ?= python3
ENV := .venv
BIN := $(ENV)/bin
READY := $(ENV)/.ready
# The TPU compiler, beside the environment: in it, JAX would look for a TPU each time.
LIBTPU := .cache/libtpu/.ready
# The GPU compiler, likewise; it needs no driver.
CUDA := .cache/cuda/.ready

# The oldest JAX that pyproject.toml allows, likewise.
OLDEST := 0.11.2
OLD_JAX := .cache/jax-$(OLDEST)/.ready

.PHONY: train test test-all test-oldest lint format clean

train: $(READY)  ## train a DeltaProduct language model on Python source
	$(BIN)/python scripts/train.py configs/tiny.py --resume

test: $(READY) $(LIBTPU) $(CUDA)  ## the tests on 8 virtual CPU devices, but for the slow ones
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not slow'

test-all: $(READY) $(LIBTPU) $(CUDA)  ## every test
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-oldest: $(READY) $(OLD_JAX)  ## what depends on the compiler, with the oldest JAX
	PYTHONPATH=$(dir $(OLD_JAX)) $(BIN)/python -m pytest tests/kernels/test_compiler.py

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

$(LIBTPU): constraints.txt $(READY)
	@mkdir -p $(@D)
	$(BIN)/python -m pip install --quiet --upgrade --no-deps --target $(@D) \
	  --constraint constraints.txt libtpu \
	  && touch $@ || echo "No libtpu for this machine: tests of TPU kernels are skipped."

$(CUDA): constraints.txt $(READY)
	@mkdir -p $(@D)
	$(BIN)/python -m pip install --quiet --upgrade --no-deps --target $(@D) \
	  --constraint constraints.txt \
	  jax-cuda13-plugin jax-cuda13-pjrt nvidia-cuda-nvcc nvidia-nvvm \
	  && touch $@ || echo "No JAX for CUDA for this machine: GPU kernels are not compiled."

$(OLD_JAX): $(READY)
	@mkdir -p $(@D)
	$(BIN)/python -m pip install --quiet --upgrade --no-deps --target $(@D) \
	  jax==$(OLDEST) jaxlib==$(OLDEST)
	touch $@

clean:  ## remove the environment and caches, never runs/
	rm -rf $(ENV) .cache
