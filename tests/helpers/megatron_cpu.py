"""verl's Megatron engine on the CPU and gloo, with Megatron-Core's own layers, schedules and vocabulary-parallel loss.

Stood in for is what needs a GPU's libraries: the attention kernel, TransformerEngine's layers by Megatron-Core's local
ones, and devices, which Megatron-Core and mbridge name "cuda" themselves.
"""

import re

import torch
from engine_worker import LAYOUTS
from torch import nn
from torch.overrides import TorchFunctionMode
from verl.utils.config import omega_conf_to_dataclass


class CUDAIsCPU(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return args[0] if function is torch.Tensor.cuda else function(*args, **kwargs)


class Attention(nn.Module):
    """Causal attention within each packed sequence, [tokens, heads, size], or each column, [tokens, B, heads, size]."""

    def __init__(self, config, layer_number, attn_mask_type, attention_type, **_):
        super().__init__()

    def forward(self, query, key, value, attention_mask, packed_seq_params=None, **_):
        place = torch.arange(len(query))
        visible = place.unsqueeze(1) >= place
        if packed_seq_params is not None:
            sequence = torch.searchsorted(packed_seq_params.cu_seqlens_q[1:].contiguous(), place, right=True)
            visible &= sequence.unsqueeze(1) == sequence
        batch = [x.unsqueeze(1) if packed_seq_params is not None else x for x in (query, key, value)]
        heads = [x.permute(1, 2, 0, 3) for x in batch]
        out = nn.functional.scaled_dot_product_attention(*heads, attn_mask=visible, enable_gqa=True)
        out = out.permute(2, 0, 1, 3).flatten(2)
        return out.squeeze(1) if packed_seq_params is not None else out


class Backend:
    """Named tp2, pp2 or the like, and tp2v40 where the vocabulary is padded to 40 columns."""

    layouts = LAYOUTS

    def __init__(self, name):
        kind, size, columns = re.fullmatch(r"(tp|pp)(\d+)(?:v(\d+))?", name).groups()
        self.size, self.columns = int(size), columns and int(columns)
        tp, pp = (self.size if kind == k else 1 for k in ("tp", "pp"))
        actor = "actor_rollout_ref.actor."
        transformer = f"+{actor}megatron.override_transformer_config."
        self.overrides = [
            "model_engine=megatron",
            "actor_rollout_ref.rollout.name=vllm",
            f"{actor}optim.total_training_steps=1",
            f"{actor}megatron.tensor_model_parallel_size={tp}",
            f"{actor}megatron.pipeline_model_parallel_size={pp}",
            f"{actor}megatron.vanilla_mbridge=true",
            # The rest is what only TransformerEngine or CUDA do.
            f"{actor}megatron.use_distributed_optimizer=false",
            f"{actor}megatron.sequence_parallel=false",
            f"{transformer}sequence_parallel=false",
            f"{transformer}gradient_accumulation_fusion=false",
            f"{transformer}persist_layer_norm=false",
            f"{transformer}use_cpu_initialization=true",
            f"+{transformer}attention_backend=local",
        ]

    def build(self, config, actor_config):
        from mbridge.core import llm_bridge
        from mbridge.models.qwen3 import Qwen3Bridge
        from megatron.core import parallel_state
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
        from verl.workers.engine.megatron import transformer_impl

        def local_layers(config, use_transformer_engine, **kwargs):
            spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, **kwargs)
            for layer in spec.layer_specs:
                layer.submodules.self_attention.submodules.core_attention = Attention
            return spec

        columns = self.columns

        class OnCPU(transformer_impl.MegatronEngineWithLMHead):
            def _build_tf_config(self):
                super()._build_tf_config()
                self.bridge.make_vocab_size_divisible_by = columns

        CUDAIsCPU().__enter__()
        torch.cuda.current_device = lambda: torch.device("cpu")
        torch.cuda.synchronize = lambda: None
        nn.Module.cuda = lambda self, device=None: self
        llm_bridge.get_gpt_decoder_block_spec = local_layers
        # Local layers have their norms apart.
        layer = "model.layers.{layer_number}."
        Qwen3Bridge._OTHER_MAPPING = {"input_layernorm.weight": [layer + "input_layernorm.weight"]}
        Qwen3Bridge._MLP_MAPPING |= {"pre_mlp_layernorm.weight": [layer + "post_attention_layernorm.weight"]}
        transformer_impl.set_random_seed = torch.manual_seed
        # verl's engine trains in half precision alone.
        object.__setattr__(actor_config.engine, "dtype", "float32")
        parallel_state.destroy_model_parallel()  # of the engine before
        engine = OnCPU(
            model_config=omega_conf_to_dataclass(config.model),
            engine_config=actor_config.engine,
            optimizer_config=actor_config.optim,
            checkpoint_config=actor_config.checkpoint,
        )
        engine.initialize()
        return engine

    def lay_out(self, engine, use_remove_padding):
        object.__setattr__(engine.engine_config, "use_remove_padding", use_remove_padding)

    def whole(self, engine, logits, data):
        """The logits [tokens, columns] of all ranks, without padding between the rows."""
        from megatron.core import parallel_state as mpu

        parts = [torch.empty_like(logits) for _ in range(mpu.get_tensor_model_parallel_world_size())]
        torch.distributed.all_gather(parts, logits.contiguous(), group=mpu.get_tensor_model_parallel_group())
        lengths = data["input_ids"].offsets().diff().tolist()
        if len(logits) > 1:
            sizes = [logits.shape[1]] * len(lengths)
        else:
            sizes = [-(-length // len(parts)) * len(parts) for length in lengths]
        rows = torch.cat(parts, dim=-1).flatten(0, 1).split(sizes)
        return torch.cat([row[:length] for row, length in zip(rows, lengths, strict=True)])

    def gradient(self, engine):
        """By Hugging Face's names, as the bridge hands out weights."""
        parameters = list(engine.module[0].parameters())
        weights = [p.data.clone() for p in parameters]
        for p in parameters:
            p.data.copy_(p.main_grad)
        gradient = {name: x.clone() for name, x in engine.bridge.export_weights(engine.module)}
        for p, weight in zip(parameters, weights, strict=True):
            p.data.copy_(weight)
        return gradient
