"""One rank of verl's FSDP2 engine under its own ppo_loss, without Ray: gradients of fixed batches.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=... python engine_worker.py MODEL OUTPUT METHOD...

Writes {(method, case): {parameter: gradient}} to OUTPUT from rank 0; the metrics, as verl reduces them over
micro-batches and ranks, stand beside the gradients under "metrics".
"""

import sys
from functools import partial

import torch
import verl  # noqa: F401  loads the plug-in
from hydra import compose, initialize_config_module
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.distributed import initialize_global_process_group_ray
from verl.utils.metric import Metric
from verl.utils.torch_functional import allgather_dict_into_dict
from verl.workers.engine import EngineRegistry
from verl.workers.utils.losses import ppo_loss

from cppo_verl.plugin.trainer import leave_out, mini_batch_of_row

ROWS = 8
# case: (micro-batch size, what stands in the mini-batch)
CASES = {
    "whole": (8, "all"),
    "micro-batches": (2, "all"),
    "left out": (2, "left out"),
    "removed by hand": (2, "removed"),
}


def nested(rows):
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def batch():
    """Eight responses of four prompts; those of the second prompt have one reward."""
    g = torch.Generator().manual_seed(0)
    prompts = [torch.randint(5, 30, (int(n),), generator=g) for n in torch.randint(2, 6, (ROWS,), generator=g)]
    responses = [torch.randint(5, 30, (int(n),), generator=g) for n in torch.randint(3, 12, (ROWS,), generator=g)]
    masks = [torch.ones(len(r), dtype=torch.int64) for r in responses]
    masks[3][1:3] = 0  # tool output
    inputs = [torch.cat(pair) for pair in zip(prompts, responses, strict=True)]
    return TensorDict(
        {
            "prompts": nested(prompts),
            "responses": nested(responses),
            "input_ids": nested(inputs),
            "position_ids": nested([torch.arange(len(x)) for x in inputs]),
            "response_mask": nested(masks),
            "loss_mask": nested([m.clone() for m in masks]),
            # from next to the random model, ln(1/32), to so far that every method has something to reject
            "old_log_probs": nested(
                [-3.4657 + i / 4 * torch.randn(len(r), generator=g).clamp(-2, 1.8) for i, r in enumerate(responses)]
            ),
            "advantages": nested([torch.full((len(r),), 1.0 - 2 * (i % 2)) for i, r in enumerate(responses)]),
        },
        batch_size=ROWS,
    )


def run(engine, actor_config, data, micro_batch_size, global_batch_size):
    tu.assign_non_tensor(
        data,
        temperature=1.0,
        use_dynamic_bsz=False,
        micro_batch_size_per_gpu=micro_batch_size,
        use_remove_padding=True,
        global_batch_size=global_batch_size,
    )
    with engine.train_mode():
        engine.optimizer_zero_grad()
        output = engine.forward_backward_batch(data, partial(ppo_loss, config=actor_config))
        gradient = {name: p.grad.full_tensor().clone() for name, p in engine.module.named_parameters()}
    metrics = allgather_dict_into_dict(output["metrics"], group=engine.get_data_parallel_group())
    gradient["metrics"] = {
        key: Metric.aggregate_dp(value) for key, value in metrics.items() if isinstance(value[0], Metric)
    }
    return gradient


def main(model, output, *methods):
    initialize_global_process_group_ray()
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    results, engine = {}, None
    for name in methods:
        method, _, mode = name.partition("@")
        overrides = [f"actor_rollout_ref.actor.loss_agg_mode={mode}"] if mode else []
        with initialize_config_module("verl.trainer.config", version_base=None):
            config = compose(
                "ppo_trainer",
                [f"+method={method}", "+platform=cpu", f"actor_rollout_ref.model.path={model}", *overrides]
                + ["actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2", "data.max_response_length=16"],
            ).actor_rollout_ref
        actor_config = omega_conf_to_dataclass(config.actor)
        if engine is None:
            engine = EngineRegistry.new(
                model_type="language_model",
                backend="fsdp2",
                model_config=omega_conf_to_dataclass(config.model),
                engine_config=actor_config.engine,
                optimizer_config=actor_config.optim,
                checkpoint_config=actor_config.checkpoint,
            )
            engine.initialize()
        seq_mean = actor_config.loss_agg_mode.startswith("seq-mean")
        for case, (micro_batch_size, content) in CASES.items():
            data = batch()
            kept = torch.ones(ROWS, dtype=torch.bool)
            if content != "all":
                kept[2:4] = False
            if content == "left out":
                masked = leave_out(data, kept, mini_batch_of_row(ROWS, world, ROWS), seq_mean)
                data.update(masked)
            rows = kept.nonzero().flatten().tolist() if content == "removed" else list(range(ROWS))
            share = len(rows) // world
            mine = tu.index_select_tensor_dict(data, rows[rank * share : (rank + 1) * share])
            size = min(micro_batch_size, share)
            size = size if share % size == 0 else 1
            results[name, case] = run(engine, actor_config, mine, size, len(rows))
    if rank == 0:
        torch.save(results, output)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
