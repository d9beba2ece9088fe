# Everything runs in .venv, which the first target that needs it creates.
PYTHON ?= python3
BIN := .venv/bin
SHELL := /bin/bash

.PHONY: demo test check fix slow fullsize kernels gpu voice clean

demo: .venv/installed
	$(BIN)/python generate.py --model tiny --text "Hello from a model that you can read in an evening." --max-seconds 4 --out out.wav

test: .venv/installed-test
	$(BIN)/python -m pytest

check: .venv/installed-dev .typecheck/csm
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy .typecheck/csm generate.py bench.py

fix: .venv/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

slow: .venv/installed-test
	$(BIN)/python -m pytest -m slow

fullsize: .venv/installed-fullsize
	$(BIN)/python -m pytest -m fullsize -s

# What every kernel becomes on four families of GPUs; needs none.
kernels: .venv/installed
	$(BIN)/python bench.py --kernels --batch 1 4 8 32

# On a machine with a GPU: its tests, then its figures, in one folder of results. GPU_PYTHON=python3 takes an
# environment that is there, with csm installed in it (pip install --no-deps -e .), in place of .venv.
gpu: $(if $(GPU_PYTHON),,.venv/installed-bench)
	mkdir -p results
	$(or $(GPU_PYTHON),$(BIN)/python) -m pytest -m cuda -rs | tee results/tests.txt; test $${PIPESTATUS[0]} -eq 0
	$(or $(GPU_PYTHON),$(BIN)/python) bench.py --batch 1 2 4 8 16 32 64 --profile --out results

# The codec of the embedded voice from nothing: recordings by four voices of flite, which must be installed, some hours of
# training on two cores, and its word error rates. Stopped, it goes on where it was.
VOICE ?= voice
RECIPE := $(BIN)/python -m csm.weights.recipe
voice: .venv/installed-eval
	$(RECIPE).recordings $(VOICE) --split train --count 20000
	$(RECIPE).recordings $(VOICE) --split test --count 100
	$(RECIPE).codec $(VOICE)/train.jsonl $(VOICE)/codec
	$(RECIPE).export codec $(VOICE)/codec/checkpoint.pt $(VOICE)/codec.safetensors
	$(RECIPE).export start $(VOICE)/codec.safetensors $(VOICE)/start
	$(BIN)/python -m csm eval --data $(VOICE)/test.jsonl --recordings --codec --no-speech --model $(VOICE)/start --out $(VOICE)/eval

clean:
	rm -rf .venv .typecheck build csm.egg-info

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml
	$(BIN)/pip install --progress-bar off -e .
	touch $@

.venv/installed-%: .venv/bin/python pyproject.toml
	$(BIN)/pip install --progress-bar off -e ".[$*]"
	touch $@ .venv/installed

# The source tree as it is installed (csm.kernels lives in kernels/): what the type checker reads.
SOURCES := $(filter-out %__pycache__,$(wildcard csm/*)) kernels weights
.typecheck/csm: $(wildcard csm/*.py kernels/*.py weights/*.py)
	rm -rf $@ && mkdir -p $@
	ln -s $(addprefix ../../,$(SOURCES)) $@/
