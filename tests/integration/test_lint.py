"""The hooks that run before a commit are those of `make lint`."""

import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
HOOKS = ROOT / ".pre-commit-config.yaml"


def test_the_hooks_run_the_commands_of_make_lint():
    recipe = subprocess.check_output(["make", "--dry-run", "--always-make", "lint"], cwd=ROOT, text=True)
    [local] = yaml.safe_load(HOOKS.read_text())["repos"]
    hooks = [hook["entry"] for hook in local["hooks"]]
    # Make adds the names of files where pre-commit passes them.
    linted = [line for line in recipe.splitlines() if line.startswith(tuple(hooks))]
    assert [line for line in recipe.splitlines()[-len(hooks) :]] == linted
    assert all(line.startswith(hook) for line, hook in zip(linted, hooks, strict=True))


def test_pre_commit_reads_the_hooks():
    subprocess.run([sys.executable, "-m", "pre_commit", "validate-config", HOOKS], check=True)
