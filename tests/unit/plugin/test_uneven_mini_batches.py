"""A mini-batch must be shared evenly by the data-parallel ranks, or the run is refused before Ray starts."""

from contextlib import nullcontext

import pytest
from commands import GRPO, start_up

from cppo_verl.plugin.preflight import refuse_uneven_mini_batches


@pytest.mark.parametrize(
    ("overrides", "gpus"),
    [
        (["trainer.nnodes=3"], 24),
        (["trainer.nnodes=2", "actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size=3"], 16),
    ],
)
def test_ranks_that_cannot_share_a_mini_batch_are_refused_before_the_first_generation(compose, overrides, gpus):
    dynamic = [f"actor_rollout_ref.{key}use_dynamic_bsz=true" for key in ("actor.", "rollout.log_prob_")]
    command = [*GRPO, "+method=cppo", *dynamic]
    with pytest.raises(ValueError, match=rf"is \d+ responses, which {gpus} GPUs \(trainer\.nnodes=\d .* share evenly"):
        start_up(compose(*command, *overrides))
    start_up(compose(*command, "trainer.nnodes=2"))


@pytest.mark.parametrize(("parallel", "shared"), [(4, True), (1, False)])
def test_megatrons_data_parallel_ranks_are_what_its_model_leaves(compose, parallel, shared):
    layout = [f"actor_rollout_ref.actor.megatron.{key}_parallel_size=2" for key in ("tensor_model", "pipeline_model")]
    config = compose("model_engine=megatron", *GRPO, "+method=cppo", *(layout if parallel == 4 else []))
    config.actor_rollout_ref.actor.ppo_mini_batch_size, config.actor_rollout_ref.rollout.n = 6, 1
    with nullcontext() if shared else pytest.raises(ValueError, match="is 6 responses, which 8 GPUs"):
        refuse_uneven_mini_batches(config)
