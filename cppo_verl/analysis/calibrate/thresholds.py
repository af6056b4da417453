"""Finds thresholds that mask a wanted share of dumped tokens, by replaying the training's own loss.

What the token threshold masks, w_t D_t > delta, depends on delta alone, because c_t <= delta. What the prefix budget
masks beyond it falls as delta_b grows. So delta is found first, then delta_b, each by bisection over the numbers with
three digits.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import numpy as np
import pandas as pd

from cppo_verl.analysis import replay
from cppo_verl.analysis.replay import Setting
from cppo_verl.analysis.text import percent
from cppo_verl.artifacts.token_dump import REJECTING, Decisions, Response
from cppo_verl.evaluation.statistics import LEVEL, Interval
from cppo_verl.plugin.config import CPPOLossConfig

RESAMPLES = 1999
RESPONSES_AT_LEAST = 8
"""Responses with an advantage at later updates; fewer than this do not tell a share."""
DIGITS = [float(f"{digits}e{exponent}") for exponent in range(-12, 2) for digits in range(100, 1000)]
"""The candidates: 1e-10 to 999 with three digits."""
GAP = 0.1
"""The part of the wanted share by which a proposal may fall short. One digit of a threshold can step over several
tokens at once: where tokens tie, and in delta_b where long responses spend the budget at the same rate."""
FACTORS = [2 ** (k / 2) for k in range(-6, 7)]
"""Multiples of the proposed threshold at which the curves are drawn."""


class Thresholds(NamedTuple):
    delta: float
    delta_b: float | None
    """None for a method without a prefix budget."""

    @property
    def given(self) -> dict[str, float]:
        """{name: value} of those that the method has."""
        return {name: value for name, value in self._asdict().items() if value is not None}


class Unreachable(ValueError):
    """No thresholds mask the wanted share."""


class Shares(NamedTuple):
    """What thresholds mask of some responses."""

    tokens: float
    """Number of the responses' tokens."""
    masked: float
    """Share of the tokens; under a smooth gate, parts of tokens count."""
    by_budget: float | None
    """Share of the masked tokens that the prefix budget rejects; None if no token is masked."""
    by_token: float
    """Share of the tokens that the token threshold masks."""
    violating: float
    """Share of the tokens that violate either constraint, masked or not."""

    @classmethod
    def of(cls, counts: pd.DataFrame) -> "Shares":
        """From the `count` of some responses."""
        tokens, masked, by_budget, violating = counts.sum()
        of_masked = by_budget / masked if masked else None
        return cls(tokens, masked / tokens, of_masked, (masked - by_budget) / tokens, violating / tokens)


def count(responses: Sequence[Response], decisions: Sequence[Decisions]) -> pd.DataFrame:
    """Numbers of tokens, of each response by its step, update and prompt."""
    rows = []
    for r, decided in zip(responses, decisions, strict=True):
        masked = decided.rejected.astype(float)
        by_budget, violating = decided.has_reason("budget"), decided.has_reason("towards_one", *REJECTING)
        counts = (r.mask.sum(), masked.sum(), masked[by_budget].sum(), violating.sum())
        rows.append((r.step, r.update, r.uid, *map(float, counts)))
    columns = ["step", "update", "prompt", "tokens", "masked", "by_budget", "violating"]
    return pd.DataFrame(rows, columns=columns).set_index(columns[:3])


@dataclass
class Sample:
    """The responses on which thresholds of a method are sought."""

    setting: Setting
    responses: list[Response]
    """Each with at least one generated token."""
    header: dict
    """Of the last step's file."""
    _known: dict[Thresholds, pd.DataFrame] = field(default_factory=dict)

    def at(self, thresholds: Thresholds) -> pd.DataFrame:
        """The `count` with these thresholds."""
        if thresholds not in self._known:
            self._known[thresholds] = count(self.responses, self.decisions(thresholds))
        return self._known[thresholds]

    def decisions(self, thresholds: Thresholds) -> list[Decisions]:
        values: dict[str, Any] = thresholds.given
        actor = replace(self.setting.actor, policy_loss=replace(self.rule, **values))
        return list(replay.decisions(Setting(self.setting.label, actor), self.responses))

    @property
    def prompts(self) -> int:
        return len({response.uid for response in self.responses})

    @property
    def rule(self) -> CPPOLossConfig:
        return cast(CPPOLossConfig, self.setting.actor.policy_loss)


def sample_of(text: str | None, responses: list[Response], headers: dict[int, dict], notes: list[str]) -> Sample:
    """The responses with the method asked for; by default the run's own if it is CPPO's loss, else cppo.

    Args:
        text: the method asked for, see `replay.setting`.
        notes: is added to if the run's settings changed.

    Raises:
        ValueError: the method has no thresholds to seek, or needs divergences that the dump lacks.
    """
    last = max(response.step for response in responses)
    header = headers[last]
    if missing := replay.lacking(header):
        raise ValueError(
            f"the dump of step {last} does not say what its run's {', '.join(missing)} was: "
            "dump it anew with this version"
        )
    setting = replay.run_setting(header)
    if text is not None or not isinstance(setting.actor.policy_loss, CPPOLossConfig):
        setting = replay.setting(text or "cppo", header)
    used = {response.step for response in responses}
    if any(headers[step].get("method") != header["method"] for step in used):
        notes.append(f"the run's settings changed between its dumps; those of step {last} count as its own here")
    rule = setting.actor.policy_loss
    if not isinstance(rule, CPPOLossConfig):
        raise ValueError(
            f"{setting.label} has no thresholds on tokens: choose --method cppo, dppo or another of that loss"
        )
    if rule.gate != "hard":
        raise ValueError(
            f"{setting.label} has the gate {rule.gate}, which masks parts of tokens: seek its thresholds under the "
            'hard one, --method "cppo"'
        )
    if not replay.is_replayable(setting, header):
        raise ValueError(
            f"{setting.label} needs divergence={setting.divergence}, which cannot be computed from what was dumped, "
            f'{header["divergence"]}: choose --method "cppo divergence={header["divergence"]}" or "cppo '
            'divergence=binary_tv"'
        )
    other = [step for step in used if headers[step].get("divergence") != header["divergence"]]
    if other and rule.divergence.startswith("topk_"):
        raise ValueError(
            f"{setting.label} needs divergence={rule.divergence}, but up to step {max(other)} the run dumped another "
            f"D_t: give --from-step {max(other) + 1}"
        )
    return Sample(setting, responses, header)


def _refuse_insufficient(responses: Sequence[Response]) -> None:
    """Raise `Unreachable` if no share can be measured on these responses."""
    if not any(response.update for response in responses):
        raise Unreachable(
            "every response is of the first update of a batch, where pi differs from mu only by engine mismatch; "
            "dump a run with several updates a batch (actor_rollout_ref.actor.ppo_mini_batch_size below "
            "data.train_batch_size)"
        )
    with_advantage = [response for response in responses if response.advantage[response.mask].any()]
    if not with_advantage:
        raise Unreachable(
            "no token has an advantage other than zero, so no update is ever masked: dump steps in which the answers "
            "to one prompt have different rewards"
        )
    drifted = sum(response.update > 0 for response in with_advantage)
    if drifted < RESPONSES_AT_LEAST:
        raise Unreachable(
            f"{drifted} response(s) with an advantage at later updates of a batch, at least {RESPONSES_AT_LEAST} are "
            "needed: dump more (trust_region.dump.responses, trust_region.dump.every)"
        )


def propose(sample: Sample, masked: float, by_budget: float | None) -> Thresholds:
    """The smallest thresholds with three digits that mask no more than wanted.

    Args:
        masked: the wanted share of the tokens, in (0, 1).
        by_budget: the wanted share of the masked tokens that the prefix budget rejects; None for a method without one.

    Raises:
        Unreachable: there are none; the message says what can be reached.
    """
    _refuse_insufficient(sample.responses)
    values = [value for value in DIGITS if value <= sample.rule.largest_divergence]
    by_token = masked * (1 - (by_budget or 0.0))
    found = Thresholds(values[-1], None if by_budget is None else values[-1])

    def smallest(name: str, most: float, share: str) -> tuple[Thresholds, Thresholds]:
        """``found`` with the smallest value of one threshold that masks ``most`` or less, and with the one before."""
        candidates = [found._replace(**{name: value}) for value in values]
        place = bisect_left(candidates, -most, key=lambda thresholds: -getattr(Shares.of(sample.at(thresholds)), share))
        return candidates[place], candidates[max(0, place - 1)]

    most = Shares.of(sample.at(found._replace(delta=values[0]))).by_token
    if most < by_token:
        raise Unreachable(
            f"{percent(by_token, 2)} of the tokens are to be masked by delta, but only {percent(most, 2)} move away "
            "from one at all: ask for a smaller --masked-share, or dump later steps"
        )
    found, next_lower = smallest("delta", by_token, "by_token")
    if by_budget is not None:
        most = Shares.of(sample.at(found._replace(delta_b=values[0]))).masked
        if most < masked:
            raise Unreachable(
                f"{percent(masked, 2)} of the tokens are to be masked, {percent(by_budget, 0)} of them "
                f"by the prefix budget; with delta={found.delta:g} for the others, delta_b=0 would still mask only "
                f"{percent(most, 2)}: ask for a smaller --budget-share or --masked-share"
            )
        found, next_lower = smallest("delta_b", masked, "masked")
    below, above = Shares.of(sample.at(found)), Shares.of(sample.at(next_lower))
    if masked - below.masked > max(GAP * masked, 1 / below.tokens):
        raise Unreachable(  # one digit of a threshold steps over the wanted share
            f"no thresholds with three digits mask between {percent(below.masked, 2)} and {percent(above.masked, 2)} "
            f"of these {below.tokens:,.0f} tokens, {percent(masked, 2)} are wanted: ask for one of these "
            "shares, or dump more responses (trust_region.dump.responses)"
        )
    return found


def intervals(counts: pd.DataFrame) -> tuple[Interval, Interval]:
    """95% intervals of the masked share and of the budget's share of it, by resampling prompts with their responses.

    NaN for a single prompt, which tells nothing of others.

    Responses to one prompt resemble each other, as do tokens of one response; resampling these instead would make the
    intervals too short.
    """
    sums = counts.groupby(level="prompt").sum().to_numpy()
    n, rng = len(sums), np.random.default_rng(0)
    if n < 2:
        return Interval(np.nan, np.nan), Interval(np.nan, np.nan)
    tokens, masked, by_budget, _ = np.stack([sums[rng.integers(0, n, n)].sum(0) for _ in range(RESAMPLES)]).T
    ends = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    of_masked = by_budget[masked > 0] / masked[masked > 0] if masked.any() else [np.nan]
    return Interval(*np.quantile(masked / tokens, ends).tolist()), Interval(*np.quantile(of_masked, ends).tolist())


def others(sample: Sample, proposed: Thresholds, name: str) -> list[Thresholds]:
    """The proposal with other values of one threshold, in order."""
    values = {float(f"{getattr(proposed, name) * factor:.3g}") for factor in FACTORS}
    return [proposed._replace(**{name: x}) for x in sorted(values) if x <= sample.rule.largest_divergence]


def recorded(responses: Sequence[Response]) -> pd.DataFrame | None:
    """The `count` of what the run itself masked; None if it trained with one of verl's own losses."""
    return None if any(r.update_mask is None or r.reason is None for r in responses) else count(responses, responses)
