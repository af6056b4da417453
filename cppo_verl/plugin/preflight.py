"""What is checked of a run before Ray starts, beyond the loss's own settings.

The shipped methods hand the settings concerned to the loss's config by interpolation, as ``policy_loss.preflight``.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from verl.base_config import BaseConfig

from cppo_verl.plugin.constants import TOP_K_ROLLOUT, TRAINER_MODE_PREFIX, TRAINER_MODES
from cppo_verl.plugin.topk.codec import bytes_per_token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHARED_PROCESS_LAUNCHERS = (
    "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
    "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher",
)
"""hydra launchers that run several jobs of a sweep in one process, where verl starts Ray once."""

TRUST_REGION_KEYS = ("delta", "delta_b", "budget", "partition", "dump")


@dataclass(kw_only=True)
class Preflight(BaseConfig):
    """Settings of the run that decide whether its loss measures what it should.

    D_t and rho_t compare pi with the policy that generated the tokens, so old_log_prob and mu's most likely tokens
    must be the rollout engine's own.

    Raises:
        ValueError: old_log_prob would be another policy's, the policy loss would not be trained, no response would have
            an advantage, or ``trust_region`` has an unknown key.
    """

    use_v1: bool
    trainer_mode: str
    rollout_correction: dict
    rollout: dict
    """Of the run's rollout, what bears on mu."""
    adv_estimator: str
    loss_agg_mode: str
    loss_scale_factor: int | None
    use_kl_loss: bool
    entropy_coeff: float
    shuffle: bool
    strategy: str
    use_fused_kernels: bool
    engine: dict
    """Of the actor's engine, what bears on its logits."""
    distillation: bool
    use_task_rewards: bool
    trust_region: dict

    def __post_init__(self) -> None:
        if problems := violations(rollout_policy_rules(self)):
            raise ValueError(f"old_log_prob would not be the rollout policy's: {problems}")
        if self.distillation and not self.use_task_rewards:
            key = "distillation.distillation_loss.use_task_rewards"
            reason = f"{key}={self.use_task_rewards} trains on the teacher's loss alone; set {key}=true"
            raise ValueError(f"the method's loss would not be trained: {reason}")
        if self.rollout.get("full_determinism") and self.adv_estimator in SPREAD_ESTIMATORS:
            alike = "gives all requests one seed, so that the responses to a prompt are alike and have no advantage"
            raise ValueError(f"nothing would be trained: {DETERMINISM}=True {alike}; set {DETERMINISM}=false")
        for key in self.trust_region.keys() - set(TRUST_REGION_KEYS):
            value = self.trust_region[key]
            raise ValueError(f"trust_region has no key {key!r} (got {key}={value!r}); it has {TRUST_REGION_KEYS}")


class Rule(NamedTuple):
    """Whether a setting of the run is permitted, and what to say where it is not."""

    setting: str
    """Its dotted key in the run's config; with hydra's "++" where the config may lack it."""
    value: Any
    permitted: bool
    reason: str
    """Why the value breaks the run."""
    fix: str
    """The value that mends it, and what else does."""


def violations(rules: list[Rule]) -> str:
    """A sentence for each rule that the run breaks, with the override that mends it; empty where it breaks none."""
    return " | ".join(
        f"{rule.setting.lstrip('+')}={rule.value} {rule.reason}; set {rule.setting}={rule.fix}"
        for rule in rules
        if not rule.permitted
    )


CORRECTION, ROLLOUT, ACTOR = "algorithm.rollout_correction.", "actor_rollout_ref.rollout.", "actor_rollout_ref.actor."
DETERMINISM = ROLLOUT + "full_determinism"
TRUNCATES = "truncates the sampling distribution, so the trainer's log-probabilities describe a different distribution"
TRANSFORMER = ACTOR + "megatron.override_transformer_config."
COUNTED = "gives padding a share of the trainer's log-probabilities, which describe a different distribution then"
SGLANG_ORIGINAL = "SGLANG_RETURN_ORIGINAL_LOGPROB"
CORRECTS = "corrects for the mismatch that the ratio to mu already carries"

MU_KEEPING = {
    "vllm": (
        "all2all_backend allow_deprecated_quantization async_scheduling attention_backend attention_config block_size "
        "calculate_kv_scales compilation_config cp_kv_cache_interleave_size cpu_distributed_timeout_seconds "
        "cpu_offload_gb cpu_offload_params cudagraph_capture_sizes cudagraph_metrics dcp_comm_backend "
        "decode_context_parallel_size disable_cascade_attn disable_custom_all_reduce disable_hybrid_kv_cache_manager "
        "disable_log_stats disable_sliding_window distributed_timeout_seconds download_dir dtype "
        "enable_chunked_prefill enable_dbo enable_eplb enable_expert_parallel enable_flashinfer_autotune "
        "enable_log_requests enable_prefix_caching enable_return_routed_experts enforce_eager eplb_config "
        "expert_placement_strategy gpu_memory_utilization hf_overrides kernel_config kv_cache_dtype "
        "kv_cache_dtype_skip_layers kv_cache_memory_bytes kv_cache_metrics kv_offloading_backend kv_offloading_size "
        "limit_mm_per_prompt linear_backend load_format long_prefill_token_threshold lora_dtype mamba_block_size "
        "mamba_cache_dtype mamba_cache_mode mamba_ssm_cache_dtype max_cpu_loras max_cudagraph_capture_size "
        "max_logprobs max_model_len max_num_batched_tokens max_num_scheduled_tokens max_num_seqs "
        "mm_encoder_attn_backend mm_encoder_tp_mode mm_processor_cache_gb mm_processor_cache_type model_impl "
        "moe_backend num_gpu_blocks_override numa_bind offload_backend offload_group_size offload_num_in_group "
        "offload_params offload_prefetch_step optimization_level performance_mode prefix_caching_hash_algo "
        "quantization quantization_config scheduling_policy seed show_hidden_metrics_for_version skip_mm_profiling "
        "stream_interval swap_space trust_remote_code ubatch_size use_fp64_gumbel watermark weight_transfer_config"
    ),
    "sglang": (
        "attention_backend chunked_prefill_size context_length cuda_graph_bs cuda_graph_max_bs deepep_mode "
        "disable_cuda_graph disable_custom_all_reduce disable_overlap_schedule disable_radix_cache dtype "
        "enable_deterministic_inference enable_dp_attention enable_torch_compile kv_cache_dtype log_level "
        "max_prefill_tokens max_running_requests max_total_tokens mem_fraction_static mm_attention_backend "
        "moe_a2a_backend moe_runner_backend page_size quantization random_seed sampling_backend "
        "schedule_conservativeness schedule_policy trust_remote_code watchdog_timeout"
    ),
}
"""Arguments of a rollout engine that are known to leave the distribution sampled from, or to change it and its recorded
log-probabilities alike, as quantisation does. verl hands all others on too, and they win over its own."""
VLLM_EXECUTORS = ("mp", "ray", "uni")
"""vLLM's own ways to run its workers."""
EXACT_REJECTION = ("standard", "block", "strict", "probabilistic")
"""vLLM's ways of speculative decoding that sample from the target's distribution."""


def rollout_policy_rules(run: Preflight) -> list[Rule]:
    """What makes old_log_prob the log-probability under mu."""
    other_trainer = f"is not one of the plug-in's trainers {', '.join(TRAINER_MODES)}"
    nearest = f"{TRAINER_MODE_PREFIX}{run.trainer_mode}"
    trainer = nearest if nearest in TRAINER_MODES else TRAINER_MODES[0]
    rollout, correction = run.rollout, run.rollout_correction
    temperature, penalty = (rollout[key] for key in ("temperature", "repetition_penalty"))
    padded = run.engine["should_pad_vocab"]
    modes = ("processed_logprobs", *(["raw_logprobs"] if temperature == 1 else []))
    legacy = "is the legacy trainer, which replaces the policy loss in bypass mode"
    dropped = "drops the rollout engine's log-probabilities"
    penalised = "changes the sampling distribution and not the trainer's"

    def corrected(key: str, permitted: Any, reason: str, fix: str) -> Rule:
        return Rule(CORRECTION + key, correction.get(key), correction.get(key) is permitted, reason, fix)

    def sampled(key: str, permitted: bool, reason: str, fix: str) -> Rule:
        return Rule(ROLLOUT + key, rollout[key], permitted, reason, fix)

    return [
        Rule("trainer.use_v1", run.use_v1, run.use_v1, legacy, "true"),
        Rule("trainer.v1.trainer_mode", run.trainer_mode, run.trainer_mode in TRAINER_MODES, other_trainer, trainer),
        corrected("bypass_mode", True, "recomputes old_log_prob with the trainer's weights", "true"),
        corrected("rollout_is", None, CORRECTS, "null"),
        corrected("rollout_rs", None, CORRECTS, "null"),
        sampled("calculate_log_probs", rollout["calculate_log_probs"], dropped, "true"),
        sampled("temperature", temperature > 0, "is greedy", "1"),
        recorded_rule(rollout, modes),
        sampled("top_p", rollout["top_p"] == 1, TRUNCATES, "1"),
        sampled("top_k", rollout["top_k"] in (-1, 0), TRUNCATES, "-1"),
        Rule(f"++{ROLLOUT}repetition_penalty", penalty, penalty == 1, penalised, "1"),
        Rule(TRANSFORMER + "should_pad_vocab", padded, not padded, COUNTED, "null"),
        *engine_rules(rollout, modes),
    ]


def recorded_rule(rollout: Mapping, logprobs_modes: tuple[str, ...]) -> Rule:
    """What makes the rollout engine record log-probabilities at the temperature that it samples at.

    verl hands ``logprobs_mode`` to vLLM alone. SGLang divides the logits by the temperature first, unless its
    environment variable says otherwise (sglang/srt/layers/sampler.py of the 0.5.12 that verl's extra pins;
    tests/integration/test_sglang.py runs it).
    """
    name, temperature = rollout["name"], rollout["temperature"]
    other = f"records another distribution than the one sampled at temperature {temperature}"
    if name in ("vllm", TOP_K_ROLLOUT):
        mode = rollout["logprobs_mode"]
        return Rule(ROLLOUT + "logprobs_mode", mode, mode in logprobs_modes, other, "processed_logprobs")
    if name == "sglang":
        original = os.environ.get(SGLANG_ORIGINAL, "false")
        return Rule(SGLANG_ORIGINAL, original, temperature == 1 or original.lower() in ("0", "false"), other, "false")
    unknown = f"is not known to be the one at which {name} records log-probabilities"
    return Rule(ROLLOUT + "temperature", temperature, temperature == 1, unknown, "1")


def engine_rules(rollout: Mapping, logprobs_modes: tuple[str, ...]) -> Iterator[Rule]:
    """What the rollout engine's own arguments must not change, those that verl makes of other settings included."""
    engine = "vllm" if rollout["name"] == TOP_K_ROLLOUT else rollout["name"]
    unknown = f"is not known to leave what {engine} samples and records alone"
    if engine == "sglang":
        # SGLang verifies drafts greedily where its kernel for sampling is missing.
        drafts = all(rollout.get("drafts", [False]))
        yield Rule("actor_rollout_ref.model.mtp.enable_rollout", drafts, not drafts, unknown, "false")
    for key, value in engine_kwargs(rollout, engine).items():
        setting = f"++{ROLLOUT}engine_kwargs.{engine}.{key}"
        if value is None or key in MU_KEEPING.get(engine, "").split():
            continue  # verl leaves null out
        if engine == "vllm" and key == "logprobs_mode":
            wins = f"wins over rollout.logprobs_mode and must be one of {logprobs_modes}"
            yield Rule(setting, value, value in logprobs_modes, wins, "null")
        elif engine == "vllm" and key == "speculative_config":
            inexact = f"accepts tokens that mu would not; rejection_sample_method must be one of {EXACT_REJECTION}"
            yield Rule(setting, value, samples_exactly(value), inexact, "null")
        elif engine == "vllm" and key == "distributed_executor_backend" and value in VLLM_EXECUTORS:
            # anything else is the path of a class
            ranks = rollout.get("ranks", [1])
            alone = f"starts one worker, where rollout.tensor_model_parallel_size and pipeline's are {ranks}"
            yield Rule(setting, value, value != "uni" or max(ranks) == 1, alone, "mp")
        else:
            yield Rule(setting, value, False, unknown, "null")


def engine_kwargs(rollout: Mapping, engine: str) -> Mapping:
    return (rollout["engine_kwargs"] or {}).get(engine) or {}


def samples_exactly(speculative_config: Mapping | str) -> bool:
    """Whether speculative decoding leaves the distribution alone; its config may be JSON, as on vLLM's command line."""
    try:
        config = json.loads(speculative_config) if isinstance(speculative_config, str) else speculative_config
        return config.get("rejection_sample_method", EXACT_REJECTION[0]) in EXACT_REJECTION
    except (ValueError, AttributeError):
        return False


SPREAD_ESTIMATORS = ("grpo", "grpo_vectorized", "grpo_passk", "rloo", "rloo_vectorized", "opo")
"""verl's advantage estimators that give nothing to a prompt whose responses all have the same reward."""

OWN_SEQUENCE_MEANS = ("sapo", "geo_mean")
"""verl's policy losses that average over sequences whatever ``loss_agg_mode`` says."""
BESIDE_ADVANTAGES = ("clip_cov", "kl_cov", "dro", "geo_mean")
"""verl's policy losses that are not in proportion to the advantages, by which the seq-mean modes are put right."""


def mask_std_0_rules(run: Preflight, loss_mode: str) -> list[Rule]:
    """What ``mask_std_0`` needs for leaving prompts out to be the same as removing them."""
    off = f"or {ACTOR}policy_loss.mask_std_0=false"
    mode, horizon = run.loss_agg_mode, run.loss_scale_factor
    seq_mean, divided = mode.startswith("seq-mean"), mode != "seq-mean-token-sum-norm" or horizon is not None
    estimates = run.adv_estimator in SPREAD_ESTIMATORS
    divides = loss_mode not in (BESIDE_ADVANTAGES if seq_mean else OWN_SEQUENCE_MEANS)
    signal = "gives an advantage to prompts whose responses all have the same reward"
    drawn = "lets the workers draw which rows share a mini-batch, and so a denominator"
    width = f"divides by the width of a micro-batch under {mode}"
    undivided = f"is averaged over the prompts left out too under {mode}"
    tokenless = "fails at a micro-batch of prompts left out alone, whose smallest loss of a token verl asks for"
    return [
        Rule("algorithm.adv_estimator", run.adv_estimator, estimates, signal, f"grpo {off}"),
        Rule(ACTOR + "shuffle", run.shuffle, not run.shuffle, drawn, f"false {off}"),
        Rule(ACTOR + "loss_scale_factor", horizon, divided, width, f"{run.rollout['response_length']} {off}"),
        Rule(ACTOR + "use_kl_loss", run.use_kl_loss, not (seq_mean and run.use_kl_loss), undivided, f"false {off}"),
        Rule(ACTOR + "entropy_coeff", run.entropy_coeff, not (seq_mean and run.entropy_coeff), undivided, f"0 {off}"),
        Rule("distillation.enabled", run.distillation, not run.distillation, tokenless, f"false {off}"),
        Rule(ACTOR + "policy_loss.loss_mode", loss_mode, divides, undivided, f"vanilla {off}"),
    ]


def top_k_rules(run: Preflight, top_k: int) -> list[Rule]:
    """What a divergence on mu's ``top_k`` most likely tokens needs beyond `rollout_policy_rules`."""
    vllm, false, naive, fcfs = (f"{value} {OR_BINARY}" for value in ("vllm", "false", "naive", "fcfs"))
    name, policy, backend = (run.rollout[key] for key in ("name", "scheduling_policy", "checkpoint_backend"))
    disaggregated, most = run.rollout["disaggregation"], engine_kwargs(run.rollout, "vllm").get("max_logprobs", 20)
    enough, returns = most == -1 or most >= top_k, name in ("vllm", TOP_K_ROLLOUT)
    passed = "passes a request from server to server, and mu's most likely tokens not"
    other, lost = "is refused by verl for any rollout but its own", "is lost: verl gives priorities to its own rollout"
    most_key = f"++{ROLLOUT}engine_kwargs.vllm.max_logprobs"
    return [
        Rule(ROLLOUT + "name", name, returns, "cannot return mu's most likely tokens", vllm),
        Rule(most_key, most, enough, f"is below top_k={top_k}", str(top_k)),
        Rule(ROLLOUT + "disaggregation.enabled", disaggregated, not disaggregated, passed, false),
        Rule(ROLLOUT + "checkpoint_engine.backend", backend, backend != "delta_sharded", other, naive),
        Rule(ROLLOUT + "scheduling_policy", policy, policy == "fcfs", lost, fcfs),
        *logits_rules(run),
    ]


OR_BINARY = "or divergence=binary_tv"


def logits_rules(run: Preflight) -> list[Rule]:
    """What the actor's engine needs for D_t to be taken from its logits."""
    fused = run.use_fused_kernels
    fsdp, false, one, null = (f"{value} {OR_BINARY}" for value in ("fsdp2", "false", "1", "null"))
    unread = "is an engine whose logits the top-K divergences do not read"
    refused = "is refused by verl's engine together with its logits hook"
    split = "splits sequences over ranks, in which the top-K divergences do not find their tokens"
    aligned = "pads sequences to lengths at which the top-K divergences do not find their tokens"
    key = ACTOR + ("megatron." if run.strategy == "megatron" else "fsdp_config.")
    needed: dict[str, tuple[Any, str, str]] = {
        "pad_to_length": (False, refused, false),
        "dynamic_context_parallel": (False, refused, false),
        "context_parallel_size": (1, split, one),
        "override_transformer_config.fp8": (None, aligned, null),
    }
    engine = {name: run.engine[name.rpartition(".")[2]] for name in needed}
    return [
        Rule(ACTOR + "strategy", run.strategy, run.strategy in ("fsdp", "fsdp2", "megatron"), unread, fsdp),
        Rule("actor_rollout_ref.model.use_fused_kernels", fused, not fused, "leaves no logits to take D_t from", false),
        *(Rule(key + name, engine[name], engine[name] == value, *text) for name, (value, *text) in needed.items()),
        Rule("distillation.enabled", run.distillation, not run.distillation, "uses verl's only logits hook", false),
    ]


def refuse_pinned(
    loss: BaseConfig, method: str | None, trust_region: Mapping[str, Any], overrides: Sequence[str]
) -> None:
    """Raise ValueError if the command line sets a key of ``trust_region`` that the method pins to another value.

    A config file may set such a key for all methods, as a recipe's scale does: the preset's own value then stands. On
    the command line a key is meant for this run, which must not go on with another value.
    """
    given: set[str] = set()
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        group, _, key = override.key_or_group.partition(".")
        if group == "trust_region" and not override.is_delete():
            given.update([key] if key else cast(dict, override.value()))
    problems = []
    for key in ("delta", "delta_b", "budget", "partition"):
        value = trust_region.get(key)
        if key in given and value != loss.get(key, value):
            way_out = f"{ACTOR}policy_loss.{key}={value}"
            if key == "partition":
                way_out = f"divergence={value}_{loss['kind']}"
            problems.append(
                f"method={method} pins {key}={loss[key]}, so trust_region.{key}={value} would be ignored: "
                f"set {way_out} instead, or use a method that reads trust_region.{key}, such as method=cppo"
            )
    if problems:
        raise ValueError(" | ".join(problems))


def refuse_overridden_variant(overrides: Sequence[str]) -> None:
    """Raise ValueError if the command appends a variant before the method, which would override a part of it."""
    appended = [text.partition("=")[0] for text in overrides if text.startswith(("+variant=", "+method="))]
    if appended == ["+variant", "+method"]:
        raise ValueError("+method=... after +variant=... overrides a part of it: put +variant=... after +method=...")


def refuse_shared_process() -> None:
    """Raise ValueError in a job of a sweep that shares its process with other jobs."""
    if not HydraConfig.initialized():
        return
    hydra = HydraConfig.get()
    if hydra.mode == RunMode.MULTIRUN and hydra.launcher._target_ in SHARED_PROCESS_LAUNCHERS:
        raise ValueError(
            f"{hydra.launcher._target_} runs the jobs of a sweep in one process, where verl starts Ray once: "
            "add hydra/launcher=processes hydra.sweep.dir=FOLDER"
        )


def refuse_uneven_mini_batches(config: DictConfig) -> None:
    """Raise ValueError if the data-parallel ranks cannot share a mini-batch evenly.

    verl's workers ask for it at the first update, after the first generation.
    """
    actor, trainer, n = config.actor_rollout_ref.actor, config.trainer, config.actor_rollout_ref.rollout.n
    gpus, parallel = trainer.nnodes * trainer.n_gpus_per_node, 1
    if actor.strategy == "megatron" and not actor.megatron.get("dynamic_context_parallel"):
        for key in ("tensor_model", "pipeline_model", "context"):
            parallel *= actor.megatron[f"{key}_parallel_size"]
    elif actor.strategy in ("fsdp", "fsdp2"):
        # The first is verl's former place of the second, and wins.
        former, present = (x.get("ulysses_sequence_parallel_size", 1) for x in (actor, actor.fsdp_config))
        parallel = former if former > 1 else present
    else:
        return
    size, uneven = actor.ppo_mini_batch_size * n, gpus % parallel
    if uneven or size % (gpus // parallel):
        of_a_model = f", {parallel} to a model" if parallel > 1 else ""
        raise ValueError(
            f"{ACTOR}ppo_mini_batch_size={actor.ppo_mini_batch_size} x {ROLLOUT}n={n} is {size} responses, which "
            f"{gpus} GPUs (trainer.nnodes={trainer.nnodes} trainer.n_gpus_per_node={trainer.n_gpus_per_node}"
            f"{of_a_model}) cannot share evenly: take another number of nodes, or a mini-batch that they divide"
        )


def captured_bytes(config: DictConfig) -> str:
    """What the transport of mu's most likely tokens costs, for a run with a top-K divergence."""
    top_k = config.actor_rollout_ref.actor.policy_loss.top_k
    responses = config.data.train_batch_size * config.actor_rollout_ref.rollout.n
    per_token = bytes_per_token(top_k)
    most = responses * config.data.max_response_length * per_token
    return (
        f"mu's {top_k} most likely tokens: {per_token} bytes a response token, at most {most / 1e6:,.1f} MB a step of "
        f"{responses} responses"
    )


def local_files(config: DictConfig) -> list[str]:
    """The run's model and data files that are paths of the machine itself, as "key=path".

    A path without a leading "/", "." or "~" may be a name on the hub where it is the model's, or for a data set class
    of the user's own; one with "://" is remote. Those who read them find these.
    """
    own_class = OmegaConf.select(config, "data.custom_cls.path") is not None
    found = []
    for key in ("actor_rollout_ref.model.path", "data.train_files", "data.val_files"):
        paths = OmegaConf.select(config, key)
        for path in [paths] if isinstance(paths, str) else paths or []:
            of_a_file = key.startswith("data.") and not own_class and "://" not in path
            if of_a_file or path.startswith(("/", "./", "../", "~")):
                found.append(f"{key}={path}")
    return found


def lacks_qwens_end_of_turn(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether a model that config.json calls qwen2 has no <|im_end|>. verl 0.9.1's agent loops ask a qwen2 for it."""
    from transformers import PreTrainedConfig

    about, _ = PreTrainedConfig.get_config_dict(tokenizer.name_or_path)
    return about.get("model_type") == "qwen2" and "<|im_end|>" not in tokenizer.get_vocab()


def missing_files(config: DictConfig) -> list[str]:
    """Those of `local_files` that are not on this machine."""
    return [x for x in local_files(config) if not os.path.exists(os.path.expanduser(x.partition("=")[2]))]
