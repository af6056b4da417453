"""Qwen3 in plain torch for many seeds at once: every parameter has a first dimension of S seeds.

One call trains or samples S independent models, so that twenty seeds cost little more than one. The function is that of
transformers' Qwen3 (one attention head, tied embeddings), whose state dict `to_qwen3` writes.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

EPS = 1e-6
INITIAL_STD = 0.1
"""Of the weights. With transformers' 0.02, which is for wide models, one seed in four learns the task late or never."""
ROPE_BASE = 10_000.0


class Shape(NamedTuple):
    """Sizes of the model; the head size is the smallest that vLLM's attention on the CPU offers."""

    vocabulary: int
    hidden: int = 32
    intermediate: int = 64
    layers: int = 2
    head: int = 32


Parameters = dict[str, Tensor]


def initialise(shape: Shape, seeds: list[int]) -> Parameters:
    """Parameters [S, ...] of randomly initialised models, one a seed."""
    models = [_initialise_one(shape, torch.Generator().manual_seed(seed)) for seed in seeds]
    return {name: torch.stack([model[name] for model in models]) for name in models[0]}


def _initialise_one(shape: Shape, generator: torch.Generator) -> Parameters:
    def normal(*size: int) -> Tensor:
        return INITIAL_STD * torch.randn(size, generator=generator)

    h, i, d = shape.hidden, shape.intermediate, shape.head
    parameters = {"embed": normal(shape.vocabulary, h), "norm": torch.ones(h)}
    for n in range(shape.layers):
        parameters |= {f"{n}.{name}": torch.ones(h) for name in ("attention_norm", "mlp_norm")}
        parameters |= {f"{n}.{name}": torch.ones(d) for name in ("q_norm", "k_norm")}
        parameters |= {f"{n}.{name}": normal(h, d) for name in ("q", "k", "v")} | {f"{n}.o": normal(d, h)}
        parameters |= {f"{n}.gate": normal(h, i), f"{n}.up": normal(h, i), f"{n}.down": normal(i, h)}
    return parameters


def layers_of(parameters: Parameters) -> int:
    return 1 + max(int(name.split(".")[0]) for name in parameters if "." in name)


def forward(parameters: Parameters, ids: Tensor, from_position: int = 0) -> Tensor:
    """Logits [S, B, L - from_position, V] of the positions from ``from_position`` on, for ``ids`` [S, B, L]."""
    x = _embed(parameters, ids)
    cos, sin = _rotation(torch.arange(ids.shape[-1]), parameters["0.q"].shape[-1], x.dtype)
    for n in range(layers_of(parameters)):
        q, k, v = _attention_input(parameters, n, x, cos, sin)
        attended = F.scaled_dot_product_attention(
            *(part.flatten(0, 1).unsqueeze(1) for part in (q, k, v)), is_causal=True
        )
        x = _after_attention(parameters, n, x, attended.squeeze(1).view_as(q))
    return _logits(parameters, x[:, :, from_position:])


@torch.no_grad()
def generate(parameters: Parameters, prompts: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Sample responses at temperature 1.

    Args:
        parameters: of S models; their dtype is that of the computation.
        prompts: token ids, [S, B, P].
        uniforms: random numbers in [0, 1), [S, B, T], fp32; T tokens are sampled.

    Returns:
        Token ids [S, B, T], and the log-probabilities that they were sampled with, [S, B, T], fp32.
    """
    (s, b, p), length = prompts.shape, uniforms.shape[-1]
    layers, head = layers_of(parameters), parameters["0.q"].shape[-1]
    dtype = parameters["embed"].dtype
    cos, sin = _rotation(torch.arange(p + length), head, dtype)
    # Keys are stored as columns: the product with a query then reads them in order.
    keys, values = (
        torch.empty(layers, s * b, head, p + length, dtype=dtype),
        torch.empty(layers, s * b, p + length, head, dtype=dtype),
    )
    tokens = torch.empty(s, b, length, dtype=torch.long)
    log_mu = torch.empty(s, b, length)
    ids, begin = prompts, 0
    for t in range(length):
        end = begin + ids.shape[-1]
        x = _embed(parameters, ids)
        for n in range(layers):
            q, k, v = _attention_input(parameters, n, x, cos[begin:end], sin[begin:end])
            keys[n, :, :, begin:end], values[n, :, begin:end] = k.flatten(0, 1).mT, v.flatten(0, 1)
            scores = torch.bmm(q.flatten(0, 1), keys[n, :, :, :end]).mul_(1 / math.sqrt(head))
            if begin == 0:
                scores += torch.full((end, end), -torch.inf, dtype=dtype).triu_(1)
            attended = torch.bmm(scores.softmax(-1), values[n, :, :end])
            x = _after_attention(parameters, n, x, attended.view_as(q))
        log_p = _logits(parameters, x[:, :, -1]).float().log_softmax(-1)
        passed = log_p.exp().cumsum(-1) <= uniforms[:, :, t, None]
        chosen = passed.sum(-1, keepdim=True).clamp_max_(log_p.shape[-1] - 1)
        tokens[:, :, t], log_mu[:, :, t] = chosen.squeeze(-1), log_p.gather(-1, chosen).squeeze(-1)
        ids, begin = chosen, end
    return tokens, log_mu


def log_probs(parameters: Parameters, prompts: Tensor, responses: Tensor) -> Tensor:
    """Log-probabilities [S, B, T] of the responses' tokens [S, B, T] after the prompts [S, B, P]."""
    ids = torch.cat([prompts, responses[..., :-1]], -1)
    logits = forward(parameters, ids, prompts.shape[-1] - 1)
    return logits.log_softmax(-1).gather(-1, responses.unsqueeze(-1)).squeeze(-1)


def _embed(parameters: Parameters, ids: Tensor) -> Tensor:
    embed = parameters["embed"]
    # A product with 0 and 1: for so small a vocabulary faster than an index, whose gradient is a scatter.
    one_hot = F.one_hot(ids.flatten(1), embed.shape[1]).to(embed.dtype)
    return torch.bmm(one_hot, embed).view(*ids.shape, -1)


def _attention_input(parameters: Parameters, n: int, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    h = _norm(x, parameters[f"{n}.attention_norm"])
    q, k, v = (_linear(h, parameters[f"{n}.{name}"]) for name in ("q", "k", "v"))
    q, k = (_rotate(_norm(part, parameters[f"{n}.{name}_norm"]), cos, sin) for part, name in ((q, "q"), (k, "k")))
    return q, k, v


def _after_attention(parameters: Parameters, n: int, x: Tensor, attended: Tensor) -> Tensor:
    x = x + _linear(attended, parameters[f"{n}.o"])
    h = _norm(x, parameters[f"{n}.mlp_norm"])
    gated = F.silu(_linear(h, parameters[f"{n}.gate"])) * _linear(h, parameters[f"{n}.up"])
    return x + _linear(gated, parameters[f"{n}.down"])


def _logits(parameters: Parameters, x: Tensor) -> Tensor:
    return _linear(_norm(x, parameters["norm"]), parameters["embed"].mT)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return torch.bmm(x.flatten(1, -2), weight).view(*x.shape[:-1], -1)


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
    return scaled.to(x.dtype) * weight.view(-1, *[1] * (x.dim() - 2), weight.shape[-1])


def _rotation(positions: Tensor, head: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    frequencies = ROPE_BASE ** (-torch.arange(0, head, 2) / head)
    angles = torch.outer(positions, frequencies).repeat(1, 2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin
