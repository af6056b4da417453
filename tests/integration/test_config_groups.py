"""Every shipped config group composes over verl's trainer, and no method ignores what the command line sets."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from commands import GRPO, start_up
from hydra.errors import InstantiationException
from omegaconf import OmegaConf
from verl.utils.config import omega_conf_to_dataclass

from cppo_verl.doctor.checks import compose_command

CONFIG = Path(__file__).parents[2] / "cppo_verl" / "config"
METHODS = sorted(path.stem for path in (CONFIG / "method").glob("[!_]*.yaml"))


@pytest.mark.parametrize("path", sorted(CONFIG.glob("*/*.yaml")), ids=lambda p: f"{p.parent.name}={p.stem}")
def test_every_shipped_group_composes_and_passes_verls_checks(compose, path):
    # A method brings the group divergence with it.
    plus = "" if path.parent.name == "divergence" else "+"
    method = [] if path.parent.name == "method" else ["+method=cppo"]
    start_up(compose(*GRPO, *method, f"{plus}{path.parent.name}={path.stem}"))


MASKED = [method for method in METHODS if method not in ("grpo", "cispo", "minpro", "pnpo", "kpop", "vaco")]


@pytest.mark.parametrize("method", MASKED)
def test_every_masked_method_takes_a_top_k_divergence_by_one_override(compose, method):
    divergence = "topk_kl" if method == "cppo_kl" or method.startswith("trm") else "topk_tv"
    config = compose(*GRPO, f"+method={method}", f"divergence={divergence}")
    rule = omega_conf_to_dataclass(config.actor_rollout_ref.actor.policy_loss)
    assert (rule.divergence, rule.top_k, rule.captures) == (divergence, 20, True)


PINS = {
    "cppo_fixed": {"delta_b": 0.05, "budget": "adaptive"},
    "cppo_kl": {"delta": 0.2, "delta_b": 0.05},
    "cppo_no_budget": {"budget": "fixed"},
    "cppo_pr6731": {"budget": "fixed", "partition": "topk"},
    "cppo_sensitivity_w60": {"delta_b": 0.05},
    "cppo_shuffled": {"budget": "fixed"},
    "cppo_unirl": {"budget": "fixed", "partition": "topk"},
    "dppo": {"budget": "fixed"},
    "drpo": {"budget": "fixed"},
    "kpop": {"delta": 0.2},
    "trm_avg": {"delta": 0.2},
    "trm_max": {"delta": 0.2},
    "trm_max_avg": {"delta": 0.2},
    "vaco": {"delta": 0.2},
}
"""Presets, and a value of each pinned key that is not the pinned one."""
READERS = {"delta": "delta", "delta_b": "delta_b", "budget": "budget", "partition": "divergence"}


@pytest.fixture
def command(tmp_path):
    """Compose a command's config as hydra does for ``main_ppo``, with the command line where the checks find it."""
    return lambda *overrides: compose_command([*GRPO, *overrides])


@pytest.mark.parametrize("method", METHODS)
def test_a_pinned_key_on_the_command_line_is_refused_and_any_other_is_read(command, method):
    """The pins are those that the preset's own file shows: a literal where ``trust_region`` would be read."""
    plain = command(f"+method={method}")
    rule = plain.actor_rollout_ref.actor.policy_loss
    values = {"delta": 0.2, "delta_b": 0.05, "budget": "fixed", "partition": "topk"}
    pinned = {
        key
        for key, field in READERS.items()
        if field in rule and "trust_region" not in str(OmegaConf.to_container(rule, resolve=False)[field])
    }
    assert pinned == PINS.get(method, {}).keys()
    for key, value in (values | PINS.get(method, {})).items():
        # A scale's file, as every recipe has one, brings the keys that grpo or trm_max alone do not have.
        plus = "" if key in plain.trust_region else "+"
        config = command(f"+method={method}", f"{plus}trust_region.{key}={value}")
        if key not in pinned:
            omega_conf_to_dataclass(config.actor_rollout_ref.actor.policy_loss)
            continue
        message = rf"method={method} pins {key}=\S+, so trust_region\.{key}={value} would be ignored: set (\S+) instead"
        with pytest.raises(InstantiationException, match=message) as error:
            omega_conf_to_dataclass(config.actor_rollout_ref.actor.policy_loss)
        way_out = re.search(message, str(error.value))[1]
        rule = command(f"+method={method}", way_out).actor_rollout_ref.actor.policy_loss
        read = omega_conf_to_dataclass(rule)[READERS[key]]
        assert read == value or read == f"{value}_tv"


def test_a_pinned_key_may_be_set_to_the_pinned_value_or_in_a_config_file(command, compose):
    omega_conf_to_dataclass(
        command("+method=cppo_fixed", "trust_region={budget:fixed,delta_b:0.03}").actor_rollout_ref.actor.policy_loss
    )
    with pytest.raises(InstantiationException, match=r"delta_b=0\.03, so trust_region\.delta_b=0\.05"):
        start_up(command("+method=cppo_fixed", "trust_region={budget:fixed,delta_b:0.05}"))
    start_up(command("+method=cppo_fixed", "~trust_region.delta_b"))  # sets nothing
    # What no command line has set: here, what a scale's file does.
    config = command("+method=cppo_fixed")
    config.trust_region.delta_b = 0.05
    start_up(config)


def test_a_variant_that_the_method_would_override_is_refused(command):
    with pytest.raises(InstantiationException, match=r"put \+variant=\.\.\. after \+method"):
        start_up(command("+variant=released", "+method=grpo"))
    config = command("+method=grpo", "+variant=released")
    start_up(config)
    assert not config.actor_rollout_ref.actor.policy_loss.mask_std_0
    assert not config.algorithm.norm_adv_by_std_in_grpo


def test_verls_command_stops_before_ray_and_says_what_to_change():
    command = [sys.executable, "-m", "verl.trainer.main_ppo", *GRPO, "+method=cppo"]
    command.append("algorithm.rollout_correction.bypass_mode=false")
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert "set algorithm.rollout_correction.bypass_mode=true" in result.stderr
    assert "ray init kwargs" not in result.stdout
    assert "Started a local Ray instance" not in result.stderr
