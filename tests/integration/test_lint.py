"""The hooks that run before a commit are those of `make lint`."""

import os
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
HOOKS = ROOT / ".pre-commit-config.yaml"


def test_the_hooks_run_the_commands_of_make_lint():
    # A make that runs the tests would have this one print more.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "--dry-run", "--always-make", "lint"]
    recipe = subprocess.check_output(command, cwd=ROOT, text=True, env=environment)
    [local] = yaml.safe_load(HOOKS.read_text())["repos"]
    hooks = [hook["entry"] for hook in local["hooks"]]
    # Make adds the names of files where pre-commit passes them.
    linted = [line for line in recipe.splitlines() if line.startswith(tuple(hooks))]
    assert [line for line in recipe.splitlines()[-len(hooks) :]] == linted
    assert all(line.startswith(hook) for line, hook in zip(linted, hooks, strict=True))


def test_pre_commit_reads_the_hooks():
    subprocess.run([sys.executable, "-m", "pre_commit", "validate-config", HOOKS], check=True)
