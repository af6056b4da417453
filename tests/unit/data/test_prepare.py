"""What `prepare` writes, counts, refuses and leaves alone."""

import argparse
import os
import sys

import datasets
import pytest
from prepared import (
    DAPO_WORDING,
    aime_year,
    check_completed,
    dapo_row,
    gsm8k_command,
    manifest,
    names,
    rows,
    run,
    sanity_row,
    sha256,
    write,
)

from cppo_verl.data import prepare, readers
from cppo_verl.data import reasoning_gym as rg
from cppo_verl.data.sources import HUB


def test_contaminated_prompts_are_not_dropped_without_a_word_on_what_they_are(planted, tmp_path, capsys):
    assert run("dapo", "--source", planted, "--output", tmp_path / "out", "--drop-contaminated") == 1
    said = "prepare dapo: --drop-contaminated of dapo needs the validation files: --against FILE"
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_dapo_keeps_the_first_row_of_each_prompt_with_a_single_answer(planted, tmp_path, capsys, monkeypatch):
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
    assert written["command"] == "cppo-verl prepare dapo --source 'a b'"
    assert written["versions"]["datasets"] == datasets.__version__
    printed = capsys.readouterr().out
    assert "11 rows read, 6 duplicates and 1 prompts with conflicting answers dropped, 4 left" in printed
    assert "5 | 6" in printed


def test_another_number_of_rows_than_expected_is_refused(planted, tmp_path, capsys):
    assert run("dapo", "--source", planted, "--output", tmp_path / "out", "--expect-rows", 5) == 1
    assert "4 rows are left, --expect-rows is 5" in capsys.readouterr().err
    assert names(tmp_path / "out") == []
    # Asked again of files that are up to date, the question is still answered.
    assert run("dapo", "--source", planted, "--output", tmp_path / "out") == 0
    assert run("dapo", "--source", planted, "--output", tmp_path / "out", "--expect-rows", 5) == 1


def test_dapo_of_the_hub_must_have_around_17k_rows(hub, tmp_path, capsys, monkeypatch):
    name, commit = "BytedTsinghua-SIA/DAPO-Math-17k", HUB["dapo"]["train"][0].revision
    hub.serves[name] = [dapo_row("a", "1")]
    assert run("dapo", "--output", tmp_path / "1") == 1
    assert "1 rows are left, expected 17000 to 17999" in capsys.readouterr().err
    monkeypatch.setitem(prepare.HUB_ROWS, "dapo", range(3, 5))
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


def test_the_sanity_test_of_the_hub_must_have_its_1460_problems(hub, tmp_path, capsys):
    name = "sail/Sanity-Test-R1D-1.5B"
    hub.serves[name] = [sanity_row(f"{i}", "1") for i in range(1461)]
    # No commit of it is pinned, so its branch is resolved; the manifest holds what was read.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: argparse.Namespace(sha="c" * 40))
        assert run("sanity-test", "--output", tmp_path / "out") == 1
        assert "1461 rows are left, expected 1460: if the data set has changed" in capsys.readouterr().err
        assert run("sanity-test", "--output", tmp_path / "other", "--expect-rows", 1461) == 0
        hub.serves[name].pop()
        assert run("sanity-test", "--output", tmp_path / "out") == 0
    assert hub.asked == [(name, None, "train", "c" * 40)] * 3
    assert manifest(tmp_path / "out")["sources"][0]["revision"] == "c" * 40
    assert len(rows(tmp_path / "out" / "train.parquet")) == 1460


@pytest.mark.parametrize("change", ["one missing", "one more", "one torn"])
def test_a_year_of_aime_must_have_thirty_problems(tmp_path, capsys, change):
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


def test_reasoning_gym_files_hold_what_the_library_call_writes(tmp_path, capsys):
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


def test_training_problems_of_a_validation_file_are_counted_and_dropped_if_asked(leaky, tmp_path, capsys):
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


def test_training_problems_of_the_data_sets_own_validation_are_dropped(tmp_path):
    train = [{"question": q, "answer": "#### 1"} for q in ("A b", "C", "D")]
    test = [{"question": q, "answer": "#### 1"} for q in ("E", "A  b")]
    source = [f"{part}={write(tmp_path / f'{part}.jsonl', c)}" for part, c in (("train", train), ("validation", test))]
    assert run("gsm8k", "--source", *source, "--output", tmp_path / "out", "--drop-contaminated") == 0
    got = [row["prompt"][0]["content"] for row in rows(tmp_path / "out" / "train.parquet")]
    assert len(got) == 2 and got[0].startswith("C\n") and got[1].startswith("D\n")


def test_the_same_request_writes_nothing_again_and_another_is_refused(planted, tmp_path, capsys):
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
    assert run(*arguments, "--against", planted, "--drop-contaminated") == 1
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


def test_problems_in_other_words_are_not_up_to_date(tmp_path, capsys, monkeypatch):
    """A folder that an older release wrote, whose prompts asked in other words."""
    arguments = ("aime", "--years", "2024", "--source", write(tmp_path / "a.jsonl", aime_year(2024)))
    arguments += ("--output", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setitem(readers.PROMPTS, "aime", "Solve this: {}")
        assert run(*arguments) == 0
    assert run(*arguments) == 1
    assert "prompt was Solve this: {}, is Solve the following" in capsys.readouterr().err


@pytest.mark.parametrize("manifest_text", [None, "", "[]", "{}", '{"request": {}}'])
def test_a_foreign_file_is_overwritten_with_force_only(planted, tmp_path, capsys, manifest_text):
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


def test_a_file_that_was_changed_is_refused(planted, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("dapo", "--source", planted, "--output", out) == 0
    content = (out / "train.parquet").read_bytes() + b"\0"
    (out / "train.parquet").write_bytes(content)
    assert run("dapo", "--source", planted, "--output", out) == 1
    assert "has changed since" in capsys.readouterr().err
    assert (out / "train.parquet").read_bytes() == content


@pytest.mark.parametrize("old", [False, True], ids=["first time", "over old files"])
@pytest.mark.parametrize("where", ["reading", "writing"])
def test_an_interrupt_leaves_nothing_half_written(planted, tmp_path, monkeypatch, where, old):
    import pandas

    out = tmp_path / "out"
    if old:
        assert run("dapo", "--source", write(tmp_path / "old.jsonl", [dapo_row("Fine", "1")]), "--output", out) == 0
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
        monkeypatch.setattr(readers, "messages", seventh)
    with pytest.raises(KeyboardInterrupt):
        run("dapo", "--source", planted, "--output", out, "--force")
    assert {name: (out / name).read_bytes() for name in names(out)} == before


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_the_same_command_completes_what_an_interrupt_between_renames_left(tmp_path, monkeypatch, capsys, nth):
    command, out, calls = gsm8k_command(tmp_path), tmp_path / "out", []

    def replace(source, target, original=os.replace):
        calls.extend([target] if target.parent == out else [])
        if len(calls) == nth:
            raise KeyboardInterrupt
        original(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("cppo_verl.artifacts.atomic.os.replace", lambda *a: replace(*map(type(tmp_path), a)))
        with pytest.raises(KeyboardInterrupt):
            run(*command)
    assert names(out) == ["manifest.json", "train.parquet"][: nth - 1]
    check_completed(command, out, capsys)


def test_the_manifest_of_another_data_set_is_not_replaced(planted, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("dapo", "--source", planted, "--output", out) == 0
    before = manifest(out)
    year = write(tmp_path / "in" / "2025.jsonl", aime_year(2025))
    aime = ("aime", "--years", "2025", "--source", f"2025={year}", "--output", out)
    assert run(*aime) == 1
    assert "holds another request's files (dataset was dapo, is aime;" in capsys.readouterr().err
    assert manifest(out) == before and names(out) == ["manifest.json", "train.parquet"]
    (out / "manifest.json").write_text("{")
    assert run(*aime) == 1 and "manifest.json exists and" in capsys.readouterr().err
    assert run(*aime, "--force") == 0


@pytest.mark.parametrize("place", ["a file", "below a file", "a broken link", "read-only"])
def test_an_output_that_cannot_be_written_to_is_named_before_anything_is_read(tmp_path, capsys, monkeypatch, place):
    target = tmp_path / "target"
    if place == "read-only":  # root may write anywhere
        target.mkdir()
        monkeypatch.setattr(prepare.os, "access", lambda path, mode: path != target)
    elif place == "a broken link":
        target.symlink_to(tmp_path / "nowhere")
    else:
        target.touch()
    out = target / "out" if place != "a file" else target
    source = write(tmp_path / "a.jsonl", [{"not": "read"}])
    assert run("dapo", "--source", source, "--output", out) == 1
    what = "cannot be written to" if place == "read-only" else "is no folder"
    assert capsys.readouterr().err == f"prepare dapo: {target} {what}: give another --output\n"
