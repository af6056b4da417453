"""Print every message that the package can raise or fail with, and its place: python tests/helpers/messages.py

A message is the text of a ``raise``, or of a call that refuses: of the configs' and records' ``require``, of a rule of
`cppo_verl.plugin.preflight`, of ``doctor``'s failures and warnings, and of what a command prints on stderr.
"""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "cppo_verl"
REFUSING = {"require", "Rule", "check", "error"}


def template(node: ast.expr) -> str:
    """The text of an expression, with {what is filled in}; "" if it has none."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(
            part.value if isinstance(part, ast.Constant) else "{" + ast.unparse(part.value) + "}"
            for part in node.values
        )
    if isinstance(node, ast.BinOp | ast.IfExp | ast.BoolOp):
        texts = [template(x) for x in ast.iter_child_nodes(node) if isinstance(x, ast.expr)]
        return (" / " if not isinstance(node, ast.BinOp) else "").join(filter(None, texts))
    return ""


def refuses(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    findings = [x.value for x in call.args[:1] if isinstance(x, ast.Constant)]
    on_stderr = any(k.arg == "file" and ast.unparse(k.value) == "sys.stderr" for k in call.keywords)
    return (
        name in REFUSING or (name == "say" and findings[:1] in (["FAIL"], ["warn"])) or (name == "print" and on_stderr)
    )


def messages(file: Path) -> list[tuple[int, str]]:
    """(line, text) of each message of one file."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        call = node.exc if isinstance(node, ast.Raise) else node
        if isinstance(call, ast.Call) and (isinstance(node, ast.Raise) or refuses(call)):
            texts = [template(x) for x in (*call.args, *(k.value for k in call.keywords))]
            text = " | ".join(t for t in texts if t and t not in ("FAIL", "warn"))
            if text:
                found.append((node.lineno, " ".join(text.split())))
    return sorted(set(found))


if __name__ == "__main__":
    for file in sorted(PACKAGE.rglob("*.py")):
        for line, text in messages(file):
            print(f"{file.relative_to(PACKAGE.parent)}:{line}: {text}")
