"""Every method in verl's own FSDP2 engine and ppo_loss: the gradient does not depend on micro-batches or ranks.

Nor on the engine: verl's own Megatron engine runs beside it, on Megatron-Core's layers, pipeline and tensor parallel.
"""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine_worker import batch
from torch.distributed import TCPStore

from cppo_verl.core import top_k_divergence

WORKER = Path(__file__).parents[1] / "helpers" / "engine_worker.py"
CORE = Path(sys.prefix) / "megatron"
METHODS = sorted(
    path.stem
    for path in (Path(__file__).parents[2] / "cppo_verl" / "config" / "method").glob("*.yaml")
    if path.stem not in ("_common", "cppo_shuffled")  # whose weights are drawn anew for each micro-batch
)
TOP_K = ["cppo+topk_tv", "cppo_kl+topk_kl", "dppo+topk_tv", "trm_max_avg+topk_kl"]
MODES = ["cppo@seq-mean-token-sum", "cppo@seq-mean-token-mean", "grpo@seq-mean-token-mean"]
ALL = [*METHODS, *TOP_K, *MODES]
# By tensor and by pipeline parallelism, and with a vocabulary of 32 tokens in 40 columns.
MEGATRON = ["tp2", "pp2"]
PADDED_VOCABULARY = "tp2v40"
IN_MEGATRON = ["cppo", "cppo@seq-mean-token-sum", "cppo+topk_tv", "cppo_kl+topk_kl"]


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
        num_attention_heads=4,
        num_key_value_heads=2,  # which two ranks can share
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


def run(model, world, engines, output):
    """Run {engine: methods} in a number of processes; {engine: {(method, case): {parameter: gradient}}}."""
    command = [sys.executable, str(WORKER), str(model), str(output)]
    command += [f"{engine}={','.join(methods)}" for engine, methods in engines.items()]
    # The ranks meet at a store of this process, as torchrun's do: a port that is only chosen here could be another's by
    # the time a rank has started.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    env = os.environ | {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    env |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "VERL_PLATFORM": "cpu", "OMP_NUM_THREADS": "1"}
    if not engines.keys() <= {"sp1", "sp2"}:
        assert CORE.exists(), f"no Megatron-Core in {CORE}: make {CORE.relative_to(CORE.parents[1])}"
        env["PYTHONPATH"] = os.pathsep.join([str(CORE), *filter(None, [env.get("PYTHONPATH")])])
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    ranks = [subprocess.Popen(command, env=env | {"RANK": str(rank)}, **pipes) for rank in range(world)]
    texts = [rank.communicate()[0] for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(texts)
    return {name: torch.load(output / f"{name}.pt", weights_only=False) for name in engines}


@pytest.fixture(scope="module")
def gradients(model, tmp_path_factory):
    """{world size: {(method, case): {parameter: gradient}}}, and of two ranks that share each sequence as "sp"."""
    one = run(model, 1, {"sp1": ALL}, tmp_path_factory.mktemp("gradients"))
    two = run(model, 2, {"sp1": ALL, "sp2": TOP_K}, tmp_path_factory.mktemp("gradients"))
    return {1: one["sp1"], 2: two["sp1"], "sp": two["sp2"]}


@pytest.fixture(scope="module")
def in_megatron(model, tmp_path_factory):
    """{engine: {(method, case): {parameter: gradient}}} of two ranks."""
    engines = dict.fromkeys(MEGATRON, IN_MEGATRON) | {PADDED_VOCABULARY: ["cppo+topk_tv"]}
    return run(model, 2, engines, tmp_path_factory.mktemp("megatron"))


def compare(got, want):
    others = ("metrics", "model_output")
    assert any(g.abs().max() > 1e-4 for name, g in want.items() if name not in others)
    for name, gradient in want.items():
        if name not in others:
            torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ALL)
def test_gradient_does_not_depend_on_micro_batches_or_ranks(gradients, method):
    whole = gradients[1][method, "whole"]
    for world in (1, 2):
        compare(gradients[world][method, "micro-batches"], whole)


@pytest.mark.parametrize("method", ALL)
def test_leaving_prompts_out_is_removing_them_by_hand(gradients, method):
    for world in (1, 2):
        compare(gradients[world][method, "left out"], gradients[1][method, "removed by hand"])


@pytest.mark.parametrize("method", [*METHODS, *TOP_K])
def test_metrics_do_not_depend_on_micro_batches_or_ranks(gradients, method):
    from cppo_verl.plugin.step_metrics import pop_shares

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
        *TOP_K,
    ]
    for a, b in itertools.combinations(families, 2):
        one, other = gradients[1][a, "whole"], gradients[1][b, "whole"]
        assert any(not torch.equal(one[n], other[n]) for n in one if n not in ("metrics", "model_output")), (a, b)


@pytest.mark.parametrize("method", TOP_K)
@pytest.mark.parametrize(("world", "case"), [(1, "padded"), (1, "dynamic"), (2, "padded"), (2, "dynamic")])
def test_a_top_k_gradient_does_not_depend_on_the_layout(gradients, method, world, case):
    compare(gradients[world][method, case], gradients[1][method, "whole"])


@pytest.mark.parametrize("method", TOP_K)
def test_divergences_in_the_engine_are_those_of_its_logits(gradients, model, method):
    from transformers import AutoModelForCausalLM

    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    logits = [net(ids[None]).logits[0].detach() for ids in batch()[0]["input_ids"].unbind()]
    output = gradients[1][method, "whole"]["model_output"]
    torch.testing.assert_close(output["logits"][0], torch.cat(logits), rtol=1e-4, atol=1e-5)
    check_divergences(output, method)


@pytest.mark.parametrize("method", TOP_K)
def test_sequence_parallel_ranks_gather_each_tokens_divergence(gradients, method):
    # Without flash-attention each of them attends to its own part only: these logits are not those of one rank.
    check_divergences(gradients["sp"][method, "whole"]["model_output"], method)


@pytest.mark.parametrize("method", IN_MEGATRON)
@pytest.mark.parametrize("engine", MEGATRON)
def test_the_gradient_in_megatron_is_that_in_fsdp2(gradients, in_megatron, engine, method):
    from cppo_verl.plugin.step_metrics import pop_shares

    cases = [case for name, case in in_megatron[engine] if name == method]
    assert len(cases) == (6 if "+" in method else 4)
    for case in cases:
        got, want = in_megatron[engine][method, case], gradients[1][method, case]
        assert got.keys() == want.keys()
        for name in want.keys() - {"metrics", "model_output"}:
            torch.testing.assert_close(got[name], want[name], rtol=1e-6, atol=1e-6)
        shares = pop_shares(dict(want["metrics"]))
        assert pop_shares(dict(got["metrics"])) == pytest.approx(shares, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("method", [method for method in IN_MEGATRON if "+" in method])
@pytest.mark.parametrize("engine", MEGATRON)
def test_divergences_in_megatron_are_those_of_its_logits(gradients, in_megatron, engine, method):
    for case in ("whole", "dynamic", "padded"):
        output = in_megatron[engine][method, case]["model_output"]
        torch.testing.assert_close(output["divergence"], gradients[1][method, case]["model_output"]["divergence"])
    check_divergences(in_megatron[engine][method, "whole"]["model_output"], method)


def test_verls_megatron_engine_counts_padding_in_its_log_probabilities(in_megatron):
    """Why the plug-in refuses a padded vocabulary: pi would not be the policy that mu was."""
    output = in_megatron[PADDED_VOCABULARY]["cppo+topk_tv", "whole"]["model_output"]
    data, _ = batch()
    following = torch.cat([row.roll(-1) for row in data["input_ids"].unbind()]).unsqueeze(-1)
    inside = torch.cat([torch.arange(len(row)) < len(row) - 1 for row in data["input_ids"].unbind()])
    counted = output["logits"][0].log_softmax(-1).gather(-1, following).squeeze(-1)
    torch.testing.assert_close(output["log_probs"][inside], counted[inside], rtol=0, atol=1e-6)
    assert output["logits"][0][:, 32:].abs().max() == 0


def check_divergences(output, method):
    """D_t of the model output against the loops over its full logits."""
    data, log_mu = batch()
    kind = method.rpartition("_")[2]
    lengths = data["input_ids"].offsets().diff().tolist()
    shown = output["logits"][0][: sum(lengths)].split(lengths)
    want = []
    for row, mu, logits in zip(data.unbind(0), log_mu, shown, strict=True):
        first = len(row["prompts"]) - 1
        log_pi = logits[first : first + len(mu)].log_softmax(-1)
        inside = top_k_divergence(log_pi, mu, row["responses"], 5, kind)
        inside[row["response_mask"] == 0] = 0
        want.append(inside)
    assert output["divergence"].max() > 0.1
    torch.testing.assert_close(output["divergence"], torch.cat(want), rtol=1e-4, atol=2e-6)
