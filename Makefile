# FGPT. `make` lists the targets; each installs what it needs.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
GPUS   := $(shell nvidia-smi -L 2>/dev/null | grep -c .)
RANKS  ?= $(if $(filter-out 0,$(GPUS)),$(GPUS),2)

# Muon with ZeRO-2, in bf16 where there is a GPU or the processor multiplies bf16 itself (AVX-512 BF16
# or AMX: twice the tokens/s of fp32), in fp32 where bf16 would be emulated.
FAST_BF16 := $(filter-out 0,$(GPUS))$(shell grep -m1 -oE 'avx512_bf16|amx_bf16' /proc/cpuinfo 2>/dev/null)
DS_CONFIG ?= ds_configs/$(if $(FAST_BF16),muon,muon_fp32).json
STEPS     ?= $(if $(FAST_BF16),460,280)
PRETRAINED_STEPS ?= $(if $(FAST_BF16),1600,900)
ARGS      ?=

# one node: the rendezvous is on a free port of loopback (torchrun alone takes the host's name, which may
# not be known to it), gloo talks over loopback, and the ranks share
# the cores (torchrun alone would give each rank one)
THREADS  ?= $(shell cores=$$(nproc 2>/dev/null || echo 1); echo $$(( cores > $(RANKS) ? cores / $(RANKS) : 1 )))
TORCHRUN := OMP_NUM_THREADS=$(THREADS) GLOO_SOCKET_IFNAME=lo \
            $(BIN)/torchrun --standalone --local-addr 127.0.0.1 --nproc-per-node $(RANKS)
PYTEST   := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# .venv is created again only when the pins change; fgpt is installed again, which builds its C
# extension, when setup.py, pyproject.toml or a C file changes
stamp     = $(VENV)/.$(1)-$(shell cat $(2) | cksum | cut -d' ' -f1)
PINS     := $(call stamp,pins,requirements.txt)
BENCH_PINS := $(call stamp,bench,requirements.txt requirements-bench.txt)
EXTENSION := setup.py pyproject.toml $(wildcard fgpt/tokenizer/wordwise/*.[ch])
INSTALLED := $(call stamp,installed,requirements.txt $(EXTENSION))
DEV_PINS := $(call stamp,dev,requirements.txt requirements-bench.txt requirements-dev.txt)

.DEFAULT_GOAL := help
.PHONY: help install install-dev train pretrained test test-all test-faults soak check fmt bench-single bench-data bench-multi bench-checkpoint bench-recipe gpu-check report parity scale clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' Makefile | awk -F ':.*## ' '{printf "  %-16s %s\n", $$1, $$2}'
	@echo '  bench-NAME       one scenario, or the ladder of one model; NAME is one of'
	@PYTHONPATH=. $(PYTHON) -c 'from fgpt.bench.scenarios import scenario_flags as names; print(" ".join(names()))' \
		| fold -s -w 90 | sed 's/^/                     /'

install: $(INSTALLED) ## make .venv with the pinned packages

install-dev: $(DEV_PINS) ## the same, and what the tests need

train: $(INSTALLED) ## train the tiny GPT on this Python's own sources; STEPS=1000 or ARGS="--resume auto" change it
	$(TORCHRUN) launchers/train.py --ds_config $(DS_CONFIG) $(if $(STEPS),--steps $(STEPS)) $(ARGS)

pretrained: $(INSTALLED) ## about 20 minutes on 2 cores: a longer run of the tiny GPT, evaluated and exported
	$(TORCHRUN) launchers/train.py --ds_config $(DS_CONFIG) --run_file launchers/runs/pretrained.json \
		--steps $(PRETRAINED_STEPS) $(ARGS)
	$(BIN)/fgpt eval runs/pretrained --suite python
	rm -rf runs/pretrained/hf
	$(BIN)/fgpt convert runs/pretrained --to hf --out runs/pretrained/hf
	@echo 'Use it: $(BIN)/fgpt generate runs/pretrained --prompt "def main("'

test: $(DEV_PINS) ## the tests, without the slow ones
	$(PYTEST) -m "not slow"

test-all: $(DEV_PINS) ## every test
	$(PYTEST)

test-faults: $(DEV_PINS) ## what FGPT survives, a line per scenario with the tests that prove it; ARGS="T8 F4"
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults $(ARGS)

soak: $(INSTALLED) ## about 25 minutes: 30 random faults, then the same run without; ARGS="--faults 4 --seed 1"
	$(BIN)/fgpt soak --out runs/soak.json $(ARGS)

check: $(DEV_PINS) ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

fmt: $(DEV_PINS) ## format, and fix what ruff can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench-single: $(BENCH_PINS) ## one device: every step from the plain loop to the trainer's defaults; QUICK=1, ARGS="--rows gpt2"
	$(BIN)/fgpt bench single $(if $(QUICK),--quick) $(ARGS)
	$(BIN)/fgpt report

bench-%: $(BENCH_PINS)
	$(BIN)/fgpt bench $* $(ARGS)

bench-data: $(BENCH_PINS) ## raw text to shards against the tokenizers' own libraries; samples per second
	$(BIN)/fgpt bench data $(ARGS)

bench-multi: $(INSTALLED) ## several ranks: ZeRO, tensor, pipeline, scaling; ARGS="--ranks 8" or "--hostfile FILE"
	$(BIN)/fgpt bench multi $(ARGS)
	$(BIN)/fgpt report

bench-checkpoint: $(INSTALLED) ## saving and loading against DeepSpeed's own checkpoints; ARGS="--rows mini"
	$(BIN)/fgpt bench checkpoint $(ARGS)

bench-recipe: $(INSTALLED) ## recipes side by side: tokens and seconds to a validation loss; ARGS="--seeds 3 --minutes 60"
	$(BIN)/fgpt bench recipe $(if $(FAST_BF16),,--precision fp32) $(ARGS)

gpu-check: $(INSTALLED) ## at most 10 minutes: every check of a GPU, resumable; ARGS="--only masks", "--device cpu" for stand-ins
	$(BIN)/fgpt doctor --gpu $(ARGS)

report: $(INSTALLED) ## tables, plots and a page of the benchmarks' records, in runs/report
	$(BIN)/fgpt report $(ARGS)

scale: $(INSTALLED) ## docs/scale.md: layouts of five models on 1 to 98,304 GPUs, by the planner
	$(BIN)/python -m fgpt.plan.scale docs/scale.md

parity: $(INSTALLED) ## compare layouts with one process, step by step; ARGS="--layouts tp2,pp2,tp2pp2"
	$(BIN)/fgpt parity $(ARGS)

clean: ## remove .venv and caches; runs/ and data/prepared/ stay
	rm -rf $(VENV) build fgpt/tokenizer/wordwise/*.so *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(PINS): requirements.txt
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(INSTALLED): $(EXTENSION) | $(PINS)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

$(BENCH_PINS): requirements-bench.txt | $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-bench.txt
	touch $@

$(DEV_PINS): requirements-dev.txt requirements-bench.txt | $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	touch $@
