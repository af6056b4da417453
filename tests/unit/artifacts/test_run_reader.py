"""Runs read from sound and damaged logs, and answers from verl's dumps."""

import json
import os
import tracemalloc

import pytest
from run_folders import answer, validation, write, write_damaged_answers

from cppo_verl.artifacts.run_reader import OLD_RECORD, read_generations, read_run, read_runs


def test_a_later_attempt_replaces_the_steps_it_did_again(tmp_path):
    write(
        tmp_path / "metrics-2.jsonl", validation(0, aime24=0.1), validation(10, aime24=0.2), validation(20, aime24=0.9)
    )
    write(tmp_path / "metrics-10.jsonl", validation(20, aime24=0.3))
    run = read_run(tmp_path)
    assert run.accuracies() == {0: {"aime24": 0.1}, 10: {"aime24": 0.2}, 20: {"aime24": 0.3}}
    assert run.notes == ["step 20 was validated twice; metrics-10.jsonl counts"]


def test_a_name_with_a_digit_that_is_no_decimal_ends_no_reading(tmp_path):
    for name in ("a1²2.jsonl", "²1.jsonl", "².jsonl"):
        write(tmp_path / name, validation(0, aime24=0.1))
    assert read_run(tmp_path).accuracies() == {0: {"aime24": 0.1}}


def test_steps_of_a_longer_attempt_that_was_given_up_do_not_count(tmp_path):
    steps = [validation(step, aime24=step / 100) for step in (0, 10, 20, 30)]
    write(tmp_path / "a" / "metrics-0.jsonl", *steps, validation(40, aime24=0.9))
    write(tmp_path / "a" / "metrics-1.jsonl", validation(10, aime24=0.5), validation(20, aime24=0.6))
    run = read_run(tmp_path / "a")
    assert run.accuracies() == {0: {"aime24": 0.0}, 10: {"aime24": 0.5}, 20: {"aime24": 0.6}}
    assert "steps 20 to 40 were given up: metrics-1.jsonl begins at step 10" in run.notes
    # a fresh start, of which nothing but the first validation is there yet
    write(tmp_path / "a" / "metrics-2.jsonl", validation(0, aime24=0.05))
    assert read_run(tmp_path / "a").accuracies() == {0: {"aime24": 0.05}}
    # another folder's metrics, such as those of an evaluation, are no attempt
    write(tmp_path / "b" / "metrics.jsonl", *steps)
    write(tmp_path / "b" / "evaluation" / "metrics.jsonl", validation(10, aime25=0.5))
    assert list(read_run(tmp_path / "b").accuracies()) == [0, 10, 20, 30]


def test_a_damaged_log_is_read_as_far_as_it_goes(tmp_path):
    path = write(
        tmp_path / "m.jsonl",
        validation(0, aime24=0.1),
        "not json",
        '{"step": 5, "data": {"val-core/aime24/acc/mean@16": NaN, "loss": null, "x": "text", "y": true}}',
        '{"stop": 6}',
        '{"step": "7", "data": {}}',
        "[" * 100_000,
        '{"step": 6, "data": {"huge": 1' + "0" * 400 + "}}",
        '{"step": 6, "data": {"huge": -1' + "0" * 5000 + "}}",
        validation(10, aime24=0.2),
        validation(20, aime24=0.5)[:-9],
        end="",
    )
    path.write_bytes(path.read_bytes().replace(b"not", b"n\xfft"))
    run = read_run(path)
    assert run.accuracies() == {0: {"aime24": 0.1}, 10: {"aime24": 0.2}}
    notes = "\n".join(run.notes)
    assert "3 line(s) are not JSON objects and were skipped; the last is cut off: a run killed, or still" in notes
    assert "2 line(s) without a step and data were skipped" in notes
    assert "values of huge, loss, val-core/aime24/acc/mean@16 that are not finite were skipped" in notes


def test_a_folder_of_runs_is_not_taken_for_one(tmp_path):
    for label, accuracy in (("cppo", 0.1), ("dppo", 0.3)):
        write(tmp_path / label / "logs" / "metrics-0.jsonl", validation(0, aime24=accuracy))
        write(tmp_path / label / "hydra" / "hydra.yaml", f"hydra: {{runtime: {{choices: {{method: {label}}}}}}}")
        write(tmp_path / label / "hydra" / "config.yaml", "{}")
    write(tmp_path / "failed" / "hydra" / "hydra.yaml", "hydra: {}")
    runs = read_runs(tmp_path)
    assert [(run.label, run.accuracies()) for run in runs] == [
        ("cppo", {0: {"aime24": 0.1}}),
        ("dppo", {0: {"aime24": 0.3}}),
    ]
    # without hydra's files nothing tells them apart, which is said
    for path in tmp_path.rglob("hydra.yaml"):
        path.unlink()
    (run,) = read_runs(tmp_path)
    assert any("metrics of 2 folders are taken for one run" in note for note in run.notes)


def test_the_largest_number_of_samples_counts(tmp_path):
    data = {
        "val-core/aime24/acc/mean@16": 0.4,
        "val-core/aime24/acc/mean@4": 0.9,
        "val-core/aime24/acc/best@16/mean": 1,
    }
    backwards = dict(reversed(data.items()))
    path = write(tmp_path / "m.jsonl", *(json.dumps({"step": s, "data": d}) for s, d in ((1, data), (2, backwards))))
    assert read_run(path).accuracies() == {1: {"aime24": 0.4}, 2: {"aime24": 0.4}}


@pytest.mark.parametrize("content", [None, "", "{}\n", '{"input": "a", "score": 1}\n'])
def test_a_folder_without_metrics_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "other.jsonl").write_text(content)
    with pytest.raises(FileNotFoundError, match="no metrics of verl's file logger in"):
        read_run(tmp_path)


def test_label_seed_and_last_step_come_from_hydras_files(tmp_path):
    write(tmp_path / "logs" / "metrics-0.jsonl", validation(0, aime24=0.1))
    write(tmp_path / "hydra" / "hydra.yaml", "hydra: {runtime: {choices: {method: cppo_soft}}}")
    write(tmp_path / "hydra" / "config.yaml", "{data: {seed: 3}, trainer: {total_training_steps: 40}}")
    run = read_run(tmp_path)
    assert (run.label, run.seed, run.t_stop) == ("cppo_soft", 3, 40)
    write(tmp_path / "hydra" / "config.yaml", "{data: {seed")
    assert "config.yaml: not readable (ParserError)" in read_run(tmp_path).notes[0]


@pytest.mark.parametrize("hydra", ["hydra", ".hydra"])
def test_a_metrics_file_has_the_config_beside_it_and_no_other_runs(hydra, tmp_path):
    file = write(tmp_path / "mine.jsonl", validation(0, aime24=0.1))
    for folder, method in (("", "cppo"), ("a/other", "dppo")):
        saved = tmp_path / folder / hydra
        write(saved / "hydra.yaml", f"hydra: {{runtime: {{choices: {{method: {method}}}}}}}")
        write(saved / "config.yaml", "{data: {seed: 3}, trainer: {total_training_steps: 40}}")
    assert (read_run(file).label, read_run(file).seed) == ("cppo", 3)
    (tmp_path / hydra / "hydra.yaml").unlink()
    run = read_run(file)
    assert (run.label, run.seed, run.t_stop, run.config) == ("mine", None, None, None)


def test_generations_are_grouped_by_problem_and_benchmark(tmp_path):
    write_damaged_answers(tmp_path)
    answers = read_generations(tmp_path, 5)
    assert answers.accuracy() == {("aime24", "p"): pytest.approx(2 / 3), ("aime25", "q"): 0.0}
    assert answers.accuracy("aime25") == {("aime25", "q"): 0.0}
    assert len(answers.notes) == 2
    with pytest.raises(FileNotFoundError, match="no generations of step 6"):
        read_generations(tmp_path, 6)


@pytest.mark.parametrize("sign", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\r"])
def test_no_sign_in_an_answer_ends_its_line(sign, tmp_path):
    """verl leaves in its dumps what is no ASCII, and Unicode has more ends of lines than JSON's."""
    records = [json.loads(answer("u", sample, f"a{sign}b", float(sample))) for sample in range(2)]
    write(tmp_path / "5.jsonl", *(json.dumps(record, ensure_ascii=False) for record in records))
    (tmp_path / "5.sources.json").write_text('{"u": "aime24"}')
    answers = read_generations(tmp_path, 5)
    assert answers.accuracy() == {("aime24", f"a{sign}b"): 0.5} and answers.notes == []


@pytest.mark.parametrize("text", ["[1]", "3", "{", "[" * 100_000, "\xff"])
def test_answers_whose_sources_are_damaged_count_as_one_benchmark(text, tmp_path):
    write_damaged_answers(tmp_path)
    (tmp_path / "5.sources.json").write_text(text, encoding="latin-1")
    answers = read_generations(tmp_path, 5)
    assert set(answers.correct) == {("all", "p"), ("all", "q")} and "no data sources beside it" in answers.notes[0]


def test_answers_of_any_size_are_read_in_little_memory(tmp_path):
    line = json.dumps({"input": "p", "output": "long " * 20_000, "acc": 1.0, "uid": "u_0_0"})
    write(tmp_path / "5.jsonl", *[line] * 200)
    tracemalloc.start()
    answers = read_generations(tmp_path, 5)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert answers.accuracy() == {("all", "p"): 1.0}
    assert peak < 5e6 < (tmp_path / "5.jsonl").stat().st_size / 3


def test_a_pipe_in_a_runs_folder_is_not_waited_for(tmp_path):
    write(tmp_path / "metrics.jsonl", validation(0, aime24=0.1))
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert read_run(tmp_path).accuracies() == {0: {"aime24": 0.1}}


def test_a_sweep_record_of_an_older_version_is_named(tmp_path):
    write(tmp_path / "metrics.jsonl", json.dumps({"step": 1, "data": {"critic/score/mean": 0.5}}))
    write(tmp_path / "hydra" / "hydra.yaml", "hydra: {runtime: {choices: {method: dppo}}}")
    write(tmp_path / "hydra" / "config.yaml", "data: {seed: 1}")
    write(tmp_path / OLD_RECORD, json.dumps({"swept": ["delta=0.1"]}))
    run = read_run(tmp_path)
    assert run.label == "dppo"
    assert run.notes == ["point.json: the sweep record of an older version; the run is not labelled by what was swept"]


@pytest.mark.parametrize("value", ["'40'", "forty", "4.5", "true", "[40]", "'${oc.env:UNSET}'", "'${nowhere}'", "'${"])
def test_text_where_a_number_belongs_is_named_and_the_run_is_read(value, tmp_path):
    write(tmp_path / "metrics.jsonl", validation(0, aime24=0.1))
    write(tmp_path / "hydra" / "hydra.yaml", "hydra: {runtime: {choices: {method: '${oc.env:UNSET}'}}}")
    write(tmp_path / "hydra" / "config.yaml", f"{{data: {{seed: 3}}, trainer: {{total_training_steps: {value}}}}}")
    run = read_run(tmp_path)
    if value == "'${":
        assert "config.yaml: not readable" in run.notes[0]
    else:
        assert (run.label, run.seed, run.t_stop) == ("${oc.env:UNSET}", 3, None)
        assert "config.yaml: trainer.total_training_steps is " in run.notes[0]
        assert run.accuracies() == {0: {"aime24": 0.1}}
