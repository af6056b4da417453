"""What a step of the paper's four scales moves for the plug-in, beside what verl moves anyway: from the recipes alone.

    python tests/benchmarks/scale.py

Counts every response at its full length, so that each number is the most that a step can have.
"""

from pathlib import Path

import verl  # noqa: F401  loads the plug-in
from hydra import compose, initialize_config_dir

from cppo_verl.evaluation import paper_results
from cppo_verl.plugin.topk.codec import bytes_per_token

RECIPES = Path(__file__).parents[2] / "recipes"
VOCABULARY = 151_936
VERL_BYTES = 44
"""Of a response token in TransferQueue: five int64 and one fp32; tests/benchmarks/transport.py counts them."""
BF16, FP32 = 2, 4
PASSES = 4
"""Of verl over the logits at least: written, read for the log-probability, their gradient written and read."""


def rows():
    """A row a scale: name, responses, tokens, bytes of candidates, verl's fields, logits taken and verl's logits."""
    with initialize_config_dir(str(RECIPES), version_base=None):
        for name in paper_results.MODELS:
            overrides = [f"scale={name}", "data_dir=data", "output=output"]
            config = compose("paper", overrides=overrides)
            rollout, policy_loss = config.actor_rollout_ref.rollout, config.actor_rollout_ref.actor.policy_loss
            responses = config.data.train_batch_size * rollout.n
            tokens = responses * config.data.max_response_length
            candidates = tokens * bytes_per_token(policy_loss.top_k)
            taken = tokens * (policy_loss.top_k + 1) * FP32
            yield name, responses, tokens, candidates, tokens * VERL_BYTES, taken, PASSES * tokens * VOCABULARY * BF16


def main():
    print("| scale | responses | response tokens | candidates | verl's fields | logits taken | verl's logits |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, responses, tokens, *moved in rows():
        sizes = " | ".join(f"{x / 1e9:,.1f} GB" for x in moved)
        print(f"| `{name}` | {responses:,} | {tokens / 1e6:.1f} M | {sizes} |")


if __name__ == "__main__":
    main()
