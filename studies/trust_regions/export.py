"""Writes what verl's trainer needs to run a cell of the study: a seed's first policy, a tokenizer, and prompts.

python -m studies.trust_regions.export --horizon 64 --seed 201 --output outputs/study/trainer/201
"""

import argparse
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from cppo_verl.testing import tiny_models
from studies.trust_regions import policy, task, warmup
from studies.trust_regions.policy import Parameters

PROMPTS = 8192
CHAT_TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
"""The four digits and nothing else, as in the loop."""
NAMES = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
NAMES |= {name: f"self_attn.{name}" for name in ("q_norm", "k_norm")}
NAMES |= {name: f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")}
NAMES |= {name: f"mlp.{name}_proj" for name in ("gate", "up", "down")}


def state_dict(parameters: Parameters) -> dict[str, Tensor]:
    """Return one seed's parameters, without the dimension of seeds, under transformers' names for Qwen3."""
    result = {"model.embed_tokens.weight": parameters["embed"], "model.norm.weight": parameters["norm"]}
    for n in range(policy.layers_of(parameters)):
        # torch.nn.Linear stores its weight as [outputs, inputs].
        layer = {
            NAMES[name]: parameters[f"{n}.{name}"].mT.contiguous()
            for name in ("q", "k", "v", "o", "gate", "up", "down")
        }
        layer |= {NAMES[name]: parameters[f"{n}.{name}"] for name in ("attention_norm", "mlp_norm", "q_norm", "k_norm")}
        result |= {f"model.layers.{n}.{name}.weight": x for name, x in layer.items()}
    return result


def qwen3(parameters: Parameters, longest: int):
    """Return transformers' Qwen3 with one seed's parameters, and its tokenizer."""
    tokenizer = tiny_models.word_tokenizer(
        task.VOCABULARY, r"[0-9]", pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", chat_template=CHAT_TEMPLATE
    )
    vocabulary, hidden = parameters["embed"].shape
    model = tiny_models.build_model(
        tokenizer,
        hidden_size=hidden,
        intermediate_size=parameters["0.gate"].shape[-1],
        num_hidden_layers=policy.layers_of(parameters),
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=longest,
        tie_word_embeddings=True,
        rope_theta=policy.ROPE_BASE,
        rms_norm_eps=policy.EPS,
    )
    model.load_state_dict(state_dict(parameters), strict=False)
    model.tie_weights()
    return model, tokenizer


def prompts(horizon: int, seed: int) -> pd.DataFrame:
    drawn = task.prompts(PROMPTS, torch.Generator().manual_seed(seed))
    text = ["".join(map(str, row)) for row in drawn.tolist()]
    right = ["".join(map(str, row)) for row in task.answers(drawn, horizon).tolist()]
    return pd.DataFrame(
        {
            "data_source": "lagged_sum",
            "prompt": [[{"role": "user", "content": prompt}] for prompt in text],
            "reward_model": [{"style": "rule", "ground_truth": answer} for answer in right],
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--horizon", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--inputs", type=Path, default=Path("outputs/study/shared"), help="default: %(default)s")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    first = warmup.first_policies(args.horizon, [args.seed], args.inputs / "first")
    model, tokenizer = qwen3({name: p[0] for name, p in first.items()}, task.ORDER + args.horizon)
    tiny_models.save(
        model, tokenizer, args.output / "model", "study.json", {"horizon": args.horizon, "seed": args.seed}
    )
    frame = prompts(args.horizon, args.seed)
    frame.to_parquet(args.output / "train.parquet")
    frame.head(32).to_parquet(args.output / "validation.parquet")


if __name__ == "__main__":
    main()
