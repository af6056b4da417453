"""verl's v1 trainers with the trust region's metrics, as trainer.v1.trainer_mode=cppo_<verl's mode>."""

import socket

from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_colocate_async import PPOTrainerColocateAsync
from verl.trainer.ppo.v1.trainer_separate_async import PPOTrainerSeparateAsync
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from cppo_verl.diagnostics import GROUPS, shares
from cppo_verl.plugin.config import TRAINER_MODE_PREFIX, missing_files
from cppo_verl.plugin.losses import METRIC_PREFIX


class TrustRegionTrainer:
    """Mixin over one of verl's trainers."""

    def __init__(self, config):
        missing = missing_files(config)
        if missing:
            raise FileNotFoundError(f"on {socket.gethostname()}, where the trainer runs: no {', no '.join(missing)}")
        # Everything in verl that asks for the mode means verl's own.
        config.trainer.v1.trainer_mode = config.trainer.v1.trainer_mode.removeprefix(TRAINER_MODE_PREFIX)
        super().__init__(config)

    def _build_replay_buffer(self):
        replay_buffer = super()._build_replay_buffer()
        # verl polls for finished generations every two seconds, longer than a small model generates.
        kwargs = self.config.trainer.v1.sampler.sampler_kwargs
        replay_buffer.poll_interval = kwargs.get("poll_interval", replay_buffer.poll_interval)
        return replay_buffer

    def _update_actor(self, batch, metrics):
        batch = super()._update_actor(batch, metrics)
        metrics.update(pop_shares(metrics))
        return batch


def pop_shares(metrics: dict[str, float]) -> dict[str, float]:
    """Take the loss's sums out of a step's metrics and return the shares made of them.

    verl reduces a loss's metrics by the mean over micro-batches, ranks and mini-batches, each with
    the same weight. A mean of per-micro-batch shares would be wrong wherever these differ in size;
    numerators and denominators are scaled alike by it, so that their quotient is the pooled share.
    """
    sums = {group: {} for group in GROUPS}
    for key in [key for key in metrics if key.startswith(METRIC_PREFIX)]:
        group, name = key.removeprefix(METRIC_PREFIX).split("/")
        sums[group][name] = metrics.pop(key)
    result = {}
    for group in GROUPS:
        infix = "" if group == "all" else f"{group}/"
        if sums[group]:
            result |= {f"trust_region/{infix}{name}": value for name, value in shares(sums[group]).items()}
    if sums["all"].get("tokens"):
        # What verl's own losses report, under verl's names.
        result["actor/ppo_kl"] = -sums["all"]["log_ratio"] / sums["all"]["tokens"]
        result["actor/pg_clipfrac"] = result["trust_region/masked_share"]
    return result


@register_trainer(TRAINER_MODE_PREFIX + "sync")
class TrustRegionTrainerSync(TrustRegionTrainer, PPOTrainerSync):
    pass


@register_trainer(TRAINER_MODE_PREFIX + "colocate_async")
class TrustRegionTrainerColocateAsync(TrustRegionTrainer, PPOTrainerColocateAsync):
    pass


@register_trainer(TRAINER_MODE_PREFIX + "separate_async")
class TrustRegionTrainerSeparateAsync(TrustRegionTrainer, PPOTrainerSeparateAsync):
    pass
