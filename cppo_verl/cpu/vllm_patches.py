"""The places in vLLM's CPU build that keep verl from updating its weights, and one that makes each run wait.

vLLM loads this module in each of its processes, through the entry point group "vllm.general_plugins": it must not
import verl. It does nothing where vLLM does not run on the CPU. tests/unit/cpu/test_vllm_patches.py fails when vLLM no
longer needs one of the patches.
"""

import functools
import inspect
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe import RoutedExperts


def keep_plain_weights() -> None:
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    import torch
    from vllm.model_executor.layers import utils
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    # dispatch_cpu_unquantized_gemm packs a linear layer's weight for a fast kernel and drops the
    # parameter, so that the next weight sync finds nothing to load into ("Parameter has no attribute
    # weight_loader").
    def keep_weight(layer: torch.nn.Module, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear  # type: ignore[assignment]  # as vLLM does

    utils.dispatch_cpu_unquantized_gemm = keep_weight

    # vLLM 0.28 packs the weights of experts in place, and only where there is no kernel yet: those of a weight sync
    # would stay plain and be read as packed, without an error. vLLM 0.24 packs them into new parameters, which lack the
    # loader that the next sync asks for.
    process = UnquantizedFusedMoEMethod.process_weights_after_loading

    @functools.wraps(process)
    def pack_each_time(self: UnquantizedFusedMoEMethod, layer: "RoutedExperts") -> None:
        self.moe_kernel = None
        loaders = {name: vars(parameter) for name, parameter in layer.named_parameters(recurse=False)}
        process(self, layer)
        for name, attributes in loaders.items():
            vars(getattr(layer, name)).update(attributes)

    UnquantizedFusedMoEMethod.process_weights_after_loading = pack_each_time  # type: ignore[method-assign]  # a patch
    sample_uncompiled()


def sample_uncompiled() -> None:
    """Run as written the two functions of the sampler that vLLM compiles on the CPU in spite of enforce_eager.

    Their first calls take five seconds, and twenty where nothing is cached: longer than a tiny model generates.
    """
    from vllm.v1.sample import sampler
    from vllm.v1.sample.ops import topk_topp_sampler

    sampler.batched_count_greater_than = inspect.unwrap(sampler.batched_count_greater_than)
    topk_topp_sampler.compiled_random_sample = inspect.unwrap(topk_topp_sampler.compiled_random_sample)
