"""What a folder of verl's answers says of a checkpoint."""

import argparse
import errno
import json
import os
import re

import pytest
import torch
import torch.distributed.tensor
from run_folders import write_damaged_answers

from cppo_verl.cli import main
from cppo_verl.evaluation.evaluate import link_weights, refuse_objects, request, show, summary


def test_summary_counts_problems_with_fewer_answers_than_asked_for(tmp_path):
    write_damaged_answers(tmp_path)
    value = summary(tmp_path, 5, 3)
    assert value["benchmarks"]["aime24"] == {
        "problems": 1,
        "answers": 3,
        "short": 0,
        "average": pytest.approx(2 / 3),
        "interval": [None, None],
        "pass": {1: pytest.approx(2 / 3), 2: pytest.approx(1.0)},
    }
    text = show(json.loads(json.dumps(value)))
    assert "| aime24    | 1        | 66.67" in text
    assert "aime25: 1 problem(s) have fewer than 3 answers" in text


@pytest.fixture
def evaluated(tmp_path):
    """A finished evaluation of a checkpoint, its folder, and the arguments that it was made with."""
    weights = tmp_path / "run" / "global_step_5" / "actor" / "model.pt"
    weights.parent.mkdir(parents=True)
    torch.save({}, weights)
    output = tmp_path / "e"
    asked = argparse.Namespace(
        checkpoint=weights.parents[1], samples=3, temperature=0.7, top_p=0.95, command=["--", "data.seed=1"]
    )
    write_damaged_answers(output)
    (output / "verl.log").touch()
    (output / "result.json").write_text(json.dumps(summary(output, 5, 3) | request(asked)))
    return output, ["--checkpoint", str(asked.checkpoint), "--samples", "3", "--", "data.seed=1"], weights


def test_a_result_is_shown_to_the_request_that_it_answers(evaluated, capsys):
    output, arguments, _ = evaluated
    for given in (arguments, []):
        assert main(["evaluate", "--output", str(output), *given]) == 0
        out = capsys.readouterr().out
        assert "result.json is there: showing it" in out and "| aime24    | 1        | 66.67" in out


@pytest.mark.parametrize(
    ("was", "asked", "difference"),
    [
        ("global_step_5", "global_step_6", "checkpoint was .*/global_step_5, is .*/global_step_6"),
        ("3", "4", "samples was 3, is 4"),
        ("data.seed=1", "data.seed=2", r"command was \['data.seed=1'\], is \['data.seed=2'\]"),
    ],
)
def test_the_result_of_another_request_is_not_shown(evaluated, was, asked, difference, capsys):
    output, arguments, weights = evaluated
    other = weights.parents[2] / "global_step_6" / "actor" / "model.pt"
    other.parent.mkdir(parents=True)
    other.write_bytes(weights.read_bytes())
    arguments = [argument.replace(was, asked) if argument.endswith(was) else argument for argument in arguments]
    assert main(["evaluate", "--output", str(output), *arguments]) == 1
    out, err = capsys.readouterr()
    assert out == "" and re.search(rf"result.json is of another evaluation \({difference}.*--force", err), err


def test_a_checkpoint_saved_again_is_another_request(evaluated, capsys):
    output, arguments, weights = evaluated
    os.utime(weights, ns=(0, 0))
    assert main(["evaluate", "--output", str(output), *arguments]) == 1
    assert "is of another evaluation (saved was " in capsys.readouterr().err


def test_a_damaged_result_a_folder_of_a_run_and_a_checkpoint_that_is_none_are_named(evaluated, capsys):
    output, arguments, weights = evaluated
    (output / "result.json").write_text('{"step": 5')
    assert main(["evaluate", "--output", str(output), *arguments]) == 1
    assert "result.json is damaged" in capsys.readouterr().err
    assert main(["evaluate", "--output", str(weights.parents[2]), *arguments]) == 1
    assert "holds what no evaluation has made: give another --output" in capsys.readouterr().err
    weights.unlink()
    assert main(["evaluate", "--output", str(output), *arguments]) == 1
    assert "expected a global_step_N folder" in capsys.readouterr().err


def test_a_weights_file_that_cannot_be_read_is_named(evaluated, capsys, monkeypatch):
    output, arguments, weights = evaluated
    (output / "result.json").unlink()

    def refuse(*_args, **_kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(weights))

    monkeypatch.setattr(torch, "load", refuse)
    assert main(["evaluate", "--output", str(output), *arguments]) == 1
    assert f"{weights}: Permission denied; --output must be" in capsys.readouterr().err


@pytest.mark.parametrize("made_by", ["hydra/hydra.yaml", ".hydra/hydra.yaml", "latest_checkpointed_iteration.txt"])
def test_an_output_within_a_run_is_refused_and_one_beside_it_is_not(evaluated, made_by, capsys):
    """A table of runs would count its scores as the run's own."""
    output, arguments, weights = evaluated
    run = weights.parents[2]
    (run / made_by).parent.mkdir(exist_ok=True)
    (run / made_by).touch()
    (run.parent / "of_another").mkdir()
    (run.parent / "of_another" / "hydra.yaml").touch()  # lies beside both
    assert main(["evaluate", "--output", str(run / "scores" / "of_step_5"), *arguments]) == 1
    assert f"is within the run {run} and would count as a part of it" in capsys.readouterr().err
    assert main(["evaluate", "--output", str(output), *arguments]) == 0


@pytest.mark.parametrize("below", [".", "scores"])
def test_an_output_that_can_be_no_folder_is_named(below, tmp_path, capsys):
    (tmp_path / "file").touch()
    output = tmp_path / "file" / below
    assert main(["evaluate", "--output", str(output), "--", "data.seed=1"]) == 1
    assert f"{output}: Not a directory; --output must be a folder" in capsys.readouterr().err


@pytest.mark.parametrize("with_checkpoint", [False, True])
def test_nothing_is_started_without_a_command(with_checkpoint, evaluated, tmp_path, capsys):
    _, arguments, _ = evaluated
    output = tmp_path / "new"
    assert main(["evaluate", "--output", str(output), *arguments[: 2 * with_checkpoint]]) == 1
    assert f"no result in {output} to show: give the training run's arguments, after --" in capsys.readouterr().err
    assert not output.exists()


def test_verl_is_shown_the_weights_of_a_checkpoint_and_nothing_else(evaluated, tmp_path):
    _, _, weights = evaluated
    (weights.parents[1] / "data.pt").touch()
    (weights.parents[1] / "transfer_queue").mkdir()
    for _ in range(2):
        link_weights(weights.parents[1], tmp_path / "checkpoint" / "global_step_5")
    [only] = (tmp_path / "checkpoint" / "global_step_5").iterdir()
    assert only.name == "actor" and only.resolve() == weights.parent and weights.exists()


class Owned:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_checkpoint_that_holds_more_than_tensors_is_refused_and_not_unpickled(protocol, evaluated, tmp_path, capsys):
    output, arguments, weights = evaluated
    torch.save({"model": Owned(tmp_path / "owned")}, weights, pickle_protocol=protocol)
    assert main(["evaluate", "--output", str(output), "--force", *arguments]) == 1
    assert "model.pt is damaged, or holds more than tensors (" in capsys.readouterr().err
    assert not (tmp_path / "owned").exists() and (output / "result.json").exists()


def test_the_sharded_weights_that_verl_saves_are_tensors(tmp_path):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        sharded = torch.distributed.tensor.distribute_tensor(torch.ones(2, 2), mesh)
        torch.save({"weight": sharded}, tmp_path / "model_world_size_1_rank_0.pt")
        torch.save({"rng": Owned(tmp_path / "owned")}, tmp_path / "extra_state_world_size_1_rank_0.pt")
        refuse_objects(tmp_path)
    finally:
        torch.distributed.destroy_process_group()
