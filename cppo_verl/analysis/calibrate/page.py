"""What `cppo_verl.analysis.calibrate.command` says of proposed thresholds: in words, tables and figures."""

from typing import NamedTuple

import numpy as np
from matplotlib.ticker import PercentFormatter

from cppo_verl.analysis import replay
from cppo_verl.analysis.calibrate.thresholds import Counts, Sample, Thresholds, Wanted, curve, intervals, recorded
from cppo_verl.analysis.html.figures import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, Figure
from cppo_verl.evaluation.statistics import Interval
from cppo_verl.plugin.config import CPPOLossConfig

PAPER = {"tv": (0.15, 0.02), "kl": (0.1, 0.002)}
"""Its (delta, delta_b) of the base models, and of the KL variant."""
QUANTILES = (0.5, 0.9, 0.95, 0.99, 0.999, 1.0)
NOTICEABLE = 0.1
"""Part of the wanted share, or of delta_b, that the engines' mismatch may take without a warning."""


class Row(NamedTuple):
    """Thresholds and what they mask."""

    name: str
    delta: float | None
    delta_b: float | None
    counts: Counts
    masked: Interval
    by_budget: Interval


class Drift(NamedTuple):
    """Quantiles of D_t, `QUANTILES`, and its mean."""

    name: str
    quantiles: list[float]
    mean: float
    values: list[float]
    """Of all tokens."""


def listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers)) if len(numbers) < 10 else f"{numbers[0]} to {numbers[-1]}"


def sample_of(text: str | None, responses: list, headers: dict[int, dict], notes: list[str]) -> Sample:
    """The responses with the rule of the method asked for, else the run's own or CPPO's; adds to the notes.

    Raises:
        ValueError: the rule has no thresholds to seek, or needs divergences that the dump lacks.
    """
    last = max(response.step for response in responses)
    header = headers[last]
    try:
        setting = replay.run_setting(header)
        if text is not None or not isinstance(setting.actor.policy_loss, CPPOLossConfig):
            setting = replay.setting(text or "cppo", header)
    except KeyError as error:
        raise ValueError(f"the dump of step {last} does not say what its run's {error} was") from error
    used = {response.step for response in responses}
    if any(headers[step]["method"] != header["method"] for step in used):
        notes.append(f"the run's settings changed between its dumps; those of step {last} are its own here")
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
            f"{setting.label} needs divergence={setting.divergence}, which is not made of what was dumped, "
            f'{header["divergence"]}: choose --method "cppo divergence={header["divergence"]}" or "cppo '
            'divergence=binary_tv"'
        )
    return Sample(setting, responses)


def page_values(
    text: str | None, sample: Sample, wanted: Wanted, proposed: Thresholds, headers: dict, notes: list[str]
) -> dict:
    """What the template takes, and the terminal shows.

    Args:
        text: the method that was asked for, if any.
    """
    pasted = overrides(text, sample, proposed, headers)
    rows = [_row("proposed", sample, proposed)]
    own = recorded(sample.responses)
    if own:
        method = headers[max(headers)]["method"]
        budget = None if method.get("budget", "none") == "none" else method.get("delta_b")
        rows.append(_row_of("the run's own", method.get("delta"), budget, own, sample))
    delta, delta_b = PAPER[sample.rule.divergence.rpartition("_")[2]]
    paper = Thresholds(delta, None if wanted.by_budget is None else delta_b)
    rows.append(_row("the paper's", sample, paper))
    drift = drifts(sample, proposed)
    curves = {name: curve(sample, proposed, name) for name, value in proposed._asdict().items() if value is not None}
    promise = promised(rows[0], len(set(sample.prompts)))
    taken = mismatch(sample, proposed, drift)
    warned = warnings(sample, wanted, proposed, drift)
    steps = sorted(set(sample.steps.tolist()))
    summary = (
        f"{len(sample.responses):,} responses to {len(set(sample.prompts)):,} prompts, "
        f"{rows[0].counts.tokens.sum():,.0f} tokens, of step{'s' * (len(steps) > 1)} {listed(steps)}; "
        f"D_t is {sample.rule.divergence}, the budget {sample.rule.budget}"
    )
    tables = {
        "thresholds": (("", "delta", "delta_b", "masked", "of it by the budget", "violating either"), _cells(rows)),
        "curves": _curve_table(curves),
        "updates": _group_table("update", sample.updates, rows[0].counts),
        "steps": _group_table("step", sample.steps, rows[0].counts),
        "drift": (
            ("D_t", "mean", *(f"{q:.1%}".replace(".0%", "%") if q < 1 else "largest" for q in QUANTILES)),
            [[part.name, *(f"{x:.2g}" for x in (part.mean, *part.quantiles))] for part in drift],
        ),
    }
    return {
        "wanted": wanted,
        "overrides": pasted,
        "promise": promise,
        "check": CHECK,
        "summary": summary,
        "mismatch": taken,
        "warnings": warned,
        "notes": notes,
        "tables": tables,
        "figures": draw(sample, wanted, rows, drift, curves),
    }


CHECK = "Other thresholds make other policies: what they mask in the end, calibrate on the new run's dump tells."


def overrides(text: str | None, sample: Sample, proposed: Thresholds, headers: dict) -> str:
    """As hydra takes them: ``trust_region.delta``, or the loss's own keys where a method's config has set these."""

    values = {name: value for name, value in proposed._asdict().items() if value is not None}
    header = headers[max(headers)]
    if text is None and sample.setting.label == replay.run_setting(header).label:
        shared = all(header["trust_region"].get(name) == header["method"][name] for name in values)
    else:
        tried = " ".join([sample.setting.label, *(f"trust_region.{name}={value:g}" for name, value in values.items())])
        rule = replay.setting(tried, header).actor.policy_loss
        shared = all(getattr(rule, name) == value for name, value in values.items())
    prefix = "trust_region" if shared else "actor_rollout_ref.actor.policy_loss"
    return " ".join(f"{prefix}.{name}={value:g}" for name, value in values.items())


def _row(name: str, sample: Sample, thresholds: Thresholds) -> Row:
    return _row_of(name, *thresholds, sample.at(thresholds), sample)


def _row_of(name: str, delta, delta_b, counts: Counts, sample: Sample) -> Row:

    return Row(name, delta, delta_b, counts, *intervals(counts, sample.prompts))


def promised(row: Row, prompts: int) -> str:
    counts = row.counts
    text = (
        f"This masks {counts.masked_share:.1%} of these tokens, 95% interval {row.masked.low:.1%} to "
        f"{row.masked.high:.1%} by resampling {prompts:,} prompts"
    )
    if row.delta_b is None:
        return text
    return text + (
        f"; the prefix budget rejects {counts.budget_share:.0%} of that, {row.by_budget.low:.0%} to "
        f"{row.by_budget.high:.0%}"
    )


def drifts(sample: Sample, proposed: Thresholds) -> list[Drift]:
    """D_t of the first update, which is the engines' mismatch, and of the later ones, as far as they are there."""

    decisions = sample.decisions(proposed)
    found = []
    for name, chosen in (("first update", sample.updates == 0), ("later updates", sample.updates > 0)):
        if not chosen.any():
            continue
        pairs = zip(sample.responses, decisions, chosen, strict=True)
        values = np.concatenate([v.divergence[r.mask] for r, v, c in pairs if c]).astype(float)
        found.append(Drift(name, np.quantile(values, QUANTILES).tolist(), float(values.mean()), values))
    return found


def mismatch(sample: Sample, proposed: Thresholds, drift: list[Drift]) -> str:
    """What the engines' mismatch takes of the thresholds."""
    first = sample.at(proposed).of(sample.updates == 0)
    if first is None:
        return "The dump has no first update of a batch: what of D_t is the engines' mismatch is not known."
    text = f"At the first update of a batch {first.masked_share:.1%} of the tokens are masked"
    if proposed.delta_b is not None:
        mean, p90 = (x / proposed.delta_b for x in (drift[0].mean, drift[0].quantiles[QUANTILES.index(0.9)]))
        text += f", and D_t is {mean:.2%} of delta_b on average, P90 {p90:.2%}"
    return text + ": the mismatch's part."


def warnings(sample: Sample, wanted: Wanted, proposed: Thresholds, drift: list[Drift]) -> list[str]:
    found = []
    first = sample.at(proposed).of(sample.updates == 0)
    if first and first.masked_share > NOTICEABLE * wanted.masked:
        found.append(f"the engines' mismatch alone masks {first.masked_share:.1%} of the tokens. {MISMATCH}")
    elif first and proposed.delta_b is not None and drift[0].mean > NOTICEABLE * proposed.delta_b:
        part = drift[0].mean / proposed.delta_b
        found.append(f"the engines' mismatch alone spends {part:.0%} of delta_b, on average. {MISMATCH}")
    if proposed.delta_b is not None and proposed.delta_b >= proposed.delta * sample.rule.w_min:
        found.append(
            f"delta_b={proposed.delta_b:g} is not below delta w_min = {proposed.delta * sample.rule.w_min:g}: the "
            "prefix budget bounds nothing that delta does not; ask for a larger --budget-share"
        )
    return found


MISMATCH = (
    "No threshold mends that: look at both sides' precision (actor_rollout_ref.rollout.dtype, the actor's "
    "fsdp_config.model_dtype), at quantised weights or caches of the rollout, and, in asynchronous trainers, at the "
    "batch's staleness."
)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:g}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _between(share: str, interval: Interval) -> str:
    return share if share == "–" else f"{share} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def _cells(rows: list[Row]) -> list[list[str]]:
    return [
        [
            row.name,
            _number(row.delta),
            _number(row.delta_b),
            _between(_percent(row.counts.masked_share), row.masked),
            "–" if row.delta_b is None else _between(_percent(row.counts.budget_share), row.by_budget),
            _percent(row.counts.violating_share),
        ]
        for row in rows
    ]


def _curve_table(curves: dict) -> tuple[tuple[str, ...], list[list[str]]]:
    """One threshold beside the other, each with what it masks."""
    header, columns = [], []
    for name, points in curves.items():
        header += [name, "masked", "by the budget"] if len(curves) > 1 else [name, "masked"]
        columns.append(
            [
                [_number(x), _percent(c.masked_share), _percent(c.budget_share)][: 3 if len(curves) > 1 else 2]
                for x, c in points
            ]
        )
    length = max(map(len, columns))
    padded = [column + [[""] * len(column[0])] * (length - len(column)) for column in columns]
    return tuple(header), [sum(parts, []) for parts in zip(*padded, strict=True)]


def _group_table(name: str, groups, counts: Counts) -> tuple[tuple[str, ...], list[list[str]]]:
    rows = []
    for group in sorted(set(groups.tolist())):
        part = counts.of(groups == group)
        shares = (part.masked_share, part.budget_share, part.violating_share)
        rows.append([str(group), f"{part.tokens.sum():,.0f}", *map(_percent, shares)])
    return (name, "tokens", "masked", "of it by the budget", "violating either"), rows


def draw(sample: Sample, wanted: Wanted, rows: list[Row], drift: list[Drift], curves: dict) -> list[Figure]:

    proposed = rows[0]
    figures = []
    for name, points in curves.items():
        other = {"delta": "delta_b", "delta_b": "delta"}[name]
        fixed = getattr(proposed, other)
        figure = Figure(
            f"masked_by_{name}",
            f"Masked share against {name}" + (f", {other} = {fixed:g}" if fixed else ""),
            f"What another {name} would have masked of these tokens. The dashed line is the proposal, the dotted one "
            "the wanted share; bars are 95% intervals.",
        )
        x = [value for value, _ in points]
        total = np.array([counts.masked_share for _, counts in points])
        by_token = np.array([counts.token_masked_share for _, counts in points])
        axes = figure.axes
        axes.fill_between(x, 0, by_token, color=ORANGE, alpha=0.45, lw=0, label="by delta")
        if proposed.delta_b is not None:
            axes.fill_between(x, by_token, total, color=BLUE, alpha=0.45, lw=0, label="by the prefix budget")
        ends = np.array([intervals(counts, sample.prompts)[0] for _, counts in points]).T
        axes.errorbar(x, total, abs(ends - total), color=BLUE if fixed else ORANGE, lw=1.5, elinewidth=0.8, marker="o")
        axes.axvline(getattr(proposed, name), color=GREY, ls="--", lw=1)
        axes.axhline(wanted.masked, color=GREY, ls=":", lw=1)
        axes.set(xscale="log", xlabel=name, ylabel="tokens masked", ylim=(0, None))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        figure.legend()
        figures.append(figure)

    figure = Figure(
        "mismatch_and_drift",
        "D_t: engine mismatch and policy drift",
        "Share of tokens whose D_t is above a value. At the first update of a batch pi is mu, so that D_t is what the "
        "two engines compute differently; later it is what the policy has moved.",
    )
    smallest = min((part.values[part.values > 0].min() for part in drift if (part.values > 0).any()), default=1e-9)
    for part, colour in zip(drift, (PURPLE, GREEN), strict=False):
        levels = np.geomspace(max(smallest, 1e-9), max(drift[-1].quantiles[-1], proposed.delta) * 1.2, 300)
        above = 1 - np.searchsorted(np.sort(part.values), levels, side="right") / len(part.values)
        figure.axes.plot(levels, np.where(above > 0, above, np.nan), color=colour, label=part.name)
    for name in ("delta", "delta_b"):
        value = getattr(proposed, name)
        if value is not None:
            figure.axes.axvline(value, color=GREY, ls="--", lw=1)
            figure.axes.text(value, 0.98, f"{name} ", rotation=90, ha="right", va="top", fontsize="small", color=INK)
    figure.axes.set(xscale="log", xlabel="D_t", ylabel="tokens above", ylim=(0, 1))
    figure.axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    figure.legend()
    figures.append(figure)

    figure = Figure(
        "masked_by_update",
        "Masked share by update of a batch",
        "With the proposed thresholds. What is masked at update 0 the engines' mismatch alone masks; then the policy "
        "moves away from mu update by update.",
    )
    updates = sorted(set(sample.updates.tolist()))
    parts = [proposed.counts.of(sample.updates == update) for update in updates]
    by_token = np.array([part.token_masked_share for part in parts])
    total = np.array([part.masked_share for part in parts])
    figure.axes.bar(updates, by_token, color=ORANGE, label="by delta")
    if proposed.delta_b is not None:
        figure.axes.bar(updates, total - by_token, bottom=by_token, color=BLUE, label="by the prefix budget")
    figure.axes.axhline(wanted.masked, color=GREY, ls=":", lw=1)
    figure.axes.set(xlabel="update", ylabel="tokens masked")
    figure.axes.xaxis.get_major_locator().set_params(integer=True)
    figure.axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    figure.legend()
    figures.append(figure)
    return figures
