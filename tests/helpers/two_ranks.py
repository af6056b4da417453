"""The quickstart on two ranks, the same in each run: seeded samples, and a single update a rollout batch."""

from trainer_run import SHORT, Run, link

SETTINGS = [
    *SHORT,
    "data.train_batch_size=16",
    "actor_rollout_ref.actor.ppo_mini_batch_size=16",  # a single update, so that pi is still mu
    "actor_rollout_ref.actor.use_kl_loss=true",
    "actor_rollout_ref.actor.optim.lr_scheduler_type=cosine",
    "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=64",
    "actor_rollout_ref.rollout.agent.default_agent_loop=seeded",
    "trainer.logger=[console,file]",
    "trust_region.dump.responses=7",
]


def on_one_node(output, interrupted, *overrides, probe="seeded"):
    """Six steps with a KL reference; the data and the model are those of another run."""
    if not (output / "data").exists():
        link(interrupted, output)
    ranks = ["trainer.n_gpus_per_node=2", "ray_kwargs.ray_init.num_gpus=2"]
    return Run(output, *SETTINGS, *ranks, *overrides, probe=probe)
