# make quickstart   train with CPPO in verl's real trainer, on the CPU
# make test         everything that CI runs
# Both set up .venv first. On Linux PyPI's torch is the CUDA build (gigabytes); PyTorch's index of CPU
# wheels spares them:  make quickstart TORCH_INDEX=<its address>

PYTHON ?= python3.11
VENV ?= .venv
TORCH_INDEX ?=
GPU_PYTHON ?= python
GPU_PINS ?= .venv-gpu-pins
PYTHON_GPU_PINS ?= python3.12
BIN := $(VENV)/bin

# Explicit, so that the CPU serves also where torch is a CUDA build.
export VERL_PLATFORM := cpu

# A Chromium from the npm registry, for the tests of the pages.
BROWSER := $(VENV)/browser

# Two workers: one run of verl's trainer works while another waits. Collected first, tests/e2e starts first: it takes longest.
PYTEST := $(BIN)/python -m pytest -n 2 --no-loadscope-reorder --durations=20

.PHONY: install quickstart study study-smoke test test-unit test-extras test-faults test-fuzz test-gpu test-gpu-pins \
    bench lint docs dist clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml $(wildcard requirements/*.*) requirements/vllm-name/setup.py
	VENV=$(VENV) PYTHON=$(PYTHON) TORCH_INDEX=$(TORCH_INDEX) requirements/install-cpu.sh -r requirements/test.txt
	$(BIN)/pip install --quiet --no-deps -e .
	touch $@

$(BROWSER)/chromium: $(VENV)/installed
	$(BIN)/npm install --silent --no-audit --no-fund --prefix $(BROWSER) @sparticuz/chromium@153.0.0
	$(BIN)/python tests/helpers/browser.py $(BROWSER)

# Megatron-Core, for the test of verl's Megatron engine, apart from what other tests import.
%/megatron: requirements/megatron.txt %/installed
	$*/bin/pip install --quiet --no-deps --upgrade --target $@ -r $<
	touch $@

quickstart: install
	$(BIN)/python examples/quickstart/run.py $(ARGS)

# The tables and pictures of docs/evidence.md, anew from the raw results of studies/trust_regions.
study: install
	$(BIN)/python -m studies.trust_regions.report

# Two cells of the study with two seeds, end to end.
study-smoke: install
	mkdir -p outputs/study-smoke
	cp docs/evidence.md outputs/study-smoke/page.md
	$(BIN)/python -m studies.trust_regions.run -m output=$(CURDIR)/outputs/study-smoke/cells \
	    inputs=outputs/study-smoke/shared results_folder=outputs/study-smoke/results \
	    rule=dppo,cppo horizon=16 updates=4 learning_rate=3e-4 steps=4 limit=2
	$(BIN)/python -m studies.trust_regions.report --results outputs/study-smoke/results --page outputs/study-smoke/page.md

test: install lint $(BROWSER)/chromium $(VENV)/megatron
	$(PYTEST)

test-unit: install
	$(PYTEST) --dist worksteal tests/unit

# What pip would install of each extra into an empty environment: minutes, and gigabytes that pip keeps in its cache.
test-extras:
	$(PYTHON) -m venv --clear build/empty
	for extra in tools cpu gpu test; do \
	    build/empty/bin/pip install --quiet --dry-run ".[$$extra]" || exit 1; \
	done

# Each part of a run killed at each moment, and what else takes long: 39 runs of two to three minutes.
test-faults: install
	$(BIN)/python -m pytest -m "nightly or not nightly" --durations=0 tests/e2e/faults

# A thousand random settings, instead of the few that `make test` tries.
test-fuzz: install
	FUZZ_CASES=1000 $(PYTEST) tests/integration/test_config_fuzz.py

# On a machine with a GPU, in the environment of GPU_PYTHON: the maths alone, then twenty steps of Qwen3-0.6B with each
# divergence. Each prints a table to paste. Not yet run on a GPU.
test-gpu:
	env -u VERL_PLATFORM $(GPU_PYTHON) tests/gpu/core.py
	env -u VERL_PLATFORM $(GPU_PYTHON) tests/gpu/stack.py

# The GPU's versions, with vLLM's CPU build for the one that needs CUDA, in an environment of their own: docs/engines.md has
# time and gigabytes.
$(GPU_PINS)/installed: requirements/gpu-constraints.txt requirements/install-gpu-pins.sh requirements/vllm-name/setup.py
	VENV=$(GPU_PINS) PYTHON=$(PYTHON_GPU_PINS) requirements/install-gpu-pins.sh
	$(GPU_PINS)/bin/pip install --quiet --no-deps -e .
	touch $@

test-gpu-pins: $(GPU_PINS)/installed $(GPU_PINS)/megatron
	$(GPU_PINS)/bin/python -m pytest -n 2 --no-loadscope-reorder --durations=20 -m "nightly or not nightly" \
	    tests/e2e/quickstart/test_quickstart.py tests/e2e/test_mismatch.py tests/e2e/test_engine.py tests/e2e/test_recipes.py \
	    tests/unit tests/integration/test_recipes.py tests/integration/test_gpu.py tests/integration/test_model_runner_v2.py \
	    tests/integration/test_vllm_wheel.py tests/integration/test_sglang.py

# The ratios of docs/benchmarks.md, side by side on this machine. Those of whole steps need a quickstart's folder: docs/topk.md.
bench: install
	$(BIN)/python tests/benchmarks/loss.py
	$(BIN)/python tests/benchmarks/top_k.py logits
	$(BIN)/python tests/benchmarks/transport.py
	$(BIN)/python tests/benchmarks/scale.py
	$(BIN)/python tests/benchmarks/reading.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck $(shell git ls-files '*.sh' '*.sbatch' .ci/run)
	$(BIN)/hadolint $(wildcard docker/Dockerfile.*)
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.compose-spec $(wildcard docker/compose*.yaml)
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.citation-file-format CITATION.cff

# The site of docs/, in build/site; opened from the folder it needs no server.
docs: install
	$(BIN)/python -m mkdocs build

# Wheel and source distribution, in build/dist.
dist: install
	$(BIN)/python -m build --no-isolation --outdir build/dist
	$(BIN)/twine check --strict build/dist/*

clean:
	rm -rf build *.egg-info requirements/vllm-name/build requirements/vllm-name/*.egg-info
