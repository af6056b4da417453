"""What only the trainer can see, as it starts: refused before Ray's workers are there."""

import json
import shutil
from types import SimpleNamespace

import pandas
import pytest
import ray
from documented import ROOT
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from verl.trainer.ppo.v1 import get_trainer_cls
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

from cppo_verl.artifacts import run_lock
from cppo_verl.data.reasoning_gym import write_parquet
from cppo_verl.plugin.trainer import TrustRegionTrainerSync
from cppo_verl.testing import tiny_models


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Data and a random model of 22 tokens."""
    folder = tmp_path_factory.mktemp("inputs")
    settings = {"min_numbers": 5, "max_numbers": 5, "min_decimals": 0, "max_decimals": 0}
    sizes = {"train_size": 64, "validation_size": 8, "min_value": 10, "max_value": 99}
    train_file, _ = write_parquet("number_sorting", folder / "data", **sizes, **settings)
    frame = pandas.read_parquet(train_file)
    questions = [prompt[0]["content"] for prompt in frame["prompt"]]
    tokenizer = tiny_models.build_tokenizer(questions, [reward["ground_truth"] for reward in frame["reward_model"]])
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = tiny_models.build_model(tokenizer, num_key_value_heads=1, max_position_embeddings=128, **sizes)
    tiny_models.save(model, tokenizer, folder / "model", "made_by.json", {"made_by": __file__})
    return folder


def start(inputs, output, *overrides):
    """verl's trainer of the quickstart's config in this process, up to the start of its workers."""
    with initialize_config_dir(str(ROOT / "examples" / "quickstart"), version_base=None):
        config = compose("quickstart", [f"output={output}", f"inputs={inputs}", *overrides])
    OmegaConf.resolve(config)
    get_trainer_cls(config.trainer.v1.trainer_mode)(config).init()


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["trainer.stall_seconds=2h"], ValueError, "trainer.stall_seconds=2h is not permitted: seconds above 0"),
        (["trainer.stop_seconds=0"], ValueError, "trainer.stop_seconds=0 is not permitted: seconds above 0"),
        (
            ["actor_rollout_ref.actor.checkpoint.async_save=true"],
            ValueError,
            r"actor\.checkpoint\.async_save=True loses every checkpoint: .*; set .*async_save=false",
        ),
        (["critic.checkpoint.async_save=true"], ValueError, r"critic\.checkpoint\.async_save=True loses every"),
        (
            ["actor_rollout_ref.model.path=/nowhere/model"],
            FileNotFoundError,
            "no actor_rollout_ref.model.path=/nowhere/model",
        ),
        (
            ["divergence=topk_tv", "actor_rollout_ref.actor.policy_loss.top_k=23"],
            ValueError,
            "policy_loss.top_k=23 is more than the 22 tokens",
        ),
        (
            [
                "divergence=topk_tv",
                "+actor_rollout_ref.rollout.agent.agent_loop_manager_class=verl.trainer.ppo.v1.AgentLoopManagerTQ",
            ],
            ValueError,
            "does not hand mu's most likely tokens over",
        ),
    ],
)
def test_a_trainer_refuses_what_it_cannot_run_before_its_workers_start(inputs, tmp_path, overrides, error, message):
    with pytest.raises(error, match=message):
        start(inputs, tmp_path, *overrides, "++actor_rollout_ref.rollout.engine_kwargs.vllm.max_logprobs=23")
    assert not ray.is_initialized()


def test_a_distilled_qwen_is_refused_with_verls_own_agent_loop(inputs, tmp_path):
    model = shutil.copytree(inputs / "model", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(
        json.dumps(config | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]})
    )
    with pytest.raises(ValueError, match=r"rollout\.agent\.default_agent_loop=single_turn_deepseek"):
        start(inputs, tmp_path / "out", f"actor_rollout_ref.model.path={model}")
    assert not ray.is_initialized()


def test_a_folder_that_another_run_trains_in_is_refused(inputs, tmp_path):
    with run_lock.hold(tmp_path / "checkpoints"), pytest.raises(BlockingIOError, match=r"process \d+ on .* trains in"):
        start(inputs, tmp_path)
    assert not ray.is_initialized()


def test_workers_that_are_the_actor_and_the_reference_are_profiled_once(monkeypatch):
    profiled = []
    workers = SimpleNamespace(start_profile=lambda **_: profiled.append("start"), stop_profile=lambda **_: None)
    monkeypatch.setattr(PPOTrainerSync, "_setup", lambda self: vars(self).update(made))
    made = {"actor_rollout_wg": workers, "ref_policy_wg": workers}
    trainer = object.__new__(TrustRegionTrainerSync)
    trainer.config = OmegaConf.create({"global_profiler": {"profile_continuous_steps": False}})
    trainer.captures, trainer.token_dump = False, None
    trainer.use_reference_policy, trainer.use_critic, trainer.global_steps = True, False, 1
    trainer.prev_step_profile, trainer.curr_step_profile = False, True
    trainer._setup()
    trainer._start_profiling()
    assert profiled == ["start"]
