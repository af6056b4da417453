"""The tables of docs/engines.md, row by row: what it says of a combination is what its start does."""

import itertools
import re
from pathlib import Path

import pytest
import verl.trainer
from commands import GRPO, start_up
from documented import ROOT
from hydra.errors import InstantiationException

from cppo_verl.plugin.constants import TOP_K_ROLLOUT

ROLLOUTS = {"vLLM": "vllm", "SGLang": "sglang", "TensorRT-LLM": "trtllm"}
ACTORS = {
    "FSDP2": "actor_rollout_ref.actor.strategy=fsdp2",
    "FSDP": "actor_rollout_ref.actor.strategy=fsdp",
    "Megatron": "model_engine=megatron",
    "VeOmni": "model_engine=veomni",
    "TorchTitan": "model_engine=torchtitan",
}
DIVERGENCES = {"binary": "binary_tv", "top-K": "topk_tv"}
PERMITTED = ("trained", "composed", "not run")


def table(header):
    """The rows of the table whose header begins with this cell, each a list of cells."""
    text = (ROOT / "docs" / "engines.md").read_text()
    (body,) = re.findall(rf"^\| {header} \|.*\n\|[- |]+\n((?:\|.*\n)+)", text, re.M)
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in body.splitlines()]


def engines():
    """{(rollout, actor, divergence): what the page says of them}."""
    found = {}
    for rollouts, actors, divergences, says in table("rollout"):
        names = rollouts.split(", "), list(ACTORS) if actors == "any" else actors.split(", "), divergences.split(", ")
        for combination in itertools.product(*names):
            assert combination not in found
            found[combination] = says
    return found


def features():
    """[(overrides, divergence, what the page says of them)] of the rows that name overrides."""
    rows = []
    for feature, *cells in table("feature"):
        overrides = re.findall(r"`(\+*[a-z][\w.]*=[^`]*)`", feature)
        if overrides:
            rows += [(overrides, divergence, says) for divergence, says in zip(DIVERGENCES, cells, strict=True)]
    return rows


def check(compose, overrides, divergence, says):
    """Start the combination up to Ray, and hold what happens against what the page says."""

    def start():
        given = [*GRPO, "actor_rollout_ref.actor.strategy=fsdp2", *overrides]
        engine = [word for word in given if word.startswith("model_engine=")]
        if engine:  # it brings a strategy of its own
            given = [word for word in given if ".strategy=" not in word]
        start_up(compose(*given, "+method=cppo", f"divergence={DIVERGENCES[divergence]}"))

    if says.startswith(PERMITTED):
        start()
        return
    assert says.startswith("refused: "), says
    with pytest.raises((InstantiationException, ValueError)) as refused:
        start()
    for quoted in re.findall(r"`([^`]+)`", says):
        assert quoted in str(refused.value)


@pytest.mark.parametrize(("combination", "says"), engines().items(), ids=str)
def test_an_engine_with_a_divergence_does_what_the_page_says(compose, combination, says):
    rollout, actor, divergence = combination
    check(compose, [f"actor_rollout_ref.rollout.name={ROLLOUTS[rollout]}", ACTORS[actor]], divergence, says)


@pytest.mark.parametrize(("overrides", "divergence", "says"), features(), ids=str)
def test_a_feature_with_a_divergence_does_what_the_page_says(compose, overrides, divergence, says):
    check(compose, overrides, divergence, says)


def test_every_engine_of_verls_is_in_the_table():
    from verl.workers.rollout.replica import RolloutReplicaRegistry

    assert {*ROLLOUTS.values(), TOP_K_ROLLOUT} == set(RolloutReplicaRegistry._registry)
    folder = Path(verl.trainer.__path__[0]) / "config" / "model_engine"
    chosen = {word.removeprefix("model_engine=") for word in ACTORS.values() if word.startswith("model_engine=")}
    assert {file.stem for file in folder.glob("*.yaml")} == {"dp", *chosen}  # "dp" is FSDP and FSDP2
    assert set(engines()) == set(itertools.product(ROLLOUTS, ACTORS, DIVERGENCES))
