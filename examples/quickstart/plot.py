"""The quickstart's picture: accuracy, reward, masked share and effective delta_b over steps, and the parts of D_t."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import MaxNLocator, PercentFormatter  # noqa: E402

BLUE, ORANGE, GREY = "#2a6fbb", "#d9822b", "#8a8f98"
UPDATES = (
    ("first_update", "the first: the engines' mismatch", GREY),
    ("later_updates", "the later ones: the policy's drift", BLUE),
)


def draw(steps, accuracy, path):
    """Write the picture of ``steps``, a list of (step, metrics), to ``path`` and return the path."""

    def series(name):
        points = [(step, values[name]) for step, values in steps if name in values]
        return [p[0] for p in points], [p[1] for p in points]

    figure, axes = plt.subplots(3, 2, figsize=(9, 8.4), layout="constrained")
    (validation, reward), (masked, budget), (updates, positions) = axes

    validation.plot(*series(accuracy), color=BLUE, marker="o", markersize=4)
    validation.set(title="validation accuracy (Avg@16)", ylim=(0, 1))

    x, y = series("critic/score/mean")
    reward.plot(x, y, color=GREY, alpha=0.4, linewidth=1)
    reward.plot(x, smooth(y), color=BLUE)
    reward.set(title="training reward (line: mean of 10 steps)", ylim=(0, 1))

    x, shares = series("trust_region/masked_share")
    budget_part = dict(zip(*series("trust_region/budget_rejected_share"), strict=True))
    by_budget = [share * budget_part.get(step, 0) for step, share in zip(x, shares, strict=True)]
    by_token = [share - part for share, part in zip(shares, by_budget, strict=True)]
    masked.stackplot(x, by_budget, by_token, colors=[ORANGE, BLUE], labels=["prefix budget", "token threshold"])
    masked.set(title="masked tokens, by what rejected them")
    masked.set_ylim(0, 1.3 * max(shares, default=1))  # room for the legend
    masked.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    masked.yaxis.set_major_formatter(PercentFormatter(1))
    masked.legend(loc="upper right", frameon=False, reverse=True)

    x, y = series("trust_region/effective_delta_b")
    budget.plot(x, y, color=GREY, alpha=0.4, linewidth=1)
    budget.plot(x, smooth(y), color=BLUE)
    budget.set(title="effective budget δ_b (mean over responses)")

    for name, label, color in UPDATES:
        updates.plot(*series(f"trust_region/{name}/divergence"), color=color, label=label)
        by_position = [series(f"trust_region/{name}/divergence/position_{b}")[1] for b in range(8)]
        means = [sum(values) / len(values) if values else float("nan") for values in by_position]
        positions.plot([(b + 0.5) / 8 for b in range(8)], means, color=color, marker="o", markersize=4)
    updates.set(title="D_t by update of the batch", yscale="log")
    updates.legend(loc="center right", frameon=False)
    positions.set(title="D_t by position in the response", yscale="log", xlabel="t / T", xlim=(0, 1))

    for axis in (validation, reward, masked, budget, updates):
        axis.sharex(validation)
        axis.set_xlabel("step")
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def smooth(values, window=10):
    """Mean of the last ``window`` values at each point."""
    return [sum(part) / len(part) for part in (values[max(0, i + 1 - window) : i + 1] for i in range(len(values)))]
