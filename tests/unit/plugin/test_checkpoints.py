"""What a run keeps: metrics files, the sources of its answers, the best checkpoint, and its line a step."""

import json
import os
import re
import shutil
import socket
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import verl
from omegaconf import OmegaConf, open_dict
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from cppo_verl.plugin import checkpoints
from cppo_verl.plugin.trainer import TrustRegionTrainerSync


@pytest.fixture
def config(tmp_path, monkeypatch):
    # set and deleted again, so that what the code sets is undone after the test
    monkeypatch.setenv(checkpoints.METRICS_PATH, "")
    monkeypatch.delenv(checkpoints.METRICS_PATH)
    config = OmegaConf.create({"trainer": {"logger": ["console"], "default_local_dir": str(tmp_path / "run")}})
    OmegaConf.set_struct(config, True)
    return config


def test_each_attempt_has_a_metrics_file_of_its_own(config, tmp_path, monkeypatch):
    assert checkpoints.log_to_file(config) == tmp_path / "run" / "metrics-0.jsonl"
    assert config.trainer.logger == ["console", "file"]
    for name in ("metrics-0.jsonl", "metrics-9.jsonl", "metrics-10.jsonl", "metrics-x.jsonl"):
        (tmp_path / "run" / name).touch()
    monkeypatch.delenv(checkpoints.METRICS_PATH)
    assert checkpoints.log_to_file(config) == tmp_path / "run" / "metrics-11.jsonl"
    assert config.trainer.logger == ["console", "file"]


def test_a_path_that_the_user_set_stays(config, tmp_path, monkeypatch):
    monkeypatch.setenv(checkpoints.METRICS_PATH, str(tmp_path / "mine.jsonl"))
    config.trainer.logger = "wandb"
    assert checkpoints.log_to_file(config) == tmp_path / "mine.jsonl"
    assert config.trainer.logger == ["wandb", "file"]
    assert not (tmp_path / "run").exists()


def checkpoint(folder, step, content):
    for name in ("actor/model_rank_0.pt", "actor/huggingface/config.json", "data.pt"):
        path = folder / f"global_step_{step}" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".pt":
            with zipfile.ZipFile(path, "w") as file:  # as torch.save does
                file.writestr("data", f"{content} {name}")
        else:
            path.write_text(f"{content} {name}")


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("linkable", [True, False])
def test_the_best_survives_verls_rotation_and_the_one_before_goes(tmp_path, monkeypatch, linkable):
    if not linkable:

        def refuse(*_):
            raise OSError("no hard links here")

        monkeypatch.setattr(checkpoints.os, "link", refuse)
    assert checkpoints.best_so_far(tmp_path) is None
    for step in (3, 6):
        checkpoint(tmp_path, step, "weights")
        whole = contents(tmp_path / f"global_step_{step}")
        # the ranks of one machine, at once
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _, step=step: checkpoints.link_checkpoint(tmp_path, step), range(8)))
        checkpoints.write_best(tmp_path, step, step / 10)
        checkpoints.forget_others(tmp_path, step)
        for file in (tmp_path / f"global_step_{step}").rglob("*.*"):
            file.unlink()
        assert contents(tmp_path / "best" / f"global_step_{step}") == whole
        assert [p.name for p in (tmp_path / "best").glob("global_step_*")] == [f"global_step_{step}"]
        assert checkpoints.best_so_far(tmp_path) == {"step": step, "accuracy": step / 10}
    (tmp_path / "best" / "best.json").write_text('{"step": 6, "acc')
    assert checkpoints.best_so_far(tmp_path) is None


@pytest.fixture
def validated(tmp_path):
    """A trainer that has just validated its checkpoint of step 6, as (whether it only validates) -> best so far."""
    checkpoint(tmp_path, 6, "weights")
    (tmp_path / checkpoints.TRACKER).write_text("6")

    def end_validation(val_only):
        trainer = TrustRegionTrainerSync.__new__(TrustRegionTrainerSync)
        trainer.config = OmegaConf.create({"trainer": {"default_local_dir": str(tmp_path), "val_only": val_only}})
        trainer.global_steps, trainer.validation = 6, {"val-core/aime24/acc/mean@16": 0.5}
        trainer._everywhere = lambda function: function()  # this machine alone, without Ray
        trainer.on_validate_end()
        return checkpoints.best_so_far(tmp_path)

    return end_validation


def test_a_validation_alone_is_not_compared_with_the_runs_own(validated, tmp_path):
    assert validated(val_only=True) is None
    assert not (tmp_path / "best").exists()
    assert validated(val_only=False) == {"step": 6, "accuracy": 0.5}


@pytest.mark.parametrize("before", [None, 3])
def test_links_that_a_killed_attempt_left_are_not_mixed_with_the_best(validated, tmp_path, before):
    if before:
        checkpoint(tmp_path, before, "weights")
        checkpoints.link_checkpoint(tmp_path, before)
        checkpoints.write_best(tmp_path, before, 0.25)
    checkpoints.link_checkpoint(tmp_path, 6)
    (tmp_path / "best" / "global_step_6" / "data.pt").unlink()  # killed before this one
    checkpoints.unshare(tmp_path, 6)
    checkpoint(tmp_path, 6, "weights of another attempt")
    assert validated(val_only=False) == {"step": 6, "accuracy": 0.5}
    assert contents(tmp_path / "best" / "global_step_6") == contents(tmp_path / "global_step_6")
    assert [p.name for p in (tmp_path / "best").glob("global_step_*")] == ["global_step_6"]


def test_sources_of_the_answers(tmp_path):
    checkpoints.write_sources(tmp_path / "validation", 7, ["u", "v", "u"], ["aime24", "aime25", "aime24"])
    (path,) = (tmp_path / "validation").iterdir()
    assert (path.name, json.loads(path.read_text())) == ("7.sources.json", {"u": "aime24", "v": "aime25"})


def test_mean_accuracy_is_unweighted_over_benchmarks():
    metrics = {"val-core/aime24/acc/mean@16": 0.2, "val-core/aime25/acc/mean@16": 0.4, "val-aux/x/acc/mean@16": 1.0}
    assert checkpoints.mean_accuracy(metrics) == pytest.approx(0.3)
    assert checkpoints.mean_accuracy({"critic/score/mean": 1.0}) is None


def test_the_line_says_what_is_known():
    metrics = {"critic/score/mean": 0.5, "trust_region/masked_share": 0.074, "perf/total_num_tokens": 9000}
    line = checkpoints.progress_line(3, 30, 4000.4, metrics | {"perf/time_per_step": 4.0}, 0.25)
    left = "1:06:40 left  reward 0.500  validation 25.0%  masked 7.4%  2,250 tokens/s"
    assert line == f"cppo_verl  step 3/30  {left}"
    assert checkpoints.progress_line(30, 30, 0.0, {}, None) == "cppo_verl  step 30/30  0:00:00 left"


def test_a_checkpoint_that_is_elsewhere_leaves_nothing(tmp_path):
    checkpoints.link_checkpoint(tmp_path, 5)
    assert list(Path(tmp_path).iterdir()) == []


def test_a_resume_that_would_start_from_scratch_is_refused(config, tmp_path):
    run = tmp_path / "run"
    with open_dict(config):
        config.trainer.resume_mode = "auto"
    checkpoints.check_resume(config)  # a first start
    for step in (3, 6):
        checkpoint(run, step, "weights")
    tracker = run / checkpoints.TRACKER
    tracker.write_text("6")
    checkpoints.check_resume(config)
    for damaged in ("9", "6\0"):
        tracker.write_text(damaged)
        with pytest.raises(ValueError, match=rf"says {re.escape(repr(damaged))}, but .* are: 3, 6\. Write one of them"):
            checkpoints.check_resume(config)
    config.trainer.resume_mode = "disable"
    checkpoints.check_resume(config)


def test_a_checkpoint_of_another_number_of_ranks_is_refused_before_they_look_for_their_parts(config, tmp_path):
    run = tmp_path / "run"
    checkpoint(run, 6, "weights")
    (run / checkpoints.TRACKER).write_text("6")
    with open_dict(config):
        config.trainer.update({"resume_mode": "auto", "nnodes": 2, "n_gpus_per_node": 2})
    file = run / "global_step_6" / "actor" / "model_rank_0.pt"
    file = file.rename(file.with_name("model_world_size_4_rank_3.pt"))
    checkpoints.check_resume(config)
    file.rename(file.with_name("model_world_size_16_rank_3.pt"))
    with pytest.raises(ValueError, match=r"is of 16 ranks, .* this run has 4 \(.*nnodes=2 .*: continue it on 16 G"):
        checkpoints.check_resume(config)


@pytest.mark.parametrize("file", ["actor/model_rank_0.pt", "data.pt"])
@pytest.mark.parametrize("share", [0, 0.3, 0.999])
def test_a_checkpoint_that_was_cut_off_is_skipped_with_a_word(config, tmp_path, capsys, file, share):
    run, tracker = tmp_path / "run", tmp_path / "run" / checkpoints.TRACKER
    with open_dict(config):
        config.trainer.resume_mode = "auto"
    for step in (3, 6, 9):
        checkpoint(run, step, "weights")
    shutil.rmtree(run / "global_step_3" / "actor")  # as verl's rotation leaves it
    tracker.write_text("9")
    damaged = run / "global_step_9" / file
    os.truncate(damaged, int(share * damaged.stat().st_size))
    checkpoints.check_resume(config)
    assert tracker.read_text() == "6"
    assert "the checkpoint of step 9 is damaged: going on from step 6" in capsys.readouterr().out
    os.truncate(run / "global_step_6" / file, 1)
    with pytest.raises(ValueError, match="says '6', .* whole checkpoint beside it are: none"):
        checkpoints.check_resume(config)


def test_a_checkpoint_that_was_cut_off_at_any_byte_is_not_whole(tmp_path):
    checkpoint(tmp_path, 9, "weights")
    for file in ("actor/model_rank_0.pt", "data.pt"):
        path = tmp_path / "global_step_9" / file
        content = path.read_bytes()
        assert checkpoints.is_whole(tmp_path, 9)
        for length in range(len(content)):
            path.write_bytes(content[:length])
            assert not checkpoints.is_whole(tmp_path, 9), (file, length)
        path.write_bytes(content)


def test_a_tracker_file_that_was_cut_off_gives_way_to_the_newest_whole_checkpoint(config, tmp_path, capsys):
    run, tracker = tmp_path / "run", tmp_path / "run" / checkpoints.TRACKER
    with open_dict(config):
        config.trainer.resume_mode = "auto"
    for step in (3, 6, 9):
        checkpoint(run, step, "weights")
    os.truncate(run / "global_step_9" / "data.pt", 9)
    tracker.touch()  # as verl truncates it
    checkpoints.check_resume(config)
    assert tracker.read_text() == "6"
    assert f"{checkpoints.TRACKER} is damaged: going on from step 6" in capsys.readouterr().out


def test_a_checkpoint_saved_anew_leaves_the_best_alone(tmp_path):
    checkpoint(tmp_path, 3, "good weights")
    whole = contents(tmp_path / "global_step_3")
    checkpoints.link_checkpoint(tmp_path, 3)
    checkpoints.unshare(tmp_path, 3)
    checkpoint(tmp_path, 3, "worse weights")
    assert contents(tmp_path / "best" / "global_step_3") == whole != contents(tmp_path / "global_step_3")


def test_the_best_of_a_run_that_is_not_continued_is_set_aside(tmp_path):
    assert checkpoints.set_aside_best(tmp_path, 0) is None
    (tmp_path / "best").mkdir()
    checkpoints.write_best(tmp_path, 6, 0.9)
    assert checkpoints.set_aside_best(tmp_path, 6) is None
    assert checkpoints.set_aside_best(tmp_path, 3) == "best-1"
    (tmp_path / "best-1").mkdir()
    assert checkpoints.set_aside_best(tmp_path, 0) == "best-2"


def test_verl_names_no_checkpoint_that_it_saves_asynchronously_as_the_newest(tmp_path):
    """Why a trainer refuses async_save; once verl finishes these checkpoints, it need not."""
    settings = {"default_local_dir": str(tmp_path), "default_hdfs_dir": None}
    actor = {"checkpoint": {"async_save": True}}
    trainer = SimpleNamespace(
        config=OmegaConf.create({"trainer": settings, "actor_rollout_ref": {"actor": actor}}),
        actor_rollout_wg=SimpleNamespace(save_checkpoint=lambda *_, **__: None),
        train_dataloader=SimpleNamespace(state_dict=dict),
        checkpoint_callback=SimpleNamespace(on_save=lambda **_: None),
        global_steps=3,
        use_critic=False,
        trainer_mode="sync",
    )
    PPOTrainerSync._save_checkpoint(trainer)
    assert (tmp_path / "global_step_3").exists() and checkpoints.newest(tmp_path) is None
    asks = [path for path in Path(verl.__file__).parent.rglob("*.py") if "finalize_async_calls" in path.read_text()]
    assert asks == []


def test_checkpoints_of_earlier_attempts_rotate_too(tmp_path):
    for step in (3, 6, 8, 9, 12):
        checkpoint(tmp_path, step, "weights")
    checkpoints.rotate(tmp_path, 9, "critic", 1)
    checkpoints.rotate(tmp_path, 9, "actor", None)
    assert all((tmp_path / f"global_step_{step}" / "actor").exists() for step in (3, 6, 8, 9, 12))
    checkpoints.rotate(tmp_path, 9, "actor", 2)
    # 12 may be half of a checkpoint, of an attempt that was killed
    left = [step for step in (3, 6, 8, 9, 12) if (tmp_path / f"global_step_{step}" / "actor").exists()]
    assert left == [8, 9, 12]


@pytest.mark.parametrize(("role", "keep", "left"), [("critic", 1, "3689"), ("actor", None, "3689"), ("actor", 2, "89")])
def test_the_responses_that_asynchronous_trainers_save_go_with_the_weights(tmp_path, role, keep, left):
    for step in (3, 6, 8, 9):
        checkpoint(tmp_path, step, "weights")
        (tmp_path / f"global_step_{step}" / "transfer_queue").mkdir()
    shutil.rmtree(tmp_path / "global_step_3" / "actor")  # by verl, which leaves the responses
    checkpoints.rotate(tmp_path, 9, role, keep)
    found = tmp_path.glob("global_step_*/transfer_queue")
    assert "".join(sorted(path.parent.name[-1] for path in found)) == left


def test_a_failed_checkpoint_names_node_folder_and_what_is_whole(tmp_path):
    error = OSError(
        "ray::WorkerDict.save_checkpoint() (pid=7, ip=10.0.0.3, actor_id=1f)\nOSError: No space left on device"
    )
    message = checkpoints.not_written(tmp_path, 6, error)
    assert message.startswith(f"on 10.0.0.3: the checkpoint of step 6 could not be written to {tmp_path} (")
    assert "No space left on device; there is none before it. Make room" in message
    (tmp_path / checkpoints.TRACKER).write_text("3")
    message = checkpoints.not_written(tmp_path, 6, OSError(28, "No space left on device"))
    assert message.startswith(f"on {socket.gethostname()}: ")
    assert "No space left on device; that of step 3 is whole" in message
