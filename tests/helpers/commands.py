"""A GRPO command of verl, and what its start-up checks."""

from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import validate_config

# verl's examples/grpo_trainer/run_qwen3-8b.sh in substance.
GRPO = [
    "algorithm.adv_estimator=grpo",
    "data.train_files=train.parquet",
    "data.val_files=test.parquet",
    "data.train_batch_size=1024",
    "data.max_prompt_length=512",
    "data.max_response_length=1024",
    "actor_rollout_ref.model.path=Qwen/Qwen3-8B",
    "actor_rollout_ref.actor.optim.lr=1e-6",
    "actor_rollout_ref.actor.ppo_mini_batch_size=256",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=32",
    "actor_rollout_ref.actor.use_kl_loss=True",
    "actor_rollout_ref.actor.kl_loss_coef=0.001",
    "actor_rollout_ref.actor.kl_loss_type=low_var_kl",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=32",
    "actor_rollout_ref.rollout.tensor_model_parallel_size=2",
    "actor_rollout_ref.rollout.name=vllm",
    "actor_rollout_ref.rollout.gpu_memory_utilization=0.6",
    "actor_rollout_ref.rollout.n=5",
    "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=32",
    "trainer.logger=[console,wandb]",
    "trainer.n_gpus_per_node=8",
    "trainer.total_epochs=15",
]


def start_up(config):
    """What verl.trainer.main_ppo does with the config before it touches Ray."""
    validate_config(config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))
