# Everything dsmoe needs lives in .venv, beside this file; nothing else on the machine is changed.
#
# Paths here are relative, and never pass through make's own lists: the checkout may lie in a folder with a space in
# its name, and make splits on spaces. So: run make from this folder (or with -C), not with -f from elsewhere.

# The Python that makes .venv, 3.11 or newer. Empty: the first one that is new enough.
PYTHON ?=
# More arguments for the command behind a target: make test ARGS='-k config -x'
ARGS ?=

# Extras of pyproject.toml that are installed, when .venv is made.
EXTRAS ?= test

VENV_PYTHON := .venv/bin/python

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup quickstart study-data lint test test-fast test-asan gpu-test soak benchmark gpu-benchmark gpu-first-hour clean

help: ## say what can be made
	@echo 'make TARGET, where TARGET is one of'
	@awk -F ' *:.*## ' '/^[a-z-]+:.*## / { printf "  %-14s %s\n", $$1, $$2 }' Makefile

setup: .venv/.installed ## make .venv with everything dsmoe needs; once it is there, needs no network

quickstart: setup ## train a small mixture-of-experts model on this machine and look at it
	$(VENV_PYTHON) tools/quickstart.py $(ARGS)

# One worker more than cores, a file's tests on one worker (they share fixtures), one thread per process. Files start in
# order: those with few and long tests, which xdist would put last, are in the first folders.
PYTEST := OMP_NUM_THREADS=1 $(VENV_PYTHON) -m pytest -n auto --dist loadfile --no-loadscope-reorder --durations=10

lint: setup ## check style, formatting, imports and types with ruff and mypy
	$(VENV_PYTHON) -m ruff check
	$(VENV_PYTHON) -m ruff format --check
	$(VENV_PYTHON) -m mypy

test: setup ## run all tests (those that need a GPU are skipped without one)
	$(PYTEST) $(ARGS)

test-fast: setup ## run the unit tests that are quick
	$(PYTEST) tests/unit -m 'not slow' $(ARGS)

# The library of kernels is built with AddressSanitizer, whose library must come before all others. Its own report of
# leaks would be Python's. The products themselves are machine code that torch makes while it runs: not looked into.
test-asan: setup ## run the tests of the C++ kernels under AddressSanitizer (a few minutes)
	OMP_NUM_THREADS=1 DSMOE_CXXFLAGS='-fsanitize=address -O1 -g' ASAN_OPTIONS=detect_leaks=0:alloc_dealloc_mismatch=0 \
	    LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so):$$($${CXX:-c++} -print-file-name=libstdc++.so)" \
	    $(VENV_PYTHON) -m pytest -n 0 tests/unit/moe/test_native_experts.py tests/unit/moe/test_gradient_accumulator.py \
	    tests/unit/native/test_brgemm.py tests/unit/model/test_loss.py tests/unit/model/test_native_attention.py \
	    tests/unit/model/test_native_norm.py tests/unit/routers/test_behaviour.py $(ARGS)

gpu-test: setup ## run only the tests that need a GPU
	$(VENV_PYTHON) -m pytest -m gpu $(ARGS)

study-data: setup ## make data/study, 100 million tokens and more of what this machine has installed
	$(VENV_PYTHON) tools/scaling_study.py corpus $(ARGS)

soak: setup ## random faults over two hosts under the supervisor for an hour (needs root; ARGS='--minutes 10')
	OMP_NUM_THREADS=1 $(VENV_PYTHON) tests/nodes/soak.py $(ARGS)

benchmark: setup ## measure an MoE layer and whole training steps on this machine (an hour or two; ARGS=--quick: minutes)
	$(VENV_PYTHON) tools/benchmark_moe.py --json runs/benchmark/layer.json $(ARGS)
	$(VENV_PYTHON) tools/benchmark_moe.py --step --json runs/benchmark/step.json $(ARGS)

gpu-benchmark: setup ## measure an MoE layer on this machine's GPU
	$(VENV_PYTHON) tools/benchmark_moe.py --require-gpu --tokens 8192 --hidden 2048 --ffn 4096 --experts 8,64 --dtype bf16 \
	    --ranks 1 --json runs/benchmark/gpu.json $(ARGS)

gpu-first-hour: setup ## everything a machine with GPUs has to show, in about 40 minutes; see docs/gpu.md
	$(VENV_PYTHON) tools/gpu_first_hour.py $(ARGS)

clean: ## remove .venv and all that was built; data/ and runs/ stay
	rm -rf .venv build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis dsmoe.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +

# The stamp is touched last, so that an install which was cut off does not count as one. A .venv without a working pip
# is what a cut-off 'python -m venv' leaves; it is made anew.
# The constraints go through the environment because DeepSpeed's build imports torch: pip has to obey them in the
# isolated environment in which it builds, too (pip before 26.2 reads PIP_CONSTRAINT there, newer ones PIP_BUILD_...).
# Both variables split on spaces, hence the relative path.
# DeepSpeed's commands are plain scripts: pip writes the path of Python into their first line as it is, and the kernel
# ends that path at the first space. They get the detour through sh that pip gives to every other command.
.venv/.installed: pyproject.toml constraints.txt
	@if ! $(VENV_PYTHON) -m pip --version >/dev/null 2>&1; then \
	    for python in $(if $(PYTHON),'$(PYTHON)',python3 python3.11 python3.12 python3.13); do \
	        if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	            echo "Making .venv with $$python"; exec "$$python" -m venv --clear .venv; \
	        fi; \
	    done; \
	    echo 'dsmoe needs Python 3.11 or newer, and $(or $(PYTHON),python3) is not.' \
	         'Name one that is: make setup PYTHON=/path/to/python3.11' >&2; \
	    exit 1; \
	fi
	@echo 'Installing into .venv. The first time takes a few minutes, and more where torch comes with CUDA.'
	@PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
	    $(VENV_PYTHON) -m pip install --quiet -e '.[$(EXTRAS)]'
	@grep -lIE '^#!/.* .*/python' .venv/bin/* | while IFS= read -r script; do \
	    sed -i "1s|.*|#!/bin/sh\n'''exec' \"\$$(dirname \"\$$0\")/python\" \"\$$0\" \"\$$@\"\n' '''|" "$$script"; \
	done
	@touch .venv/.installed
