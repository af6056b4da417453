"""A disk that is full or read-only: a tmpfs of this machine.

tests/e2e/quickstart/test_calibrate.py has a checkpoint that finds no room.
"""

import os
import subprocess

import pytest
from token_dumps import batch, train, writer
from verl.utils import tensordict_utils as tu
from verl.utils.tracking import FileLogger

from cppo_verl.artifacts import run_lock
from cppo_verl.launch.trainer_process import Trainers
from cppo_verl.plugin import checkpoints
from cppo_verl.plugin.config import CPPOLossConfig


@pytest.fixture
def disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("a mount needs root")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture
def full_disk(disk):
    (disk / "other").mkdir()
    with (disk / "other" / "data").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(bytes(4096))
    return disk


def test_a_full_disk_ends_the_token_dump_with_a_warning_and_not_the_run(full_disk, caplog):
    data, log_pi = batch()
    records = train(CPPOLossConfig(), data, log_pi, [0, 1])
    dump = writer(full_disk / "other")
    dump.write(3, None, records, {0: "a_0_0", 1: "a_1_0"}, tu.index_select_tensor_dict(data, [0, 1]))
    assert "no more tokens are dumped: [Errno 28] No space left on device" in caplog.text
    assert not dump.due(4)
    assert [path.name for path in (full_disk / "other").iterdir()] == ["data"]


def test_metrics_without_room_are_told_with_the_file_and_how_to_continue(full_disk, monkeypatch):
    file = full_disk / "metrics-0.jsonl"
    monkeypatch.setenv(checkpoints.METRICS_PATH, str(file))
    logger = FileLogger("project", "experiment")
    (full_disk / checkpoints.TRACKER).touch()
    with (
        pytest.raises(
            RuntimeError, match=rf"nothing can be written to {file}.* No space .*; the same command continues"
        ),
        checkpoints.naming_a_full_disk(full_disk),
    ):
        logger.log({"critic/score/mean": 0.5}, 1)


def test_another_error_keeps_its_name(tmp_path):
    with pytest.raises(ConnectionResetError), checkpoints.naming_a_full_disk(tmp_path):
        raise ConnectionResetError(104, "of a reward service")


@pytest.mark.parametrize("folder", ["run", "run/checkpoints"])
def test_a_run_in_a_read_only_folder_is_refused_before_anything_starts(disk, tmp_path, folder):
    (disk / "run").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    folder = disk / folder
    message = rf"{folder} cannot be written to on .*: Read-only file system; .* another trainer.default_local_dir"
    with pytest.raises(OSError, match=message):
        run_lock.hold(folder)
    with Trainers() as trainers, pytest.raises(OSError, match=message):
        trainers.start([], tmp_path / "log", dict(os.environ), folder)
    assert not (tmp_path / "log").exists()
