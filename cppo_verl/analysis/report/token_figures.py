"""What a report takes from a run's dump of tokens: sums by step and position, and a few responses to look at."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from cppo_verl.analysis.html.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, Figure, plain
from cppo_verl.analysis.report.curves import BIN_CENTRES, WIDTH, Absent, Line, finished, panel, threshold_lines
from cppo_verl.artifacts.token_dump import REASONS, Response, TokenDump
from cppo_verl.core.metrics import POSITION_BINS

CODE = {name: position for position, name in enumerate(REASONS)}
BARS = 300
"""Of a threshold picture, at most."""
NAMED_TOKENS = 32
"""Up to this length of a response, its tokens are written below the bars."""
TOP = 0.1
KINDS = {"budget": "masked by the budget", "token": "masked by the token threshold", "kept": "not masked at all"}
COLORS = {"kept": GREY, "towards_one": BLUE, "token": RED, "budget": ORANGE}
LABELS = {
    "kept": "within the region",
    "towards_one": "kept, moves towards one",
    "token": "masked: above δ",
    "budget": "masked: above c_t",
}


@dataclass
class Dumped:
    """Of one run."""

    relative_error: dict[int, float] = field(default_factory=dict)
    """{step: sum of |log pi - log mu| over sum of |log mu|}, of the tokens of a batch's first update."""
    entropy: dict[int, float] = field(default_factory=dict)
    """{step: mean of -log mu}, which estimates mu's entropy without bias."""
    by_position: list[np.ndarray] = field(default_factory=list)
    """D_t of the later updates, in each of `POSITION_BINS`."""
    chosen: list[tuple[str, Response, dict]] = field(default_factory=list)
    """(kind of `KINDS`, response, header of its file)."""


def reduced(dump: TokenDump) -> Dumped:
    result = Dumped()
    sums = defaultdict(lambda: np.zeros(4))
    bins = [[] for _ in range(POSITION_BINS)]
    for response in dump.responses:
        mask = response.mask
        log_mu, log_pi = response.log_mu[mask].astype(float), response.log_pi[mask].astype(float)
        first = response.update == 0
        apart = np.abs(log_pi - log_mu).sum() if first else 0.0
        sums[response.step] += (apart, np.abs(log_mu).sum() if first else 0.0, -log_mu.sum(), len(log_mu))
        if not first:
            t, last = response.position[mask], mask.sum()
            place = -(-POSITION_BINS * t // last) - 1
            for b in range(POSITION_BINS):
                bins[b].append(response.divergence[mask][place == b])
    for step, (apart, size, surprise, tokens) in sorted(sums.items()):
        if size > 0:
            result.relative_error[step] = apart / size
        if tokens > 0:
            result.entropy[step] = surprise / tokens
    if any(map(len, bins)):
        result.by_position = [np.concatenate(values) for values in bins]
    result.chosen = _chosen(dump)
    return result


def _chosen(dump: TokenDump) -> list[tuple[str, Response, dict]]:
    """The response with most tokens masked by each constraint, and one without: where w_t D_t - c_t is largest."""
    best = {}
    for response in dump.responses:
        if response.threshold is None or response.reason is None or not response.mask.any():
            continue
        if token_threshold(dump.headers[response.step]) is None:
            continue
        counts = {kind: int((response.reason == CODE[kind]).sum()) for kind in ("budget", "token")}
        if not any(counts.values()):
            counts = {"kept": float((response.weighted_divergence - response.threshold)[response.mask].max())}
        for kind, count in counts.items():
            if (kind == "kept" or count > 0) and (kind not in best or count > best[kind][0]):
                best[kind] = (count, response)
    taken, result = set(), []
    for kind in KINDS:
        if kind in best and id(best[kind][1]) not in taken:
            response = best[kind][1]
            taken.add(id(response))
            result.append((kind, response, dump.headers[response.step]))
    return result


def token_threshold(header: dict) -> float | None:
    """delta of the method that a dump's header tells of."""
    method = header.get("method")
    delta = method.get("delta") if isinstance(method, dict) else None
    return float(delta) if isinstance(delta, int | float) else None


def over_steps(
    name: str,
    title: str,
    caption: str,
    drawn: Sequence[Line],
    values: dict[int, dict[int, float]],
    without: str,
    log: bool = False,
) -> Figure | Absent:
    """A quantity of the dump over its steps.

    Args:
        values: {id of a run: {step: value}}.
    """
    found = [(line, [values.get(id(run), {}) for run in line.runs]) for line in drawn]
    missing = [line.short for line, parts in found if not all(parts)]
    found = [(line, parts) for line, parts in found if all(parts)]
    if not found:
        return Absent(title, without)
    figure = panel(name, title, caption, len(found))
    for line, parts in found:
        common = sorted(set.intersection(*map(set, parts)))
        columns = [[part[step] for part in parts] for step in common]
        marker = "o" if len(common) <= 60 else ""
        figure.axes.plot(common, np.mean(columns, axis=1), label=plain(line.short), marker=marker, **line.look)
        if len(parts) > 1:
            low, high = np.min(columns, axis=1), np.max(columns, axis=1)
            figure.axes.fill_between(common, low, high, color=line.color, alpha=0.15, linewidth=0)
    return finished(figure, found, missing, without, log=log)


def largest_by_position(
    drawn: Sequence[Line], by_position: dict[int, Sequence[np.ndarray]], thresholds: dict[int, dict]
) -> Figure | Absent:
    """Mean of the largest tenth of D_t in each part of the responses; arguments as of `drift_by_position`."""
    title, without = "The largest tenth of D_t by position", "no dumped tokens of later updates"
    found, missing = [], []
    for line in drawn:
        parts = [by_position[id(run)] for run in line.runs if by_position.get(id(run))]
        bins = [np.concatenate(values) for values in zip(*parts, strict=True)]
        if bins and all(map(len, bins)):
            found.append((line, [float(np.sort(x)[-max(1, round(TOP * len(x))) :].mean()) for x in bins]))
        else:
            missing.append(line.short)
    if not found:
        return Absent(title, without)
    caption = "Mean of the largest 10 % of the dumped tokens' D_t in each eighth of the response, later updates."
    figure = panel("largest_by_position", title, caption, len(found))
    for line, values in found:
        figure.axes.plot(BIN_CENTRES, values, label=plain(line.short), marker="o", **line.look)
    threshold_lines(figure, found, thresholds)
    return finished(figure, found, missing, without, log=True, positions=True)


def threshold_picture(name: str, run: str, kind: str, response: Response, header: dict, texts: list[str]) -> Figure:
    """w_t D_t of each token against the thresholds.

    Args:
        run: as the legends name it.
        texts: of the response's generated tokens, as a person can read them; empty if no tokenizer tells.
    """
    mask = response.mask
    weighted, threshold = response.weighted_divergence[mask], response.threshold[mask]
    reason, t = response.reason[mask], response.position[mask]
    delta, total = token_threshold(header), len(t)
    counts = {cause: int((reason == CODE[cause]).sum()) for cause in ("budget", "token")}
    caption = (
        f"Step {response.step}, update {response.update}, score {response.score:g}, advantage "
        f"{response.advantage[mask][0]:+.2f}, {total} tokens: {counts['budget']} masked by the prefix budget, "
        f"{counts['token']} by the token threshold."
    )
    if response.delta_b is not None:
        caption += f" δ_b = {response.delta_b:.3g}."
    kept = np.arange(total)
    if total > BARS:
        kept = _columns(weighted, reason)
        caption += f" {BARS} of the tokens are drawn: the masked and the largest first."
    if texts:
        excerpt = "".join(texts)
        caption += f" “{excerpt[:160]}{'…' if len(excerpt) > 160 else ''}”"
    figure = Figure(name, plain(f"{run}: {KINDS[kind]}"), caption, WIDTH, 3.6)
    axes = figure.axes
    axes.set_axisbelow(True)
    width = 0.8 if total <= BARS else total / BARS
    for cause, color in COLORS.items():
        at = kept[reason[kept] == CODE[cause]]
        if len(at):
            axes.bar(t[at], weighted[at], width=width, color=color, label=LABELS[cause], linewidth=0)
        if len(at) and cause in counts:  # a masked token's bar may be too low to be seen
            edge = axes.get_xaxis_transform()
            mark = "v" if total <= NAMED_TOKENS else "|"
            axes.plot(t[at], np.full(len(at), 1.0), mark, color=color, clip_on=False, transform=edge, gid=cause)
    axes.axhline(delta, color=PURPLE, linestyle="--", linewidth=1.2, label="token threshold δ")
    shown = np.sort(kept)
    axes.step(t[shown], threshold[shown], where="mid", color=GREEN, linewidth=1.4, label="effective threshold c_t")
    axes.set_xlabel("t")
    axes.set_xlim(0.4, total + 0.6)
    low = min(0.0, float(threshold[shown].min()))
    high = max(float(weighted[shown].max()), delta)
    # One token far above all others would press them down; its bar goes on beyond the panel.
    if high > 4 * delta:
        figure.caption += f" The highest bar is {high:.3g}."
    if low < -2 * delta:
        figure.caption += f" c_t falls to {low:.3g}."
    axes.set_ylim(max(1.1 * low, -2 * delta), min(1.1 * high, 4 * delta))
    if texts and total <= NAMED_TOKENS:
        axes.set_xticks(t, [plain(text[:12]) for text in texts], rotation=60, ha="right", fontsize=7)
        axes.set_xlabel("")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _columns(weighted: np.ndarray, reason: np.ndarray) -> np.ndarray:
    """One token of each stretch of the response: of the masked ones if there are any, the largest."""
    masked = np.isin(reason, (CODE["budget"], CODE["token"]))
    result = []
    for part in np.array_split(np.arange(len(weighted)), BARS):
        among = part[masked[part]] if masked[part].any() else part
        result.append(among[np.argmax(weighted[among])])
    return np.array(result)
