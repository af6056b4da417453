"""The step's trust-region metrics, made of the sums that the losses report.

verl reduces a loss's metrics by the mean over micro-batches and ranks, each with the same weight. A mean of shares
would be wrong wherever these differ in size. The mean scales numerators and denominators of a mini-batch alike, so that
their quotient is the share of all its tokens or responses.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from cppo_verl.core.metrics import GROUPS, POSITION_BINS, shares
from cppo_verl.plugin.losses import ABSOLUTE_SUMS, METRIC_PREFIX, UPDATE_TOKENS


def pop_shares(metrics: dict[str, float]) -> dict[str, float]:
    """Take the loss's sums out of a step's metrics and return the shares made of them."""
    sums: dict[str, dict[str, float]] = defaultdict(dict)
    for key in [key for key in metrics if key.startswith(METRIC_PREFIX)]:
        group, name = key.removeprefix(METRIC_PREFIX).split("/")
        sums[group][name] = metrics.pop(key)
    result: dict[str, float] = {}
    for group in GROUPS:
        infix = "" if group == "all" else f"{group}/"
        if sums[group]:
            result |= {f"trust_region/{infix}{name}": value for name, value in shares(sums[group]).items()}
    if sums["all"].get("tokens"):
        # The names under which verl's own losses report these.
        result["actor/ppo_kl"] = -sums["all"]["log_ratio"] / sums["all"]["tokens"]
        result["actor/pg_clipfrac"] = result["trust_region/masked_share"]
    return result


def step_shares(sums: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The step's metrics made of its updates' sums: exact shares, where verl would average the updates' own.

    Args:
        sums: the loss's sums, one value per mini-batch, in the order of the step's updates.
    """
    whole = over_mini_batches(sums)
    return pop_shares({key: sum(values) for key, values in whole.items()}) | shares_by_update(whole)


def over_mini_batches(sums: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Multiply verl's means by the number of micro-batches and ranks that each was taken over.

    Mini-batches differ in their number of micro-batches where batch sizes are dynamic. That number, times the ranks, is
    the tokens of the whole mini-batch, which every micro-batch reports, over their mean.
    """
    # verl's own losses report no sums.
    whole_and_mean = (sums.get(key, ()) for key in (UPDATE_TOKENS, f"{METRIC_PREFIX}all/tokens"))
    factors = [whole / mean if mean else 0.0 for whole, mean in zip(*whole_and_mean, strict=True)]
    return {key: [value * factor for value, factor in zip(sums[key], factors, strict=True)] for key in sums}


def shares_by_update(sums: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Mean D_t at a step's first update and at its later ones, over all tokens and by position.

    Of the first update also the relative log-probability error: sum of |log pi - log mu| over sum of |log mu|.

    At the first update pi differs from mu by the engine mismatch alone (and, in the asynchronous trainers, by the
    staleness of the batch); at the later ones there is policy drift too.
    """
    result: dict[str, float] = {}
    for when, updates in (("first_update", slice(1)), ("later_updates", slice(1, None))):
        for group in ("all", *(f"position_{b}" for b in range(POSITION_BINS))):
            tokens = sum(sums.get(f"{METRIC_PREFIX}{group}/tokens", [])[updates])
            if tokens > 0:
                infix = "" if group == "all" else f"/{group}"
                divergence = sum(sums[f"{METRIC_PREFIX}{group}/divergence"][updates])
                result[f"trust_region/{when}/divergence{infix}"] = divergence / tokens
    error, size = (sums.get(key, [0.0])[0] for key in ABSOLUTE_SUMS)
    if size:
        result["trust_region/first_update/relative_log_prob_error"] = error / size
    return result
