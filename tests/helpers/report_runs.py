"""Runs as the quickstart leaves them, made without the trainer, and what a report draws of them."""

import json
from statistics import fmean

import numpy as np
from run_folders import answer, write
from token_dumps import CPPO, DELTA, W_MIN, batch, train, writer
from verl.utils import tensordict_utils as tu

from cppo_verl.analysis.report.drawing import draw
from cppo_verl.analysis.report.panels import Panel
from cppo_verl.artifacts.run_reader import read_runs

ACCURACY = "val-core/sorting/acc/mean@4"
SHARE = "trust_region/masked_share"


def metrics(step, seed=0, budget=True):
    """What a step of a method with a trust region logs, in verl's and the plug-in's names."""
    g = np.random.default_rng([seed, step])
    names = [
        "critic/score/mean",
        "response_length/mean",
        SHARE,
        *(f"trust_region/{sign}/masked_share" for sign in ("positive", "negative")),
        *(f"trust_region/{when}_update{s}/divergence" for when, s in (("first", ""), ("later", "s"))),
        *(f"trust_region/later_updates/divergence/position_{b}" for b in range(8)),
        *(f"actor/perf/{name}" for name in ("max_memory_allocated_gb", "cpu_memory_used_gb")),
        *(f"timing_s/{name}" for name in ("gen", "update_actor", "dump_tokens")),
    ]
    values = dict(zip(names, g.uniform(0.1, 0.9, len(names)).tolist(), strict=True))
    values["timing_s/dump_tokens"] *= 0.1
    values["timing_s/step"] = values["timing_s/gen"] + values["timing_s/update_actor"] + 0.25
    if step % 4:  # else nothing of it was masked, which leaves the shares out
        values["trust_region/budget_rejected_share"] = 0.75 if budget else 0.0
        values["trust_region/token_rejected_share"] = 0.25 if budget else 1.0
    values["trust_region/effective_delta_b"] = 0.01 + 0.001 * step if budget else 0.0
    if step % 5 == 0:
        values |= {ACCURACY: float(g.integers(0, 17)) / 16, "timing_s/testing": 2.0}
    return values


def make(folder, method="cppo", seed=1, steps=12, config="", answers=True, budget=True):
    """A run's folder as the quickstart leaves it, without the trainer."""
    rows = [{"step": step, "data": metrics(step, seed, budget)} for step in range(steps + 1)]
    del rows[0]["data"][SHARE]  # the validation before the first step
    write(folder / "logs" / "metrics-0.jsonl", *map(json.dumps, rows))
    loss = f"loss_mode: cppo, delta: 0.05, w_min: 0.8, mask: {'budget' if budget else 'none'}"
    write(
        folder / "hydra" / "config.yaml",
        f"data: {{seed: {seed}}}\noutput: {folder}",
        "trainer: {total_training_steps: 20, default_local_dir: '${output}/c'}",
        f"actor_rollout_ref: {{actor: {{policy_loss: {{{loss}}}}}}}",
        config,
    )
    write(
        folder / "hydra" / "hydra.yaml",
        f"hydra: {{runtime: {{output_dir: {folder}, choices: {{method: {method}}}}}}}",
    )
    write(folder / "hydra" / "overrides.yaml", f"- method={method}", f"- data.seed={seed}")
    for step in range(0, steps + 1, 5) if answers else ():
        lines = [answer(f"u{p}", i, f"problem {p}", float((p + i + step) % 3 == 0)) for p in range(6) for i in range(4)]
        write(folder / "validation" / f"{step}.jsonl", *lines)
        write(folder / "validation" / f"{step}.sources.json", json.dumps({f"u{p}": "sorting" for p in range(6)}))
    return folder


def dump(folder, step=3, method=None):
    """24 responses in three updates, and what their batch was made of."""
    method = method or CPPO()
    data, log_pi = batch()
    rows = [row for row in range(24) if row != 5]
    records = train(method, data, log_pi, rows)
    header = {"loss_mode": "cppo", "delta": DELTA, "w_min": W_MIN}
    keys = {row: f"prompt{row // 4}_{row % 4}_0" for row in rows}
    writer(folder / "tokens", method=header).write(step, None, records, keys, tu.index_select_tensor_dict(data, rows))
    return data, log_pi


def read(*folders):
    return [run for folder in folders for run in read_runs(folder)]


def drawn(made):
    panels = [item for items in made["sections"].values() for item in items if isinstance(item, Panel)]
    return {panel.name: draw(panel) for panel in panels}


def data_of(figure, label):
    """The labelled line's points, and those of the faint one that was drawn before it."""
    lines = figure.axes.lines
    at = next(i for i, line in enumerate(lines) if line.get_label() == label)
    mean = lines[at].get_xydata().tolist()
    faint = lines[at - 1].get_xydata().tolist() if at and lines[at - 1].get_gid() == "each step" else None
    return mean, faint


def means_of_ten(points):
    return [[x, fmean(y for _, y in points[max(0, i - 9) : i + 1])] for i, (x, _) in enumerate(points)]
