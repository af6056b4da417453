"""The server of the CPU's vLLM replica, as Ray hands it to processes that only call it."""

import inspect
import subprocess
import sys

from ray import cloudpickle
from verl.workers.rollout.vllm_rollout import vllm_async_server
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer

from cppo_verl.cpu.rollout_server import deferred, load_replica


def test_a_handle_of_the_server_brings_no_vllm(compose, tmp_path):
    """When verl's own brings none, drop rollout_server.py: its module imports vLLM."""
    assert "vllm" in vars(vllm_async_server)
    rollout = compose("actor_rollout_ref.rollout.name=vllm").actor_rollout_ref.rollout
    exported = load_replica()(0, rollout, None).server_class.__ray_metadata__.modified_class
    (tmp_path / "class").write_bytes(cloudpickle.dumps(exported))
    code = "import sys; from ray import cloudpickle; loaded = cloudpickle.load(open(sys.argv[1], 'rb'))"
    code += "; print(loaded.__name__, loaded.generate.__name__, 'verl' in sys.modules, 'vllm' in sys.modules)"
    command = [sys.executable, "-c", code, str(tmp_path / "class")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.split()[-4:] == ["vLLMHttpServer", "method", "True", "False"]


def test_every_method_of_verls_server_is_passed_on_as_what_it_is():
    passed_on = deferred(vLLMHttpServer)
    for name, method in inspect.getmembers(vLLMHttpServer, inspect.isfunction):
        if not name.startswith("__"):
            assert inspect.iscoroutinefunction(getattr(passed_on, name)) == inspect.iscoroutinefunction(method)
    assert passed_on.__name__ == "vLLMHttpServer"
    assert passed_on.actor_class == f"{vLLMHttpServer.__module__}.vLLMHttpServer"
