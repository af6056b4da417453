"""Responses that move away from mu update by update, and what the oracle says of thresholds on them."""

from dataclasses import replace

import numpy as np
import oracle
from token_dumps import RUN_HEADER as BASE
from token_dumps import actor, divergence

from cppo_verl.analysis import replay
from cppo_verl.analysis.calibrate.thresholds import Sample
from cppo_verl.artifacts.token_dump import REASONS, Response
from cppo_verl.plugin.config import CPPOLossConfig

DELTA, DELTA_B = 0.05, 0.005
HEADER = BASE | {"method": BASE["method"] | {"delta": DELTA, "delta_b": DELTA_B, "budget": "adaptive"}}
HEADER["trust_region"] = BASE["trust_region"] | {"budget": "adaptive"}
RULES = {
    "adaptive": CPPOLossConfig(),
    "wide": CPPOLossConfig(budget_clamp=5.0, horizon=64),
    "fixed": CPPOLossConfig(budget="fixed", w_min=0.6),
    "dppo": CPPOLossConfig(budget="none", w_min=1.0),
    "kl": CPPOLossConfig(divergence="binary_kl"),
    "topk": CPPOLossConfig(divergence="topk_tv", budget="fixed"),
}


def decided(rule, response):
    """By the oracle: the reason of each token, what rounding could change, and its effective threshold."""
    valid = response.mask.tolist()
    mu, pi, adv = (getattr(response, name).astype(float).tolist() for name in ("log_mu", "log_pi", "advantage"))
    if rule.divergence.startswith("topk_"):
        div = response.divergence.astype(float).tolist()
    else:
        kind = rule.divergence.removeprefix("binary_")
        div = [divergence(kind, m, p) if v else 0.0 for m, p, v in zip(mu, pi, valid, strict=True)]
    w = oracle.position_weights(valid, rule.w_min)
    if rule.horizon:
        t = np.cumsum(valid)
        w = [(1 - (1 - rule.w_min) * (n - 1) / (rule.horizon - 1)) if v else 0.0 for n, v in zip(t, valid, strict=True)]
    delta_b = {"none": None, "fixed": rule.delta_b, "adaptive": 0.0}[rule.budget]
    if rule.budget == "adaptive":
        p90 = oracle.quantile([d for d, v in zip(div, valid, strict=True) if v], 0.9)
        delta_b = min(max(p90, rule.delta_b), rule.budget_clamp * rule.delta_b)
    c = oracle.effective_threshold(div, valid, w, rule.delta, delta_b)
    away = [oracle.moves_away(*x) for x in zip(mu, pi, adv, strict=True)]
    unsure = [
        v and (abs(a * b - x) < 2e-6 or abs(a * b - rule.delta) < 2e-6)
        for v, a, b, x in zip(valid, w, div, c, strict=True)
    ]
    reason = []
    for v, a, b, x, moved in zip(valid, w, div, c, away, strict=True):
        rejected = "token" if a * b > rule.delta else "budget"
        reason.append("" if not v else "kept" if a * b <= x else rejected if moved else "towards_one")
    return reason, unsure, [a * b for a, b in zip(w, div, strict=True)], c, delta_b


def drifting(seed=0, prompts=8, samples=3, updates=4, step=2, mismatch=1e-6, topk=False):
    """Responses that move further from mu with each update of the batch, as a run with `HEADER` records them."""
    g = np.random.default_rng(seed)
    responses = []
    for prompt in range(prompts):
        update = prompt * updates // prompts
        for number in range(samples):
            length = int(g.integers(6, 48))
            mask = np.ones(length, dtype=bool)
            if number == 0:
                mask[2:4] = False  # tool output
            spread = 0.08 * update * g.gamma(1.0) + mismatch
            log_mu = np.where(mask, -0.02 - 2 * g.random(length), 0).astype(np.float32)
            log_pi = np.minimum(log_mu + spread * g.normal(size=length), np.where(mask, -0.01, 0))
            log_pi = np.where(mask, log_pi, 0).astype(np.float32)
            div = abs(np.exp(log_pi, dtype=np.float64) - np.exp(log_mu, dtype=np.float64)).astype(np.float32)
            response = Response(
                step=step,
                update=update,
                key=f"s{step}p{prompt}_{number}_0",
                score=float(number % 2),
                delta_b=None,
                prompt=np.arange(3, dtype=np.int32),
                response=g.integers(0, 22, length).astype(np.int32),
                mask=mask,
                log_mu=log_mu,
                log_pi=log_pi,
                advantage=np.where(mask, 1.0 if number % 2 else -1.0, 0).astype(np.float32),
                divergence=np.minimum(1.4 * div, 1) if topk else div,
                weighted_divergence=None,
                threshold=None,
                update_mask=None,
                reason=None,
            )
            reason, _, weighted, c, delta_b = decided(CPPOLossConfig(delta=DELTA, delta_b=DELTA_B), response)
            responses.append(
                replace(
                    response,
                    delta_b=delta_b,
                    weighted_divergence=np.array(weighted, dtype=np.float32),
                    threshold=np.array(c, dtype=np.float32),
                    reason=np.array([REASONS.index(name) for name in reason], dtype=np.uint8),
                    update_mask=np.isin(reason, ["kept", "towards_one"]).astype(np.float32),
                )
            )
    return sorted(responses, key=lambda response: response.update)


def sample(rule, responses):
    return Sample(replay.Setting("a rule", actor(rule)), responses, HEADER)


def by_oracle(rule, responses, found):
    """Tokens, those masked, those masked by delta, and those that rounding could change."""
    rule = replace(rule, **{name: value for name, value in found._asdict().items() if value is not None})
    sums = np.zeros(4)
    for response in responses:
        reason, unsure, *_ = decided(rule, response)
        sums += [response.mask.sum(), sum(r in ("token", "budget") for r in reason), reason.count("token"), sum(unsure)]
    return sums
