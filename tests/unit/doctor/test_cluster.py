"""What a cluster's nodes are asked for; tests/integration/test_cluster.py asks them."""

import pytest
import torch
from safetensors.torch import save_file

from cppo_verl.doctor.cluster import LEAST_FREE, _checkpoint_share


def test_a_checkpoint_takes_twelve_bytes_a_parameter_split_over_the_nodes(tmp_path):
    save_file({"a": torch.zeros(3, 4), "b": torch.zeros(2)}, tmp_path / "model-1.safetensors")
    save_file({"c": torch.zeros(10)}, tmp_path / "model-2.safetensors")
    assert _checkpoint_share(str(tmp_path), 2) == 12 * 24 // 2
    assert _checkpoint_share("Qwen/Qwen3-8B", 2) == LEAST_FREE


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", b""])
def test_weights_that_are_none_are_named(content, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"/model.safetensors is cut off, or a pointer of Git LFS: download it again"):
        _checkpoint_share(str(tmp_path), 1)
