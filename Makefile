# Two words do all the set-up on a fresh machine with Python 3.11 or newer: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
CPU_TORCH = torch==2.13.0+cpu
TESTERS = --numprocesses=2 --dist=loadfile
KERNELS = $(wildcard kernels/cpu/*.c)
COMPILE = -std=gnu11 -Wno-psabi -fopenmp -ffp-contract=off -Ikernels/cpu
SANITIZE = $(COMPILE) -DLOOKS_UP_ASIDE=0 -O0 -g -fsanitize=address,undefined -fno-sanitize-recover=all
EMULATION = tests/kernels/emulation
EMULATE = -ULOOKS_UP_ASIDE -DLOOKS_UP_ASIDE=1 -mavx2 -mfma -mf16c -include $(EMULATION)/emulate.h

.PHONY: help install native sanitize emulate sanitize-emulated demo test interpret check smoke load bench-cpu bench-report \
	gpu-wheels gpu-check gpu-bench clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(VENV)/.installed  ## a virtual environment with everything (CPU torch unless nvidia-smi answers)

$(VENV)/.installed: pyproject.toml constraints.txt tests/clients/openai-2.txt $(wildcard kernels/cpu/*.[ch])
	$(PYTHON) -m venv $(VENV)
	@if nvidia-smi >/dev/null 2>&1; then echo "nvidia-smi answers: taking torch with CUDA"; \
	else echo "no NVIDIA GPU here: taking torch for the CPU"; \
	  $(BIN)/pip install --quiet "$(CPU_TORCH)" 2>/dev/null \
	  || $(BIN)/pip install --quiet "$(CPU_TORCH)" --index-url https://download.pytorch.org/whl/cpu; fi
	$(BIN)/pip install --quiet --editable ".[dev]" --constraint constraints.txt
	$(BIN)/pip install --quiet --upgrade --no-deps --target $(VENV)/openai-2 --requirement tests/clients/openai-2.txt
	@touch $@

native:  ## rebuild the CPU kernels in place (install does it too, whenever their sources change)
	$(BIN)/python -c "import setuptools; setuptools.setup()" --quiet build_ext --inplace

demo: install  ## start the server on the bundled demo and drive it through the story (KEEP=0 ends after it)
	@$(BIN)/python -m demo.show

test: install  ## all tests that need no GPU
	$(BIN)/python -m pytest $(TESTERS)

sanitize: build/sanitized/all  ## the C kernels under the address and undefined-behaviour sanitizers
	build/sanitized/all

build/sanitized/all: $(KERNELS:kernels/cpu/%.c=build/sanitized/%.o) $(wildcard tests/kernels/sanitize/*.[ch])
	$(CC) $(SANITIZE) $(filter-out %.h,$^) -lm -o $@

build/sanitized/%.o: kernels/cpu/%.c $(wildcard kernels/cpu/*.h)
	@mkdir -p $(@D)
	$(CC) $(SANITIZE) -c $< -o $@

emulate: build/emulated.so  ## the C kernels with AVX-512 and byte products in terms of AVX2, for tests (needs libsimde-dev)

build/emulated.so: $(KERNELS:kernels/cpu/%.c=build/emulated/%.o) $(EMULATION)/processor.c
	$(CC) $(COMPILE) -fPIC -shared $^ -lm -o $@

build/emulated/%.o: kernels/cpu/%.c $(wildcard kernels/cpu/*.h) $(EMULATION)/emulate.h
	@mkdir -p $(@D)
	$(CC) $(COMPILE) -O1 -fPIC -fvisibility=hidden $(EMULATE) -c $< -o $@

sanitize-emulated: build/sanitized-emulated/all  ## the emulated kernels under the same sanitizers
	build/sanitized-emulated/all

build/sanitized-emulated/all: $(KERNELS:kernels/cpu/%.c=build/sanitized-emulated/%.o) $(EMULATION)/processor.c \
		$(wildcard tests/kernels/sanitize/*.[ch])
	$(CC) $(SANITIZE) $(filter-out %.h,$^) -lm -o $@

build/sanitized-emulated/%.o: kernels/cpu/%.c $(wildcard kernels/cpu/*.h) $(EMULATION)/emulate.h
	@mkdir -p $(@D)
	$(CC) $(SANITIZE) $(EMULATE) -c $< -o $@

interpret: $(VENV)/interpret/.installed  ## the GPU kernels under Triton's interpreter, and their machine code; no GPU needed
	TRITON_INTERPRET=1 PYTHONPATH=$(VENV)/interpret OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TESTERS) tests/triton

# Beside the environment, not in it: a CPU install has no Triton, and must not need it. 3.6 is what torch 2.11 comes with;
# its interpreter cannot run loops whose bounds are arguments with numpy 2.4, which the environment has.
$(VENV)/interpret/.installed: $(VENV)/.installed
	$(BIN)/pip install --quiet --upgrade --no-deps --target $(VENV)/interpret triton==3.6.0 "numpy==2.3.5"
	@touch $@

check: install  ## format, lint, types, layout
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_layout.py

smoke: install  ## a server on a free port, three adapters at once, uploads, metrics, SIGTERM; under a minute
	@$(BIN)/python -m loadtests.smoke

load: install  ## 8 streams over 4 adapters: tokens/s, percentiles, every text as when alone; to loadtests/results
	@$(BIN)/python -m loadtests.load

bench-cpu: install  ## this CPU's speed against bitsandbytes and peft, a figure a line (QUICK=1: fewer rounds)
	@$(BIN)/python -m tests.bench.cpu $(if $(QUICK),--quick)

bench-report: install  ## docs/performance.md, its tables and pictures, from the newest runs that are kept
	@$(BIN)/pip install --quiet --editable ".[dev,bench]" --constraint constraints.txt
	@$(BIN)/python -m tests.bench.report

gpu-wheels: install  ## gather into build/wheels what an offline GPU machine lacks
	@$(BIN)/python -m tests.gpu.wheels

# On a machine with a GPU and no network: Python 3.12 with torch, triton, transformers and peft as GPU_PYTHON, and
# build/wheels. Where there are no wheels, what GPU_PYTHON has must do. Results go to the folder $$OUT too, if that is set.
GPU_PYTHON ?= python3
GPU_RUN = PYTHONPATH=$(CURDIR):$(CURDIR)/build/site PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 $(GPU_PYTHON)

build/site/.installed: $(wildcard build/wheels/*.whl)
	@rm -rf build/site && mkdir -p build/site
	@if ls build/wheels/*.whl >/dev/null 2>&1; then $(GPU_PYTHON) -m pip install --quiet --no-index --no-deps --no-compile \
	  --no-cache-dir --disable-pip-version-check --target build/site build/wheels/*.whl; fi
	@touch $@

gpu-check: build/site/.installed  ## on a machine with an NVIDIA GPU: kernels, graphs, engine and server; 5 minutes at most
	@$(GPU_RUN) -m tests.gpu.check

gpu-bench: build/site/.installed  ## on a machine with an NVIDIA GPU: its speed beside its floors; meant for 5 minutes
	@$(GPU_RUN) -m tests.bench.gpu

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
