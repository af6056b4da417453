"""Names that the plug-in registers with verl, shared by the modules that register, choose or report them."""

LOSS_MODES = ("cppo", "trm", "prefix_ratio", "neighbour")
"""Values of ``actor_rollout_ref.actor.policy_loss.loss_mode``; each is a function of `cppo_verl.plugin.losses`."""
CLIP_RATIOS = ("clip_ratio_low", "clip_ratio_high", "clip_ratio_c")
"""Keys of ``actor_rollout_ref.actor`` that a policy loss reads beside its own config."""

TRAINER_MODE_PREFIX = "cppo_"
TRAINER_MODES = tuple(TRAINER_MODE_PREFIX + mode for mode in ("sync", "colocate_async", "separate_async"))
"""Values of ``trainer.v1.trainer_mode``: verl's own modes, prefixed."""

TOP_K_ROLLOUT = "vllm_top_k"
"""Value of ``actor_rollout_ref.rollout.name`` that the trainer sets instead of "vllm" for a top-K divergence."""
TOP_K_AGENT_LOOP_MANAGER = "cppo_verl.plugin.topk.agent_loop.TopKAgentLoopManager"
"""Value of ``actor_rollout_ref.rollout.agent.agent_loop_manager_class`` that the trainer sets with it."""
