"""The prepared files, from look-alikes of the public ones whose counts are known by hand."""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import unicodedata

import pytest

datasets = pytest.importorskip("datasets")
pytest.importorskip("verl")
pyarrow_parquet = pytest.importorskip("pyarrow.parquet")

from cppo_verl.data import prepare  # noqa: E402
from cppo_verl.data import reasoning_gym as rg  # noqa: E402

DAPO_WORDING = "Do this one in steps and close with Answer: and the number.\n\n{}\n\nAnswer on a line of its own."


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def run(*arguments) -> int:
    parser = argparse.ArgumentParser()
    prepare.add_arguments(parser)
    return prepare.run(parser.parse_args([str(a) for a in arguments]))


def rows(path) -> list[dict]:
    return pyarrow_parquet.read_table(path).to_pylist()


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def sha256(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def manifest(folder) -> dict:
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


def dapo_row(problem, answer, **changes):
    row = {
        "data_source": "math_dapo",
        "prompt": [{"role": "user", "content": DAPO_WORDING.format(problem)}],
        "ability": "MATH",
        "reward_model": {"style": "rule-lighteval/MATH_v2", "ground_truth": answer},
        "extra_info": {"index": f"uuid {problem[:9]}"},
    }
    return row | changes


def write(path, content):
    """Rows as the kind of file that the suffix of ``path`` names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(content).to_parquet(path)
    elif path.suffix == ".csv":
        datasets.Dataset.from_list(content).to_csv(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(content, indent=1), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content), encoding="utf-8")
    return path


def aime_year(year, answer="{}", problem="problem", key="answer"):
    return [{problem: f"Problem {i} of {year}", key: answer.format(i), "url": "x"} for i in range(30)]


@pytest.fixture
def planted(tmp_path):
    """11 rows: 5 prompts, of which one is repeated in four writings and one has two answers."""
    cafe = "A caf\u00e9 sells 3 cakes"
    content = [
        dapo_row(cafe, "3"),
        dapo_row("Second", "2"),
        dapo_row(unicodedata.normalize("NFD", cafe), "3"),
        dapo_row("A caf\u00e9  sells\u00a03\ncakes", " 3"),
        dapo_row("\ufeff" + cafe, "3"),
        dapo_row("Torn", "5"),
        dapo_row("Torn", "6"),
        dapo_row("Torn", "5"),
        dapo_row("Second", "2"),
        dapo_row("second", "7"),
        dapo_row("Last", "-1"),
    ]
    return write(tmp_path / "in" / "dapo.parquet", content)


def test_dapo_is_deduplicated(planted, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "prepare", "dapo", "--source", "a b"])
    out = tmp_path / "out"
    assert run("dapo", "--source", planted, "--output", out, "--expect-rows", 4) == 0
    got = rows(out / "train.parquet")
    assert [row["extra_info"]["index"] for row in got] == [
        "uuid A caf\u00e9 se",
        "uuid Second",
        "uuid second",
        "uuid Last",
    ]
    assert [row["reward_model"] for row in got] == [{"style": "rule", "ground_truth": x} for x in ("3", "2", "7", "-1")]
    assert got[0]["prompt"] == [{"role": "user", "content": DAPO_WORDING.format("A caf\u00e9 sells 3 cakes")}]
    assert set(got[0]) == {"data_source", "prompt", "ability", "reward_model", "extra_info"}
    assert {row["data_source"] for row in got} == {"math_dapo"}

    assert names(out) == ["manifest.json", "train.parquet"]
    written = manifest(out)
    (conflict,) = written["files"]["train.parquet"].pop("conflicting")
    assert conflict["answers"] == ["5", "6"] and "Torn" in conflict["prompt"]
    assert written["files"]["train.parquet"] == {
        "read": 11,
        "duplicates": 6,
        "deduplicated": 4,
        "rows": 4,
        "sha256": sha256(out / "train.parquet"),
    }
    assert written["sources"] == [{"part": "train", "files": {"dapo.parquet": sha256(planted)}}]
    assert written["command"] == "python -m cppo_verl prepare dapo --source 'a b'"
    assert written["versions"]["datasets"] == datasets.__version__
    printed = capsys.readouterr().out
    assert "11 rows read, 6 duplicates and 1 prompts with conflicting answers dropped, 4 left" in printed
    assert "5 | 6" in printed


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_same_rows_from_other_kinds_of_file(planted, tmp_path, name):
    content = rows(planted)
    source = write(tmp_path / "folder" / name, content[:3])
    write(source.with_name("b" + source.suffix), content[3:])
    (source.parent / "README.md").write_text("not data")
    for place, out in ((planted, "one"), (source.parent, "two")):
        assert run("dapo", "--source", place, "--output", tmp_path / out) == 0
    assert rows(tmp_path / "one" / "train.parquet") == rows(tmp_path / "two" / "train.parquet")


def test_expected_rows(planted, tmp_path, capsys):
    assert run("dapo", "--source", planted, "--output", tmp_path / "out", "--expect-rows", 5) == 1
    assert "4 rows are left, --expect-rows is 5" in capsys.readouterr().err
    assert names(tmp_path / "out") == []
    # Asked again of files that are up to date, the question is still answered.
    assert run("dapo", "--source", planted, "--output", tmp_path / "out") == 0
    assert run("dapo", "--source", planted, "--output", tmp_path / "out", "--expect-rows", 5) == 1


@pytest.fixture
def hub(monkeypatch):
    """A hub that serves what a test puts in; ``asked`` holds the calls."""

    def load_dataset(name, config=None, *, split=None, revision=None):
        hub.asked.append((name, config, split, revision))
        if name not in hub.serves:
            raise ConnectionError("no route to the hub")
        return datasets.Dataset.from_list(hub.serves[name])

    hub = argparse.Namespace(asked=[], serves={})
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return hub


def test_hub_rows_are_expected_around_17k(hub, tmp_path, capsys, monkeypatch):
    name, commit = "BytedTsinghua-SIA/DAPO-Math-17k", prepare.HUB["dapo"]["train"][0].revision
    assert (min(prepare.DAPO_ROWS), max(prepare.DAPO_ROWS)) == (17_000, 17_999)
    hub.serves[name] = [dapo_row("a", "1")]
    assert run("dapo", "--output", tmp_path / "1") == 1
    assert "1 rows are left, expected 17000 to 17999" in capsys.readouterr().err
    monkeypatch.setattr(prepare, "DAPO_ROWS", range(3, 5))
    for size, code in ((2, 1), (3, 0), (4, 0), (5, 1)):
        hub.serves[name] = [dapo_row(f"{i}", "1") for i in range(size)]
        assert run("dapo", "--output", tmp_path / f"{size} rows") == code
    assert run("dapo", "--output", tmp_path / "5 rows", "--expect-rows", 5) == 0
    assert hub.asked == [(name, None, None, commit)] * 6
    assert manifest(tmp_path / "3 rows")["sources"][0] == {
        "part": "train",
        "id": name,
        "config": None,
        "split": None,
        "revision": commit,
    }


def test_hub_branch_is_resolved_to_its_commit(hub, tmp_path, monkeypatch, capsys):
    import huggingface_hub

    def dataset_info(self, name, revision):
        return argparse.Namespace(sha={"main": "a" * 40, "v2": "b" * 40}[revision])

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    hub.serves["openai/gsm8k"] = [{"question": "Q", "answer": "#### 1"}]
    assert run("gsm8k", "--revision", "v2", "--output", tmp_path / "out") == 0
    assert hub.asked == [("openai/gsm8k", "main", split, "b" * 40) for split in ("train", "test")]
    written = manifest(tmp_path / "out")
    assert {source["revision"] for source in written["sources"]} == {"b" * 40}
    assert written["request"]["sources"]["train"][0]["revision"] == "v2"

    hub.serves |= {"one/I": aime_year(2024)[:15], "one/II": aime_year(2024)[15:]}
    halves = ("--source", "2024=hf:one/I", "2024=hf:one/II@v2")
    assert run("aime", "--years", "2024", *halves, "--output", tmp_path / "aime") == 0
    assert hub.asked[2:] == [("one/I", None, None, "a" * 40), ("one/II", None, None, "b" * 40)]
    assert run("aime", "--revision", "v2", "--output", tmp_path / "three") == 1
    assert "yentinglin/aime_2025" in capsys.readouterr().err


def test_no_network(hub, tmp_path, capsys):
    assert run("gsm8k", "--output", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "openai/gsm8k@" in error and "no route to the hub" in error and "--source" in error
    assert names(tmp_path / "out") == []


def test_aime(tmp_path):
    """Three years, three kinds of file, three namings; part I and II apart; repeats as in some public copies."""
    from verl.utils.reward_score import default_compute_score

    first = write(tmp_path / "I.csv", aime_year(2024, "0{}", "Problem", "Answer")[:15])
    second = write(tmp_path / "II.parquet", aime_year(2024, "0{}", "Problem", "Answer")[15:] * 3)
    folder = write(tmp_path / "2025" / "a.jsonl", aime_year(2025, "so it is $\\boxed{{0{}}}$.", "question", "solution"))
    last = write(tmp_path / "2026.json", [row | {"answer": int(row["answer"])} for row in aime_year(2026)])
    source = (f"2024={first}", f"2024={second}", f"2025={folder.parent}", f"2026={last}")
    assert run("aime", "--source", *source, "--output", tmp_path / "out", "--expect-rows", 90) == 0
    got = rows(tmp_path / "out" / "validation.parquet")
    assert [row["data_source"] for row in got] == ["aime24"] * 30 + ["aime25"] * 30 + ["aime26"] * 30
    assert [row["reward_model"]["ground_truth"] for row in got] == [str(i) for i in range(30)] * 3
    assert [row["extra_info"]["year"] for row in got] == [2024] * 30 + [2025] * 30 + [2026] * 30
    counts = manifest(tmp_path / "out")["files"]["validation.parquet"]
    assert (counts["read"], counts["duplicates"], counts["rows"]) == (120, 30, 90)
    for row in got[3::30]:
        assert "Problem 3 of" in row["prompt"][0]["content"] and "Answer: $Answer" in row["prompt"][0]["content"]
        for response, right in (("So.\nAnswer: 3", True), ("So.\nAnswer: $3$", True), ("So.\nAnswer: 4", False)):
            truth = row["reward_model"]["ground_truth"]
            assert default_compute_score(row["data_source"], response, truth)["acc"] is right


@pytest.mark.parametrize("answer", ["1000", "-1", "3.5", "", "x", None, "336^\\circ", "\u0663", "12 or 13"])
def test_aime_answer_that_is_no_integer_from_0_to_999(tmp_path, capsys, answer):
    content = aime_year(2025)
    content[17]["answer"] = answer
    source = write(tmp_path / "a.parquet", content)
    assert run("aime", "--years", "2025", "--source", f"2025={source}", "--output", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "row 17" in error and repr(answer) in error
    assert names(tmp_path / "out") == []


@pytest.mark.parametrize("change", ["one missing", "one more", "one torn"])
def test_aime_has_thirty_problems(tmp_path, capsys, change):
    content = aime_year(2026)
    if change == "one missing":
        content[7] = content[8]
    elif change == "one more":
        content.append({"problem": "Problem 30", "answer": "1", "url": "x"})
    else:
        content.append(content[0] | {"answer": "999"})
    source = write(tmp_path / "a.jsonl", content)
    assert run("aime", "--years", "2026", "--source", source, "--output", tmp_path / "out") == 1
    assert f"{31 if change == 'one more' else 29} are left" in capsys.readouterr().err


def test_gsm8k(tmp_path):
    """verl's reader finds, in the form that the prompt asks for, the ground truth that is written."""
    from verl.utils.reward_score import default_compute_score

    train = [{"question": "Q1", "answer": "1+1=<<1+1=2>>2\n#### 2"}, {"question": "Q2", "answer": "x\n#### 1,234,567"}]
    test = [{"question": "Q3", "answer": "#### -0.5"}]
    source = [f"{part}={write(tmp_path / f'{part}.csv', c)}" for part, c in (("train", train), ("validation", test))]
    assert run("gsm8k", "--source", *source, "--output", tmp_path / "out", "--expect-rows", 2) == 0
    got = rows(tmp_path / "out" / "train.parquet") + rows(tmp_path / "out" / "validation.parquet")
    assert [row["reward_model"]["ground_truth"] for row in got] == ["2", "1234567", "-0.5"]
    assert [row["extra_info"]["split"] for row in got] == ["train", "train", "validation"]
    for row in got:
        assert '"#### N"' in row["prompt"][0]["content"]
        truth = row["reward_model"]["ground_truth"]
        assert default_compute_score(row["data_source"], f"Sure.\n#### {truth}", truth) == 1.0
        assert default_compute_score(row["data_source"], f"Sure.\n#### {truth}1", truth) == 0.0


@pytest.mark.parametrize("answer", ["no mark 5", "#### five", "#### ", "#### 1 2"])
def test_gsm8k_answer_without_a_number(tmp_path, capsys, answer):
    good = write(tmp_path / "good.jsonl", [{"question": "Q", "answer": "#### 1"}])
    bad = write(tmp_path / "bad.jsonl", [{"question": "Q", "answer": "#### 1"}, {"question": "R", "answer": answer}])
    assert run("gsm8k", "--source", f"train={good}", f"validation={bad}", "--output", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "bad.jsonl, row 1" in error and repr(answer) in error
    assert names(tmp_path / "out") == []


def test_reasoning_gym(tmp_path, capsys):
    settings = dict(min_numbers=2, max_numbers=3, min_value=10)
    rg.write_parquet("number_sorting", tmp_path / "direct", train_size=6, validation_size=2, seed=5, **settings)
    sizes = ("--train-size", 6, "--validation-size", 2, "--seed", 5)
    written = [f"{key}={value}" for key, value in settings.items()]
    out = ("--output", tmp_path / "out")
    assert run("reasoning-gym", "number_sorting", *sizes, *out, "--task-settings", *written) == 0
    for name in ("train", "validation"):
        assert rows(tmp_path / "out" / f"{name}.parquet") == rows(tmp_path / "direct" / f"{name}.parquet")
    assert run("reasoning-gym", "number_sorting", *sizes, *out, "--task-settings", *written[:-1]) == 1
    assert "task_settings was" in capsys.readouterr().err
    for task, setting, message in (
        ("no_such_task", "a=1", "no_such_task"),
        ("number_sorting", "no_such_setting=1", "no_such_setting"),
        ("number_sorting", "min_numbers", "expected KEY=VALUE"),
        ("number_sorting", "min_numbers=-1", "-1"),
    ):
        assert run("reasoning-gym", task, "--output", tmp_path / "bad", "--task-settings", setting) == 1
        assert message in capsys.readouterr().err
    assert names(tmp_path / "bad") == []


@pytest.fixture
def leaky(tmp_path):
    """AIME 2024, and ten training rows in other words of which three pose its problems 4, 4 and 9."""
    aime = tmp_path / "aime"
    source = write(tmp_path / "a.jsonl", aime_year(2024))
    assert run("aime", "--years", "2024", "--source", source, "--output", aime) == 0
    content = [dapo_row(f"Problem {i} of 1999", "1") for i in range(7)]
    content.insert(2, dapo_row("Problem  4 of\n2024", "4"))
    content.insert(5, dapo_row("Problem 9 of 2024", "9"))
    content.append(dapo_row("Problem 4 of 2024, continued", "4"))
    return write(tmp_path / "train.jsonl", content), aime / "validation.parquet"


def test_contamination(leaky, tmp_path, capsys):
    train, validation = leaky
    plain = ("dapo", "--source", train, "--against", validation)
    assert run(*plain, "--output", tmp_path / "kept") == 0
    assert "2 of 10 prompts are validation prompts, kept" in capsys.readouterr().out
    assert run(*plain, "--output", tmp_path / "dropped", "--drop-contaminated", "--expect-rows", 10) == 0
    assert "2 of 10 prompts are validation prompts, dropped" in capsys.readouterr().out
    for folder, left in (("kept", 10), ("dropped", 8)):
        counts = manifest(tmp_path / folder)["files"]["train.parquet"]
        assert (counts["contaminated"], counts["deduplicated"], counts["rows"]) == (2, 10, left)
    before = [row["prompt"] for row in rows(tmp_path / "kept" / "train.parquet")]
    after = [row["prompt"] for row in rows(tmp_path / "dropped" / "train.parquet")]
    assert after == before[:2] + before[3:5] + before[6:]


def test_contamination_of_a_data_set_by_itself(tmp_path):
    train = [{"question": q, "answer": "#### 1"} for q in ("A b", "C", "D")]
    test = [{"question": q, "answer": "#### 1"} for q in ("E", "A  b")]
    source = [f"{part}={write(tmp_path / f'{part}.jsonl', c)}" for part, c in (("train", train), ("validation", test))]
    assert run("gsm8k", "--source", *source, "--output", tmp_path / "out", "--drop-contaminated") == 0
    got = [row["prompt"][0]["content"] for row in rows(tmp_path / "out" / "train.parquet")]
    assert len(got) == 2 and got[0].startswith("C\n") and got[1].startswith("D\n")


def test_problems_of_a_file_without_instructions():
    prompts = ["One\n\nx = 1", "Two\n\nx = 1", "Two", "Three\n\ny"]
    assert prepare._problems(prompts) == ["One x = 1", "Two x = 1", "Two", "Three y"]
    assert prepare._problems(["One\n\nx = 1"]) == ["One x = 1"]
    assert prepare._problems(["Add:", "Add:\n\nx", "Add:\n\ny"]) == ["Add:", "x", "y"]  # a problem is never empty


def test_rerun(planted, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ("dapo", "--source", planted, "--output", out)
    assert run(*arguments) == 0
    train = out / "train.parquet"
    before = train.stat().st_mtime_ns, (out / "manifest.json").read_bytes()

    assert run(*arguments) == 0
    assert "up to date" in capsys.readouterr().out
    assert before == (train.stat().st_mtime_ns, (out / "manifest.json").read_bytes())
    # The same content from elsewhere is the same request; another content is not.
    planted = planted.rename(tmp_path / "dapo.parquet")
    arguments = ("dapo", "--source", planted, "--output", out)
    assert run(*arguments) == 0
    assert run(*arguments, "--drop-contaminated") == 1
    assert "drop_contaminated was False, is True" in capsys.readouterr().err
    write(planted, rows(planted)[:2])
    assert run(*arguments) == 1
    assert "sources was" in capsys.readouterr().err
    assert before == (train.stat().st_mtime_ns, (out / "manifest.json").read_bytes())

    assert run(*arguments, "--force") == 0
    assert len(rows(train)) == 2 and manifest(out)["files"]["train.parquet"]["sha256"] == sha256(train)
    capsys.readouterr()
    assert run(*arguments) == 0
    assert "up to date" in capsys.readouterr().out


@pytest.mark.parametrize("manifest_text", [None, "", "[]", "{}", '{"request": {}}'])
def test_file_that_this_command_did_not_write(planted, tmp_path, capsys, manifest_text):
    out = tmp_path / "out"
    out.mkdir()
    (out / "train.parquet").write_bytes(b"mine")
    if manifest_text is not None:
        (out / "manifest.json").write_text(manifest_text)
    assert run("dapo", "--source", planted, "--output", out) == 1
    assert "--force" in capsys.readouterr().err
    assert (out / "train.parquet").read_bytes() == b"mine"
    assert run("dapo", "--source", planted, "--output", out, "--force") == 0
    assert len(rows(out / "train.parquet")) == 4


def test_file_that_was_changed(planted, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("dapo", "--source", planted, "--output", out) == 0
    content = (out / "train.parquet").read_bytes() + b"\0"
    (out / "train.parquet").write_bytes(content)
    assert run("dapo", "--source", planted, "--output", out) == 1
    assert "has changed since" in capsys.readouterr().err
    assert (out / "train.parquet").read_bytes() == content


GOOD = dapo_row("Fine", "1")
BAD_DAPO = {
    "missing columns": ([{"prompt": "a", "solution": "1"}], "no column data_source, ability, reward_model, extra_info"),
    "its columns": ([{"prompt": "a", "solution": "1"}], "it has prompt, solution"),
    "null prompt": ([GOOD, dapo_row("x", "1", prompt=None)], "row 1: prompt must be a list of messages, got None"),
    "text prompt": ([dapo_row("x", "1", prompt="What?")], "got 'What?'"),
    "no content": ([dapo_row("x", "1", prompt=[{"role": "user"}])], "got {'role': 'user'}"),
    "null content": ([dapo_row("x", "1", prompt=[{"role": "user", "content": None}])], "must be text, got None"),
    "blank content": ([dapo_row("x", "1", prompt=[{"role": "user", "content": "\ufeff \n"}])], "content is empty"),
    "NUL": ([GOOD, GOOD, dapo_row("a\0b", "1")], "row 2: prompt.content holds a NUL"),
    "number answer": ([dapo_row("x", 7)], "reward_model.ground_truth must be text, got 7"),
    "no answer": ([dapo_row("x", "1", reward_model={"style": "rule"})], "must hold ground_truth, got {'style'"),
    "no index": ([dapo_row("x", "1", extra_info=None)], "extra_info must be a dict"),
    "unknown source": ([GOOD, dapo_row("x", "1", data_source="my_math")], "data_source 'my_math' is unknown to verl"),
    "upper case": ([dapo_row("x", "1", data_source="AIME25")], "data_source 'AIME25'"),
    "only conflicts": ([dapo_row("x", "1"), dapo_row("x", "2")], "no row of train is left"),
}


@pytest.mark.parametrize("case", BAD_DAPO)
def test_bad_rows(tmp_path, capsys, case):
    content, message = BAD_DAPO[case]
    source = write(tmp_path / "bad.jsonl", content)
    assert run("dapo", "--source", source, "--output", tmp_path / "out") == 1
    assert message in capsys.readouterr().err
    assert names(tmp_path / "out") == []


BAD_FILES = {
    "empty.parquet": b"",
    "foreign.parquet": b"PAR1 this is not one PAR1",
    "empty.jsonl": b"",
    "cut.jsonl": b'{"problem": "a", "ans',
    "latin.jsonl": '{"problem": "caf\u00e9", "answer": 1}\n'.encode("latin-1"),
    "wide.jsonl": '{"problem": "a", "answer": 1}\n'.encode("utf-16"),
    "empty.csv": b"",
    "header.csv": b"problem,answer\n",
    "latin.csv": "problem,answer\ncaf\u00e9,1\n".encode("latin-1"),
    "kind.xlsx": b"PK",
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_unreadable_file(tmp_path, capsys, name):
    (tmp_path / name).write_bytes(BAD_FILES[name])
    source = ("--source", f"2025={tmp_path / name}")
    assert run("aime", "--years", "2025", *source, "--output", tmp_path / "out") == 1
    assert name in capsys.readouterr().err
    assert names(tmp_path / "out") == []


def test_source_that_names_no_file(tmp_path, capsys):
    mixed = write(tmp_path / "mixed" / "a.jsonl", [GOOD]).parent
    write(mixed / "b.parquet", [GOOD])
    (tmp_path / "bare").mkdir()
    for source, message in ((mixed, "a.jsonl, b.parquet"), (tmp_path / "bare", "found none"), ("a/b", "hf:ID")):
        assert run("dapo", "--source", source, "--output", tmp_path / "out") == 1
        assert message in capsys.readouterr().err
    assert run("aime", "--source", "1999=x", "--output", tmp_path / "out") == 1
    assert "--source 1999=x: expected PART=PLACE, where PART is one of 2024, 2025, 2026" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["bom.csv", "bom.jsonl"])
def test_byte_order_mark(tmp_path, name):
    source = write(tmp_path / name, aime_year(2025))
    source.write_bytes(b"\xef\xbb\xbf" + source.read_bytes())
    assert run("aime", "--years", "2025", "--source", f"2025={source}", "--output", tmp_path / "out") == 0
    assert "\ufeff" not in "".join(row["prompt"][0]["content"] for row in rows(tmp_path / "out" / "validation.parquet"))


@pytest.mark.parametrize("old", [False, True], ids=["first time", "over old files"])
@pytest.mark.parametrize("where", ["reading", "writing"])
def test_interrupt_leaves_nothing_half_written(planted, tmp_path, monkeypatch, where, old):
    import pandas

    out = tmp_path / "out"
    if old:
        assert run("dapo", "--source", write(tmp_path / "old.jsonl", [GOOD]), "--output", out) == 0
    before = {name: (out / name).read_bytes() for name in names(out)}

    def half(self, path, **kwargs):
        path.write_bytes(b"PAR1")
        raise KeyboardInterrupt

    def seventh(messages, where):
        if where.endswith("row 7"):
            raise KeyboardInterrupt
        return messages

    if where == "writing":
        monkeypatch.setattr(pandas.DataFrame, "to_parquet", half)
    else:
        monkeypatch.setattr(prepare, "_messages", seventh)
    with pytest.raises(KeyboardInterrupt):
        run("dapo", "--source", planted, "--output", out, "--force")
    assert {name: (out / name).read_bytes() for name in names(out)} == before


@pytest.fixture
def gsm8k(tmp_path):
    """A command of three renames: manifest, train, validation."""
    for part in ("train", "validation"):
        write(tmp_path / f"{part}.jsonl", [{"question": part, "answer": "#### 1"}])
    source = [f"{part}={tmp_path / part}.jsonl" for part in ("train", "validation")]
    return ["gsm8k", "--source", *source, "--output", str(tmp_path / "out")]


def check_completed(command, folder, capsys):
    assert run(*command) == 0
    assert "wrote" in capsys.readouterr().out
    assert [len(rows(folder / f"{name}.parquet")) for name in ("train", "validation")] == [1, 1]
    assert run(*command) == 0
    assert "up to date" in capsys.readouterr().out


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_interrupt_between_the_renames(gsm8k, tmp_path, monkeypatch, capsys, nth):
    out, calls = tmp_path / "out", []

    def replace(source, target, original=os.replace):
        calls.extend([target] if target.parent == out else [])
        if len(calls) == nth:
            raise KeyboardInterrupt
        original(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("cppo_verl.artifacts.atomic.os.replace", lambda *a: replace(*map(type(tmp_path), a)))
        with pytest.raises(KeyboardInterrupt):
            run(*gsm8k)
    assert names(out) == ["manifest.json", "train.parquet"][: nth - 1]
    check_completed(gsm8k, out, capsys)


@pytest.mark.process
def test_killed_between_the_renames(gsm8k, tmp_path, capsys):
    out = tmp_path / "out"
    script = f"""
        import argparse, os, signal, sys, types
        reward = types.SimpleNamespace(default_compute_score=lambda *_: 0)  # importing verl takes seconds
        sys.modules |= {{"verl": reward, "verl.utils": reward, "verl.utils.reward_score": reward}}
        from cppo_verl.data import prepare
        replace = os.replace

        def kill(source, target):
            if str(target) == {str(out / "train.parquet")!r}:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)

        os.replace = kill
        parser = argparse.ArgumentParser()
        prepare.add_arguments(parser)
        prepare.run(parser.parse_args({gsm8k!r}))
    """
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=environment, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert [name for name in names(out) if not name.endswith(".tmp")] == ["manifest.json"]
    check_completed(gsm8k, out, capsys)
