"""Procedural problems: one reasoning-gym task as train and validation rows in verl's RL schema.

`cppo_verl.rewards.reasoning_gym` is their reward. Curricula and reasoning-gym's ``composite`` task are left out; one
file holds one task.
"""

import json
from pathlib import Path
from typing import Any

from cppo_verl.artifacts.atomic import replacing
from cppo_verl.data.readers import Row, rl_row
from cppo_verl.rewards.reasoning_gym import PREFIX, load_task, score_answer


def write_parquet(
    task: str, folder: str | Path, *, train_size: int, validation_size: int, seed: int = 0, **task_kwargs: Any
) -> tuple[Path, Path]:
    """Write ``folder/train.parquet`` and ``folder/validation.parquet``; return the two paths.

    Arguments and errors are those of `make_rows`. Either both files are replaced or neither.
    """
    import pandas

    parts = make_rows(task, train_size=train_size, validation_size=validation_size, seed=seed, **task_kwargs)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "train.parquet", folder / "validation.parquet"
    with replacing(*paths) as temporary:
        for rows, path in zip(parts, temporary, strict=True):
            pandas.DataFrame(rows).to_parquet(path, index=False)
    return paths


def make_rows(
    task: str, *, train_size: int, validation_size: int, seed: int = 0, **task_kwargs: Any
) -> tuple[list[Row], list[Row]]:
    """Return train and validation rows of one reasoning-gym ``task``, such as "number_sorting", with its settings.

    The validation problems depend on ``seed`` and ``validation_size`` alone. A training problem whose question is also
    a validation question is dropped, so train may hold fewer than ``train_size`` rows.

    Raises ValueError for an unknown task, for a task whose problems do not survive JSON (their own answer no longer
    verifies), and if no training problem would be left.
    """
    if train_size < 1 or validation_size < 1:
        raise ValueError(f"sizes must be at least 1, got train_size={train_size}, validation_size={validation_size}")
    # reasoning-gym seeds problem i with seed + i: seeds closer than the size would give shifted copies.
    validation = _rows(task, task_kwargs, "validation", validation_size, seed)
    train = _rows(task, task_kwargs, "train", train_size, seed + validation_size)
    held_out = {row["prompt"][0]["content"] for row in validation}
    train = [row for row in train if row["prompt"][0]["content"] not in held_out]
    if not train:
        raise ValueError(
            f"every training question of {task!r} {task_kwargs} is a validation question: give wider --task-settings"
        )
    return train, validation


def _rows(task: str, task_kwargs: dict[str, Any], split: str, size: int, seed: int) -> list[Row]:
    import reasoning_gym

    kwargs_json = json.dumps(task_kwargs, sort_keys=True)
    load_task(PREFIX + task, kwargs_json)  # refuses an unknown task by name
    rows = []
    for index, entry in enumerate(reasoning_gym.create_dataset(task, size=size, seed=seed, **task_kwargs)):
        # verl hands extra_info to the reward through Arrow, which merges the fields of nested dicts across rows. A JSON
        # string comes back as it was.
        text = json.dumps(entry, default=str)
        extra_info = {"split": split, "index": index, "task_kwargs": kwargs_json, "entry": text}
        answer = entry["answer"]
        if answer is not None and score_answer(answer, [PREFIX + task, kwargs_json, text]) < 1:
            raise ValueError(f"problem {index} of {task!r} does not verify its own answer after JSON: {answer!r}")
        rows.append(rl_row(PREFIX + task, entry["question"], "reasoning", answer or "", extra_info))
    return rows
