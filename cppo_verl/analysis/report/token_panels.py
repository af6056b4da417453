"""Panels from the token dumps of the runs."""

from collections.abc import Callable, Sequence

import numpy as np

from cppo_verl.analysis.report.curves import by_position, left_out, trace
from cppo_verl.analysis.report.dump_summary import KINDS, ChosenResponse, DumpSummary, token_threshold
from cppo_verl.analysis.report.panels import Band, LinePanel, Missing, TokenPanel
from cppo_verl.analysis.report.runs import Line
from cppo_verl.artifacts.token_dump import CODE

BARS = 300
"""Most tokens drawn of one response."""
TOP = 0.1
EXCERPT = 160
"""Characters of a response in its caption."""


def over_steps(
    name: str,
    title: str,
    lines: Sequence[Line],
    quantity: Callable[[DumpSummary], dict[int, float]],
    without: str,
    log: bool = False,
) -> LinePanel | Missing:
    """A quantity of the dumps, {step: value}, over the steps that were dumped."""
    found = {line: [quantity(item.dumped) if item.dumped else {} for item in line.runs] for line in lines}
    complete = {line: parts for line, parts in found.items() if all(parts)}
    if not complete:
        return Missing(title, without)
    traces, bands = [], []
    for line, parts in complete.items():
        common = sorted(set.intersection(*map(set, parts)))
        columns = [[part[step] for part in parts] for step in common]
        traces.append(trace(line, common, np.mean(columns, axis=1), "o" if len(common) <= 60 else ""))
        if len(parts) > 1:
            bands.append(Band(line.color, common, np.min(columns, axis=1), np.max(columns, axis=1)))
    missing = left_out([line.label for line in lines if line not in complete], without)
    return LinePanel(name=name, title=title, facts=missing, traces=traces, bands=bands, log=log)


def largest_by_position(lines: Sequence[Line]) -> LinePanel | Missing:
    """Mean of the largest tenth of D_t in each bin of positions."""
    found = {}
    for line in lines:
        parts = [item.dumped.by_position for item in line.runs if item.dumped and item.dumped.by_position]
        bins = [np.concatenate(values) for values in zip(*parts, strict=True)]
        if bins and all(map(len, bins)):
            found[line] = [float(np.sort(x)[-max(1, round(TOP * len(x))) :].mean()) for x in bins]
    title = "The largest tenth of D_t by position"
    return by_position("largest_by_position", title, lines, found, "no dumped tokens of later updates")


def response_panel(name: str, run: str, chosen: ChosenResponse, texts: Sequence[str]) -> TokenPanel:
    """w_t D_t of each token of a response against the thresholds.

    Args:
        run: its name in the title.
        texts: the response's generated tokens as text; empty without a tokenizer.
    """
    response, delta = chosen.response, token_threshold(chosen.header)
    weighted, threshold, reason = response.weighted_divergence, response.threshold, response.reason
    assert delta is not None and weighted is not None and threshold is not None and reason is not None
    mask = response.mask
    weighted, threshold, reason = weighted[mask], threshold[mask], reason[mask]
    drawn = np.arange(len(weighted)) if len(weighted) <= BARS else _drawn(weighted, reason)
    lowest, highest = float(threshold[drawn].min()), float(weighted[drawn].max())
    excerpt = "".join(texts)
    facts = {
        "response": response,
        "advantage": float(response.advantage[mask][0]),
        "tokens": len(weighted),
        "by_budget": int((reason == CODE["budget"]).sum()),
        "by_token": int((reason == CODE["token"]).sum()),
        "drawn": len(drawn),
        "excerpt": excerpt[:EXCERPT] + ("…" if len(excerpt) > EXCERPT else ""),
        "highest": highest if highest > 4 * delta else None,
        "lowest": lowest if lowest < -2 * delta else None,
    }
    return TokenPanel(
        name=name,
        title=f"{run}: {KINDS[chosen.kind]}",
        caption="tokens_of_response",
        facts=facts,
        response=response,
        delta=delta,
        drawn=drawn,
        texts=texts,
    )


def _drawn(weighted: np.ndarray, reason: np.ndarray) -> np.ndarray:
    """One token per stretch of the response: the one with the largest w_t D_t, of the masked ones if there are any."""
    masked = np.isin(reason, (CODE["budget"], CODE["token"]))
    result = []
    for part in np.array_split(np.arange(len(weighted)), BARS):
        among = part[masked[part]] if masked[part].any() else part
        result.append(among[np.argmax(weighted[among])])
    return np.array(result)
