"""The request to stop, as its file."""

import pytest

from cppo_verl.artifacts import stop_request
from cppo_verl.cli import main


def test_the_command_asks_the_run_of_a_folder(tmp_path, capsys):
    assert stop_request.requested(tmp_path) is None
    assert main(["stop", str(tmp_path), "--reason", "maintenance"]) == 0
    assert stop_request.requested(tmp_path) == "maintenance"
    assert f"asked the run in {tmp_path} to end after its step" in capsys.readouterr().out
    # the last reason counts
    assert main(["stop", str(tmp_path)]) == 0
    assert stop_request.requested(tmp_path) == "cppo-verl stop"


def test_a_folder_that_is_not_there_is_not_made(tmp_path, capsys):
    assert main(["stop", str(tmp_path / "chekpoints")]) == 1
    assert (
        f"no folder {tmp_path / 'chekpoints'}: expected the run's trainer.default_local_dir" in capsys.readouterr().err
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("make", [lambda f: (f / "stop").touch(), lambda f: (f / "stop").write_text("\n")])
def test_an_empty_file_is_a_request_too(tmp_path, make):
    make(tmp_path)
    assert stop_request.requested(tmp_path) == "no reason given"


def test_an_answer_takes_the_requests_place_until_the_next_start(tmp_path):
    stop_request.request_stop(tmp_path / "new", "SIGTERM")
    stop_request.answer(tmp_path / "new", "stopped after step 4 of 6: SIGTERM")
    assert stop_request.requested(tmp_path / "new") is None
    assert stop_request.stopped(tmp_path / "new") == "stopped after step 4 of 6: SIGTERM"
    assert stop_request.start_over(tmp_path / "new") is None
    assert stop_request.stopped(tmp_path / "new") is None
    assert list((tmp_path / "new").iterdir()) == []


def test_a_request_from_before_a_start_is_removed_and_told(tmp_path):
    assert stop_request.start_over(tmp_path / "nothing there yet") is None
    stop_request.request_stop(tmp_path, "SIGTERM")
    assert stop_request.start_over(tmp_path) == "SIGTERM"
    assert list(tmp_path.iterdir()) == []
