import re

import pytest
import torch
from omegaconf import OmegaConf

from cppo_verl.doctor.checks import (
    ConfigError,
    Report,
    _compiler,
    _device,
    compose_command,
    engine,
    routing,
)


def test_a_gpu_platform_without_a_gpu_is_warned_of(capsys):
    from verl.plugin.platform import PlatformRegistry

    if torch.cuda.device_count():
        pytest.skip("this machine has one")
    _device(Report(), PlatformRegistry.get("nvidia")())
    out = capsys.readouterr().out
    assert out.startswith("warn  device ")
    assert "cuda (nvidia), 0 visible here: to train on this machine see its driver and CUDA_VISIBLE_DEVICES" in out


SEARCH_PATH = "hydra:\n  searchpath: [pkg://verl.trainer.config]\n"


@pytest.mark.parametrize(
    "flags", [("--config-dir", "-cn"), ("--config-path", "--config-name"), ("-cp", "--config-name")]
)
def test_a_config_of_the_users_is_composed_as_by_verls_command(tmp_path, flags):
    (tmp_path / "mine.yaml").write_text(f"defaults: [ppo_trainer, _self_]\n{SEARCH_PATH}trainer:\n  nnodes: 3\n")
    config = compose_command([flags[0], str(tmp_path), flags[1], "mine", "+added=1", "~trainer.total_epochs"])
    assert (config.trainer.nnodes, config.added) == (3, 1)
    assert "total_epochs" not in config.trainer
    assert "hydra" not in config


def test_interpolations_and_numbers_survive():
    config = compose_command(
        ["actor_rollout_ref.actor.optim.lr=1e-6", "trainer.project_name=${trainer.experiment_name}"]
    )
    assert config.actor_rollout_ref.actor.optim.lr == 1e-6
    config.trainer.experiment_name = "other"
    assert config.trainer.project_name == "other"


def test_the_folder_on_the_search_path_of_the_command_line_is_used(tmp_path):
    (tmp_path / "size").mkdir()
    (tmp_path / "size" / "small.yaml").write_text("# @package trainer\nnnodes: 5\n")
    assert compose_command([f"hydra.searchpath=[file://{tmp_path}]", "+size=small"]).trainer.nnodes == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trainer.nnods=2"], "Could not override 'trainer.nnods'"),
        (["--config-name", "nothing"], "Cannot find primary config 'nothing'"),
        (["+method=nothing"], "Could not find 'method/nothing'"),
        (["trainer.nnodes=1,2"], "Ambiguous value for argument 'trainer.nnodes=1,2'"),
        (["--multirun"], "--multirun asks for several runs: leave it out, and give each key one run's value"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_arguments_that_hydra_refuses_are_refused_in_its_words(arguments, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        compose_command(arguments)


@pytest.mark.parametrize("missing", ["compiler", "headers"])
def test_a_compiler_and_pythons_headers_are_looked_for(missing, capsys, monkeypatch, tmp_path):
    headers = {"include": str(tmp_path)}
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr("sysconfig.get_path", headers.__getitem__)
    monkeypatch.setenv("CC", "sh -c")  # any program that is there
    report = Report()
    _compiler(report)
    assert not report.failed and "ok    compiler                sh, and Python's headers" in capsys.readouterr().out
    if missing == "compiler":
        monkeypatch.setenv("CC", "no-such-compiler -O2")
    else:
        (tmp_path / "Python.h").unlink()
    _compiler(report)
    out = capsys.readouterr().out
    named = "no-such-compiler" if missing == "compiler" else str(tmp_path / "Python.h")
    assert report.failed and f"not found: {named}: install a C compiler and Python's headers (gcc, python3-dev)" in out


@pytest.mark.parametrize(
    ("device", "vanilla", "installed", "finding"),
    [
        ("cuda", "false", ("megatron-core", "megatron-bridge"), "ok    engine +Megatron; .* tensor 4, .*, expert 8"),
        ("cuda", "false", ("megatron-core",), "FAIL  engine +Megatron's needs megatron-bridge: install them on every"),
        ("cuda", "true", ("megatron-bridge",), "FAIL  engine +Megatron's needs megatron-core, mbridge: install"),
        ("cpu", "false", ("megatron-core", "megatron-bridge"), "FAIL  engine +verl has its Megatron engine for GPUs"),
    ],
)
def test_megatrons_engine_is_there_or_lacks_packages(device, vanilla, installed, finding, compose, capsys, monkeypatch):
    monkeypatch.setattr("cppo_verl.doctor.checks._installed", lambda name: name in installed or None)
    megatron = "actor_rollout_ref.actor.megatron."
    sizes = [f"{megatron}tensor_model_parallel_size=4", f"{megatron}expert_model_parallel_size=8"]
    config = compose("model_engine=megatron", *sizes, f"{megatron}vanilla_mbridge={vanilla}")
    engine(Report(), config, device)
    assert re.match(finding, capsys.readouterr().out)
    engine(Report(), compose(), device)
    assert capsys.readouterr().out == ""


FLAG = "actor_rollout_ref.rollout.enable_rollout_routing_replay"


@pytest.mark.parametrize(
    ("strategy", "mode", "recorded", "finding"),
    [
        ("fsdp2", None, False, ""),
        ("fsdp2", None, True, f"warn  routing .* the fsdp2 engine does not replay them, .*: set {FLAG}=false"),
        ("megatron", "disabled", False, ""),
        ("megatron", "R3", True, "ok    routing .* R3: the actor replays the rollout's experts"),
        ("veomni", "R3", False, f"FAIL  routing .* R3 needs {FLAG}=true"),
        ("megatron", "R2", True, "FAIL  routing .* R2 .* set actor_rollout_ref.actor.megatron.router_replay.mode=R3"),
    ],
)
def test_routing_replay_is_on_off_or_lacks_something(strategy, mode, recorded, finding, capsys):
    actor = {"strategy": strategy} | ({strategy: {"router_replay": {"mode": mode}}} if mode else {})
    rollout = {"enable_rollout_routing_replay": recorded}
    routing(Report(), OmegaConf.create({"actor_rollout_ref": {"actor": actor, "rollout": rollout}}))
    out = capsys.readouterr().out
    assert re.match(finding, out) if finding else out == ""


def test_verls_config_has_the_keys_of_routing_replay(compose):
    assert OmegaConf.select(compose(), FLAG) is False
    megatron = compose("model_engine=megatron", config_name="ppo_trainer")
    assert OmegaConf.select(megatron, "actor_rollout_ref.actor.megatron.router_replay.mode") == "disabled"
