"""What the CPU platform replaces in verl, and whether verl still needs it."""

import pytest
import torch.distributed as dist


@pytest.fixture
def single_rank(monkeypatch):
    for key, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(key, value)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def test_verl_still_names_the_cpu_twice_for_its_process_group(single_rank):
    """When this fails, drop verl_patches.py."""
    import verl.utils.distributed as distributed

    patched = distributed.initialize_global_process_group_ray
    with pytest.raises(ValueError, match="Duplicate device type cpu"):
        patched.func()
    patched()
    assert dist.get_world_size() == 1
