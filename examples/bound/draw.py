"""How the bound and what it bounds grow with the length of a response: a uniform, a position-weighted and a
prefix-budgeted trust region, on policies small enough to enumerate.

    python examples/bound/draw.py [--output bound.png]
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from theory import (  # noqa: E402
    Region,
    first_token_slack,
    linear_bound,
    linear_weights,
    prefix_bound,
    project,
    residual,
    uniform_bound,
)

DELTA, DELTA_B, W_MIN, VOCABULARY = 0.15, 0.02, 0.8, 2
COLORS = {"uniform": "#8a8f98", "position-weighted": "#2a6fbb", "prefix-budgeted": "#d9822b"}


def regions(horizon):
    """{name: (region, its bound on the residual for |R| <= 1)}."""
    weights, largest = linear_weights(horizon, W_MIN), DELTA / W_MIN
    budget = prefix_bound(horizon, DELTA_B, largest) + first_token_slack(horizon, DELTA, largest)
    return {
        "uniform": (Region(np.ones(horizon), DELTA), uniform_bound(horizon, DELTA)),
        "position-weighted": (Region(weights, DELTA), linear_bound(DELTA / weights, largest)),
        "prefix-budgeted": (Region(weights, DELTA, DELTA_B), budget),
    }


def curves(horizons, seeds=8):
    """{region: {"bound", "worst": one value a horizon}}; worst over rewards in [-1, 1] and ``seeds`` pairs of policies,
    each moved as far as the region lets it towards a policy that never samples mu's more likely token."""
    result = {name: {"bound": [], "worst": []} for name in COLORS}
    for horizon in horizons:
        for name, (region, bound) in regions(horizon).items():
            worst = 0.0
            for seed in range(seeds):
                rng = np.random.default_rng(seed)
                mu = [rng.dirichlet([2.0] * VOCABULARY, size=VOCABULARY**t) for t in range(horizon)]
                target = [np.eye(VOCABULARY)[m.argmin(1)] for m in mu]
                worst = max(worst, residual(mu, project(mu, target, region), np.zeros(VOCABULARY**horizon)).worst)
            result[name]["bound"].append(bound)
            result[name]["worst"].append(worst)
    return result


def draw(horizons, values, path):
    figure, axis = plt.subplots(figsize=(8, 4.6), layout="constrained")
    for name, region in values.items():
        axis.plot(horizons, region["bound"], color=COLORS[name], linestyle="--")
        axis.plot(horizons, region["worst"], color=COLORS[name], marker="o", markersize=4, label=name)
    axis.plot([], [], color="black", linestyle="--", label="its bound")
    axis.set(yscale="log", xlabel="T", title="the residual that the surrogate leaves out, worst reward in [-1, 1]")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="center right", bbox_to_anchor=(1, 0.34))
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("bound.png"))
    args = parser.parse_args()
    horizons = range(2, 13)
    print(draw(horizons, curves(horizons), args.output))


if __name__ == "__main__":
    main()
