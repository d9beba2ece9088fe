# Everything runs in .venv, which the first target that needs it creates.
PYTHON ?= python3
BIN := .venv/bin
SHELL := /bin/bash

.PHONY: demo test check fix slow ray fullsize golden browser kernels gpu tiny clean

demo: .venv/installed
	$(BIN)/python generate.py --model tiny --file docs/examples/demo.txt --seed 1 --max-seconds 15 --out out.wav

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

# Replicas and workers on a Ray cluster of this machine, with the embedded voice.
ray: .venv/installed-test .venv/installed-ray
	$(BIN)/python -m pytest -m ray -s

fullsize: .venv/installed-test
	$(BIN)/python -m pytest -m fullsize -s

# The published weights against their golden codes, token ids and prompts: make golden MODEL=sesame/csm-1b (or a folder).
# Takes 7 GB of memory on a CPU.
golden: .venv/installed-test
	$(if $(MODEL),,$(error MODEL is not set: make golden MODEL=sesame/csm-1b, or a folder with the weights))
	HF_HUB_OFFLINE=$${HF_HUB_OFFLINE:-0} CSM_MODEL=$(MODEL) $(BIN)/python -m pytest -m golden -s

# The server's web page in a browser: needs Chromium (Debian's package, or CSM_CHROMIUM names the program).
browser: .venv/installed-browser
	$(BIN)/python -m pytest -m browser

# Compiles every kernel for four GPU architectures; needs no GPU.
kernels: .venv/installed
	$(BIN)/python bench.py --kernels --batch 1 4 8 32

# On a machine with a GPU: benchmarks, accuracy, tests and tuning, each under a time limit, in less than ten minutes, into
# results/. GPU_PYTHON=python3 uses an existing environment with csm installed in it (pip install --no-deps -e .) instead
# of .venv.
gpu: $(if $(GPU_PYTHON),,.venv/installed-bench)
	$(or $(GPU_PYTHON),$(BIN)/python) -m csm.bench.gpu --out results

# Trains the embedded voice from nothing: recordings by four voices of flite, a codec, a model, and their word error
# rates. Needs Debian's flite, wordnet-base and wamerican. Takes hours on two cores and resumes where it stopped. At full
# length it has not been run in one go; weights/tiny/README.md says how the weights there were made. A rehearsal of all
# its commands ran from start to end in 13 minutes on two cores, and its voice babbles: make tiny RECORDINGS=400
# CODEC_STEPS=600 TURN_STEPS=60 TALK_STEPS=60 DECODER_STEPS=60 SENTENCES=5 SEEDS=1
# On a GPU (not run as a whole): make tiny DEVICE=cuda CODEC_OPTIONS="--workers 1 --clips 64 --no-compiled"
TINY ?= tiny
RECORDINGS ?= 60000
CODEC_STEPS ?= 16000
TURN_STEPS ?= 3000
TALK_STEPS ?= 15000
DECODER_STEPS ?= 4000
DEVICE ?= cpu
CODEC_OPTIONS ?=
SENTENCES ?= 150
SEEDS ?= 3
RECIPE := $(BIN)/python -m csm.weights.recipe
FINETUNE := $(BIN)/python -m csm finetune --resume --device $(DEVICE) --codes $(TINY)/codes --jobs 2 --valid $(TINY)/valid.jsonl \
	--depth-share 0.5 --precision bfloat16 --weight-decay 0.05 --ema 0.999
tiny: .venv/installed-eval
	$(RECIPE).recordings $(TINY) --text open --split train --count $(RECORDINGS)
	$(RECIPE).recordings $(TINY) --text open --split valid --count 100
	$(RECIPE).recordings $(TINY)/templates --text templates --split test --count $(SENTENCES)
	$(RECIPE).recordings $(TINY)/everyday --text everyday --split test --count $(SENTENCES)
	$(RECIPE).pronunciation $(TINY)/pronunciation.json.gz
	$(RECIPE).conversations $(TINY)/train.jsonl $(TINY)/talks.jsonl
	$(RECIPE).codec $(TINY)/train.jsonl $(TINY)/codec --steps $(CODEC_STEPS) --device $(DEVICE) $(CODEC_OPTIONS)
	$(RECIPE).export codec $(TINY)/codec/checkpoint.pt $(TINY)/codes.safetensors
	$(RECIPE).export start $(TINY)/codes.safetensors $(TINY)/start --pronunciation $(TINY)/pronunciation.json.gz
	$(FINETUNE) --data $(TINY)/train.jsonl --model $(TINY)/start --config $(TINY)/start/config.json --out $(TINY)/turns \
		--steps $(TURN_STEPS) --batch-size 16 --learning-rate 1.5e-3 --warmup 300 --min-lr-ratio 0.8
	$(FINETUNE) --data $(TINY)/talks.jsonl --model $(TINY)/turns/model --out $(TINY)/talks --context 2 --code-noise 0.15 \
		--steps $(TALK_STEPS) --batch-size 24 --batch-rows 1300 --learning-rate 1.3e-3 --warmup 100
	$(RECIPE).drawn $(TINY)/train.jsonl $(TINY)/talks/model $(TINY)/drawn.npz --device $(DEVICE)
	$(RECIPE).codec $(TINY)/train.jsonl $(TINY)/decoder --start $(TINY)/codes.safetensors --decoder-only $(TINY)/drawn.npz \
		--steps $(DECODER_STEPS) --device $(DEVICE) $(CODEC_OPTIONS)
	$(RECIPE).export codec $(TINY)/decoder/checkpoint.pt $(TINY)/codec.safetensors
	$(RECIPE).export model $(TINY)/talks/model $(TINY)/model --codec $(TINY)/codec.safetensors
	$(BIN)/python -m csm eval --data $(TINY)/templates/test.jsonl --recordings --codec --model $(TINY)/model --seeds $(SEEDS) \
		--out $(TINY)/eval-templates
	$(BIN)/python -m csm eval --data $(TINY)/everyday/test.jsonl --recordings --codec --model $(TINY)/model --seeds $(SEEDS) \
		--out $(TINY)/eval-everyday

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

# The type checker reads the source tree as it is installed (csm.kernels lives in kernels/).
SOURCES := $(filter-out %__pycache__,$(wildcard csm/*)) kernels weights
.typecheck/csm: $(wildcard csm/*.py kernels/*.py weights/*.py)
	rm -rf $@ && mkdir -p $@
	ln -s $(addprefix ../../,$(SOURCES)) $@/
