"""A folder is locked by one run, and a dead one frees it."""

import os
import re
import socket

import pytest

from cppo_verl.artifacts import run_lock


def test_a_second_run_is_told_who_works_in_the_folder(tmp_path):
    with run_lock.hold(tmp_path / "run"):
        owner = f"process {os.getpid()} on {socket.gethostname()} trains in {tmp_path / 'run'} already"
        for _ in range(2):
            with pytest.raises(BlockingIOError, match=re.escape(owner)):
                run_lock.hold(tmp_path / "run")
    run_lock.hold(tmp_path / "run").close()


def test_a_folder_that_cannot_be_written_to_is_named_with_the_way_out(tmp_path):
    (tmp_path / "file").write_text("")
    message = rf"{tmp_path}/file/run cannot be written to on {socket.gethostname()}: .*; give this run another trainer"
    with pytest.raises(OSError, match=message):
        run_lock.hold(tmp_path / "file" / "run")


def test_a_left_over_file_is_no_lock(tmp_path):
    (tmp_path / "run.lock").write_text("process 1 on a machine that has burnt down")
    with run_lock.hold(tmp_path):
        assert (tmp_path / "run.lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}"


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    run_lock.hold(tmp_path).close()
    assert "cannot be locked ([Errno 38] Function not implemented)" in capsys.readouterr().err
