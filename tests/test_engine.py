"""Every method in verl's own FSDP2 engine and ppo_loss: the gradient does not depend on micro-batches or ranks."""

import itertools
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.trainer

WORKER = Path(__file__).with_name("engine_worker.py")
METHODS = sorted(
    path.stem
    for path in (Path(__file__).parents[1] / "cppo_verl" / "config" / "method").glob("*.yaml")
    if path.stem not in ("_harness", "cppo_shuffled")  # whose weights are drawn anew for each micro-batch
)
MODES = ["cppo@seq-mean-token-sum", "cppo@seq-mean-token-mean", "grpo@seq-mean-token-mean"]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    vocabulary = {f"<{i}>": i for i in range(32)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<2>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<0>", eos_token="<1>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gradients(model, tmp_path_factory):
    """{world size: {(method, case): {parameter: gradient}}}"""
    folder, port = tmp_path_factory.mktemp("gradients"), free_port()
    results = {}
    for world in (1, 2):
        output = folder / f"{world}.pt"
        ranks = []
        for rank in range(world):
            env = {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            command = [sys.executable, str(WORKER), str(model), str(output), *METHODS, *MODES]
            env |= {"VERL_PLATFORM": "cpu", "OMP_NUM_THREADS": "1"}
            ranks.append(
                subprocess.Popen(
                    command, env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
                )
            )
        texts = [rank.communicate(timeout=300)[0] for rank in ranks]
        assert all(rank.returncode == 0 for rank in ranks), "\n".join(texts)
        results[world] = torch.load(output, weights_only=False)
    return results


def compare(got, want):
    assert any(g.abs().max() > 1e-4 for name, g in want.items() if name != "metrics")
    for name, gradient in want.items():
        if name != "metrics":
            torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", [*METHODS, *MODES])
def test_gradient_does_not_depend_on_micro_batches_or_ranks(gradients, method):
    whole = gradients[1][method, "whole"]
    for world in (1, 2):
        compare(gradients[world][method, "micro-batches"], whole)


@pytest.mark.parametrize("method", [*METHODS, *MODES])
def test_leaving_prompts_out_is_removing_them_by_hand(gradients, method):
    for world in (1, 2):
        compare(gradients[world][method, "left out"], gradients[1][method, "removed by hand"])


@pytest.mark.parametrize("method", METHODS)
def test_metrics_do_not_depend_on_micro_batches_or_ranks(gradients, method):
    from cppo_verl.plugin.trainer import pop_shares

    whole = pop_shares(dict(gradients[1][method, "whole"]["metrics"]))
    if method in ("grpo", "cispo"):
        assert whole == {}
        return
    for world in (1, 2):
        metrics = pop_shares(dict(gradients[world][method, "micro-batches"]["metrics"]))
        assert metrics == pytest.approx(whole, rel=1e-4, abs=1e-5)


def test_the_methods_differ(gradients):
    families = [
        "grpo",
        "cispo",
        "dppo",
        "cppo",
        "cppo_soft",
        "cppo_sapo",
        "cppo_kl",
        "drpo",
        "trm_max",
        "minpro",
        "pnpo",
    ]
    for a, b in itertools.combinations(families, 2):
        one, other = gradients[1][a, "whole"], gradients[1][b, "whole"]
        assert any(not torch.equal(one[n], other[n]) for n in one if n != "metrics"), (a, b)
