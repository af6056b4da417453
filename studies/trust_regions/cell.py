"""A cell of the study: makes first policies and a pilot where they are missing, finds thresholds, trains, writes."""

import platform
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import verl
from omegaconf import DictConfig

import cppo_verl
from cppo_verl.analysis import replay
from cppo_verl.artifacts.atomic import replacing
from cppo_verl.artifacts.token_dump import Response
from studies.trust_regions import loop, results, rules, warmup
from studies.trust_regions.loop import Batch, Measured, Settings

SEEDS = {"grid": range(101, 105), "evaluation": range(201, 221)}
GRID = (1e-4, 3e-4, 1e-3)
"""Learning rates."""
PILOT_RESPONSES = 800


def run(config: DictConfig, file: Path) -> None:
    """Train all seeds of the cell, and write what was measured to ``file``."""
    torch.set_num_threads(1)  # a cell a core
    begin = time.monotonic()
    seeds = list(SEEDS.get(config.seeds, config.seeds))[: config.limit]
    rate = results.best_rate(config, GRID) if config.learning_rate == "chosen" else float(config.learning_rate)
    settings = Settings(
        config.horizon,
        config.updates,
        rate,
        config.steps,
        rollout_dtype=getattr(torch, config.rollout),
        staleness=config.staleness,
    )
    thresholds = thresholds_of(config, settings)
    actor = replay.setting(rules.text(config.rule, thresholds), rules.header(config.horizon)).actor
    rows = []
    for start in range(0, len(seeds), config.at_once):
        some = seeds[start : start + config.at_once]
        first = warmup.first_policies(config.horizon, some, Path(config.inputs, "first"))
        rows.append(table(some, loop.train(first, some, settings, actor)))
    about = {
        "method": config.rule,
        "share": config.share,
        "seeds": str(config.seeds),
        "thresholds": thresholds,
        "settings": asdict(settings) | {"rollout_dtype": config.rollout},
        "command": command(config),
        "versions": {"cppo_verl": cppo_verl.__version__, "torch": torch.__version__, "verl": verl.__version__}
        | {"python": platform.python_version()},
        "seconds": round(time.monotonic() - begin),
    }
    results.write(file, pd.concat(rows), about)


def command(config: DictConfig) -> str:
    """What makes the cell anew, wherever its folders are."""
    own = [
        f"{key}={'null' if value is None else value}"
        for key, value in config.items()
        if key not in ("output", "inputs", "results_folder", "trainer")
    ]
    return shlex.join(["python", "-m", "studies.trust_regions.run", "output=outputs/study", *own])


def thresholds_of(config: DictConfig, settings: Settings) -> rules.Thresholds:
    """Those that mask the wanted share of a pilot's tokens, or the paper's.

    The pilot trains DPPO, on the grid's seeds, with a threshold that masks the share of a first pilot without a mask.
    """
    if config.share == "paper":
        return {} if config.rule not in rules.OF_TOKENS else _paper(config.rule)
    if config.rule == "none":
        return {}
    share = float(config.share)
    loose = pilot(config, settings, "none", {})
    delta = rules.matched("dppo", share, loose, config.horizon)
    return rules.matched(config.rule, share, pilot(config, settings, "dppo", delta), config.horizon)


def _paper(method: str) -> rules.Thresholds:
    without_budget = method in ("dppo", "cppo_no_budget", "cppo_shuffled")
    return {"delta": rules.PAPER["delta"]} if without_budget else dict(rules.PAPER)


def pilot(config: DictConfig, settings: Settings, method: str, thresholds: rules.Thresholds) -> list[Response]:
    """Responses at random updates of a run with ``method``; kept, as all methods of a condition need them."""
    condition = f"{settings.horizon}-{settings.updates}-{settings.learning_rate:g}-{config.rollout}-{config.staleness}"
    name = "-".join([condition, method, *(f"{x:g}" for x in thresholds.values())])
    file = Path(config.inputs, "pilot", f"{name}.pt")
    if not file.exists():
        seeds = list(SEEDS["grid"])
        kept: list[Response] = []
        random = np.random.default_rng(0)
        # Of all responses of the pilot about this part is kept.
        part = PILOT_RESPONSES / (len(seeds) * settings.steps * settings.prompts * settings.samples)

        def keep(step: int, update: int, batch: Batch, log_pi: torch.Tensor) -> None:
            drawn = random.random(batch.rewards.shape) < part
            for s, b in np.argwhere(drawn & batch.has_signal.numpy()):
                kept.append(response(step, update, f"{seeds[s]}", b, batch, log_pi, s, settings))

        actor = replay.setting(rules.text(method, thresholds), rules.header(settings.horizon)).actor
        first = warmup.first_policies(settings.horizon, seeds, Path(config.inputs, "first"))
        loop.train(first, seeds, settings, actor, keep)
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as (temporary,):
            torch.save(kept, temporary)
    return torch.load(file, weights_only=False)  # written by this function


def response(
    step: int, update: int, seed: str, b: int, batch: Batch, log_pi: torch.Tensor, s: int, settings: Settings
) -> Response:
    """One of the batch's responses, as a token dump has it."""
    log_mu, pi = batch.log_mu[s, b].numpy(), log_pi[s, b].numpy()
    return Response(
        step=step,
        update=update,
        key=f"{seed}:{step}:{update}:{b // settings.samples}_{b}_0",
        score=batch.rewards[s, b].item(),
        prompt=batch.prompts[s, b].numpy(),
        response=batch.responses[s, b].numpy(),
        mask=np.ones(len(pi), bool),
        log_mu=log_mu,
        log_pi=pi,
        advantage=np.full(len(pi), batch.advantages[s, b].item(), np.float32),
        divergence=np.abs(np.exp(pi) - np.exp(log_mu)),
    )


def table(seeds: Sequence[int], steps: list[Measured]) -> pd.DataFrame:
    """A row for each seed and step: accuracy, shares of the tokens that were trained on, and their mean |pi - mu|."""
    frames = []
    for step, measured in enumerate(steps):
        tokens = measured["tokens"].clamp_min(1)
        columns: dict[str, Any] = {"seed": seeds, "step": step + 1, "accuracy": measured["accuracy"]}
        columns |= {name: measured[name] / tokens for name in ("masked", "by_budget", "deviation")}
        columns |= {"tokens": measured["tokens"], "not_finite": measured["not_finite"]}
        at = measured["masked_at"] / (tokens / loop.POSITION_BINS).unsqueeze(-1)
        columns |= {f"masked_at_{b}": at[:, b] for b in range(loop.POSITION_BINS)}
        frames.append(pd.DataFrame(columns))
    return pd.concat(frames).sort_values(["seed", "step"], ignore_index=True)
