"""``cppo-verl stop``."""

from cppo_verl.artifacts import run_lock, stop_request
from cppo_verl.cli import main


def test_the_command_asks_the_run_of_a_folder(tmp_path, capsys):
    assert main(["stop", str(tmp_path), "--reason", "maintenance"]) == 0
    assert stop_request.requested(tmp_path) == "maintenance"
    assert f"asked the run in {tmp_path} to end after its step" in capsys.readouterr().out
    # the last reason counts
    assert main(["stop", str(tmp_path)]) == 0
    assert stop_request.requested(tmp_path) == "cppo-verl stop"


def test_a_folder_in_which_no_run_has_begun_is_named(tmp_path, capsys):
    """Such as a run's own folder in the place of that of its checkpoints: nobody would ever read the request there."""
    said = f"no run has begun in {tmp_path}: unless one is starting there, {tmp_path} is not its trainer.default_local"
    assert main(["stop", str(tmp_path)]) == 0
    assert said in capsys.readouterr().err
    run_lock.hold(tmp_path).close()
    assert main(["stop", str(tmp_path)]) == 0
    assert capsys.readouterr().err == ""


def test_a_folder_that_is_not_there_is_not_made(tmp_path, capsys):
    assert main(["stop", str(tmp_path / "chekpoints")]) == 1
    assert (
        f"no folder {tmp_path / 'chekpoints'}: expected the run's trainer.default_local_dir" in capsys.readouterr().err
    )
    assert list(tmp_path.iterdir()) == []


def test_a_request_that_cannot_be_written_is_said_with_its_reason(tmp_path, capsys):
    (tmp_path / "stop").mkdir()  # in the place of the file
    assert main(["stop", str(tmp_path)]) == 1
    assert "the run was not asked to stop: [Errno 21] Is a directory" in capsys.readouterr().err
