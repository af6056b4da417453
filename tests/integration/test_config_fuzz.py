"""Random overrides on the quickstart's command: each passes the start-up checks truly, or is refused with a way out.

An oracle of its own reads the composed config and decides whether mu and the mask survive; it shares no rule with
`cppo_verl.plugin.preflight`. ``make test-fuzz`` tries a thousand; FUZZ_CASES and FUZZ_SEED choose how many and which.
"""

import math
import os
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from commands import start_up
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf, open_dict
from omegaconf.errors import InterpolationKeyError

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"
CASES, SEED = int(os.environ.get("FUZZ_CASES", 50)), int(os.environ.get("FUZZ_SEED", 1))
BATCHES = 10
COMMAND = ["actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=64"]  # verl wants it with use_kl_loss

ACTOR, ROLLOUT = "actor_rollout_ref.actor.", "actor_rollout_ref.rollout."
RULE, ENGINE = ACTOR + "policy_loss", ROLLOUT + "engine_kwargs.vllm."
CONFIGS = "cppo_verl.plugin.config."
MASKED = ("CPPOLossConfig", "cppo")
METHODS = {
    "cppo": MASKED,
    "dppo": MASKED,
    "cppo_kl": MASKED,
    "cppo_fixed": MASKED,
    "trm_max": ("TRMLossConfig", "trm"),
    "minpro": ("PrefixRatioLossConfig", "prefix_ratio"),
    "grpo": ("MethodConfig", "vanilla"),
}
"""Class and loss mode of each method."""

VALUES = {
    f"{RULE}.loss_mode": ["cppo", "vanilla", "dppo_tv", "trm", "prefix_ratio"],
    f"{RULE}._target_": [CONFIGS + "MethodConfig", CONFIGS + "TRMLossConfig", "verl.workers.config.PolicyLossConfig"],
    f"{RULE}.mask_std_0": ["true", "false", "maybe"],
    f"{RULE}.preflight": ["null", "{use_v1:true}", "{rollout:{top_p:1.0}}"],
    f"{RULE}.preflight.use_v1": ["true"],
    f"{RULE}.preflight.rollout.temperature": ["1.0", "0.3"],
    RULE: ["{loss_mode:vanilla}", "{mask_std_0:false}", "null"],
    f"{RULE}._recursive_": ["false", "true"],
    "trust_region.delta": ["0.1", "0", "1.5", "abc"],
    "trust_region.delta_b": ["0.01", "-1"],
    "trust_region.budget": ["fixed", "none", "adaptiv"],
    "trust_region.partition": ["binary", "topk"],
    "trust_region.detla": ["0.1"],
    "trust_region.dump.every": ["0", "3", "-1"],
    "trainer.use_v1": ["true", "false"],
    "trainer.v1.trainer_mode": ["cppo_sync", "cppo_colocate_async", "sync", "other"],
    "trainer.total_training_steps": ["5"],
    "algorithm.adv_estimator": ["grpo", "rloo", "opo", "reinforce_plus_plus_baseline", "gdpo"],
    "algorithm.norm_adv_by_std_in_grpo": ["false"],
    "algorithm.rollout_correction.bypass_mode": ["true", "false"],
    "algorithm.rollout_correction.rollout_is": ["null", "token", "sequence"],
    "algorithm.rollout_correction.rollout_rs": ["null", "seq_mean_k1"],
    "algorithm.rollout_correction": ["{bypass_mode:false}", "{rollout_is:token}"],
    "distillation.enabled": ["false"],
    f"{ACTOR}shuffle": ["true", "false"],
    f"{ACTOR}ppo_epochs": ["2"],
    f"{ACTOR}loss_agg_mode": ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm", "token-sum"],
    f"{ACTOR}loss_scale_factor": ["32", "null"],
    f"{ACTOR}use_kl_loss": ["true", "false"],
    f"{ACTOR}entropy_coeff": ["0", "0.01"],
    "actor_rollout_ref.model.use_fused_kernels": ["true", "false"],
    f"{ROLLOUT}calculate_log_probs": ["true", "false"],
    f"{ROLLOUT}logprobs_mode": ["processed_logprobs", "raw_logprobs", "raw_logits"],
    f"{ROLLOUT}temperature": ["1.0", "0.7", "0"],
    f"{ROLLOUT}top_p": ["1.0", "0.95"],
    f"{ROLLOUT}top_k": ["-1", "0", "20"],
    f"{ROLLOUT}repetition_penalty": ["1.0", "1.1"],
    f"{ROLLOUT}min_p": ["0.1"],
    f"{ROLLOUT}ignore_eos": ["true"],
    f"{ROLLOUT}dtype": ["bfloat16"],
    f"{ROLLOUT}scheduling_policy": ["fcfs", "priority"],
    f"{ROLLOUT}pipeline_model_parallel_size": ["1", "2"],
    f"{ROLLOUT}val_kwargs.top_p": ["0.9"],
    f"{ROLLOUT}checkpoint_engine.backend": ["naive", "delta_sharded"],
    ENGINE + "logprobs_mode": ["processed_logprobs", "raw_logprobs", "processed_logits", "null"],
    ENGINE + "logits_processors": ["[mine.Processor]", "null"],
    ENGINE + "override_generation_config": ["{repetition_penalty:1.2}"],
    ENGINE + "speculative_config": [
        "{method:ngram}",
        "{rejection_sample_method:synthetic}",
        '\'{"rejection_sample_method":"synthetic"}\'',
    ],
    ENGINE + "max_logprobs": ["5", "50"],
    ENGINE + "quantization": ["fp8"],
    ENGINE + "max-model-len": ["64"],
}
"""Overrides to draw from; hydra's prefix is drawn too."""
CHANGES_MU = ("logits_processors", "override_generation_config", "max-model-len")
PREFIXES = [""] * 4 + ["+", "++", "++", "~"]


def draw(rng):
    """A method, perhaps a divergence, and one to four overrides in any of hydra's spellings."""
    method = rng.choice(list(METHODS))
    overrides = [f"method={method}"]
    if method not in ("grpo", "minpro") and rng.random() < 0.4:
        overrides.append(f"divergence={rng.choice(['topk_tv', 'topk_kl', 'binary_kl', 'kl', 'tv'])}")
    for key in rng.sample(list(VALUES), rng.randint(1, 4)):
        prefix = rng.choice(PREFIXES)
        overrides.append(f"~{key}" if prefix == "~" else f"{prefix}{key}={rng.choice(VALUES[key])}")
    rng.shuffle(overrides)
    return method, overrides


def breaks(config, method, overrides):
    """Last names of the keys by which the run would not train with its method's loss against the sampler's policy."""
    raw = OmegaConf.to_container(config, resolve=False)
    try:
        run = OmegaConf.to_container(config, resolve=True)
    except Exception as error:  # a key that others refer to was deleted
        return {"interpolation", *re.findall(r"\w+", str(error))}
    broken = {key for key, sound in checks_of_the_sampler(run).items() if not sound}
    actor, rollout, algorithm = run["actor_rollout_ref"]["actor"], run["actor_rollout_ref"]["rollout"], run["algorithm"]
    loss, engine = actor.get("policy_loss"), rollout.get("engine_kwargs", {}).get("vllm") or {}
    target, mode = METHODS[method]
    if loss is None or loss.get("_target_") != CONFIGS + target or not loss.get("_recursive_", True):
        return broken | {"policy_loss", "_target_", "loss_mode", "preflight"}
    modes = ("vanilla", "dppo_tv") if method == "grpo" else (mode,)
    # What the class has by itself where the key is deleted.
    if loss.get("loss_mode", mode) not in modes:
        broken.add("loss_mode")
    shipped = OmegaConf.load(QUICKSTART.parents[1] / "cppo_verl/config/method/_common.yaml")
    shipped = OmegaConf.to_container(shipped)["actor_rollout_ref"]["actor"]["policy_loss"]["preflight"]
    if hides(raw["actor_rollout_ref"]["actor"]["policy_loss"].get("preflight"), loss.get("preflight"), shipped, config):
        return broken | {"preflight", "not found", "loss_mode"}

    checks = {"mask_std_0": isinstance(loss.get("mask_std_0", True), bool)}
    if loss.get("mask_std_0", True):
        mean = actor["loss_agg_mode"].startswith("seq-mean")
        checks |= {
            "shuffle": not actor["shuffle"],
            "adv_estimator": algorithm["adv_estimator"] in ("grpo", "rloo", "opo"),
            "loss_scale_factor": not actor["loss_agg_mode"].endswith("norm") or actor["loss_scale_factor"] is not None,
            "use_kl_loss": not (mean and actor["use_kl_loss"]),
            "entropy_coeff": not (mean and actor["entropy_coeff"]),
        }
    if str(loss.get("divergence")).startswith("topk"):
        checks |= {
            "max_logprobs": engine.get("max_logprobs", 20) >= loss.get("top_k", 20),
            "use_fused_kernels": not run["actor_rollout_ref"]["model"].get("use_fused_kernels"),
            "scheduling_policy": rollout["scheduling_policy"] == "fcfs",
            "backend": rollout["checkpoint_engine"]["backend"] == "naive",
        }
    largest = 1 if str(loss.get("divergence")).endswith("tv") else math.inf
    for key, permitted in {
        "delta": lambda x: isinstance(x, int | float) and 0 < x <= largest,
        "delta_b": lambda x: isinstance(x, int | float) and 0 < x <= largest,
        "budget": lambda x: x in ("adaptive", "fixed", "none"),
    }.items():
        if key in loss and not (method.startswith("trm") and loss[key] is None):
            checks[key] = permitted(loss[key])
        given = any(re.match(rf"\+*trust_region\.{key}=", override) for override in overrides)
        if given and key in loss and loss[key] != run["trust_region"][key]:
            broken.add(key)
    partition = run["trust_region"].get("partition")
    if any("trust_region.partition=" in override for override in overrides) and "divergence" in loss:
        checks["partition"] = str(loss["divergence"]).startswith(partition)
    return broken | {key for key, sound in checks.items() if not sound}


def checks_of_the_sampler(run):
    """{key: whether mu is the sampler's and reaches the loss}, as far as that is not the loss's own config."""
    rollout, trainer = run["actor_rollout_ref"]["rollout"], run["trainer"]
    engine = rollout.get("engine_kwargs", {}).get("vllm") or {}
    temperature, mode = rollout.get("temperature", 1), rollout.get("logprobs_mode", "processed_logprobs")
    recorded = (engine.get("logprobs_mode") or mode) if mode in ("processed_logprobs", "raw_logprobs") else mode
    correction = run["algorithm"].get("rollout_correction", {})
    checks = {
        "use_v1": trainer.get("use_v1", True),
        "trainer_mode": trainer["v1"].get("trainer_mode", "cppo_").startswith("cppo_"),
        "bypass_mode": correction.get("bypass_mode") is True,
        "rollout_is": correction.get("rollout_is") is None,
        "rollout_rs": correction.get("rollout_rs") is None,
        "calculate_log_probs": rollout.get("calculate_log_probs", True),
        "temperature": temperature > 0,
        "logprobs_mode": recorded == "processed_logprobs" or (recorded == "raw_logprobs" and temperature == 1),
        "top_p": rollout.get("top_p", 1) == 1,
        "top_k": rollout.get("top_k", -1) < 1,
        "repetition_penalty": rollout.get("repetition_penalty", 1) == 1,
        "min_p": "min_p" not in rollout,
        "pipeline_model_parallel_size": rollout.get("pipeline_model_parallel_size", 1) == 1,
        "speculative_config": "synthetic" not in str(engine.get("speculative_config")),
        "trust_region": set(run["trust_region"]) <= {"delta", "delta_b", "budget", "partition", "dump"},
        "every": run["trust_region"]["dump"].get("every", -1) >= 0,
    }
    return checks | {key: engine.get(key) is None for key in CHANGES_MU}


def hides(raw, filled, shipped, config):
    """Whether the preflight's settings are other than the run's own."""
    if not isinstance(filled, dict) or not isinstance(raw, dict):
        return True
    try:
        return filled != OmegaConf.to_container(OmegaConf.create(shipped, parent=config), resolve=True)
    except InterpolationKeyError:  # of a key that was deleted
        return True


WAY_OUT = re.compile(
    r"set |leave |one of|permitted|must|Could not|has no key|unexpected keyword|not found|issing"
    r"|has no attribute|not implemented|is not in struct|invalid override"
)


@pytest.fixture(scope="module")
def outcomes():
    """How many cases passed and how many were refused: of many, some of both."""
    counted = Counter()
    yield counted
    assert counted.total() < 30 or len(counted) == 2


@pytest.mark.parametrize("part", range(BATCHES))
def test_random_overrides_pass_truly_or_are_refused_with_key_and_way_out(part, tmp_path, outcomes):
    for number in range(part, CASES, BATCHES):
        method, overrides = draw(random.Random(f"{SEED}-{number}"))
        case = f"case {number}: {' '.join(overrides)}"
        keys = {re.split(r"[=]", override.lstrip("+~"))[0].rpartition(".")[2] for override in overrides}
        try:
            with initialize_config_dir(str(QUICKSTART), version_base=None):
                config = compose("quickstart", [*COMMAND, f"output={tmp_path}", *overrides], return_hydra_config=True)
            HydraConfig.instance().set_config(config)
            with open_dict(config):
                del config["hydra"]
        except Exception as error:
            assert any(key in str(error) for key in keys) and WAY_OUT.search(str(error)), f"{case}\n{error}"
            outcomes["refused"] += 1
            continue
        try:
            broken = breaks(config, method, overrides)
            try:
                start_up(config)
                error = None
            except Exception as refusal:
                error = f"{type(refusal).__name__}: {refusal}"
        finally:
            HydraConfig.instance().cfg = None
        if not broken:
            assert error is None, f"{case}\nis sound but refused: {error}"
            outcomes["passed"] += 1
            continue
        assert error is not None, f"{case}\npasses, though it breaks {broken}"
        assert any(key in error for key in broken) and WAY_OUT.search(error), f"{case}\n{broken}\n{error}"
        outcomes["refused"] += 1
