"""One override turns a GRPO command into a CPPO command, and what breaks it stops before Ray starts."""

import copy
import pickle
import re
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml
from commands import GRPO, start_up
from hydra.errors import ConfigCompositionException, InstantiationException
from omegaconf import OmegaConf
from verl.trainer.distillation.losses import compute_distillation_loss_range
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.trainer.ppo.v1 import get_trainer_cls
from verl.utils.config import omega_conf_to_dataclass

from cppo_verl.plugin.config import CPPOLossConfig
from cppo_verl.plugin.losses import cppo as cppo_rule
from cppo_verl.plugin.preflight import MU_KEEPING

CONFIG = Path(__file__).parents[3] / "cppo_verl" / "config"
RULE = "actor_rollout_ref.actor.policy_loss."


@pytest.fixture(scope="module")
def cppo(compose):
    """The CPPO command's config with some dotted keys changed or added."""
    config = compose(*GRPO, "+method=cppo")
    OmegaConf.set_struct(config, False)
    kept = pickle.dumps(config)  # loaded in a tenth of the time that OmegaConf copies it in

    def changed_by(*overrides):
        config = pickle.loads(kept)
        config.merge_with_dotlist(list(overrides))
        return config

    return changed_by


@pytest.fixture(scope="module")
def top_k(compose):
    return compose(*GRPO, "+method=cppo", "divergence=topk_tv")


def changed(before, after, path=""):
    """Dotted keys whose value differs."""
    keys = set()
    for key in before.keys() | after.keys():
        a, b = (x._get_node(key) if key in x else None for x in (before, after))
        if OmegaConf.is_dict(a) and OmegaConf.is_dict(b):
            keys |= changed(a, b, f"{path}{key}.")
        elif a != b:
            keys.add(f"{path}{key}")
    return keys


def test_one_override_makes_a_grpo_command_a_cppo_command(compose):
    before, after = compose(*GRPO), compose(*GRPO, "+method=cppo")
    start_up(before)
    start_up(after)
    rule = omega_conf_to_dataclass(after.actor_rollout_ref.actor).policy_loss
    assert isinstance(rule, CPPOLossConfig)
    assert get_policy_loss_fn(rule.loss_mode).args == (cppo_rule, CPPOLossConfig)
    assert get_trainer_cls(after.trainer.v1.trainer_mode).__mro__[2] is get_trainer_cls(before.trainer.v1.trainer_mode)
    assert changed(before, after) == {
        "algorithm.rollout_correction.bypass_mode",
        "trainer.v1.trainer_mode",
        "trainer.stall_seconds",
        "trainer.stop_seconds",
        "trust_region",
        *(RULE + key for key in ("_target_", "loss_mode", "mask_std_0", "preflight", "delta", "delta_b", "budget")),
        *(RULE + key for key in ("budget_clamp", "w_min", "weights", "divergence", "gate", "tau")),
        *(RULE + key for key in ("top_k", "ratio_cap")),
    }


@pytest.mark.parametrize("method", ["grpo", "minpro"])
def test_a_method_without_a_divergence_refuses_one(compose, method):
    with pytest.raises(ConfigCompositionException, match="Could not override 'divergence'"):
        compose(*GRPO, f"+method={method}", "divergence=topk_tv")


@pytest.mark.parametrize(
    ("overrides", "way_out"),
    [
        (["actor_rollout_ref.rollout.name=sglang"], "actor_rollout_ref.rollout.name=vllm"),
        (["actor_rollout_ref.model.use_fused_kernels=true"], "actor_rollout_ref.model.use_fused_kernels=false"),
        (
            ["actor_rollout_ref.actor.fsdp_config.pad_to_length=true"],
            "actor_rollout_ref.actor.fsdp_config.pad_to_length=false",
        ),
        (["distillation.enabled=true", RULE + "mask_std_0=false"], "distillation.enabled=false"),
        (["actor_rollout_ref.actor.strategy=veomni"], "actor_rollout_ref.actor.strategy=fsdp2"),
        ([RULE + "top_k=50"], "++actor_rollout_ref.rollout.engine_kwargs.vllm.max_logprobs=50"),
        (
            ["actor_rollout_ref.rollout.disaggregation.enabled=true"],
            "actor_rollout_ref.rollout.disaggregation.enabled=false",
        ),
        (
            ["actor_rollout_ref.rollout.checkpoint_engine.backend=delta_sharded"],
            "actor_rollout_ref.rollout.checkpoint_engine.backend=naive",
        ),
        (["actor_rollout_ref.rollout.scheduling_policy=priority"], "actor_rollout_ref.rollout.scheduling_policy=fcfs"),
        (
            ["+actor_rollout_ref.rollout.engine_kwargs.vllm.max_logprobs=5"],
            "++actor_rollout_ref.rollout.engine_kwargs.vllm.max_logprobs=20",
        ),
    ],
)
def test_what_keeps_mus_likeliest_tokens_away_is_refused_with_the_override_that_mends_it(top_k, overrides, way_out):
    config = copy.deepcopy(top_k)
    setting = re.escape(way_out.lstrip("+").split("=")[0])

    def change(*dotlist):
        for key, value in (item.lstrip("+").split("=") for item in dotlist):
            OmegaConf.update(config, key, yaml.safe_load(value), force_add=True)
        return config.actor_rollout_ref.actor.policy_loss

    with pytest.raises(InstantiationException, match=rf"{setting}=.*; set {re.escape(way_out)}"):
        omega_conf_to_dataclass(change(*overrides))
    omega_conf_to_dataclass(change(way_out))


MEGATRON = "actor_rollout_ref.actor.megatron."


@pytest.fixture(scope="module")
def megatron(compose):
    return lambda *overrides: compose("model_engine=megatron", *GRPO, "+method=cppo", *overrides)


@pytest.mark.parametrize("divergence", ["binary_tv", "topk_tv"])
def test_one_override_turns_a_grpo_command_for_megatron_into_cppo(megatron, divergence):
    sizes = {"tensor_model": 4, "pipeline_model": 2, "expert_model": 8, "expert_tensor": 1}
    parallel = [f"{MEGATRON}{name}_parallel_size={size}" for name, size in sizes.items()]
    config = megatron(f"divergence={divergence}", *parallel)
    start_up(config)
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    assert (actor.strategy, actor.policy_loss.divergence) == ("megatron", divergence)
    assert get_trainer_cls(config.trainer.v1.trainer_mode).__name__ == "TrustRegionTrainerSync"


@pytest.mark.parametrize(
    ("setting", "value", "reason", "value_that_mends_it"),
    [
        ("context_parallel_size", 2, "splits sequences over ranks", 1),
        ("dynamic_context_parallel", True, "is refused by verl's engine", "false"),
        ("pad_to_length", True, "is refused by verl's engine", "false"),
        ("override_transformer_config.fp8", "hybrid", "pads sequences to lengths", "null"),
    ],
)
def test_where_megatron_lays_tokens_out_otherwise_the_top_k_divergences_are_refused(
    megatron, setting, value, reason, value_that_mends_it
):
    further = {"dynamic_context_parallel": [f"{MEGATRON}max_seqlen_per_dp_cp_rank=4096"]}.get(setting, [])
    override = f"++{MEGATRON}{setting}={value}"
    start_up(megatron(override, *further))
    mended = f"set {MEGATRON}{setting}={value_that_mends_it} or divergence=binary_tv"
    with pytest.raises(InstantiationException, match=rf"{MEGATRON}{setting}={value} {reason}.*; {mended}"):
        start_up(megatron(override, *further, "divergence=topk_tv"))


@pytest.mark.parametrize("divergence", ["binary_tv", "topk_tv"])
def test_a_padded_vocabulary_is_refused(megatron, divergence):
    setting = f"{MEGATRON}override_transformer_config.should_pad_vocab"
    with pytest.raises(InstantiationException, match=f"{setting}=True gives padding a share.*; set {setting}=null"):
        start_up(megatron(f"+{setting}=true", f"divergence={divergence}"))


def test_the_binary_divergences_ask_for_none_of_it(cppo):
    start_up(cppo("actor_rollout_ref.rollout.name=sglang", "actor_rollout_ref.model.use_fused_kernels=true"))


def test_no_shipped_group_shadows_one_of_verls():
    import verl.trainer

    verls = {p.name for p in (Path(verl.trainer.__file__).parent / "config").iterdir()}
    assert not {p.name for p in CONFIG.iterdir() if p.is_dir()} & verls


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("delta=0", r"delta=0 is not permitted: a number in \(0, 1\]"),
        ("delta=1.5", r"delta=1.5 is not permitted: a number in \(0, 1\]"),
        ("delta=abc", r"delta='abc' is not permitted: a number in \(0, 1\]"),
        ("delta=.NaN", r"delta=nan is not permitted"),
        ("delta_b=-0.02", r"delta_b=-0.02 is not permitted: a number in \(0, 1\]"),
        ("w_min=0", r"w_min=0 is not permitted: a number in \(0, 1\]"),
        ("w_min=1.01", r"w_min=1.01 is not permitted: a number in \(0, 1\]"),
        ("budget=adaptiv", r"budget='adaptiv' is not permitted: one of \('adaptive', 'fixed', 'none'\)"),
        ("gate=sharp", r"gate='sharp' is not permitted: one of \('hard', 'soft', 'sapo', 'penalty'\)"),
        ("divergence=top_k_tv", r"divergence='top_k_tv' is not permitted: one of \('binary_tv', 'binary_kl', 'topk_"),
        ("top_k=0", r"top_k=0 is not permitted: an integer >= 1"),
        ("top_k=2.5", r"top_k=2.5 is not permitted: an integer >= 1"),
        ("mask_std_0=maybe", r"mask_std_0='maybe' is not permitted: true or false"),
        ("horizon=2.5", r"horizon=2.5 is not permitted: an integer >= 1, or null"),
        ("horizon=0", r"horizon=0 is not permitted: an integer >= 1, or null"),
        ("weights=random", r"weights='random' is not permitted: one of \('linear', 'shuffled'\)"),
        ("budget_clamp=0.5", r"budget_clamp=0.5 is not permitted: a number >= 1"),
        ("ratio_cap=0.5", r"ratio_cap=0.5 is not permitted: a number >= 1, or null"),
    ],
)
def test_impossible_values_are_refused_with_the_permitted_range(cppo, override, message):
    with pytest.raises(InstantiationException, match=message):
        start_up(cppo(RULE + override))


def test_an_infinite_prefix_budget_which_would_mask_what_follows_tool_output_is_refused_with_the_way_to_none(cppo):
    infinite = cppo(RULE + "divergence=binary_kl", "trust_region.delta_b=.inf")
    with pytest.raises(InstantiationException, match="delta_b=inf is not permitted: a finite number; budget=none"):
        start_up(infinite)


@pytest.mark.parametrize("method", ["cppo", "grpo", "minpro"])
def test_every_method_dumps_tokens_by_one_override_and_none_without(compose, method):
    overrides = [*GRPO, f"+method={method}", "trainer.default_local_dir=/run/checkpoints"]
    dump = omega_conf_to_dataclass(compose(*overrides).actor_rollout_ref.actor.policy_loss).dump
    assert dump.every == 0
    config = compose(*overrides, "trust_region.dump.every=10")
    start_up(config)
    dump = omega_conf_to_dataclass(config.actor_rollout_ref.actor.policy_loss).dump
    assert (dump.every, dump.responses, dump.megabytes) == (10, 32, 256)
    assert dump.folder == "/run/checkpoints/tokens"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("every=-1", r"every=-1 is not permitted: an integer >= 0"),
        ("every=2.5", r"every=2.5 is not permitted: an integer >= 0"),
        ("every=true", r"every=True is not permitted: an integer >= 0"),
        ("responses=0", r"responses=0 is not permitted: an integer >= 1"),
        ("megabytes=0", r"megabytes=0 is not permitted: a number > 0"),
        ("folder=null", r"folder=None is not permitted: a path"),
    ],
)
def test_impossible_dumps_are_refused(cppo, override, message):
    with pytest.raises(InstantiationException, match=r"trust_region\.dump\." + message):
        start_up(cppo("trust_region.dump." + override))


def test_a_dump_of_a_distilling_run_is_refused(cppo):
    config = cppo("trust_region.dump.every=10", "distillation.enabled=true", RULE + "mask_std_0=false")
    with pytest.raises(InstantiationException, match=r"dump\.every=10 is not permitted: 0 with distillation\.enabled"):
        omega_conf_to_dataclass(config.actor_rollout_ref.actor.policy_loss)


def test_a_dump_of_ranks_that_share_rows_out_anew_for_each_micro_batch_is_refused(compose):
    dynamic = "actor_rollout_ref.actor.megatron.dynamic_context_parallel=true"
    config = compose("model_engine=megatron", *GRPO, "+method=cppo", dynamic)
    omega_conf_to_dataclass(config.actor_rollout_ref.actor.policy_loss)
    config.trust_region.dump.every = 10
    with pytest.raises(InstantiationException, match=rf"every=10 is not permitted: 0 with {re.escape(dynamic)}"):
        omega_conf_to_dataclass(config.actor_rollout_ref.actor.policy_loss)


@pytest.mark.parametrize(
    ("mode", "loss_mode", "other"), [("token-mean", "sapo", "kl_cov"), ("seq-mean-token-sum", "kl_cov", "sapo")]
)
def test_a_loss_of_verls_that_would_average_over_the_prompts_left_out_is_refused(compose, mode, loss_mode, other):
    average = ["actor_rollout_ref.actor.use_kl_loss=false", f"actor_rollout_ref.actor.loss_agg_mode={mode}"]
    config = compose(*GRPO, "+method=grpo", *average, f"{RULE}loss_mode={loss_mode}")
    with pytest.raises(InstantiationException, match=rf"loss_mode={loss_mode} is averaged over .* left out .*{mode}"):
        start_up(config)
    start_up(compose(*GRPO, "+method=grpo", *average, f"{RULE}loss_mode={other}"))
    start_up(compose(*GRPO, "+method=grpo", *average, f"{RULE}loss_mode={loss_mode}", f"{RULE}mask_std_0=false"))


def test_distillation_with_mask_std_0_is_refused_as_verls_fails_at_a_micro_batch_without_a_token(cppo):
    with pytest.raises(RuntimeError, match=r"min\(\)"):
        compute_distillation_loss_range(torch.zeros(1, 3), torch.zeros(1, 3))
    rule = cppo("distillation.enabled=true").actor_rollout_ref.actor.policy_loss
    with pytest.raises(InstantiationException, match=r"distillation\.enabled=True fails at .*mask_std_0=false"):
        omega_conf_to_dataclass(rule)


def test_impossible_combinations_are_refused_by_name(compose, cppo):
    with pytest.raises(InstantiationException, match=r"no key 'gate' \(got gate='soft'\)"):
        start_up(compose(*GRPO, "+method=trm_max", "+" + RULE + "gate=soft"))
    with pytest.raises(InstantiationException, match="delta=None is not permitted: a number where delta_avg is null"):
        start_up(compose(*GRPO, "+method=trm_max", RULE + "delta=null"))
    with pytest.raises(InstantiationException, match="horizon=8 is not permitted: null with weights=shuffled"):
        start_up(cppo(RULE + "horizon=8", RULE + "weights=shuffled"))


def test_unknown_keys_are_refused(compose):
    with pytest.raises(ConfigCompositionException, match=r"Could not override .*policy_loss\.detla"):
        compose(*GRPO, "+method=cppo", RULE + "detla=0.1")
    with pytest.raises(InstantiationException, match=r"no key 'detla' \(got detla=0.1\); it has .*'delta', 'delta_b'"):
        start_up(compose(*GRPO, "+method=cppo", "+" + RULE + "detla=0.1"))


def test_an_unknown_key_of_the_trust_region_is_refused(compose):
    with pytest.raises(InstantiationException, match=r"trust_region has no key 'detla' \(got detla=0\.1\)"):
        start_up(compose(*GRPO, "+method=cppo", "+trust_region.detla=0.1"))


@pytest.mark.parametrize(
    ("method", "mode"), [("cppo", "vanilla"), ("trm_max", "cppo"), ("grpo", "cppo"), ("pnpo", "trm")]
)
def test_a_loss_mode_that_another_method_needs_is_refused(compose, method, mode):
    with pytest.raises(InstantiationException, match=rf"loss_mode='{mode}' is not permitted: the method sets it"):
        start_up(compose(*GRPO, f"+method={method}", f"{RULE}loss_mode={mode}"))


def test_verls_own_loss_modes_take_the_methods_that_have_no_rule_of_the_plug_ins(compose):
    start_up(compose(*GRPO, "+method=grpo", RULE + "loss_mode=gspo"))


@pytest.mark.parametrize(
    ("override", "way_out"),
    [
        ("trainer.use_v1=false", "trainer.use_v1=true"),
        ("trainer.v1.trainer_mode=sync", "trainer.v1.trainer_mode=cppo_sync"),
        ("trainer.v1.trainer_mode=colocate_async", "trainer.v1.trainer_mode=cppo_colocate_async"),
        ("trainer.v1.trainer_mode=other", "trainer.v1.trainer_mode=cppo_sync"),
        ("algorithm.rollout_correction.bypass_mode=false", "algorithm.rollout_correction.bypass_mode=true"),
        ("algorithm.rollout_correction.rollout_is=token", "algorithm.rollout_correction.rollout_is=null"),
        ("algorithm.rollout_correction.rollout_rs=token_k1", "algorithm.rollout_correction.rollout_rs=null"),
        ("actor_rollout_ref.rollout.calculate_log_probs=false", "actor_rollout_ref.rollout.calculate_log_probs=true"),
        ("actor_rollout_ref.rollout.temperature=0", "actor_rollout_ref.rollout.temperature=1"),
        ("actor_rollout_ref.rollout.top_p=0.95", "actor_rollout_ref.rollout.top_p=1"),
        ("actor_rollout_ref.rollout.top_k=20", "actor_rollout_ref.rollout.top_k=-1"),
        (
            "actor_rollout_ref.rollout.logprobs_mode=raw_logits",
            "actor_rollout_ref.rollout.logprobs_mode=processed_logprobs",
        ),
    ],
)
def test_a_wrong_mu_is_refused_with_the_override_that_mends_it(cppo, override, way_out):
    setting = re.escape(override.split("=")[0])
    with pytest.raises(InstantiationException, match=rf"{setting}=.*; set {re.escape(way_out)}"):
        start_up(cppo(override))
    start_up(cppo(override, way_out))


def test_a_temperature_that_both_sides_apply_is_right_and_one_that_mu_lacks_is_refused(cppo):
    hot = "actor_rollout_ref.rollout.temperature=0.7"
    raw = "actor_rollout_ref.rollout.logprobs_mode=raw_logprobs"
    start_up(cppo(hot))
    start_up(cppo(raw))
    with pytest.raises(InstantiationException, match=r"temperature 0.7; set .*processed_logprobs"):
        start_up(cppo(hot, raw))


def test_a_run_without_a_method_is_verls_own_business(compose):
    start_up(compose(*GRPO, "trainer.use_v1=false", "actor_rollout_ref.actor.policy_loss.loss_mode=gspo"))


ENGINE = "actor_rollout_ref.rollout.engine_kwargs."


@pytest.mark.parametrize(
    "override",
    [
        "vllm.logprobs_mode=raw_logits",
        "vllm.logprobs-mode=processed_logprobs",
        "vllm.logits_processors=[mine.Processor]",
        "vllm.override_generation_config={repetition_penalty: 1.1}",
        "vllm.generation_config=folder",
        "vllm.reasoning_config={}",
        "vllm.worker_cls=mine.Worker",
        "vllm.distributed_executor_backend=mine.Executor",
        "vllm.scheduler_cls=mine.Scheduler",
        "vllm.diffusion_config={}",
        "vllm.additional_config={a: 1}",
        "vllm.speculative_config={method: ngram,rejection_sample_method: synthetic}",
        'vllm.speculative_config=\'{"rejection_sample_method": "synthetic"}\'',
        "vllm.speculative_config=ngram",
        "vllm.no_such_argument=1",
    ],
)
def test_an_engine_argument_that_may_change_mu_is_refused_by_name_and_null_mends_it(cppo, override):
    key = override.partition("=")[0]
    config = cppo(ENGINE + override)
    with pytest.raises(InstantiationException, match=rf"{re.escape(key)}=.*; set \+\+{re.escape(ENGINE + key)}=null"):
        start_up(config)
    start_up(cppo(ENGINE + override, f"{ENGINE}{key}=null"))


@pytest.mark.parametrize(
    ("overrides", "way_out"),
    [
        ([ENGINE + "sglang.rl_on_policy_target=fsdp"], rf"\+\+{ENGINE}sglang\.rl_on_policy_target=null"),
        ([ENGINE + "sglang.preferred_sampling_params={min_p: 0.1}"], r"\S+sglang\.preferred_sampling_params=null"),
        ([ENGINE + "sglang.speculative_algorithm=EAGLE"], r"\S+sglang\.speculative_algorithm=null"),
        ([f"actor_rollout_ref.model.mtp.{key}=true" for key in ("enable", "enable_rollout")], r"\S+rollout=false"),
    ],
)
def test_what_sglang_may_sample_or_record_otherwise_is_refused_and_vllm_does_not_mind(cppo, overrides, way_out):
    with pytest.raises(InstantiationException, match=f"leave what sglang samples and records alone; set {way_out}"):
        start_up(cppo("actor_rollout_ref.rollout.name=sglang", *overrides))
    start_up(cppo("actor_rollout_ref.rollout.name=sglang", ENGINE + "sglang.attention_backend=fa3"))
    start_up(cppo(*overrides))


def test_a_rollout_of_several_ranks_in_one_process_is_refused_as_it_would_wait_for_ever(cppo):
    uni, ranks = (
        f"{ENGINE}vllm.distributed_executor_backend=uni",
        "actor_rollout_ref.rollout.tensor_model_parallel_size",
    )
    with pytest.raises(InstantiationException, match=r"backend=uni starts one worker, .* are \[2, 1\]; set \S+=mp"):
        start_up(cppo(uni, f"{ranks}=2"))
    start_up(cppo(uni, f"{ranks}=1"))


@pytest.mark.parametrize(
    "override",
    [
        "vllm.logprobs_mode=raw_logprobs",  # at temperature 1
        "vllm.logprobs_mode=processed_logprobs",
        "vllm.distributed_executor_backend=mp",
        "vllm.speculative_config={method: ngram,num_speculative_tokens: 3}",
        'vllm.speculative_config=\'{"method": "ngram", "rejection_sample_method": "block"}\'',
        "vllm.quantization=fp8",
        "vllm.kv_cache_dtype=fp8",
        "vllm.attention_backend=FLASHINFER",
        "sglang.logits_processors=[mine.Processor]",  # of an engine that does not run
    ],
)
def test_an_engine_argument_that_keeps_mu_is_permitted(cppo, override):
    start_up(cppo(ENGINE + override))


def test_what_an_engine_records_at_another_temperature_is_known_or_refused(cppo, monkeypatch):
    """verl hands logprobs_mode to vLLM alone, so that it verifies nothing of the other engines."""
    hot, raw = "actor_rollout_ref.rollout.temperature=0.7", "actor_rollout_ref.rollout.logprobs_mode=raw_logprobs"
    name = "actor_rollout_ref.rollout.name="
    start_up(cppo(name + "sglang", hot, raw))
    monkeypatch.setenv("SGLANG_RETURN_ORIGINAL_LOGPROB", "1")
    start_up(cppo(name + "sglang", raw))
    with pytest.raises(InstantiationException, match="=1 records another .* set SGLANG_RETURN_ORIGINAL_LOGPROB=false"):
        start_up(cppo(name + "sglang", hot))
    start_up(cppo(name + "trtllm", raw))
    with pytest.raises(InstantiationException, match=r"temperature=0\.7 is not known to be the one at which trtllm"):
        start_up(cppo(name + "trtllm", hot))


def test_raw_log_probabilities_by_an_engine_argument_are_refused_at_another_temperature(cppo):
    hot = ["actor_rollout_ref.rollout.temperature=0.7", f"{ENGINE}vllm.logprobs_mode=raw_logprobs"]
    with pytest.raises(InstantiationException, match=r"wins over rollout\.logprobs_mode"):
        start_up(cppo(*hot))


def test_every_permitted_argument_of_vllm_is_one():
    from vllm.entrypoints.openai.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    known = {action.dest for action in make_arg_parser(FlexibleArgumentParser())._actions}
    # Of vLLM 0.24, which runs on GPUs, or of 0.28 alone; and of older ones.
    other = "calculate_kv_scales" if version("vllm").startswith("0.28.") else "max_num_scheduled_tokens"
    assert set(MU_KEEPING["vllm"].split()) - known <= {other, "swap_space"}


def test_a_penalty_of_the_rollout_is_refused_and_whatever_validation_samples_is_not(cppo):
    key = "actor_rollout_ref.rollout.repetition_penalty"
    with pytest.raises(InstantiationException, match=rf"repetition_penalty=1\.1 .*; set \+\+{re.escape(key)}=1"):
        start_up(cppo(f"{key}=1.1"))
    greedy = "actor_rollout_ref.rollout.val_kwargs={temperature: 0,top_k: 5,top_p: 0.9}"
    start_up(cppo(f"{key}=1.0", greedy, "actor_rollout_ref.rollout.ignore_eos=true"))


def test_a_key_that_verls_rollout_does_not_have_is_refused_before_ray(cppo):
    with pytest.raises(InstantiationException, match="unexpected keyword argument 'min_p'"):
        start_up(cppo("actor_rollout_ref.rollout.min_p=0.1"))


@pytest.mark.parametrize(
    ("overrides", "way_out"),
    [
        (["actor_rollout_ref.actor.shuffle=true"], "actor_rollout_ref.actor.shuffle=false"),
        (["algorithm.adv_estimator=reinforce_plus_plus"], "algorithm.adv_estimator=grpo"),
        (["algorithm.adv_estimator=gdpo"], "algorithm.adv_estimator=grpo"),
        (
            [
                "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-sum-norm",
                "actor_rollout_ref.actor.use_kl_loss=false",
            ],
            "actor_rollout_ref.actor.loss_scale_factor=1024",
        ),
        (
            ["actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean"],
            "actor_rollout_ref.actor.use_kl_loss=false",
        ),
    ],
)
def test_mask_std_0_is_refused_where_leaving_out_is_not_removing(cppo, overrides, way_out):
    with pytest.raises(
        InstantiationException, match=rf"mask_std_0=True is not permitted: .*; set {re.escape(way_out)}"
    ):
        start_up(cppo(*overrides))
    start_up(cppo(*overrides, way_out))
    start_up(cppo(*overrides, f"{RULE}mask_std_0=false"))
