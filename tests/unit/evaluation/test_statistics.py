"""Evaluation statistics against enumeration and loops; runs and tables from sound and damaged logs."""

import itertools
import json
import math
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import fuzz
from run_folders import answer, write

from cppo_verl.artifacts.run_reader import read_generations, read_run, read_runs
from cppo_verl.cli import main
from cppo_verl.evaluation import paper_results
from cppo_verl.evaluation.evaluate import show, summary
from cppo_verl.evaluation.statistics import compare, interval_over_problems, interval_over_seeds, pass_at_k, select

# --- statistics -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "correct", "k"), [(5, 2, 1), (5, 2, 3), (6, 0, 2), (6, 6, 2), (7, 3, 7), (4, 1, 4)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(n, correct, k):
    answers = [1] * correct + [0] * (n - correct)
    subsets = list(itertools.combinations(answers, k))
    assert pass_at_k(correct, n, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets))


def test_impossible_pass_at_k_is_refused():
    for correct, n, k in [(1, 4, 5), (5, 4, 2), (1, 4, 0)]:
        with pytest.raises(ValueError, match=f"got k={k}, n={n}, correct={correct}"):
            pass_at_k(correct, n, k)


def test_intervals_hold_the_truth_as_often_as_they_say():
    import numpy as np

    rng = np.random.default_rng(0)
    over_seeds = over_problems = 0
    for trial in range(100):
        low, high = interval_over_seeds(rng.normal(0.3, 0.02, size=3))
        over_seeds += low <= 0.3 <= high
        low, high = interval_over_problems(rng.binomial(16, 0.3, size=30) / 16, seed=trial)
        over_problems += low <= 0.3 <= high
    assert over_seeds == pytest.approx(95, abs=5)
    assert over_problems == pytest.approx(94, abs=5)  # the bootstrap's own shortfall at 30 problems


def test_an_interval_of_three_seeds_by_hand():
    # t of two degrees of freedom at 97.5 %: 4.30265; standard deviation 0.02
    low, high = interval_over_seeds([0.30, 0.32, 0.34])
    assert (low, high) == pytest.approx((0.32 - 4.30265 * 0.02 / 3**0.5, 0.32 + 4.30265 * 0.02 / 3**0.5), abs=1e-6)
    assert all(map(math.isnan, interval_over_seeds([0.3])))
    assert all(map(math.isnan, interval_over_problems([0.3])))


def test_a_paired_comparison_enumerates_to_the_same_p_value():
    first = dict(enumerate([0.9, 0.4, 0.5, 0.8, 0.3, 0.7]))
    second = dict(enumerate([0.6, 0.5, 0.2, 0.4, 0.3, 0.5])) | {99: 1.0}
    result = compare(first, second)
    differences = [first[i] - second[i] for i in first]
    observed = abs(sum(differences))
    signs = list(itertools.product([1, -1], repeat=6))
    exact = sum(abs(sum(s * d for s, d in zip(sign, differences, strict=True))) >= observed - 1e-12 for sign in signs)
    assert result.p_value == pytest.approx(exact / len(signs), abs=0.02)
    assert result.difference == pytest.approx(fmean(differences))
    assert result.problems == 6
    assert result.interval.low < result.difference < result.interval.high
    assert compare(first, {99: 1.0}) is None


# --- the paper's choice of a step -----------------------------------------------------------------------------


@fuzz
@given(
    st.dictionaries(
        st.integers(0, 60),
        st.dictionaries(st.sampled_from("abc"), st.integers(0, 16).map(lambda n: n / 16), min_size=1),
    ),
    st.one_of(st.none(), st.integers(0, 60)),
)
def test_selection_is_the_loop(steps, t_stop):
    best = None
    curve = []
    for step in sorted(steps):
        if all(name in steps[step] for name in "ab") and (t_stop is None or step <= t_stop):
            mean = (steps[step]["a"] + steps[step]["b"]) / 2
            curve.append((step, mean))
            if best is None or mean > best[1]:
                best = (step, mean)
    got = select(steps, ["a", "b"], t_stop)
    if best is None:
        assert got is None
        return
    assert (got.step, got.mean) == best
    assert got.components == {name: steps[got.step][name] for name in "ab"}
    assert (got.last_step, got.last) == curve[-1]
    assert got.candidates == len(curve)
    means = [mean for _, mean in curve]
    windows = [means[i : i + 3] for i in range(len(means) - 2)] or [means]
    assert got.smoothed == pytest.approx(max(fmean(w) for w in windows))


def test_the_papers_table_is_printed_as_read():
    assert paper_results.TABLE["qwen3_1.7b"]["cppo"] == (34.79, 30.63, 30.21, 31.88)
    assert paper_results.TABLE["qwen3_30b_a3b_base"]["cispo"] is paper_results.COLLAPSE
    for rows in paper_results.TABLE.values():
        assert list(rows) == ["grpo", "minpro", "cispo", "dppo", "trm_max", "trm_avg", "cppo"]
        for values in rows.values():
            # the paper rounds the mean by its own components, a few by more than a hundredth
            assert values is None or abs(fmean(values[:3]) - values[3]) < 0.25


# --- runs -----------------------------------------------------------------------------------------------------


def line(step, **benchmarks):
    return json.dumps({"step": step, "data": {f"val-core/{name}/acc/mean@16": v for name, v in benchmarks.items()}})


def test_a_later_attempt_replaces_the_steps_it_did_again(tmp_path):
    write(tmp_path / "metrics-2.jsonl", line(0, aime24=0.1), line(10, aime24=0.2), line(20, aime24=0.9))
    write(tmp_path / "metrics-10.jsonl", line(20, aime24=0.3))
    run = read_run(tmp_path)
    assert run.accuracies() == {0: {"aime24": 0.1}, 10: {"aime24": 0.2}, 20: {"aime24": 0.3}}
    assert run.notes == ["step 20 was validated twice; metrics-10.jsonl counts"]


def test_a_damaged_log_is_read_as_far_as_it_goes(tmp_path):
    path = write(
        tmp_path / "m.jsonl",
        line(0, aime24=0.1),
        "not json",
        '{"step": 5, "data": {"val-core/aime24/acc/mean@16": NaN, "loss": null, "x": "text", "y": true}}',
        '{"stop": 6}',
        '{"step": "7", "data": {}}',
        "[" * 100_000,
        line(10, aime24=0.2),
        line(20, aime24=0.5)[:-9],
        end="",
    )
    path.write_bytes(path.read_bytes().replace(b"not", b"n\xfft"))
    run = read_run(path)
    assert run.accuracies() == {0: {"aime24": 0.1}, 10: {"aime24": 0.2}}
    notes = "\n".join(run.notes)
    assert "3 line(s) are not JSON objects and were skipped; the last is cut off: a run killed, or still" in notes
    assert "2 line(s) without a step and data were skipped" in notes
    assert "values of loss, val-core/aime24/acc/mean@16 that are not finite were skipped" in notes


def test_a_folder_of_runs_is_not_taken_for_one(tmp_path):
    for label, accuracy in (("cppo", 0.1), ("dppo", 0.3)):
        write(tmp_path / label / "logs" / "metrics-0.jsonl", line(0, aime24=accuracy))
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
    write(tmp_path / "logs" / "metrics-0.jsonl", line(0, aime24=0.1))
    write(tmp_path / "hydra" / "hydra.yaml", "hydra: {runtime: {choices: {method: cppo_soft}}}")
    write(tmp_path / "hydra" / "config.yaml", "{data: {seed: 3}, trainer: {total_training_steps: 40}}")
    run = read_run(tmp_path)
    assert (run.label, run.seed, run.t_stop) == ("cppo_soft", 3, 40)
    write(tmp_path / "hydra" / "config.yaml", "{data: {seed")
    assert "hydra: not readable" in read_run(tmp_path).notes[0]


def test_generations_are_grouped_by_problem_and_benchmark(tmp_path):
    write(
        tmp_path / "5.jsonl",
        *[answer("u1", i, "p", acc) for i, acc in enumerate([1.0, 0.0])],
        answer("u1", 2, "p", 0.0),
        answer("u1", 2, "p", 1.0, output=1),  # the second output of the same sample
        answer("u2", 0, "q", 0.0),
        json.dumps({"input": "r", "acc": None, "uid": "u3_0_0"}),
        '{"input": "cut',
    )
    (tmp_path / "5.sources.json").write_text(json.dumps({"u1": "aime24", "u2": "aime25"}))
    answers = read_generations(tmp_path, 5)
    assert answers.accuracy() == {("aime24", "p"): pytest.approx(2 / 3), ("aime25", "q"): 0.0}
    assert answers.accuracy("aime25") == {("aime25", "q"): 0.0}
    assert len(answers.notes) == 2
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
    with pytest.raises(FileNotFoundError, match="no generations of step 6"):
        read_generations(tmp_path, 6)


# --- the table ------------------------------------------------------------------------------------------------


@pytest.fixture
def three_seeds(tmp_path):
    runs = []
    for seed, shift in enumerate([0.0, 0.02, 0.04]):
        folder = tmp_path / f"cppo-{seed}"
        steps = {0: 0.1, 10: 0.3 + shift, 20: 0.2, 30: 0.9}
        write(
            folder / "metrics-0.jsonl", *(line(s, aime24=a, aime25=a + 0.1, aime26=a - 0.1) for s, a in steps.items())
        )
        write(folder / "hydra" / "hydra.yaml", "hydra: {runtime: {choices: {method: cppo}}}")
        write(folder / "hydra" / "config.yaml", f"{{data: {{seed: {seed}}}, trainer: {{total_training_steps: 20}}}}")
        runs.append(str(folder))
    return runs


def test_a_table_over_seeds_beside_the_papers(three_seeds, capsys):
    assert main(["table", *three_seeds, "--paper", "qwen3_1.7b", "--format", "csv"]) == 0
    out, err = capsys.readouterr()
    rows = [row.split(",") for row in out.replace("[25.0", "[25.0").splitlines()]
    assert rows[0][:6] == ["method", "runs", "aime24", "aime25", "aime26", "mean"]
    cppo = out.splitlines()[-1]
    # mean of 30, 32 and 34 per cent; half width 4.30265 * 2 / sqrt(3)
    assert cppo.startswith('cppo,3,32.00,42.00,22.00,"32.00 [27.03, 36.97]",10/10/10,20.00,')
    assert cppo.endswith("34.79,30.63,30.21,31.88")
    assert out.splitlines()[1].startswith("grpo,0,not run,not run,not run,not run,,,,30.41")
    assert "cppo: the best of 3 validations is 12.0 points above the last one" in err


@pytest.mark.parametrize("format", ["markdown", "latex"])
def test_other_formats_hold_the_same_cells(three_seeds, format, capsys):
    assert main(["table", "a|b=" + three_seeds[0], "x_y=" + three_seeds[1], "--format", format, "--t-stop", "40"]) == 0
    out = capsys.readouterr().out
    assert "90.00" in out
    if format == "markdown":
        lines = out.splitlines()
        assert len({len(text) for text in lines}) == 1
        assert lines[2].startswith("| a\\|b ")
    else:
        assert r"x\_y & 1 & 90.00" in out
        assert out.count(r"\\") == 3


def test_what_cannot_be_scored_is_said_and_the_rest_produced(three_seeds, tmp_path, capsys):
    other = write(tmp_path / "other.jsonl", line(0, gsm8k=0.5))
    command = ["table", *three_seeds, str(other), str(tmp_path / "nowhere"), "--benchmarks", "aime24,aime25"]
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert "| cppo" in out
    assert f"{other}: left out, no step validated on aime24, aime25 (it has gsm8k)" in err
    assert "skipped: no run at" in err
    assert main(["table", str(other), "--benchmarks", "aime24"]) == 1
    assert main(["table", "--paper", "qwen3_8b_base", "--format", "csv"]) == 0
    assert "cppo,0,not run,not run,not run,not run,,,,34.58,30.00,28.75,31.11" in capsys.readouterr().out


def test_a_table_is_not_overwritten_unasked(three_seeds, tmp_path, capsys):
    target = tmp_path / "t" / "table.md"
    assert main(["table", *three_seeds, "--output", str(target)]) == 0
    target.write_text("mine")
    assert main(["table", *three_seeds, "--output", str(target)]) == 1
    assert target.read_text() == "mine"
    assert "give --force" in capsys.readouterr().err
    assert main(["table", *three_seeds, "--output", str(target), "--force"]) == 0
    assert "| cppo" in target.read_text()


def test_two_methods_are_compared_on_the_same_problems(tmp_path, capsys):
    for label, right in (("a", [3, 2, 4]), ("b", [1, 2, 2])):
        folder = tmp_path / label
        write(folder / "metrics-0.jsonl", line(5, aime24=0.5))
        rows = [answer(f"u{p}", i, f"p{p}", float(i < n)) for p, n in enumerate(right) for i in range(4)]
        write(folder / "val" / "5.jsonl", *rows)
        (folder / "val" / "5.sources.json").write_text(json.dumps({f"u{p}": "aime24" for p in range(3)}))
        write(folder / "rollouts" / "5.jsonl", answer("u9", 0, "a training prompt", 1.0))
    (tmp_path / "b").rename(tmp_path / "lr=1e-6")  # as hydra's sweeps name folders
    runs = [f"a={tmp_path / 'a'}", f"b={tmp_path / 'lr=1e-6'}"]
    assert main(["table", str(tmp_path / "lr=1e-6"), "--format", "csv"]) == 0
    assert "\nlr=1e-6,1,50.00," in capsys.readouterr().out
    assert main(["table", *runs, "--compare", "a", "b"]) == 0
    assert "a - b, all problems: +33.33 points" in capsys.readouterr().out
    assert main(["table", *runs, "--compare", "a", "c"]) == 1
    assert "no scored run is labelled 'c': there are a, b" in capsys.readouterr().err
