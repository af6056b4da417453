"""The request to stop, as its file."""

import os
import time
from datetime import timedelta

import pytest

from cppo_verl.artifacts import stop_request


def test_a_run_finds_a_request_and_its_last_reason(tmp_path):
    folder = tmp_path / "new"
    assert stop_request.requested(folder) is None
    stop_request.request_stop(folder, "SIGTERM")
    stop_request.request_stop(folder, "maintenance")
    assert stop_request.requested(folder) == "maintenance"


def test_a_request_waits_until_it_is_answered_and_what_cannot_be_read_is_none(tmp_path):
    assert not stop_request.waits(tmp_path)
    stop_request.request_stop(tmp_path, "SIGTERM")
    assert stop_request.waits(tmp_path)
    stop_request.answer(tmp_path, "stopped after step 4 of 6: SIGTERM")
    assert not stop_request.waits(tmp_path)
    (tmp_path / "stop").mkdir()
    assert not stop_request.waits(tmp_path)


@pytest.mark.parametrize("make", [lambda f: (f / "stop").touch(), lambda f: (f / "stop").write_text("\n")])
def test_an_empty_file_is_a_request_too(tmp_path, make):
    make(tmp_path)
    assert stop_request.requested(tmp_path) == "no reason given"


def test_an_answer_replaces_the_request_until_the_next_start(tmp_path):
    stop_request.request_stop(tmp_path, "SIGTERM")
    stop_request.answer(tmp_path, "stopped after step 4 of 6: SIGTERM")
    assert stop_request.requested(tmp_path) is None
    assert stop_request.stopped(tmp_path) == "stopped after step 4 of 6: SIGTERM"
    stop_request.forget_answer(tmp_path)
    assert stop_request.stopped(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_a_launcher_clears_request_and_answer_and_is_told_of_the_request(tmp_path):
    assert stop_request.start_over(tmp_path / "nothing there yet") is None
    stop_request.answer(tmp_path, "stopped after step 4 of 6: SIGTERM")
    stop_request.request_stop(tmp_path, "maintenance")
    assert stop_request.start_over(tmp_path) == "maintenance"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("seconds", "age"), [(3 * 3600, timedelta(hours=3)), (-3600, timedelta(0))])
def test_a_requests_age_is_the_files_and_never_negative(tmp_path, seconds, age):
    stop_request.request_stop(tmp_path, "SIGTERM")
    then = time.time() - seconds
    os.utime(tmp_path / "stop", (then, then))
    assert abs(stop_request.age(tmp_path) - age) <= timedelta(minutes=1)


def test_no_request_has_no_age(tmp_path):
    assert stop_request.age(tmp_path) == timedelta(0)


def test_a_request_that_cannot_be_written_raises(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        stop_request.request_stop(tmp_path / "file", "SIGTERM")
