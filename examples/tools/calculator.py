"""The tool of the example: arithmetic on numbers, as verl's tool agent loop loads it.

    actor_rollout_ref.rollout.multi_turn.function_tool_path=examples/tools/calculator.py

verl loads this file by its path in every worker, so that nothing has to be installed. A tool with a state, or one
that gives rewards of its own, is a subclass of verl's ``BaseTool`` in a ``tool_config_path`` instead.
"""

import ast
import math
import operator

from verl.tools.function_tool import function_tool

OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
}
LONGEST = 200  # characters: what a model writes must not keep a worker busy


@function_tool
def calculator(expression: str) -> str:
    """Compute an arithmetic expression.

    Args:
        expression: numbers, the operators + - * / and parentheses
    """
    if not isinstance(expression, str) or len(expression) > LONGEST:
        return "error: not an expression"
    try:
        result = value(ast.parse(expression, mode="eval").body)
        if not math.isfinite(result):
            raise OverflowError
        return str(result) if isinstance(result, int) else f"{result:.12g}"
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "error: not an expression"
    except (ZeroDivisionError, OverflowError):
        return "error: no finite number"


def value(node: ast.expr) -> int | float:
    """Of a parsed expression; ValueError for whatever is not arithmetic on numbers."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](value(node.left), value(node.right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](value(node.operand))
    raise ValueError(f"not arithmetic: {ast.dump(node)}")
