"""One rank of one of verl's engines under its own ppo_loss, without Ray: gradients of fixed batches.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=... python engine_worker.py MODEL OUTPUT ENGINE=METHOD,... ...

ENGINE is sp1 or sp2, FSDP2 with Ulysses sequence-parallel groups of that size, or one of Megatron's as
`megatron_cpu.Backend` names them; several run in turn. METHOD is one of the hydra group, METHOD+DIVERGENCE or
METHOD@LOSS_AGG_MODE. The last rank writes {(method, case): {parameter: gradient}} to OUTPUT/ENGINE.pt; beside the
gradients stand "metrics", as verl reduces them over micro-batches and ranks, and that rank's "model_output".
"""

import sys
from functools import partial

import torch
import verl  # noqa: F401  loads the plug-in
from hydra import compose, initialize_config_module
from parsed_once import each_text_parsed_once
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.distributed import initialize_global_process_group_ray
from verl.utils.metric import Metric
from verl.utils.torch_functional import allgather_dict_into_dict
from verl.utils.ulysses import get_ulysses_sequence_parallel_group
from verl.workers.engine import EngineRegistry
from verl.workers.utils.losses import ppo_loss

from cppo_verl.plugin.losses import loss_context
from cppo_verl.plugin.topk.codec import CODES_FIELD, IDS_FIELD, pack
from cppo_verl.plugin.topk.loss import top_k_ppo_loss
from cppo_verl.plugin.zero_std_filter import leave_out, mini_batch_of_row

ROWS = 8
VOCABULARY = 32
# case: (micro-batch size, what stands in the mini-batch)
CASES = {
    "whole": (8, "all"),
    "micro-batches": (2, "all"),
    "left out": (2, "left out"),
    "removed by hand": (2, "removed"),
}
# And, of the top-K divergences: how the engine lays the tokens out.
LAYOUTS = {
    "padded": dict(use_remove_padding=False),
    "dynamic": dict(use_dynamic_bsz=True, max_token_len_per_gpu=40),
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
    # from next to the random model, 1/32 each, to so far that every method has something to reject
    log_mu = []
    for i, r in enumerate(responses):
        sampled = torch.nn.functional.one_hot(r, VOCABULARY)
        boost = 0.4 * i * torch.randn(len(r), 1, generator=g).clamp(-2, 1.8)
        log_mu.append((0.3 * i / 7 * torch.randn(len(r), VOCABULARY, generator=g) + boost * sampled).log_softmax(-1))
    top = [mu.topk(5) for mu in log_mu]
    packed = [pack(t.indices, t.values) for t in top]
    sampled = [mu.gather(-1, r[:, None]).squeeze(-1) for mu, r in zip(log_mu, responses, strict=True)]
    data = TensorDict(
        {
            "prompts": nested(prompts),
            "responses": nested(responses),
            "input_ids": nested(inputs),
            "position_ids": nested([torch.arange(len(x)) for x in inputs]),
            "response_mask": nested(masks),
            "loss_mask": nested([m.clone() for m in masks]),
            "old_log_probs": nested(sampled),
            "rollout_log_probs": nested(sampled),
            IDS_FIELD: nested([ids for ids, _ in packed]),
            CODES_FIELD: nested([codes for _, codes in packed]),
            "advantages": nested([torch.full((len(r),), 1.0 - 2 * (i % 2)) for i, r in enumerate(responses)]),
        },
        batch_size=ROWS,
    )
    return data, log_mu


class FSDP2:
    """verl's FSDP2 engine, with Ulysses sequence-parallel groups of a size."""

    layouts = LAYOUTS

    def __init__(self, name):
        self.size = int(name.removeprefix("sp"))
        ranks = f"actor_rollout_ref.actor.ulysses_sequence_parallel_size={self.size}"
        # verl's configuration asks for packed rows where ranks share a sequence
        self.overrides = [ranks, "+platform=cpu", "actor_rollout_ref.model.use_remove_padding=true"]
        if self.size > 1:
            self.layouts = {case: x for case, x in LAYOUTS.items() if x.get("use_remove_padding", True)}

    def build(self, config, actor_config):
        engine = EngineRegistry.new(
            model_type="language_model",
            backend="fsdp2",
            model_config=omega_conf_to_dataclass(config.model),
            engine_config=actor_config.engine,
            optimizer_config=actor_config.optim,
            checkpoint_config=actor_config.checkpoint,
        )
        engine.initialize()
        return engine

    def lay_out(self, engine, use_remove_padding):
        pass  # the micro-batch says it

    def whole(self, engine, logits, data):
        """The logits [tokens, V] of all ranks."""
        parts = [logits.clone() for _ in range(self.size)]
        if self.size > 1:
            torch.distributed.all_gather(parts, parts[0].clone(), group=get_ulysses_sequence_parallel_group())
        return torch.cat(parts, dim=1)[0]

    def gradient(self, engine):
        return {name: p.grad.full_tensor().clone() for name, p in engine.module.named_parameters()}


def run(backend, engine, actor_config, data, micro_batch_size, global_batch_size, **layout):
    captures = getattr(actor_config.policy_loss, "captures", False)
    settings = dict(
        temperature=1.0,
        use_dynamic_bsz=False,
        micro_batch_size_per_gpu=micro_batch_size,
        use_remove_padding=True,
        global_batch_size=global_batch_size,
        distillation_use_topk=captures,
        return_model_output=True,
    )
    settings |= layout
    tu.assign_non_tensor(data, **settings)
    backend.lay_out(engine, settings["use_remove_padding"])
    shown = []

    def watched(*, data, model_output=None, student_logits=None, **kwargs):
        if student_logits is not None:
            shown.append(backend.whole(engine, student_logits.detach(), data))
        observed = []
        with loss_context(observed=observed):
            result = top_k_ppo_loss(data=data, model_output=model_output, student_logits=student_logits, **kwargs)
        for _, tokens, _ in observed:
            rows = zip(tokens.divergence, data["responses"].offsets().diff(), strict=True)
            model_output["divergence"] = nested([row[:length] for row, length in rows])
        return result

    loss = watched if captures else ppo_loss
    with engine.train_mode():
        engine.optimizer_zero_grad()
        output = engine.forward_backward_batch(data, partial(loss, config=actor_config))
        gradient = backend.gradient(engine)
    if not output:  # a pipeline's first ranks
        return gradient
    metrics = allgather_dict_into_dict(output["metrics"], group=engine.get_data_parallel_group())
    gradient["metrics"] = {
        key: Metric.aggregate_dp(value) for key, value in metrics.items() if isinstance(value[0], Metric)
    }
    model_output = output["model_output"]
    gradient["model_output"] = {k: v.values() for k, v in model_output.items()} | {"logits": shown}
    return gradient


def main(model, output, *engines):
    initialize_global_process_group_ray()
    for name, _, methods in (engine.partition("=") for engine in engines):
        results = results_of(name, model, methods.split(","))
        if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            torch.save(results, f"{output}/{name}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def results_of(engine_name, model, methods):
    if engine_name.startswith("sp"):
        backend = FSDP2(engine_name)
    else:
        import megatron_cpu

        backend = megatron_cpu.Backend(engine_name)
    rank, dp_size = torch.distributed.get_rank(), torch.distributed.get_world_size() // backend.size

    def part(data, rows, micro_batch_size):
        """This data-parallel rank's rows, and a micro-batch size that divides them."""
        share, dp_rank = len(rows) // dp_size, rank // backend.size
        mine = tu.index_select_tensor_dict(data, rows[dp_rank * share : (dp_rank + 1) * share])
        size = min(micro_batch_size, share)
        return mine, size if share % size == 0 else 1

    results, engine = {}, None
    for name in methods:
        method, _, mode = name.partition("@")
        method, _, divergence = method.partition("+")
        overrides = [f"actor_rollout_ref.actor.loss_agg_mode={mode}"] if mode else []
        if divergence:
            overrides += [f"divergence={divergence}", "actor_rollout_ref.actor.policy_loss.top_k=5"]
        with initialize_config_module("verl.trainer.config", version_base=None):
            config = compose(
                "ppo_trainer",
                [f"+method={method}", f"actor_rollout_ref.model.path={model}", "data.max_response_length=16"]
                + ["actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2", *overrides, *backend.overrides],
            ).actor_rollout_ref
        actor_config = omega_conf_to_dataclass(config.actor)
        if engine is None:
            engine = backend.build(config, actor_config)
        seq_mean = actor_config.loss_agg_mode.startswith("seq-mean")
        for case, (micro_batch_size, content) in CASES.items():
            data, _ = batch()
            kept = torch.ones(ROWS, dtype=torch.bool)
            if content != "all":
                kept[2:4] = False
            if content == "left out":
                masked = leave_out(data, kept, mini_batch_of_row(ROWS, dp_size, ROWS), seq_mean)
                data.update(masked)
            rows = kept.nonzero().flatten().tolist() if content == "removed" else list(range(ROWS))
            mine, size = part(data, rows, micro_batch_size)
            results[name, case] = run(backend, engine, actor_config, mine, size, len(rows))
        if divergence:
            for case, layout in backend.layouts.items():
                mine, size = part(batch()[0], list(range(ROWS)), 2)
                results[name, case] = run(backend, engine, actor_config, mine, size, ROWS, **layout)
    return results


if __name__ == "__main__":
    with each_text_parsed_once():
        main(*sys.argv[1:])
