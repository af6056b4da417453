"""verl's FSDP2 engine on the CPU, and whether verl still lacks it."""

import pytest
import torch


def test_verl_itself_still_has_no_fsdp2_engine_for_the_cpu():
    """When this fails, drop fsdp_engine.py."""
    from verl.workers.engine import EngineRegistry

    engines = EngineRegistry._engines["language_model"]["fsdp2"]
    assert {device for device, engine in engines.items() if engine.__module__.startswith("verl.")} == {"cuda", "npu"}
    assert engines["cpu"].__module__ == "cppo_verl.cpu.fsdp_engine"


def test_pinned_offload_still_needs_an_accelerator():
    """When this fails, drop the override in fsdp_engine.py."""
    if torch.accelerator.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(RuntimeError, match="accelerator|NVIDIA driver"):
        torch.empty(1).pin_memory()
