# make train   sets up .venv and runs the main job on the bundled digits
# make test    sets up .venv and runs the linter and the whole test suite
PYTHON ?= python3
BIN := .venv/bin
CONFIG ?= configs/train/digits.yaml

.PHONY: train test setup clean
.DEFAULT_GOAL := train

train: setup
	@$(BIN)/accelerate launch --quiet --num_cpu_threads_per_process $$($(BIN)/python -c 'import os; print(os.cpu_count())') \
	  --config_file configs/accelerate/$$($(BIN)/python -c 'import torch; print("one_gpu" if torch.cuda.is_available() else "cpu")').yaml \
	  train_unet.py --config $(CONFIG)

test: setup
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n 2 --dist loadfile

setup: .venv/installed

.venv/installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	  { echo 'make: Python 3.10 or later is needed; name one with: make PYTHON=/path/to/python3' >&2; exit 1; }
	@$(PYTHON) -c 'import shutil, sys; sys.exit(shutil.disk_usage(".").free < 10e9)' || \
	  { echo 'make: 10 GB of free disk are needed here, most of them for PyTorch' >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || \
	  { echo 'make: no virtual environment could be made; install the venv package of your Python' >&2; exit 1; }
	@echo 'installing requirements.txt into .venv (some minutes, some GB)'
	@$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt || \
	  { echo 'make: pip could not install requirements.txt (the reason stands above); check the network and the disk, then run make again' >&2; exit 1; }
	@touch $@

clean:
	rm -rf .venv build src/*.egg-info
