"""Every public function of the maths says what it takes, returns and raises."""

import ast
import inspect
import re

import pytest

from cppo_verl.core import divergence, metrics, neighbours, surrogate, trust_region

FUNCTIONS = [
    function
    for module in (divergence, trust_region, surrogate, neighbours, metrics)
    for name, function in vars(module).items()
    if inspect.isfunction(function) and function.__module__ == module.__name__ and not name.startswith("_")
]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_a_docstring_names_every_argument_the_result_and_the_errors(function):
    text = inspect.getdoc(function)
    _, _, rest = text.partition("\nArgs:\n")
    arguments = re.split(r"\n(?=\w+:\n)", rest)[0]
    assert re.findall(r"^    (\w+): ", arguments, re.MULTILINE) == list(inspect.signature(function).parameters)
    assert "\nReturns:\n" in text
    source = ast.parse(inspect.getsource(function))
    raises = any(isinstance(node, ast.Raise) for node in ast.walk(source))
    assert "\nRaises:\n" in text or not raises
