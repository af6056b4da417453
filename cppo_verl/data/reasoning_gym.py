"""Procedural problems with verifiers: reasoning-gym tasks as verl data and reward.

``write_parquet`` writes train and validation files in verl's RL schema; ``compute_score`` is the verl
reward function that goes with them::

    reward.custom_reward_function.path=pkg://cppo_verl.data.reasoning_gym
    reward.custom_reward_function.name=compute_score

Left out: curricula and reasoning-gym's ``composite`` task; one file holds one task.
"""

import functools
import json
from pathlib import Path

from cppo_verl.artifacts.atomic import replacing

PREFIX = "reasoning_gym/"


def write_parquet(task, folder, *, train_size, validation_size, seed=0, **task_kwargs):
    """Write ``folder/train.parquet`` and ``folder/validation.parquet``; return the two paths.

    The arguments and the errors are those of ``make_rows``; either both files are replaced or neither.
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


def make_rows(task, *, train_size, validation_size, seed=0, **task_kwargs):
    """Train and validation rows, two lists of dicts in verl's RL schema.

    ``task`` is a reasoning-gym name ("number_sorting"), ``task_kwargs`` its settings. A training problem
    whose question is also a validation question is dropped, so train may hold fewer than ``train_size``
    rows. The validation problems depend on ``seed`` and ``validation_size`` only.

    Raises ValueError for an unknown task, for a task whose problems do not survive JSON (their own answer
    no longer verifies), and where no training problem would be left.
    """
    if train_size < 1 or validation_size < 1:
        raise ValueError(f"sizes must be at least 1, got train_size={train_size}, validation_size={validation_size}")
    # reasoning-gym seeds problem i with seed + i: seeds closer than the size would give shifted copies.
    validation = _rows(task, task_kwargs, "validation", validation_size, seed)
    train = _rows(task, task_kwargs, "train", train_size, seed + validation_size)
    held_out = {row["prompt"][0]["content"] for row in validation}
    train = [row for row in train if row["prompt"][0]["content"] not in held_out]
    if not train:
        raise ValueError(f"every training question of {task!r} {task_kwargs} is a validation question: widen the task")
    return train, validation


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    """Verl reward function: the task's own verifier on one decoded response.

    The answer is what the last ``<answer>...</answer>`` holds, or the whole response where there is none.
    Returns ``{"score": float in [0, 1], "acc": 1.0 or 0.0}``; partial credit counts in ``score`` only, so
    that validation logs the share of fully right answers. ``ground_truth`` is not used: many problems have
    more than one right answer. Raises ValueError for data that ``write_parquet`` did not write.
    """
    from reasoning_gym.utils import extract_answer

    extra_info = extra_info or {}
    if "entry" not in extra_info or "task_kwargs" not in extra_info:
        raise ValueError(
            f"extra_info must hold 'entry' and 'task_kwargs' (see write_parquet), got {sorted(extra_info)}"
        )
    dataset = _dataset(data_source, extra_info["task_kwargs"])
    tagged = extract_answer(solution_str)
    answer = solution_str.strip() if tagged is None else tagged
    try:
        score = float(dataset.score_answer(answer, json.loads(extra_info["entry"])))
    except Exception:
        # Some verifiers raise on text they cannot parse. The entry itself verified when it was written,
        # so what failed is the answer.
        score = 0.0
    return {"score": score, "acc": float(score >= 1.0)}


@functools.cache
def _dataset(data_source, task_kwargs):
    """The dataset object whose verifier scores ``data_source``; ``task_kwargs`` is JSON."""
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    task = data_source.removeprefix(PREFIX)
    if not data_source.startswith(PREFIX) or task not in DATASETS:
        raise ValueError(f"unknown data_source {data_source!r}: expected {PREFIX}<task> with a reasoning-gym task name")
    return reasoning_gym.create_dataset(task, size=1, seed=0, **json.loads(task_kwargs))


def _rows(task, task_kwargs, split, size, seed):
    """``size`` problems as dicts in verl's RL schema."""
    import reasoning_gym

    kwargs_json = json.dumps(task_kwargs, sort_keys=True)
    _dataset(PREFIX + task, kwargs_json)  # an unknown task ends here, with its name
    rows = []
    for index, entry in enumerate(reasoning_gym.create_dataset(task, size=size, seed=seed, **task_kwargs)):
        # verl hands extra_info to the reward through Arrow, which merges the fields of nested dicts of
        # different rows: a JSON string comes back as it went in.
        extra_info = {
            "split": split,
            "index": index,
            "task_kwargs": kwargs_json,
            "entry": json.dumps(entry, default=str),
        }
        answer = entry["answer"]
        if answer is not None and compute_score(PREFIX + task, answer, answer, extra_info)["acc"] != 1.0:
            raise ValueError(f"problem {index} of {task!r} does not verify its own answer after JSON: {answer!r}")
        rows.append(
            {
                "data_source": PREFIX + task,
                "prompt": [{"role": "user", "content": entry["question"]}],
                "ability": "reasoning",
                "reward_model": {"style": "rule", "ground_truth": answer or ""},
                "extra_info": extra_info,
            }
        )
    return rows
