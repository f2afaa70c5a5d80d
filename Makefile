PYTHON ?= python3.11
VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
SGLANG := .venv-sglang/.installed
MODELOPT := .venv-modelopt/.installed
export OMP_NUM_THREADS ?= 1

help:  ## Show the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

$(INSTALLED): constraints.txt setup.py
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --disable-pip-version-check -q -c constraints.txt -e ".[dev]"
	touch $@

install: $(INSTALLED)  ## Create .venv with the tested versions

$(SGLANG): $(wildcard tools/install_sglang/*)
	PYTHON=$(PYTHON) tools/install_sglang/install.sh $(@D)
	touch $@

sglang: $(SGLANG)  ## Create .venv-sglang, the rollout servers' own environment

$(MODELOPT): $(wildcard tools/install_modelopt/*)
	PYTHON=$(PYTHON) tools/install_modelopt/install.sh $(@D)
	touch $@

modelopt: $(MODELOPT)  ## Create .venv-modelopt, which tools.export_quantized quantises in

demo: $(INSTALLED)  ## Train a tiny MoE model with GMPO on the CPU
	$(PY) -m tools.demo

lint: $(INSTALLED)  ## Style, types and import layers
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright
	$(VENV)/bin/lint-imports

test: export HF_HUB_OFFLINE = 1
test: lint  ## Lint, then every test that needs no GPU
	$(PY) -m pytest -m "not gpu"

test-fast: export HF_HUB_OFFLINE = 1
test-fast: $(INSTALLED)  ## Unit tests only, under a minute
	$(PY) -m pytest tests/unit -m "not slow and not distributed and not gpu"

test-slurm: export HF_HUB_OFFLINE = 1
test-slurm: $(INSTALLED)  ## Jobs on an emulated Slurm cluster; part of make test
	$(PY) -m pytest -m slurm

test-gpu: export HF_HUB_OFFLINE = 1
test-gpu: $(INSTALLED)  ## Tests that need an NVIDIA GPU
	$(PY) -m pytest tests/gpu

clean:  ## Remove the environment and everything the tools left behind
	rm -rf $(VENV) .venv-sglang .venv-modelopt build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache .grimp_cache

.PHONY: help install sglang modelopt demo lint test test-fast test-slurm test-gpu clean
