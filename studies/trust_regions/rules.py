"""The methods of the study, and the thresholds with which each masks a wanted share of a pilot's tokens."""

from bisect import bisect_left
from collections.abc import Callable

import numpy as np

from cppo_verl.analysis import replay
from cppo_verl.analysis.calibrate.thresholds import DIGITS, Sample, propose
from cppo_verl.artifacts.token_dump import Response

BUDGET_SHARE = 0.7
"""Share of the masked tokens that the prefix budget is to reject, of methods that have one; `calibrate`'s default."""
NO_MASK = "dppo trust_region.delta=1"
"""The ratio alone: a total variation never exceeds one."""
PAPER = {"delta": 0.15, "delta_b": 0.02}
METHODS = (
    "none",
    "grpo",
    "cispo",
    "trm_avg",
    "dppo",
    "cppo",
    "cppo_no_weights",
    "cppo_no_budget",
    "cppo_shuffled",
)
OF_TOKENS = METHODS[4:]
"""The methods whose thresholds are on tokens."""

Thresholds = dict[str, float]
"""{delta, delta_b, delta_avg or clip: value}, as the method has them."""


def text(method: str, thresholds: Thresholds) -> str:
    """The method with its thresholds, as `cppo-verl inspect --method` and `replay.setting` take it; also hydra's
    overrides of verl's trainer, behind ``+method=``."""
    if method == "none":
        return NO_MASK
    overrides = {
        "delta": "trust_region.delta={0}",
        "delta_b": "trust_region.delta_b={0}",
        "delta_avg": "actor_rollout_ref.actor.policy_loss.delta_avg={0}",
        # clip-higher keeps the ratio of GRPO's published bounds.
        "clip": "actor_rollout_ref.actor.clip_ratio_low={1} actor_rollout_ref.actor.clip_ratio_high={0}",
        "clip_high": "actor_rollout_ref.actor.clip_ratio_high={0}",
    }
    parts = [overrides[name].format(f"{x:g}", f"{x * 0.2 / 0.28:g}") for name, x in thresholds.items()]
    return " ".join([method, *parts])


def header(horizon: int) -> dict:
    """What a replay has to know of the run that its tokens are of."""
    return {"trust_region": PAPER, "divergence": "binary_tv", "max_response_length": horizon, "method": {}}


def matched(method: str, share: float, responses: list[Response], horizon: int) -> Thresholds:
    """Return thresholds with which the method masks ``share`` of the responses' tokens.

    Raises:
        ValueError: there are none.
    """
    about = header(horizon)
    if method == "none":
        return {}
    if method in OF_TOKENS:
        sample = Sample(replay.setting(method, about), responses, about)
        has_budget = sample.rule.budget != "none"
        return propose(sample, share, BUDGET_SHARE if has_budget else None).given
    name = {"trm_avg": "delta_avg", "grpo": "clip", "cispo": "clip_high"}[method]

    def masked(value: float) -> float:
        decided = replay.decisions(replay.setting(text(method, {name: value}), about), responses)
        counts = [((d.update_mask < 1)[r.mask].sum(), r.mask.sum()) for d, r in zip(decided, responses, strict=True)]
        below_one, tokens = np.sum(counts, 0)
        return below_one / tokens

    return {name: _smallest(masked, share)}


def _smallest(masked: Callable[[float], float], share: float) -> float:
    """The smallest number of three digits for which ``masked``, which falls, is at most ``share``."""
    return DIGITS[bisect_left(DIGITS, -share, key=lambda value: -masked(value))]
