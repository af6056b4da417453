"""The command `prepare`, and look-alikes of public data sets whose counts are known by hand."""

import argparse
import hashlib
import json

import datasets
import pyarrow.parquet

from cppo_verl.data import prepare

BOXED = " Please reason step by step, and put your final answer within \\boxed{}."
DAPO_WORDING = "Do this one in steps and close with Answer: and the number.\n\n{}\n\nAnswer on a line of its own."


def run(*arguments) -> int:
    """The exit code of `cppo-verl prepare` with ``arguments``."""
    parser = argparse.ArgumentParser()
    prepare.add_arguments(parser)
    return prepare.run(parser.parse_args([str(a) for a in arguments]))


def rows(path) -> list[dict]:
    """The rows of a parquet file."""
    return pyarrow.parquet.read_table(path).to_pylist()


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


def sanity_row(problem, answer, **changes):
    """A row with the columns of the sanity test that public code reads, and one of which nothing is known."""
    prompt = [{"role": "user", "content": problem + BOXED}]
    return {"source": "unknown", "prompt": prompt, "reward_model": {"ground_truth": answer}} | changes


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


def gsm8k_command(folder) -> list[str]:
    """A command that renames three files to ``folder``/out: the manifest, train and validation."""
    for part in ("train", "validation"):
        write(folder / f"{part}.jsonl", [{"question": part, "answer": "#### 1"}])
    source = [f"{part}={folder / part}.jsonl" for part in ("train", "validation")]
    return ["gsm8k", "--source", *source, "--output", str(folder / "out")]


def check_completed(command, folder, capsys):
    """Check that ``command`` writes one row of each part to ``folder``, and a second call nothing."""
    assert run(*command) == 0
    assert "wrote" in capsys.readouterr().out
    assert [len(rows(folder / f"{name}.parquet")) for name in ("train", "validation")] == [1, 1]
    assert run(*command) == 0
    assert "up to date" in capsys.readouterr().out
