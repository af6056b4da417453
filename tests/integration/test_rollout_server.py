"""The server of the CPU's vLLM replica, as Ray hands it to processes that only call it."""

import subprocess
import sys

from ray import cloudpickle
from verl.workers.rollout.vllm_rollout import vllm_async_server

from cppo_verl.cpu import rollout_server


def test_a_handle_of_the_server_brings_no_vllm(compose, tmp_path):
    """When verl's own brings none, drop rollout_server.py: its module imports vLLM."""
    assert "vllm" in vars(vllm_async_server)
    server_class = rollout_server.load_replica()(
        0, compose("actor_rollout_ref.rollout.name=vllm").actor_rollout_ref.rollout, None
    ).server_class
    (tmp_path / "class").write_bytes(cloudpickle.dumps(server_class.__ray_metadata__.modified_class))
    code = "import sys; from ray import cloudpickle; loaded = cloudpickle.load(open(sys.argv[1], 'rb'))"
    code += "; print(loaded.__name__, loaded.generate.__name__, 'verl' in sys.modules, 'vllm' in sys.modules)"
    command = [sys.executable, "-c", code, str(tmp_path / "class")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.split()[-4:] == ["vLLMHttpServer", "method", "True", "False"]
