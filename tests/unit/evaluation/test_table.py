"""Runs as one table: scores, the paper's rows, warnings and comparisons."""

import json
from pathlib import Path

import pytest
from run_folders import answer, validation, write

from cppo_verl.artifacts.sweep_record import write_record
from cppo_verl.cli import main


@pytest.fixture
def three_seeds(tmp_path):
    runs = []
    for seed, shift in enumerate([0.0, 0.02, 0.04]):
        folder = tmp_path / f"cppo-{seed}"
        steps = {0: 0.1, 10: 0.3 + shift, 20: 0.2, 30: 0.9}
        write(
            folder / "metrics-0.jsonl",
            *(validation(s, aime24=a, aime25=a + 0.1, aime26=a - 0.1) for s, a in steps.items()),
        )
        write(folder / "hydra" / "hydra.yaml", "hydra: {runtime: {choices: {method: cppo}}}")
        write(folder / "hydra" / "config.yaml", f"{{data: {{seed: {seed}}}, trainer: {{total_training_steps: 20}}}}")
        runs.append(str(folder))
    return runs


def test_table_shows_seeds_beside_the_papers_rows(three_seeds, capsys):
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


@pytest.mark.parametrize(
    "value", ["soon", "${oc.env:SECRET}", "${${name}:SECRET}", "${ oc.env:SECRET }", "${oc.env:UNSET}"]
)
def test_an_odd_config_is_named_and_the_other_runs_are_scored(three_seeds, value, capsys, monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    folder = Path(three_seeds[0]) / "hydra"
    text = f"{{name: oc.env, data: {{seed: '{value}'}}, trainer: {{total_training_steps: '{value}'}}}}"
    write(folder / "config.yaml", text)
    write(folder / "hydra.yaml", f"hydra: {{runtime: {{choices: {{method: '{value}'}}}}}}")
    assert main(["table", *three_seeds]) == 0
    out, err = capsys.readouterr()
    assert "| cppo " in out and "90.00" in out
    assert "data.seed is '" in err and "trainer.total_training_steps is '" in err and "hunter2" not in out + err


@pytest.mark.parametrize("format", ["markdown", "latex"])
def test_table_formats_hold_the_same_cells(three_seeds, format, capsys):
    runs = ["a|\nb=" + three_seeds[0], "x_y^2=" + three_seeds[1]]
    assert main(["table", *runs, "--format", format, "--t-stop", "40"]) == 0
    out = capsys.readouterr().out
    assert "90.00" in out
    if format == "markdown":
        lines = out.splitlines()
        assert len({len(text) for text in lines}) == 1
        assert lines[2].startswith("| a\\| b ")
    else:
        assert r"x\_y\textasciicircum{}2 & 1 & 90.00" in out
        assert out.count(r"\\") == 3


def test_table_names_the_runs_that_cannot_be_scored_and_shows_the_rest(three_seeds, tmp_path, capsys):
    other = write(tmp_path / "other.jsonl", validation(0, gsm8k=0.5))
    command = ["table", *three_seeds, str(other), str(tmp_path / "nowhere"), "--benchmarks", "aime24,aime25"]
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert "| cppo" in out
    assert f"{other}: left out, no step validated on aime24, aime25 (it has gsm8k)" in err
    assert "skipped: no run at" in err
    assert main(["table", str(other), "--benchmarks", "aime24"]) == 1
    late = write(tmp_path / "late.jsonl", validation(10, gsm8k=0.5))
    assert main(["table", str(late), "--t-stop", "5"]) == 1
    assert f"{late}: left out, no step up to 5 validated on gsm8k (it has gsm8k)" in capsys.readouterr().err
    assert main(["table", str(tmp_path / "nowhere"), "--settings", "--paper", "qwen3_8b_base"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and "no run to read the settings of" in err
    assert main(["table", "--paper", "qwen3_8b_base", "--format", "csv"]) == 0
    assert "cppo,0,not run,not run,not run,not run,,,,34.58,30.00,28.75,31.11" in capsys.readouterr().out


def test_table_compares_two_methods_on_the_same_problems(tmp_path, capsys):
    for label, right in (("a", [3, 2, 4]), ("b", [1, 2, 2])):
        folder = tmp_path / label
        write(folder / "metrics-0.jsonl", validation(5, aime24=0.5))
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
    assert main(["table", *runs, "--compare", "a", "b", "--format", "csv"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("method,runs,") and "a - b" not in out and "a - b, all problems: +33.33 points" in err
    assert main(["table", *runs, "--compare", "a", "c"]) == 1
    assert "no scored run is labelled 'c': there are a, b" in capsys.readouterr().err


def test_a_method_whose_runs_collapsed_has_no_score_and_one_of_several_is_named(tmp_path, capsys):
    curves = {"a": [0.2, 0.4, 0.1, 0.05], "b": [0.2, 0.4, 0.1, 0.3], "c": [0.2, 0.4, 0.3, 0.3]}
    for name, curve in curves.items():
        lines = [validation(10 * i, aime24=value) for i, value in enumerate(curve)]
        write(tmp_path / name / "metrics-0.jsonl", *lines)
    paths = {name: str(tmp_path / name) for name in curves}
    assert main(["table", "x=" + paths["a"], "y=" + paths["b"], "--format", "csv"]) == 0
    out = capsys.readouterr().out
    assert "x,1,collapse,collapse,20,5.00," in out and "y,1,40.00,40.00,10," in out
    assert main(["table", "x=" + paths["a"], "x=" + paths["c"], "--format", "csv"]) == 0
    out, err = capsys.readouterr()
    assert "x,2,40.00," in out and "x: 1 of its 2 runs collapsed (step 20)" in err
    assert main(["table", "x=" + paths["a"], "--format", "csv", "--collapse-share", "0.1"]) == 0
    assert "x,1,40.00,40.00,10," in capsys.readouterr().out


def of_scale(folder, scale, accuracies, swept=()):
    """A run of a recipe whose mean accuracy at steps 10, 20, ... is one of these."""
    steps = enumerate(accuracies, start=1)
    write(folder / "metrics-0.jsonl", *(validation(10 * n, aime24=a, aime25=a, aime26=a) for n, a in steps))
    choices = f"{{method: cppo{f', scale: {scale}' if scale else ''}}}"
    write(folder / "hydra" / "hydra.yaml", f"hydra: {{runtime: {{choices: {choices}}}}}")
    write(folder / "hydra" / "config.yaml", "{trainer: {total_training_steps: 100}}")
    if swept:
        write_record(folder, [], list(swept), 0)
    return str(folder)


@pytest.mark.parametrize("share", ["50", "-0.5", "nan"])
def test_a_collapse_share_that_is_none_is_refused(share, three_seeds, capsys):
    """Under 50, which may mean per cent, every run would have collapsed."""
    assert main(["table", *three_seeds, f"--collapse-share={share}"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and f"--collapse-share={float(share)} is no share: give a number from 0 to 1" in err


def test_all_models_stand_in_one_matrix(tmp_path, capsys):
    runs = [
        of_scale(tmp_path / "a", "qwen3_1.7b", [0.2, 0.5]),
        of_scale(tmp_path / "b", "qwen3_30b_a3b_base", [0.6, 0.1, 0.1]),  # collapsed
        of_scale(tmp_path / "c", "qwen3_0.6b", [0.9]),
        of_scale(tmp_path / "d", None, [0.9]),
    ]
    assert main(["table", *runs, "--paper", "all", "--format", "csv"]) == 0
    out, err = capsys.readouterr()
    header, *rows = [line.split(",") for line in out.splitlines()]
    assert [row[0] for row in rows] == ["grpo", "minpro", "cispo", "dppo", "trm_max", "trm_avg", "cppo"]
    cell = dict(zip(header, rows[-1], strict=True))
    assert cell["qwen3_1.7b mean"] == "50.00" and cell["qwen3_1.7b paper mean"] == "31.88"
    assert cell["qwen3_30b_a3b_base aime25"] == cell["qwen3_30b_a3b_base mean"] == "collapse"
    assert cell["qwen3_8b_base mean"] == "not run" and cell["qwen3_8b_base paper mean"] == "31.11"
    assert dict(zip(header, rows[2], strict=True))["qwen3_30b_a3b_base paper mean"] == "collapse"
    assert f"{runs[2]}: left out, its recipe's scale is qwen3_0.6b, no model of Table 1" in err
    assert f"{runs[3]}: left out, its recipe's scale is None" in err and "90.00" not in out
    assert main(["table", *runs, "--paper", "all", "--compare", "cppo", "dppo"]) == 1
    assert "--compare needs the runs of one model: --paper qwen3_1.7b or" in capsys.readouterr().err


def test_a_sweep_over_models_fills_the_rows_of_its_methods(tmp_path, capsys):
    for model in ("qwen3_1.7b", "qwen3_8b_base"):
        of_scale(tmp_path / model, model, [0.4], swept=[f"scale={model}", "method=cppo", "seed=1"])
    assert main(["table", str(tmp_path), "--paper", "all", "--format", "csv"]) == 0
    header, *rows = [line.split(",") for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 7
    cell = dict(zip(header, rows[-1], strict=True))
    assert cell["qwen3_1.7b mean"] == cell["qwen3_8b_base mean"] == "40.00"


def test_the_settings_of_runs_stand_beside_the_papers(tmp_path, capsys):
    run = of_scale(tmp_path / "a", "qwen3_1.7b", [0.2])
    loss = "{delta: 0.3, delta_b: '${trust_region.delta_b}', w_min: 0.8}"
    actor = f"{{ppo_mini_batch_size: 16, ppo_epochs: 2, policy_loss: {loss}}}"
    write(
        tmp_path / "a" / "hydra" / "config.yaml",
        f"{{data: {{train_batch_size: 64}}, trust_region: {{delta_b: 0.04}}, actor_rollout_ref: {{actor: {actor}}}}}",
    )
    assert main(["table", "mine=" + run, "--paper", "qwen3_1.7b", "--settings", "--format", "csv"]) == 0
    header, *rows = [line.split(",") for line in capsys.readouterr().out.splitlines()]
    assert header == ["setting", "paper qwen3_1.7b", "mine"]
    cells = {name: values for name, *values in rows}
    assert cells["updates a step"] == ["2", "8"] and cells["delta"] == ["0.15", "0.3"]
    assert cells["delta_b"] == ["0.015", "0.04"] and cells["budget"] == ["fixed", ""]
    assert cells["validation: top-p"] == ["0.95", ""]
