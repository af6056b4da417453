"""The command line: which module runs, and what is said where a package is missing."""

import importlib
import sys
from types import ModuleType

import pytest

import cppo_verl
from cppo_verl.cli import COMMANDS, main


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_a_module_with_the_two_functions(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    module = importlib.import_module(f"cppo_verl.{COMMANDS[name][0]}")
    assert callable(module.run)
    assert module.__doc__.split()[0] in capsys.readouterr().out


@pytest.mark.parametrize("name", ["doctor", "evaluate", "mismatch", "stop"])
def test_an_argument_of_a_training_command_is_told_where_it_belongs(name, capsys):
    place = {"evaluate": ["--output", "x"], "stop": ["x"]}.get(name, [])
    with pytest.raises(SystemExit) as ended:
        main([name, *place, "--config-dir", "recipes"])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and f"cppo-verl {name}: error: unrecognized arguments: --config-dir" in said
    assert ("the arguments of a training command stand after --" in said) == (name != "stop")


def test_an_unknown_command_is_refused_with_the_known_ones(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train"])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "'train'" in error and all(name in error for name in COMMANDS)


@pytest.mark.parametrize(
    "arguments, package, way_out",
    [
        (["table", "nowhere"], "numpy", "'cppo-verl[tools]'"),
        (["prepare", "gsm8k", "--source", "train=x.csv", "validation=x.csv"], "datasets", "'cppo-verl[tools]'"),
        (["doctor"], "omegaconf", "'cppo-verl[gpu]'"),
    ],
)
def test_a_missing_package_is_named_with_the_way_to_install_it(
    arguments, package, way_out, monkeypatch, tmp_path, capsys
):
    (tmp_path / "x.csv").touch()
    monkeypatch.chdir(tmp_path)
    for name in [name for name in sys.modules if name.startswith("cppo_verl.")]:
        monkeypatch.delitem(sys.modules, name)
    for name, value in [*vars(cppo_verl).items()]:
        if isinstance(value, ModuleType):
            monkeypatch.setattr(cppo_verl, name, value)  # the imports of the command replace it
    monkeypatch.setitem(sys.modules, package, None)
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert f"needs {package}, not installed here: pip install {way_out}" in error
    assert "Traceback" not in error


def test_a_module_missing_from_the_package_itself_is_not_hidden(monkeypatch):
    monkeypatch.setitem(sys.modules, "cppo_verl.launch.stop", None)
    with pytest.raises(ModuleNotFoundError, match=r"cppo_verl\.launch\.stop"):
        main(["stop", "."])
