"""vLLM's CPU build, on which the tests run, beside the wheel for CUDA of the same version, which runs on a GPU.

`make test-gpu-pins` downloads the wheel. Its Python files are read, never imported: that would need CUDA.
"""

import ast
import importlib.util
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from seams import imported, table

INSTALLED = Path(importlib.util.find_spec("vllm").origin).parents[1]
VERSION = version("vllm").removesuffix("+cpu")
WHEELS = list(Path(sys.prefix, "wheels").glob(f"vllm-{VERSION}-*.whl"))
KERNELS = "vllm._C"
"""Of the CPU build alone, and imported on the CPU alone."""
NAMES = sorted(path for path in {*table(), *imported()} - {KERNELS} if path.startswith("vllm."))

needs_wheel = pytest.mark.skipif(not WHEELS, reason=f"no wheel of vLLM {VERSION}: make test-gpu-pins downloads one")


@pytest.fixture(scope="module")
def wheel():
    return zipfile.Path(WHEELS[0])


def interface(root, path):
    """The signatures and fields of what the sources below ``root`` define as ``path``, line by line.

    Raises:
        AttributeError: they define no such thing.
    """
    parts = path.split(".")
    for count in range(len(parts), 0, -1):
        stem = "/".join(parts[:count])
        file = next((root / name for name in (f"{stem}.py", f"{stem}/__init__.py") if (root / name).exists()), None)
        if file:
            break
    found = ast.parse(file.read_text())
    for position, name in enumerate(parts[count:], count):
        scope = ast.walk(found) if position == count else found.body  # imports may stand below TYPE_CHECKING
        found = next((node for node in scope if name in bound(node)), None)
        if found is None:
            raise AttributeError(f"{path}: {file} has no {name}")
        if isinstance(found, ast.ImportFrom):
            return interface(root, ".".join([found.module, *parts[position:]]))
    if isinstance(found, ast.Module):
        return ast.unparse(found).splitlines()
    members = [node for node in found.body if bound(node)] if isinstance(found, ast.ClassDef) else []
    return [line for node in (found, *members) for line in ast.unparse(without_body(node)).splitlines()]


def bound(node):
    """The names that a statement binds."""
    if isinstance(node, ast.ImportFrom):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def without_body(node):
    return type(node)(**vars(node) | {"body": []}) if hasattr(node, "body") else node


@needs_wheel
def test_all_python_files_of_the_cpu_build_but_two_are_the_wheels(wheel):
    names = [str(file.relative_to(INSTALLED)) for file in (INSTALLED / "vllm").rglob("*.py")]
    same = {x for x in names if (wheel / x).exists() and (wheel / x).read_bytes() == (INSTALLED / x).read_bytes()}
    assert len(names) > 1000
    assert set(names) - same == {"vllm/_version.py", "vllm/platforms/__init__.py"}


@needs_wheel
@pytest.mark.parametrize("path", NAMES)
def test_what_the_plug_in_touches_has_the_same_signature_and_fields_in_the_wheel(wheel, path):
    assert interface(wheel, path) == interface(INSTALLED, path)


@needs_wheel
def test_the_kernels_for_the_cpu_are_not_in_the_wheel(wheel):
    assert [file.name for file in (wheel / "vllm").iterdir() if file.name.startswith("_C.")] == []


@pytest.mark.parametrize(
    ("path", "file", "now", "then"),
    [
        ("vllm.logprobs.FlatLogprobs", "logprobs.py", "token_ids: list[int]", "token_ids: list[str]"),
        ("vllm.logprobs.Logprob", "logprobs.py", "logprob: float", "log_prob: float"),
        ("vllm.v1.engine.async_llm.AsyncLLM", "v1/engine/async_llm.py", "request_id: str,", "name: str,"),
        ("vllm.platforms.current_platform", "platforms/__init__.py", "platform: Platform", "platform: object"),
    ],
)
def test_a_signature_or_a_field_that_differs_is_noticed(tmp_path, path, file, now, then):
    source = (INSTALLED / "vllm" / file).read_text()
    copy = tmp_path / "vllm" / file
    copy.parent.mkdir(parents=True)
    copy.write_text(source)
    assert interface(tmp_path, path) == interface(INSTALLED, path)
    copy.write_text(source.replace(now, then))
    assert interface(tmp_path, path) != interface(INSTALLED, path)
    copy.write_text(source.replace(path.rpartition(".")[2], "another"))
    with pytest.raises(AttributeError, match=path):
        interface(tmp_path, path)
