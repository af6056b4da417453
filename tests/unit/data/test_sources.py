"""Places that rows come from: files of each kind, the hub, and what is said of those that cannot be read."""

import argparse
import os

import pytest
from prepared import aime_year, dapo_row, manifest, names, rows, run, sha256, write


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_files_of_another_kind_give_the_same_rows(planted, tmp_path, name):
    content = rows(planted)
    source = write(tmp_path / "folder" / name, content[:3])
    write(source.with_name("b" + source.suffix), content[3:])
    (source.parent / "README.md").write_text("not data")
    for place, out in ((planted, "one"), (source.parent, "two")):
        assert run("dapo", "--source", place, "--output", tmp_path / out) == 0
    assert rows(tmp_path / "one" / "train.parquet") == rows(tmp_path / "two" / "train.parquet")


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_the_rows_are_those_of_the_file_that_the_manifest_names_whatever_its_time(name, tmp_path):
    out = tmp_path / "out"
    for question in ("Before", "Behind"):
        source = write(tmp_path / name, [dapo_row(question, "1")])
        os.utime(source, ns=(0, 0))
        assert run("dapo", "--source", source, "--output", out, "--force") == 0
        assert question in rows(out / "train.parquet")[0]["prompt"][0]["content"]
        assert manifest(out)["sources"] == [{"part": "train", "files": {name: sha256(source)}}]


@pytest.mark.parametrize("name", ["[ab].parquet", "?.parquet", "a*.parquet", "{a,b}.parquet", "[!b]/x.parquet"])
def test_a_path_that_looks_like_a_pattern_names_one_file(name, tmp_path):
    for other in ("a", "b", "ab"):
        write(tmp_path / f"{other}.parquet", [dapo_row("Another file's", "1")])
        write(tmp_path / other / "x.parquet", [dapo_row("Another file's", "1")])
    source = write(tmp_path / name, [dapo_row("Its own", "1")])
    assert run("dapo", "--source", source, "--output", tmp_path / "out") == 0
    [row] = rows(tmp_path / "out" / "train.parquet")
    assert "Its own" in row["prompt"][0]["content"]
    assert manifest(tmp_path / "out")["sources"][0]["files"] == {source.name: sha256(source)}


def test_a_branch_of_the_hub_is_resolved_to_its_commit(hub, tmp_path, monkeypatch):
    import huggingface_hub

    def dataset_info(self, name, revision):
        return argparse.Namespace(sha={"main": "a" * 40, "v2": "b" * 40}[revision])

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    hub.serves["openai/gsm8k"] = [{"question": "Q", "answer": "#### 1"}]
    places = [f"{part}=hf:openai/gsm8k@v2" for part in ("train", "validation")]
    assert run("gsm8k", "--source", *places, "--output", tmp_path / "out") == 0
    assert hub.asked == [("openai/gsm8k", "main", split, "b" * 40) for split in ("train", "test")]
    written = manifest(tmp_path / "out")
    assert {source["revision"] for source in written["sources"]} == {"b" * 40}
    assert written["request"]["sources"]["train"][0]["revision"] == "v2"

    hub.serves |= {"one/I": aime_year(2024)[:15], "one/II": aime_year(2024)[15:]}
    halves = ("--source", "2024=hf:one/I", "2024=hf:one/II@v2")
    assert run("aime", "--years", "2024", *halves, "--output", tmp_path / "aime") == 0
    assert hub.asked[2:] == [("one/I", None, None, "a" * 40), ("one/II", None, None, "b" * 40)]


def test_without_a_network_a_local_copy_is_asked_for(hub, tmp_path, capsys):
    assert run("gsm8k", "--output", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "openai/gsm8k@" in error and "no route to the hub" in error and "--source" in error
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
def test_an_unreadable_file_is_named(tmp_path, capsys, name):
    (tmp_path / name).write_bytes(BAD_FILES[name])
    source = ("--source", f"2025={tmp_path / name}")
    assert run("aime", "--years", "2025", *source, "--output", tmp_path / "out") == 1
    assert name in capsys.readouterr().err
    assert names(tmp_path / "out") == []


def test_a_source_without_files_of_one_kind_is_refused(tmp_path, capsys):
    mixed = write(tmp_path / "mixed" / "a.jsonl", [dapo_row("Fine", "1")]).parent
    write(mixed / "b.parquet", [dapo_row("Fine", "1")])
    (tmp_path / "bare").mkdir()
    for source, message in ((mixed, "a.jsonl, b.parquet"), (tmp_path / "bare", "found none"), ("a/b", "hf:ID")):
        assert run("dapo", "--source", source, "--output", tmp_path / "out") == 1
        assert message in capsys.readouterr().err
    assert run("aime", "--source", "1999=x", "--output", tmp_path / "out") == 1
    assert "--source 1999=x: expected PART=PLACE, where PART is one of 2024, 2025, 2026" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["bom.csv", "bom.jsonl"])
def test_byte_order_marks_are_removed(tmp_path, name):
    source = write(tmp_path / name, aime_year(2025))
    source.write_bytes(b"\xef\xbb\xbf" + source.read_bytes())
    assert run("aime", "--years", "2025", "--source", f"2025={source}", "--output", tmp_path / "out") == 0
    assert "\ufeff" not in "".join(row["prompt"][0]["content"] for row in rows(tmp_path / "out" / "validation.parquet"))
