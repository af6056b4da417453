"""Dumps of tokens made by the training code itself, what the formulas say of them, and ways to damage them."""

import math
from functools import partial

import numpy as np
import oracle
import torch
from omegaconf import OmegaConf
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.workers.config import FSDPActorConfig, PolicyLossConfig
from verl.workers.utils.losses import ppo_loss

from cppo_verl.artifacts.token_dump import Response, encode, read_tokens
from cppo_verl.plugin import token_recorder
from cppo_verl.plugin.config import (
    CPPOLossConfig,
    DumpConfig,
    NeighbourLossConfig,
    PrefixRatioLossConfig,
    TRMLossConfig,
)

DELTA, DELTA_B, W_MIN = 0.15, 0.02, 0.8


CPPO = partial(CPPOLossConfig, delta=DELTA, delta_b=DELTA_B, w_min=W_MIN)


METHODS = {
    "cppo": CPPO(),
    "fixed": CPPO(budget="fixed"),
    "soft": CPPO(gate="soft"),
    "sapo": CPPO(gate="sapo"),
    "penalty": CPPO(gate="penalty"),
    "dppo": CPPO(budget="none", w_min=1.0),
    "kl": CPPO(divergence="binary_kl", budget="fixed"),
    "trm_max": TRMLossConfig(delta=0.1, delta_avg=None),
    "trm_max_avg": TRMLossConfig(delta=0.5, delta_avg=0.02),
    "minpro": PrefixRatioLossConfig(ratio="minimum"),
    "pnpo": PrefixRatioLossConfig(ratio="mean"),
    "kpop": NeighbourLossConfig(rule="kpop"),
    "vaco": NeighbourLossConfig(rule="vaco", delta=0.2),
    "vanilla": PolicyLossConfig(loss_mode="vanilla"),
    "cispo": PolicyLossConfig(loss_mode="cispo"),
}


def nested(rows):
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def batch(seed=0, rows=24):
    """Responses with tool output between their tokens, from next to mu to far off, and log pi for each row."""
    g = torch.Generator().manual_seed(seed)

    def tokens(low, high):
        return [torch.randint(0, 100, (int(n),), generator=g) for n in torch.randint(low, high, (rows,), generator=g)]

    prompts, responses = tokens(1, 6), tokens(1, 40)
    masks = [torch.ones(len(r), dtype=torch.int64) for r in responses]
    for mask in masks[::3]:
        mask[1:-1] = torch.rand(len(mask[1:-1]), generator=g) > 0.3
    masks[5][:] = 0  # left out
    # off the mask, what verl's agent loops put there, and the trainer's of tool output
    log_mu = [torch.where(m > 0, -2 * torch.rand(len(m), generator=g), 0.0) for m in masks]
    scale = torch.linspace(0.01, 0.4, rows)
    log_pi = [
        (mu + s * torch.randn(len(mu), generator=g)).clamp_max(-0.01) for mu, s in zip(log_mu, scale, strict=True)
    ]
    advantages = [torch.where(m > 0, float(torch.randn((), generator=g)), 0.0) for m in masks]
    scores = [torch.zeros(len(m)) for m in masks]
    for row, score in enumerate(scores):
        score[-1] = row
    fields = {
        "prompts": prompts,
        "responses": responses,
        "response_mask": masks,
        "old_log_probs": log_mu,
        "rollout_log_probs": log_mu,
        "advantages": advantages,
        "rm_scores": scores,
    }
    return TensorDict({name: nested(rows) for name, rows in fields.items()}, batch_size=rows), log_pi


def actor(method):
    return FSDPActorConfig(
        strategy="fsdp2",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        policy_loss=method,
        clip_ratio_low=0.2,
        clip_ratio_high=0.28,
    )


def train(method, data, log_pi, drawn, mini_batch=8, micro_batch=4, epochs=1, measured=None):
    """The records of a step, as verl's engine makes its workers' loss leave them: the policy stays where it is."""
    data = data.copy()
    data.update(token_recorder.row_field(drawn, len(data)))
    loss = partial(token_recorder.recording_loss, partial(ppo_loss, config=actor(method)))
    for _ in range(epochs):
        for begin in range(0, len(data), micro_batch):
            rows = list(range(begin, begin + micro_batch))
            part = tu.index_select_tensor_dict(data, rows)
            tu.assign_non_tensor(part, dp_size=1, batch_num_tokens=100, global_batch_size=mini_batch)
            # log pi(y_t) stands where y_t is predicted, one before it; elsewhere stands what nobody reads
            packed = []
            for prompt, pi in zip(part["prompts"].unbind(), log_pi[begin : begin + micro_batch], strict=True):
                packed += [torch.full((len(prompt) - 1,), math.nan), pi, torch.tensor([math.nan])]
            output = {"log_probs": torch.cat(packed).requires_grad_()}
            result, metrics = loss(model_output=output, data=part, dp_group=None)
            result.backward()
            assert metrics and output["log_probs"].grad is not None
    return token_recorder.take(None)


def writer(folder, megabytes=1.0, every=1, method=None):
    clips = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio_c": 10.0}
    config = {
        "actor": {"policy_loss": method or {"loss_mode": "cppo"}, **clips},
        "model": {"path": "some/model"},
    }
    settings = DumpConfig(every=every, responses=8, megabytes=megabytes, folder=str(folder))
    run = {
        "actor_rollout_ref": config,
        "trust_region": {"partition": "binary", "delta": 0.05, "dump": {"every": every}},
        "data": {"max_response_length": 12},
    }
    return token_recorder.DumpWriter(OmegaConf.create(run), settings)


def dumped(tmp_path, method, drawn=None, **kwargs):
    """What the reader makes of a step with ``method``: {row: [its responses in the order of the updates]}."""
    data, log_pi = batch()
    drawn = token_recorder.draw(data["response_mask"], len(data), step=3) if drawn is None else drawn
    records = train(method, data, log_pi, drawn, **kwargs)
    keys = {row: f"prompt{row // 4}_{row % 4}_0" for row in drawn}
    writer(tmp_path).write(3, None, records, keys, tu.index_select_tensor_dict(data, drawn))
    result = read_tokens(tmp_path)
    assert result.notes == []
    by_row = {row: [] for row in drawn}
    for response in result.responses:
        by_row[int(response.score)].append(response)
    return data, log_pi, by_row


def divergence(kind, m, p):
    if kind == "tv":
        return abs(math.exp(p) - math.exp(m))
    mu, pi = math.exp(m), math.exp(p)
    return mu * (m - p) + ((1 - mu) * math.log((1 - mu) / (1 - pi)) if mu < 1 else 0.0)


def expected(method, log_mu, log_pi, adv, valid):
    """Per token: D_t, the reason, and whether rounding could change it; per response: w D, c and delta_b."""
    tokens = range(len(valid))
    kind = "kl" if getattr(method, "divergence", "").endswith("kl") else "tv"
    div = [divergence(kind, m, p) if v else 0.0 for m, p, v in zip(log_mu, log_pi, valid, strict=True)]
    kept = [t for t in tokens if valid[t]]
    reason, sure = ["" for _ in tokens], [True for _ in tokens]
    if isinstance(method, CPPOLossConfig):
        w = oracle.position_weights(valid, method.w_min)
        delta_b = {"none": None, "fixed": DELTA_B}.get(method.budget, oracle.adaptive_budget(div, valid, DELTA_B))
        c = oracle.effective_threshold(div, valid, w, DELTA, delta_b)
        sure = oracle.decided(div, valid, w, DELTA, delta_b, 1e-5)
        for t in kept:
            away = oracle.moves_away(log_mu[t], log_pi[t], adv[t])
            rejected = "token" if w[t] * div[t] > DELTA else "budget"
            reason[t] = "kept" if w[t] * div[t] <= c[t] else rejected if away else "towards_one"
        return div, reason, sure, [a * b for a, b in zip(w, div, strict=True)], c, delta_b
    if isinstance(method, TRMLossConfig):
        bad = method.delta is not None and max(div) > method.delta
        bad |= method.delta_avg is not None and sum(div) / len(kept) > method.delta_avg
        for t in kept:
            reason[t] = "response" if bad else "kept"
    elif isinstance(method, NeighbourLossConfig):
        far = sum(abs(math.exp(log_pi[t] - log_mu[t]) - 1) for t in kept) > method.delta * len(kept)
        for t in kept:
            both = max(divergence("kl", log_mu[t], log_pi[t]), divergence("kl", log_pi[t], log_mu[t]))
            away = oracle.moves_away(log_mu[t], log_pi[t], adv[t])
            dropped = both > method.delta if method.rule == "kpop" else far and away
            reason[t] = "kept" if not dropped else "token" if method.rule == "kpop" else "response"
    elif isinstance(method, PrefixRatioLossConfig):
        lowest, total = math.inf, 0.0
        for n, t in enumerate(kept, start=1):
            log_ratio = log_pi[t] - log_mu[t]
            total += log_ratio
            if method.ratio == "minimum":
                ratio = math.exp(log_ratio + (lowest if n > 1 else 0.0))
            else:
                ratio = math.exp(total / n)
            lowest = min(lowest, log_ratio)
            reason[t] = "kept" if 0.8 <= ratio <= 1.28 else "clipped"
    return div, reason, sure, None, None, None


def make_response(i=0, length=40, **changed):
    g = np.random.default_rng(i)
    mask = np.ones(length, dtype=bool)
    mask[2:5] = False
    names = ("log_mu", "log_pi", "advantage", "divergence", "weighted_divergence", "threshold", "update_mask")
    columns = {name: np.where(mask, g.normal(size=length), 0).astype(np.float32) for name in names}
    columns |= {name: -abs(columns[name]) for name in ("log_mu", "log_pi")} | {"divergence": abs(columns["divergence"])}
    columns |= {"reason": np.where(mask, g.integers(1, 5, length), 0).astype(np.uint8), "mask": mask}
    columns |= {name: g.integers(0, 150_000, length).astype(np.int32) for name in ("prompt", "response")}
    return Response(**{"step": 4, "update": i, "key": f"u_{i}_0", "score": 1.0, "delta_b": 0.5} | columns | changed)


def save(folder, step, responses, **header):
    file = folder / f"step-{step:06d}.parquet"
    file.write_bytes(encode(responses, {"step": step} | header))
    return file


def damaged(file, part):
    content = file.read_bytes()
    file.write_bytes(part(content))


RUN_HEADER = {
    "method": {"_target_": "cppo_verl.plugin.config.CPPOLossConfig", "loss_mode": "cppo", "delta": 0.07},
    "divergence": "binary_tv",
    "clip_ratio_low": 0.2,
    "clip_ratio_high": 0.2,
    "trust_region": {"partition": "binary", "delta": 0.05, "delta_b": 0.005, "budget": "fixed"},
    "max_response_length": 32,
}
STATED = RUN_HEADER | {"method": {"_target_": "cppo_verl.plugin.config.CPPOLossConfig", "delta": 0.15, "delta_b": 0.02}}
"""The header of a run that trained with `CPPO`."""


def responses_of_cppo(folder):
    """Responses of three updates, with tool output, as CPPO saw them."""
    _, _, by_row = dumped(folder, METHODS["cppo"])
    return [response for of_row in by_row.values() for response in of_row]
