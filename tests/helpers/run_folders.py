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
