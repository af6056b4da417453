"""Which private or overridden names of verl, vLLM, Ray and hydra the package touches, collected from its code."""

import ast
import importlib
import inspect
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE, PLUGINS = ROOT / "cppo_verl", ROOT / "hydra_plugins"
UPSTREAM = ("verl", "vllm", "ray", "hydra")
PUBLIC = {"_replace", "_asdict", "_target_", "_exit"}
"""Of NamedTuple, of hydra's configs and of os: public, in spite of their names."""
RAYS = {"__ray_call__", "__ray_metadata__"}


def files() -> list[Path]:
    return sorted([*PACKAGE.rglob("*.py"), *PLUGINS.glob("*.py")])


def private_names() -> set[str]:
    """Private attributes and modules that the code names and does not define itself."""
    used, defined = set(), set()
    for file in files():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                defined.add(node.name)
            elif isinstance(node, ast.AnnAssign | ast.Assign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                # On self, or in a class; what is assigned on anything else is another's.
                defined |= {t.id for t in targets if isinstance(t, ast.Name)}
                defined |= {t.attr for t in targets if isinstance(t, ast.Attribute) and ast.unparse(t.value) == "self"}
            elif isinstance(node, ast.Attribute) and node.attr.startswith("_"):
                used.add(node.attr)
            elif isinstance(node, ast.ImportFrom) and node.module:
                used |= {node.module} if "._" in f".{node.module}" else set()
    return {name for name in used - defined - PUBLIC if not name.startswith("__") or name in RAYS}


def overridden() -> set[str]:
    """``module.Class.method`` of each upstream method that a class of the package overrides."""
    found = set()
    for file in files():
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if not re.search(r"^class ", file.read_text(), re.M):
            continue
        module = importlib.import_module(name)
        for cls in vars(module).values():
            if inspect.isclass(cls) and cls.__module__ == name:
                found |= _overridden_by(cls)
    return found


def _overridden_by(cls: type) -> set[str]:
    bases = [base for base in cls.__mro__ if base.__module__.split(".")[0] in UPSTREAM]
    own = [base for base in cls.__mro__ if base.__module__.startswith(("cppo_verl.", "hydra_plugins.cppo_verl"))]
    found = set()
    for method in {name for base in own for name, value in vars(base).items() if _written(value)}:
        definers = [base for base in bases if method in vars(base)]
        if definers:
            found.add(f"{definers[-1].__module__}.{definers[-1].__qualname__}.{method}")
    return found


def _written(value: object) -> bool:
    """Whether a class attribute is a function of this package's source; dataclasses generate others."""
    function = (
        inspect.unwrap(getattr(value, "__func__", value)) if callable(value) or hasattr(value, "__func__") else None
    )
    return inspect.isfunction(function) and function.__code__.co_filename.startswith((str(PACKAGE), str(PLUGINS)))


def patched() -> set[str]:
    """Last name of each upstream attribute that the CPU room or the watch replaces, or the registration wraps."""
    found = set(re.findall(r'patch_function_wrapper\("[\w.]+", "(\w+)"\)', (PACKAGE / "register.py").read_text()))
    others = [PACKAGE / "cpu" / "fork_server.py", PACKAGE / "plugin" / "health.py"]
    for file in [*(PACKAGE / "cpu").glob("*_patches.py"), *others]:
        for node in ast.walk(ast.parse(file.read_text())):
            targets = [node.target] if isinstance(node, ast.AugAssign) else getattr(node, "targets", [])
            for target in targets:
                if isinstance(target, ast.Attribute) and ast.unparse(target.value) not in ("self", "layer"):
                    found.add(target.attr)
    return found


def imported() -> set[str]:
    """``module.name`` of what the code imports from upstream."""
    return {
        f"{node.module}.{alias.name}"
        for file in files()
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UPSTREAM
        for alias in node.names
    }


ROW = re.compile(r"^\| `([\w.]+)(\([^`]*\))?` \| (.+) \| (.+) \|$", re.M)


def table() -> dict[str, tuple[str | None, str]]:
    """{dotted path: (signature, tests)} of docs/seams.md."""
    text = (ROOT / "docs" / "seams.md").read_text()
    return {path: (signature, tests) for path, signature, _, tests in ROW.findall(text)}


def resolve(path: str):
    """The object at a dotted path; None for what only instances have, if the source defines it.

    Raises:
        AttributeError: there is none.
    """
    parts = path.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for position, name in enumerate(parts[count:], count):
            metadata = getattr(found, "__ray_metadata__", None)
            if metadata is not None and name != "__ray_metadata__":
                found = metadata.modified_class  # what ray.remote wrapped
            if not hasattr(found, name):
                if position == len(parts) - 1 and re.search(rf"(self\.|def ){name}\b", inspect.getsource(found)):
                    return None
                raise AttributeError(f"{path}: {found} has no {name}")
            found = getattr(found, name)
        return found
    raise AttributeError(f"{path}: no such module")


def signature(function) -> str:
    """The parameters' names, as docs/seams.md writes them."""
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    parameters = inspect.signature(inspect.unwrap(function)).parameters.values()
    names = [stars.get(p.kind, "") + p.name for p in parameters]
    return "(" + ", ".join(name for name in names if name not in ("self", "_ray_trace_ctx")) + ")"
