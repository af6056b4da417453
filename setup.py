from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def pinned(name: str) -> list[str]:
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


setup(
    name="cppo-verl",
    version="0.1.0",
    description="CPPO, the cumulative prefix-divergence trust region for LLM reinforcement learning, as a verl plug-in",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.13",
    # An explicit root makes an editable install a plain path entry, which Ray workers and hydra's
    # package resources read like an ordinary install.
    package_dir={"": "."},
    # hydra finds its plug-ins in the namespace package hydra_plugins, which other distributions share.
    packages=[*find_packages(include=["cppo_verl", "cppo_verl.*"]), "hydra_plugins"],
    package_data={"cppo_verl": ["config/**/*.yaml", "analysis/html/templates/*"]},
    install_requires=["torch>=2.6", "numpy>=2.0", "wrapt>=1.16"],
    extras_require={
        "gpu": pinned("gpu.txt"),
        "cpu": pinned("cpu.txt"),
        "test": pinned("test.txt"),
    },
    entry_points={
        "verl.plugins": ["cppo_verl = cppo_verl.register"],
        "vllm.general_plugins": ["cppo_verl = cppo_verl.cpu.vllm_patches:keep_plain_weights"],
    },
)
