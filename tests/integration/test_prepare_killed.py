"""The files that a killed `prepare` leaves."""

import os
import signal
import subprocess
import sys
import textwrap

from prepared import check_completed, gsm8k_command, names


def test_the_same_command_completes_what_a_kill_between_renames_left(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    command, out = gsm8k_command(tmp_path), tmp_path / "out"
    script = f"""
        import argparse, os, signal, sys, types
        reward = types.SimpleNamespace(default_compute_score=lambda *_: 0)  # importing verl takes seconds
        sys.modules |= {{"verl": reward, "verl.utils": reward, "verl.utils.reward_score": reward}}
        from cppo_verl.data import prepare
        replace = os.replace

        def kill(source, target):
            if str(target) == {str(out / "train.parquet")!r}:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)

        os.replace = kill
        parser = argparse.ArgumentParser()
        prepare.add_arguments(parser)
        prepare.run(parser.parse_args({command!r}))
    """
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=environment, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert [name for name in names(out) if not name.endswith(".tmp")] == ["manifest.json"]
    check_completed(command, out, capsys)
