"""The one place in vLLM 0.28.0's CPU build that keeps verl from updating its weights.

Loaded by vLLM in each of its processes through the entry point group "vllm.general_plugins", so that
it stands apart from ``plugin`` and imports no verl; it does nothing where vLLM does not run on the CPU.
"""


def keep_plain_weights() -> None:
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    import torch
    from vllm.model_executor.layers import utils

    # dispatch_cpu_unquantized_gemm packs a linear layer's weight for a fast kernel and drops the
    # parameter, so that the next weight sync finds nothing to load into ("Parameter has no attribute
    # weight_loader"). tests/test_cpu_platform.py fails when vLLM keeps it.
    def keep_weight(layer, remove_weight):
        layer.cpu_linear = torch.nn.functional.linear

    utils.dispatch_cpu_unquantized_gemm = keep_weight
