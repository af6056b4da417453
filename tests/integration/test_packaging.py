"""The package as it is built, and its command in environments that hold less than ours."""

import email
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
from environments import closure, link

import cppo_verl

ROOT = Path(__file__).parents[2]


def tracked(*folders):
    """The files of the repository below ``folders``, or all of them."""
    return subprocess.check_output(["git", "ls-files", *folders], cwd=ROOT, text=True).splitlines()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the tracked files, as a build must not write into the repository."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in tracked():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    return copy


@pytest.fixture(scope="module")
def built(checkout, tmp_path_factory):
    """The wheel, built from the source distribution as pip does where there is no wheel."""
    folder = tmp_path_factory.mktemp("built")
    backend = "import sys, setuptools.build_meta as backend; backend.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", backend, folder], cwd=checkout, check=True, capture_output=True)
    [source] = folder.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        archive.extractall(folder, filter="data")
    [unpacked] = folder.glob("cppo_verl-*/")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, "."]
    subprocess.run(command, cwd=unpacked, check=True)
    [wheel] = folder.glob("*.whl")
    return wheel


def test_the_wheel_holds_the_tracked_files_of_the_package_and_no_others(built):
    with zipfile.ZipFile(built) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == set(tracked("cppo_verl", "hydra_plugins"))


def test_the_metadata_repeats_the_version_and_the_pinned_requirements(built):
    with zipfile.ZipFile(built) as wheel:
        [metadata] = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
        [entry_points] = [name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt")]
        described = email.message_from_string(wheel.read(metadata).decode())
        commands = ConfigParser()
        commands.read_string(wheel.read(entry_points).decode())
    assert described["Version"] == cppo_verl.__version__
    assert described["License-Expression"] == "Apache-2.0"
    assert set(described.get_all("Provides-Extra")) == {"tools", "cpu", "gpu", "flash-attn", "test"}
    needed = described.get_all("Requires-Dist")
    assert [line for line in needed if "extra ==" not in line] == ["torch>=2.6", "numpy>=2.0", "wrapt>=1.16"]
    for extra in ("cpu", "gpu"):
        assert f'verl==0.9.1; extra == "{extra}"' in needed
    # The one source build of the GPU's stack is a command of its own.
    assert [line for line in needed if "flash-attn" in line.split(";")[0]] == [
        'flash-attn==2.8.3; extra == "flash-attn"'
    ]
    assert commands["console_scripts"]["cppo-verl"] == "cppo_verl.cli:main"
    assert commands["verl.plugins"]["cppo_verl"] == "cppo_verl.register"


def test_the_description_stands_alone_on_an_index(built):
    check = [sys.executable, "-m", "twine", "check", "--strict", *built.parent.glob("cppo_verl-*.*z"), built]
    subprocess.run(check, check=True, capture_output=True)
    with zipfile.ZipFile(built) as wheel:
        [metadata] = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
        description = email.message_from_string(wheel.read(metadata).decode()).get_payload()
    links = re.findall(r"\]\(([^)]*)\)", description)
    assert links and all(link.startswith("https://") for link in links)
    commands = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("make ")]
    assert len(commands) == 2 and all(command in description for command in commands)


@pytest.fixture
def environment(built, tmp_path):
    """A function that makes an environment of the built package and one of its extras, and returns another: that runs
    commands there one after the other in one process, up to the first that fails."""

    def make(extra, without=()):
        venv = tmp_path / "venv"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
        pip = [sys.executable, "-m", "pip", "--python", venv / "bin/python", "install", "--quiet", "--no-deps", built]
        subprocess.run(pip, check=True)
        [site] = venv.glob("lib/python*/site-packages")
        link(site, extra, without)

        def run(*commands):
            settings = os.environ | {"HF_HOME": str(tmp_path / "home"), "VERL_PLATFORM": "cpu"}
            code = "import sys; from cppo_verl.cli import main; sys.exit(any(main(x.split()) for x in sys.argv[1:]))"
            program = [venv / "bin/python", "-P", "-c", code, *commands]
            return subprocess.run(program, cwd=tmp_path, env=settings, capture_output=True, text=True)

        return run

    return make


def test_an_editable_install_is_a_path_entry(checkout, tmp_path):
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--prefix", tmp_path]
    subprocess.run([*pip, "--ignore-installed", "-e", checkout], check=True)
    [entry] = tmp_path.rglob("*.pth")
    assert entry.read_text().strip() == str(checkout)


@pytest.fixture
def bare(tmp_path):
    """A function that runs the command with the standard library and this package alone; returns the process."""

    def run(*arguments):
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from cppo_verl.cli import main; sys.exit(main())"
        # -S leaves site-packages out.
        command = [sys.executable, "-S", "-E", "-c", code, *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    return run


def test_help_needs_the_standard_library_alone(bare):
    ended = bare("--help")
    assert ended.returncode == 0, ended.stderr
    assert "usage: cppo-verl" in ended.stdout


def test_stop_needs_the_standard_library_alone(bare, tmp_path):
    ended = bare("stop", str(tmp_path))
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "stop").exists()


@pytest.mark.parametrize(
    "command",
    ["calibrate x", "doctor", "evaluate --output x", "inspect x", "mismatch --dump x", "report x", "table x"],
)
def test_a_command_without_its_packages_says_what_to_install(bare, command):
    ended = bare(*command.split())
    assert ended.returncode == 1
    assert re.search(r"needs [\w, -]+, not installed here: pip install 'cppo-verl\[\w+\]'", ended.stderr)
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["stop", "--help"]])
def test_help_imports_no_large_package(arguments):
    code = (
        "import json, sys\nfrom cppo_verl.cli import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "print(json.dumps(sorted(name for name in sys.modules if '.' not in name)))"
    )
    shown = subprocess.check_output([sys.executable, "-c", code, *arguments], cwd=ROOT, text=True)
    imported = json.loads(shown.splitlines()[-1])
    assert "cppo_verl" in imported
    assert not {"torch", "verl", "numpy", "ray", "hydra", "omegaconf", "transformers", "pandas"} & set(imported)


GSM8K = "prepare gsm8k --source train=train.csv validation=validation.csv"
TOOLS = [GSM8K, "table run", "calibrate run", "inspect run --method run", "report run"]


@pytest.fixture
def material(tmp_path):
    """A data set and a run for the commands of `TOOLS`."""
    for part in ("train", "validation"):
        (tmp_path / f"{part}.csv").write_text(f"question,answer\nHow many in {part}?,#### 1\n")
    [example] = ROOT.glob("examples/*/run/hydra/config.yaml")
    (tmp_path / "run").symlink_to(example.parents[1])


def test_the_extra_of_the_tools_holds_all_they_need(environment, material):
    assert {"vllm", "transferqueue", "pytest"}.isdisjoint(closure("tools"))
    ended = environment("tools")("prepare reasoning-gym number_sorting --train-size 4 --validation-size 2", *TOOLS)
    assert ended.returncode == 0, ended.stderr


def test_without_any_extra_each_command_says_what_it_misses(environment, material, tmp_path):
    run = environment("")
    shown = subprocess.check_output([tmp_path / "venv/bin/cppo-verl", "--help"], cwd=tmp_path, text=True)
    assert "usage: cppo-verl" in shown and "doctor" in shown
    for command in [*TOOLS, "evaluate --output evaluated", "mismatch --dump run"]:
        ended = run(command)
        assert ended.returncode == 1 and "Traceback" not in ended.stderr
        assert re.search(r"needs [\w, -]+, not installed here: pip install 'cppo-verl\[\w+\]'", ended.stderr)
    ended = run("doctor --no-ray")
    assert ended.returncode == 1 and "pip install 'cppo-verl[gpu]'" in ended.stdout + ended.stderr


def test_a_package_that_is_needed_at_the_very_end_is_missed_at_the_beginning(environment, material, tmp_path):
    run = environment("tools", without=("reasoning-gym", "matplotlib"))
    before = sorted(tmp_path.iterdir())
    for command in [*TOOLS, "evaluate --output evaluated"]:
        ended = run(command)
        assert ended.returncode == 1 and "needs reasoning-gym, matplotlib" in ended.stderr, ended.stderr
    assert sorted(tmp_path.iterdir()) == before
    ended = run("doctor --no-ray")
    assert ended.returncode == 1
    assert re.search("FAIL +other packages .*matplotlib, .*reasoning-gym, .*pip install 'cppo-verl", ended.stdout)
