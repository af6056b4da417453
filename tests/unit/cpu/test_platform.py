"""The platform "cpu": when verl chooses it, and what its device module answers."""

import torch

from cppo_verl.cpu.platform import PlatformCPU


def test_it_is_chosen_by_name_and_by_detection_without_an_accelerator_build(monkeypatch):
    from verl.plugin.platform import platform_manager

    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    assert platform_manager._detect_platform_name() == "cpu"
    monkeypatch.delenv("VERL_PLATFORM")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: None)
    assert PlatformCPU().is_platform_available()
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    assert not PlatformCPU().is_platform_available()


def test_the_device_module_answers_what_verl_asks():
    device = PlatformCPU().device_module
    free, total = device.mem_get_info()
    assert 0 < free <= total
    assert 0 < device.memory_allocated() < total
    assert 0 < device.max_memory_allocated() < total
    assert device.is_available()
    state = device.get_rng_state()
    first = torch.rand(3)
    device.set_rng_state(state)
    assert torch.equal(first, torch.rand(3))
    assert device.current_stream() is not None  # falls through to torch.cpu
