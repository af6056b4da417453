"""Finds thresholds that mask a wanted share of dumped tokens, by replaying the training's own loss.

What the token threshold masks, w_t D_t > delta, depends on delta alone, because c_t <= delta. What the prefix budget
masks beyond it falls as delta_b grows. So delta is found first, then delta_b, each by bisection over the numbers with
three digits.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import numpy as np

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


class Wanted(NamedTuple):
    """The shares to reach, in (0, 1)."""

    masked: float
    """Share of the tokens that is masked."""
    by_budget: float | None
    """Share of the masked tokens that the prefix budget rejects; None for a method without one."""


class Unreachable(ValueError):
    """No thresholds mask the wanted share."""


@dataclass(eq=False)
class Counts:
    """Numbers of tokens per response, [R]; under a smooth gate, parts of tokens count."""

    tokens: np.ndarray
    masked: np.ndarray
    by_budget: np.ndarray
    """Masked tokens that the prefix budget rejects."""
    violating: np.ndarray
    """Tokens that violate either constraint, masked or not."""

    @property
    def masked_share(self) -> float:
        return float(self.masked.sum() / self.tokens.sum())

    @property
    def budget_share(self) -> float | None:
        """Share of the masked tokens; None if no token is masked."""
        return float(self.by_budget.sum() / self.masked.sum()) if self.masked.any() else None

    @property
    def token_masked_share(self) -> float:
        """Share of the tokens that the token threshold masks."""
        return float((self.masked - self.by_budget).sum() / self.tokens.sum())

    @property
    def violating_share(self) -> float:
        return float(self.violating.sum() / self.tokens.sum())

    def of(self, chosen: np.ndarray) -> "Counts | None":
        """The counts of some responses; None if these have no token."""
        return Counts(*(x[chosen] for x in vars(self).values())) if self.tokens[chosen].any() else None


def count(responses: Sequence[Response], decisions: Sequence[Decisions]) -> Counts:
    rows = []
    for response, decided in zip(responses, decisions, strict=True):
        masked = decided.rejected.astype(float)
        by_budget, violating = decided.has_reason("budget"), decided.has_reason("towards_one", *REJECTING)
        rows.append((response.mask.sum(), masked.sum(), masked[by_budget].sum(), violating.sum()))
    return Counts(*np.array(rows, dtype=float).T)


@dataclass
class Sample:
    """The responses on which thresholds of a method are sought."""

    setting: Setting
    responses: list[Response]
    """Each with at least one generated token."""
    _known: dict[Thresholds, Counts] = field(default_factory=dict)

    def at(self, thresholds: Thresholds) -> Counts:
        """What these thresholds mask."""
        if thresholds not in self._known:
            self._known[thresholds] = count(self.responses, self.decisions(thresholds))
        return self._known[thresholds]

    def decisions(self, thresholds: Thresholds) -> list[Decisions]:
        return list(replay.decisions(with_thresholds(self.setting, thresholds), self.responses))

    @property
    def rule(self) -> CPPOLossConfig:
        return cast(CPPOLossConfig, self.setting.actor.policy_loss)

    @property
    def updates(self) -> np.ndarray:
        return np.array([response.update for response in self.responses])

    @property
    def steps(self) -> np.ndarray:
        return np.array([response.step for response in self.responses])

    @property
    def prompts(self) -> list[str]:
        return [response.uid for response in self.responses]


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
        raise ValueError(f"the dump of step {last} does not say what its run's {', '.join(missing)} was")
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
    return Sample(setting, responses)


def with_thresholds(setting: Setting, thresholds: Thresholds) -> Setting:
    values: dict[str, Any] = thresholds.given
    rule = replace(setting.actor.policy_loss, **values)
    return Setting(setting.label, replace(setting.actor, policy_loss=rule))


def insufficient(responses: Sequence[Response]) -> str | None:
    """Why no share can be measured on these responses; None if it can."""
    if not any(response.update for response in responses):
        return (
            "every response is of the first update of a batch, where pi differs from mu only by engine mismatch; "
            "dump a run with several updates a batch (actor_rollout_ref.actor.ppo_mini_batch_size below "
            "data.train_batch_size)"
        )
    if not any(response.advantage[response.mask].any() for response in responses):
        return "no token has an advantage other than zero, so that no update moves away from one"
    drifted = sum(bool(r.update and r.advantage[r.mask].any()) for r in responses)
    if drifted < RESPONSES_AT_LEAST:
        return (
            f"{drifted} response(s) with an advantage at later updates of a batch, at least {RESPONSES_AT_LEAST} are "
            "needed: dump more (trust_region.dump.responses, trust_region.dump.every)"
        )
    return None


def propose(sample: Sample, wanted: Wanted) -> Thresholds:
    """The smallest thresholds with three digits that mask no more than wanted.

    Raises:
        Unreachable: there are none; the message says what can be reached.
    """
    values = [value for value in DIGITS if value <= sample.rule.largest_divergence]
    by_token = wanted.masked * (1 - (wanted.by_budget or 0.0))
    found = Thresholds(values[-1], None if wanted.by_budget is None else values[-1])

    def smallest(name: str, most: float, share: Callable[[Counts], float]) -> tuple[Thresholds, Thresholds]:
        """``found`` with the smallest value of one threshold that masks ``most`` or less, and with the one before."""
        place = bisect_left(values, -most, key=lambda value: -share(sample.at(found._replace(**{name: value}))))
        at, before = values[place], values[max(0, place - 1)]
        return found._replace(**{name: at}), found._replace(**{name: before})

    most = sample.at(found._replace(delta=values[0])).token_masked_share
    if most < by_token:
        raise Unreachable(
            f"{percent(by_token, 2)} of the tokens are to be masked by delta, but only {percent(most, 2)} move away "
            "from one at all: ask for a smaller --masked-share, or dump later steps"
        )
    found, next_lower = smallest("delta", by_token, lambda counts: counts.token_masked_share)
    if wanted.by_budget is not None:
        most = sample.at(found._replace(delta_b=values[0])).masked_share
        if most < wanted.masked:
            raise Unreachable(
                f"{percent(wanted.masked, 2)} of the tokens are to be masked, {percent(wanted.by_budget, 0)} of them "
                f"by the prefix budget; with delta={found.delta:g} for the others, delta_b=0 would still mask only "
                f"{percent(most, 2)}: ask for a smaller --budget-share or --masked-share"
            )
        found, next_lower = smallest("delta_b", wanted.masked, lambda counts: counts.masked_share)
    below, above = sample.at(found), sample.at(next_lower)
    if wanted.masked - below.masked_share > max(GAP * wanted.masked, 1 / below.tokens.sum()):
        raise Unreachable(  # one digit of a threshold steps over the wanted share
            f"no thresholds with three digits mask between {percent(below.masked_share, 2)} and "
            f"{percent(above.masked_share, 2)} of these {below.tokens.sum():,.0f} tokens, {percent(wanted.masked, 2)} "
            "are wanted: ask for one of these shares, or dump more responses (trust_region.dump.responses)"
        )
    return found


# --- what the proposal is worth --------------------------------------------------------------------------------


def intervals(counts: Counts, prompts: Sequence[str], seed: int = 0) -> tuple[Interval, Interval]:
    """95% intervals of the masked share and of the budget's share of it, by resampling prompts with their responses.

    Responses to one prompt resemble each other, as do tokens of one response; resampling these instead would make the
    intervals too short.
    """
    _, index = np.unique(prompts, return_inverse=True)
    n = index.max() + 1
    columns = np.stack([counts.tokens, counts.masked, counts.by_budget], axis=1)
    sums = np.stack([np.bincount(index, weights=column) for column in columns.T], axis=1)
    rng = np.random.default_rng(seed)
    tokens, masked, by_budget = np.stack([sums[rng.integers(0, n, n)].sum(0) for _ in range(RESAMPLES)]).T
    ends = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    any_masked = masked > 0
    of_masked = by_budget[any_masked] / masked[any_masked] if any_masked.any() else [np.nan]
    return Interval(*np.quantile(masked / tokens, ends).tolist()), Interval(*np.quantile(of_masked, ends).tolist())


def curve(sample: Sample, proposed: Thresholds, name: str) -> list[tuple[float, Counts]]:
    """[(value, what it masks)] for other values of one threshold, the other as proposed."""
    at = getattr(proposed, name)
    values = {float(f"{at * factor:.3g}") for factor in FACTORS}
    points = sorted(value for value in values if value <= sample.rule.largest_divergence)
    return [(value, sample.at(proposed._replace(**{name: value}))) for value in points]


def recorded(responses: Sequence[Response]) -> Counts | None:
    """What the run itself masked; None if it trained with one of verl's own losses."""
    return None if any(r.update_mask is None or r.reason is None for r in responses) else count(responses, responses)
