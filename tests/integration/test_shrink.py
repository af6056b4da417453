"""recipes/shrink.py: what it makes of a recipe, and what it refuses."""

import importlib.util
import json
from pathlib import Path

import pytest
import ray
from omegaconf import OmegaConf
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.trainer.ppo.v1 import get_trainer_cls
from verl.utils.config import omega_conf_to_dataclass, validate_config

from cppo_verl.artifacts import run_lock
from cppo_verl.testing.tiny_models import share_of_digits

RECIPES = Path(__file__).parents[2] / "recipes"
SCALES = sorted(path.stem for path in (RECIPES / "scale").glob("*.yaml"))
PLATFORM = Path(__file__).parents[2] / "cppo_verl" / "config" / "platform" / "cpu.yaml"
SIZES = {
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu",
    "actor_rollout_ref.actor.ppo_mini_batch_size",
    "actor_rollout_ref.model.path",
    "actor_rollout_ref.rollout.n",
    "data.max_prompt_length",
    "data.max_response_length",
    "data.train_batch_size",
    "data.train_files",
    "data.val_files",
    "data_dir",
    "reward.custom_reward_function.name",
    "reward.custom_reward_function.path",
    "trainer.total_training_steps",
}


@pytest.fixture(scope="module")
def shrink():
    spec = importlib.util.spec_from_file_location("shrink", RECIPES / "shrink.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def leaves(config, path=""):
    """{dotted key: what stands there, interpolations as they are}."""
    found = {}
    for key in config:
        node = config._get_node(key)
        value = node._value()
        found |= leaves(node, f"{path}{key}.") if isinstance(value, dict) else {path + key: value}
    return found


@pytest.mark.parametrize("method", ["cppo_kl", "grpo"])
@pytest.mark.parametrize("scale", SCALES)
def test_a_recipe_shrinks_in_size_and_changes_platform_and_nothing_else(shrink, scale, method):
    overrides = [f"scale={scale}", f"method={method}", "output=/runs/a"]
    recipe, shrunk = shrink.compose(overrides), shrink.compose([*overrides, "+shrink=tiny"])
    shrunk.merge_with_dotlist([shrink.prompts(recipe, shrunk)])
    before, after = leaves(recipe), leaves(shrunk)  # hydra resolves what it instantiates, in place
    validate_config(shrunk, use_reference_policy=need_reference_policy(shrunk), use_critic=need_critic(shrunk))
    for part in ("actor", "rollout"):
        omega_conf_to_dataclass(shrunk.actor_rollout_ref[part])
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    assert SIZES <= changed <= SIZES | leaves(OmegaConf.load(PLATFORM)).keys()
    assert "actor_rollout_ref.model.use_remove_padding" not in changed  # packed, as the recipes are
    updates = [c.data.train_batch_size / c.actor_rollout_ref.actor.ppo_mini_batch_size for c in (recipe, shrunk)]
    assert updates[0] == updates[1] > 1


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("Qwen/Qwen3-1.7B", "qwen3"),
        ("/models/Qwen3-30B-A3B-Base", "qwen3_moe"),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", "qwen2"),
    ],
)
def test_the_tiny_model_has_the_architecture_and_tokens_enough(shrink, tmp_path, path, kind):
    from transformers import AutoConfig, AutoTokenizer

    shrink.prepare(tmp_path / "a", path, 2)
    assert AutoConfig.from_pretrained(tmp_path / "a" / "model").model_type == kind
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a" / "model")
    assert len(tokenizer) >= 20
    question = [{"role": "user", "content": "7"}]
    assert tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True) == "<user>7<assistant>"


@pytest.mark.parametrize("method", ["grpo", "dppo", "cppo"])
def test_the_shrunk_sanity_test_starts_up_to_ray(shrink, tmp_path, method):
    overrides = ["scale=r1d_1.5b_sanity", f"method={method}", f"output={tmp_path}"]
    recipe, shrunk = shrink.compose(overrides), shrink.compose([*overrides, "+shrink=tiny"])
    shrunk.merge_with_dotlist([shrink.prompts(recipe, shrunk)])
    shrink.prepare(tmp_path, recipe.actor_rollout_ref.model.path, 2)
    OmegaConf.resolve(shrunk)
    # The settings have passed where the folder is taken, which another run's lock refuses before Ray starts.
    with run_lock.hold(tmp_path / "checkpoints"), pytest.raises(BlockingIOError, match="trains in"):
        get_trainer_cls(shrunk.trainer.v1.trainer_mode)(shrunk).init()
    assert not ray.is_initialized()


def test_random_answers_get_different_rewards():
    scores = [share_of_digits("any", answer, "12")["score"] for answer in ("12", "1,", "", "abc")]
    assert scores == [1, 0.5, 0, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["scale=qwen3_9b"], "Could not find 'scale/qwen3_9b'"),
        ([], "You must specify 'scale'"),
        (
            ["scale=qwen3_8b_base", "data.train_batch_size=100"],
            "data.train_batch_size=100 is not permitted: a multiple",
        ),
        (
            ["scale=qwen3_8b_base", "actor_rollout_ref.model.path=a/Llama-8B"],
            "model.path=a/Llama-8B is no Qwen3 and",
        ),
    ],
)
def test_what_is_no_recipe_is_refused_before_anything_is_written(shrink, tmp_path, capsys, arguments, message):
    assert shrink.main([*arguments, "--output", str(tmp_path / "a")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_the_folder_must_be_given(shrink, capsys):
    with pytest.raises(SystemExit):
        shrink.main(["scale=qwen3_8b_base"])
    assert "the following arguments are required: --output" in capsys.readouterr().err


def test_a_folder_that_holds_something_else_is_left_as_it_is(shrink, tmp_path):
    dense, moe = "Qwen/Qwen3-8B-Base", "Qwen/Qwen3-30B-A3B-Base"
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and was not made by this script: give another --output"):
        shrink.prepare(tmp_path, dense, 2)

    (tmp_path / "model" / "shrink.json").write_text(json.dumps({"stands_for": dense}))
    with pytest.raises(ValueError, match=f"holds a shrunk {dense}, and {moe} is asked for: give another --output"):
        shrink.prepare(tmp_path, moe, 2)
    shrink.prepare(tmp_path, dense, 2)

    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("2")
    with pytest.raises(ValueError, match="holds a run that has ended: give another --output"):
        shrink.prepare(tmp_path, dense, 2)
    shrink.prepare(tmp_path, dense, 3)
    assert (tmp_path / "model" / "config.json").read_text() == "mine"
    assert not (tmp_path / "data").exists()


def test_a_folder_of_any_name_is_the_output(shrink, tmp_path, capsys):
    folder = tmp_path / "Übung, (1) it's=a"
    assert shrink.main(["scale=qwen3_1.7b", "data.train_batch_size=7", "--output", str(folder)]) == 2
    assert capsys.readouterr().err.startswith("data.train_batch_size=7 is not permitted")
