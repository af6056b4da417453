"""Lines and files as verl's trainer leaves them in a run's folder."""

import json


def write(path, *lines, end="\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + end)
    return path


def answer(uid, sample, problem, accuracy, output=0):
    return json.dumps(
        {"input": problem, "acc": accuracy, "uid": f"{uid}_{sample}_{output}", "output": "o", "score": -1.0}
    )


def validation(step, **benchmarks):
    """A line of verl's file logger: the accuracy of each benchmark at ``step``."""
    return json.dumps({"step": step, "data": {f"val-core/{name}/acc/mean@16": v for name, v in benchmarks.items()}})


def write_damaged_answers(folder):
    """The answers of step 5 to two problems of two benchmarks, beside one without accuracy and one that is cut off."""
    write(
        folder / "5.jsonl",
        *[answer("u1", i, "p", acc) for i, acc in enumerate([1.0, 0.0])],
        answer("u1", 2, "p", 0.0),
        answer("u1", 2, "p", 1.0, output=1),  # the second output of the same sample
        answer("u2", 0, "q", 0.0),
        json.dumps({"input": "r", "acc": None, "uid": "u3_0_0"}),
        '{"input": "cut',
    )
    (folder / "5.sources.json").write_text(json.dumps({"u1": "aime24", "u2": "aime25"}))
