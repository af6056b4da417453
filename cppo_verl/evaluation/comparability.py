"""Names the settings beside the method in which compared runs differ."""

from collections.abc import Sequence

from cppo_verl.artifacts.run_reader import Run
from cppo_verl.artifacts.saved_config import select

_ACTOR = "actor_rollout_ref.actor."
BESIDE_THE_METHOD = {
    "model": ["actor_rollout_ref.model.path"],
    "reward": [f"reward.custom_reward_function.{name}" for name in ("path", "name")],
    "aggregation": [_ACTOR + "loss_agg_mode", _ACTOR + "loss_scale_factor"],
    "normalisation": ["algorithm.norm_adv_by_std_in_grpo", _ACTOR + "policy_loss.mask_std_0"],
    "prompts": [f"data.{name}" for name in ("train_files", "val_files", "max_prompt_length", "max_response_length")],
    "batches": ["data.train_batch_size", "actor_rollout_ref.rollout.n", _ACTOR + "ppo_mini_batch_size"],
    "optimiser": [_ACTOR + "optim.lr"],
    "engine": [_ACTOR + "strategy", "actor_rollout_ref.rollout.name", "trainer.v1.trainer_mode"],
    "validation": [f"actor_rollout_ref.rollout.val_kwargs.{name}" for name in ("n", "temperature", "top_p")],
}
"""{what a comparison of methods holds fixed: its keys}."""


def unequal(runs: Sequence[Run]) -> list[str]:
    """Return one line for each setting of `BESIDE_THE_METHOD` in which the runs with a readable config differ."""
    configs = [(run.label, config) for run in runs if (config := run.saved("config.yaml"))]
    lines = []
    for what, keys in BESIDE_THE_METHOD.items():
        for key in keys:
            labels: dict[str, list[str]] = {}
            for label, config in configs:
                labels.setdefault(str(select(config, key)), []).append(label)
            if len(labels) > 1:
                found = "; ".join(f"{value} in {', '.join(dict.fromkeys(of))}" for value, of in labels.items())
                lines.append(f"the runs differ in more than the method, {what}: {key} is {found}")
    return lines
