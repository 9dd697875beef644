# make demo   environment, training, videos: 15 to 30 minutes on two cores with bfloat16
# make demo-short   the same with a third of the training, for cores without bfloat16
# make test   environment, test suite
# make test-gpu   the tests that need a CUDA GPU
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
RUN := $(VENV)/bin/python

.PHONY: demo demo-short test test-gpu clean

demo: $(VENV)/.kit
	$(RUN) -m kit demo

demo-short: $(VENV)/.kit
	$(RUN) -m kit demo conf=demo_short

test: $(VENV)/.kit-test
	OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder --max-worker-restart 0

test-gpu: $(VENV)/.kit-test
	KIT_TEST_GPU=1 $(RUN) -m pytest tests/gpu

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	  { echo "kit needs Python 3.11, 3.12 or 3.13, $(PYTHON) is another: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.kit: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(RUN) -m pip install $(PIP_ARGS) --constraint constraints.txt --editable .
	touch $@

$(VENV)/.kit-test: $(VENV)/.kit
	$(RUN) -m pip install $(PIP_ARGS) --constraint constraints.txt --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
