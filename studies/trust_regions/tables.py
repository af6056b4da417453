"""The tables of the study's report, in Markdown. What has not run is named there."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from cppo_verl.evaluation.statistics import Comparison, interval_over_problems
from cppo_verl.evaluation.table import markdown
from studies.trust_regions.measures import (
    ALPHA,
    CONDITIONS,
    GRID,
    HORIZONS,
    LARGE_ENOUGH,
    MATCHED_AGAIN,
    NAMES,
    REACHED,
    UPDATES,
    Study,
    collapsed,
    collapses,
    condition,
    curves,
    difference,
    family,
    first_reached,
    holm,
    is_matched,
    lost_updates,
    masked_share,
    mean_over_tokens,
    paired,
    wilson,
)
from studies.trust_regions.results import Cell, final_accuracy

ARMS = {
    "share-0.15": "masked share 15 %",
    "share-paper": "the paper's thresholds",
    "bf16": "rollout in bfloat16",
    "stale": "rollout one batch old",
}
OTHERS = ("none", "grpo", "cispo", "trm_avg"), ("cppo_no_weights", "cppo_no_budget", "cppo_shuffled")
MISSING = "not run"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return markdown(list(header), [list(row) for row in rows])


def points(value: float) -> str:
    """A difference of accuracies in percentage points."""
    return f"{100 * value:+.1f}"


def _with_interval(found: Comparison) -> str:
    return f"{points(found.difference)} [{points(found.interval.low)}, {points(found.interval.high)}]"


def _bold_if_one(comparison: Comparison, p: float) -> str:
    """The difference with its interval, bold if it is what the protocol calls one."""
    shown = _with_interval(comparison)
    return f"**{shown}**" if p < ALPHA and abs(comparison.difference) >= LARGE_ENOUGH else shown


def primary(study: Study) -> str:
    """CPPO minus DPPO under the nine conditions, then minus the DPPO that was matched again; each part is a family.

    Last, minus DPPO at CPPO's learning rate, each for itself.
    """
    again = [(HORIZONS[-1], u) for u in UPDATES]
    rows = [*_cppo_minus_dppo(study, CONDITIONS), *_cppo_minus_dppo(study, again, MATCHED_AGAIN), *_same_rate(study)]
    header = ["", NAMES["cppo"], NAMES["dppo"], "difference, 95 % interval", "p (Holm)", "masked", "collapsed"]
    return table(header, rows)


def _cppo_minus_dppo(
    study: Study, conditions: Sequence[tuple[int, int]], arm: str | None = None
) -> Iterable[list[str]]:
    """A row for each condition, with DPPO's cell of the arm."""
    found = family(study, "cppo", "dppo", conditions, arm)
    for c in conditions:
        cells = study.find("cppo", *c), study.find("dppo", *c, arm)
        shown = [MISSING] * 4
        if c in found:
            masked = " / ".join(_masked(cell) for cell in cells if cell)
            counts = " / ".join(str(collapsed(cell)) for cell in cells if cell)
            shown = [_bold_if_one(*found[c]), f"{found[c][1]:.3f}", masked, counts]
        yield [condition(*c) + (", matched again" if arm else ""), *map(_score, cells), *shown]


def _same_rate(study: Study) -> Iterable[list[str]]:
    """A row for each cell of DPPO among `Study.rates`."""
    for cell in study.rates:
        settings = cell.about["settings"]
        if cell.about["method"] != "dppo":
            continue
        cppo = study.find("cppo", settings["horizon"], settings["updates"])
        if (found := difference(cppo, cell)) and cppo:
            title = condition(settings["horizon"], settings["updates"])
            title += f", DPPO at {settings['learning_rate']:g} for {cell.about['share']:.0%}"
            masked, counts = f"{_masked(cppo)} / {_masked(cell)}", f"{collapsed(cppo)} / {collapsed(cell)}"
            yield [title, _score(cppo), _score(cell), _with_interval(found), f"{found.p_value:.3f}", masked, counts]


def _masked(cell: Cell) -> str:
    return f"{masked_share(cell):.1%}"


def against(study: Study, others: Sequence[str]) -> str:
    """CPPO minus each of the others under the nine conditions; each other method is a family.

    Below, for itself and without correction, minus those at CPPO's learning rate where they were given another.
    """
    families = {other: family(study, "cppo", other) for other in others}

    def shown(other: str, c: tuple[int, int]) -> str:
        if c not in families[other]:
            return MISSING
        cells = study.find("cppo", *c), study.find(other, *c)
        matched = all(is_matched(cell) for cell in cells if cell)
        return _bold_if_one(*families[other][c]) + ("" if matched else " *")

    rows = [[condition(*c), *(shown(other, c) for other in others)] for c in CONDITIONS]
    for cell in study.rates:
        settings, method = cell.about["settings"], cell.about["method"]
        c = settings["horizon"], settings["updates"]
        found = difference(study.find("cppo", *c), cell)
        if method in others and found:
            title = f"{condition(*c)}, at {settings['learning_rate']:g}"
            rows.append([title, *(_with_interval(found) if other == method else "" for other in others)])
    return table(["CPPO minus", *(NAMES[other] for other in others)], rows)


def all_methods(study: Study) -> str:
    """The primary metric of every method under every condition."""
    header = ["method", *(f"{t} / {u}" for t, u in CONDITIONS)]
    return table(header, ([NAMES[m], *(_score(study.find(m, *c)) for c in CONDITIONS)] for m in NAMES))


def _score(cell: Cell | None) -> str:
    if cell is None:
        return MISSING
    return f"{100 * final_accuracy(cell.rows).mean():.1f}" + ("" if is_matched(cell) else " *")


def secondary(study: Study) -> str:
    """The other metrics of every method, averaged over the conditions that have run."""
    rows = []
    for method in NAMES:
        cells = [cell for c in CONDITIONS if (cell := study.find(method, *c))]
        if not cells:
            rows.append([NAMES[method], *[MISSING] * 6])
            continue
        accuracy = [curves(cell) for cell in cells]
        best = np.mean([curve.max(axis=1).mean() for curve in accuracy])
        area = np.mean([curve.mean(axis=1).mean() for curve in accuracy])
        reached = np.concatenate([first_reached(curve) for curve in accuracy])
        share, late = np.isfinite(reached).mean(), reached[np.isfinite(reached)]
        step = f"{np.median(late):.0f} ({share:.0%} of the runs)" if len(late) else "never"
        moved = np.mean([mean_over_tokens(cell, "deviation") for cell in cells])
        masked = np.mean([masked_share(cell) for cell in cells])
        budget = np.mean([mean_over_tokens(cell, "by_budget") for cell in cells])
        rows.append(
            [
                NAMES[method],
                f"{100 * best:.1f}",
                f"{100 * area:.1f}",
                step,
                f"{moved:.4f}",
                f"{masked:.1%}",
                f"{budget:.1%}",
            ]
        )
    header = [
        "method",
        "best of curve",
        "mean of curve",
        f"step at {REACHED:.0%}",
        "mean |pi - mu|",
        "masked",
        "by budget",
    ]
    return table(header, rows)


def rates(study: Study) -> str:
    """The learning rate that each method was given under each condition."""
    header = ["method", *(f"{t} / {u}" for t, u in CONDITIONS)]

    def rate(cell: Cell | None) -> str:
        return f"{cell.about['settings']['learning_rate']:g}" if cell else MISSING

    return table(header, ([NAMES[m], *(rate(study.find(m, *c)) for c in CONDITIONS)] for m in NAMES))


def thresholds(study: Study) -> str:
    """The thresholds that mask the wanted share under each condition."""
    rows = []
    for method, names in (("dppo", ["delta"]), ("cppo", ["delta", "delta_b"])):
        cells = [study.find(method, *c) for c in CONDITIONS]
        for name in names:
            values = (f"{cell.about['thresholds'][name]:g}" if cell else MISSING for cell in cells)
            rows.append([f"{NAMES[method]}, {name}", *values])
    return table(["", *(f"{t} / {u}" for t, u in CONDITIONS)], rows)


def collapse_table(study: Study) -> str:
    rows = []
    for method, by_rate in collapses(study).items():
        row = [NAMES[method]]
        for rate in GRID:
            bad, runs = by_rate.get(rate, (0, 0))
            low, high = wilson(bad, runs) if runs else (0, 0)
            row.append(f"{bad} of {runs}, {low:.0%} to {high:.0%}" if runs else MISSING)
        lost, updates = lost_updates(study, method)
        rows.append([*row, f"{lost} of {updates:,}"])
    return table(["method", *(f"learning rate {rate:g}" for rate in GRID), "updates lost"], rows)


def arms(study: Study) -> str:
    """Each method minus DPPO in each arm at T = 64 with 16 updates; an arm is a family."""
    rows = []
    for arm, title in ARMS.items():
        cells = {method: cell for method in NAMES if (cell := study.find(method, 64, 16, arm))}
        found = {method: difference(cell, cells.get("dppo")) for method, cell in cells.items() if method != "dppo"}
        ran = {method: comparison for method, comparison in found.items() if comparison}
        adjusted = dict(zip(ran, holm([comparison.p_value for comparison in ran.values()]), strict=True))
        for method, cell in cells.items():
            shown = _bold_if_one(ran[method], adjusted[method]) if method in ran else ""
            counts = f"{collapsed(cell)} of {cell.rows['seed'].nunique()}"
            rows.append([title, NAMES[method], _score(cell), shown, f"{masked_share(cell):.2%}", counts])
    return table(
        ["arm", "method", "accuracy", "minus DPPO, 95 % interval", "masked", "collapsed"], rows or [[MISSING] * 6]
    )


def contrasts(study: Study) -> str:
    """How CPPO minus DPPO depends on horizon and updates: paired by seed, averaged over the other axis."""
    rows = []
    axes: tuple[tuple[str, Callable, tuple], ...] = (
        (f"T = {HORIZONS[-1]} minus T = {HORIZONS[0]}", lambda end, other: (end, other), UPDATES),
        (f"{UPDATES[-1]} minus {UPDATES[0]} updates", lambda end, other: (other, end), HORIZONS),
    )
    for (title, at, others), (low, high) in zip(
        axes, ((HORIZONS[0], HORIZONS[-1]), (UPDATES[0], UPDATES[-1])), strict=True
    ):
        ends = [[paired(study, *at(end, other)) for other in others] for end in (low, high)]
        if any(x is None for end in ends for x in end):
            rows.append([title, MISSING])
            continue
        values = np.mean(ends[1], 0) - np.mean(ends[0], 0)
        interval = interval_over_problems(values)
        cells = [study.find(m, *at(end, other)) for m in ("cppo", "dppo") for end in (low, high) for other in others]
        star = "" if all(is_matched(cell) for cell in cells if cell) else " *"
        rows.append([title, f"{points(values.mean())} [{points(interval.low)}, {points(interval.high)}]{star}"])
    return table(["CPPO minus DPPO", "change of the difference, 95 % interval"], rows)


def instruments(study: Study) -> str:
    """The loop's runs beside those of verl's trainer, on the same seeds."""
    rows = []
    for cell in study.trainer:
        settings = cell.about["settings"]
        loop = study.find(cell.about["method"], settings["horizon"], settings["updates"])
        seeds = cell.rows["seed"].unique()
        same = loop._replace(rows=loop.rows[loop.rows["seed"].isin(seeds)]) if loop else None
        found = difference(cell, same)
        scores = [_score(same), _score(cell)]
        shares = [_masked(c) if c else MISSING for c in (same, cell)]
        shown = _with_interval(found) if found else MISSING
        rows.append([NAMES[cell.about["method"]], str(len(seeds)), *scores, shown, *shares])
    header = ["method", "seeds", "loop", "trainer", "trainer minus loop, 95 % interval", "masked, loop", "trainer"]
    return table(header, rows or [[MISSING] * 7])


TABLES: dict[str, Callable[[Study], str]] = {
    "primary": lambda study: f"{primary(study)}\n\n{contrasts(study)}",
    "methods": all_methods,
    "secondary": secondary,
    "rates": lambda study: f"{rates(study)}\n\n{thresholds(study)}",
    "others": lambda study: "\n\n".join(against(study, others) for others in OTHERS),
    "collapse": collapse_table,
    "arms": arms,
    "instruments": instruments,
}
