"""verl's FSDP2 engine on the CPU; verl registers it for cuda and npu only."""

from dataclasses import replace

from torch import nn
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead


@EngineRegistry.register(model_type="language_model", backend=["fsdp2"], device=["cpu"])
class CPUEngineWithLMHead(FSDPEngineWithLMHead):
    def _build_fsdp_module(self, module: nn.Module) -> nn.Module:
        # A reference model is offloaded to pinned memory, which needs an accelerator. Its parameters
        # are on the CPU as they are.
        config = self.engine_config
        self.engine_config = replace(config, forward_only=False)
        try:
            return super()._build_fsdp_module(module)
        finally:
            self.engine_config = config
