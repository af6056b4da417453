"""What the doctor asks Ray's workers: whether every node of a cluster can run a training command (``cppo-verl doctor
--cluster``), or without a cluster, whether a worker on this machine has what this process has.

`check_node` runs as a task in the worker, also in one without this package: Ray sends it by value, and it imports there
what it needs.
"""

import logging
import math
import os
import platform
import shutil
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from omegaconf import DictConfig, OmegaConf
from ray import cloudpickle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

if TYPE_CHECKING:
    from cppo_verl.doctor.checks import Report

BYTES_PER_PARAMETER = 12
"""Bytes of a checkpoint per parameter: weights and Adam's two moments in fp32."""
LEAST_FREE = 1 << 30
"""Bytes that a checkpoint folder must have free where the model's size is not known."""
CPUS_PER_GPU, CPUS_PER_ROLLOUT_GPU = 3, 2
"""CPUs that verl reserves with each GPU of its trainer, and of a rollout that is separate from it."""
PATIENCE = 300
"""Seconds that a worker may take to start and to answer; uv may download its packages first."""

Needed = tuple[list[str], str | None, str, int, bool]
NOTHING: Needed = ([], None, "/", 0, False)
"""The arguments of `check_node` after the versions, for which any node will do."""


def check_node(
    versions: dict[str, str | None], files: list[str], hub_model: str | None, folder: str, need: int, wandb: bool
) -> tuple[list[str], int]:
    """Compare the node that this runs on with what the run needs.

    Args:
        versions: {"python" or distribution: version where the run starts}.
        files: of the config, as ``key=path``.
        hub_model: name of a model on the hub, if the run needs one from there.
        folder: of the checkpoints; it need not exist yet.
        need: bytes that a checkpoint takes on this node.
        wandb: whether the run logs there.

    Returns:
        What would break the run there, each with the way out; the bytes free for checkpoints.
    """
    problems = []
    where = f"for {sys.executable} there"
    # `uv run` sets it; it makes the environment by the project's lock file.
    if "UV_RUN_RECURSION_DEPTH" in os.environ:
        where += ", by `uv add` in the project, or by `uv pip install --no-deps`"
    for name, wanted in versions.items():
        if (there := _version(name)) != wanted:
            what = "is not installed" if there is None else f"is {there}"
            problems.append(f"{name} {what}, here it is {wanted}: install the same {where}")
    try:
        from cppo_verl.doctor.registrations import registrations

        if missing := [name for name, ok in registrations().items() if not ok]:
            problems.append(f"verl has not loaded the plug-in ({', '.join(missing)}): install it {where}")
    except Exception as error:  # verl's own of a platform that only the plug-in knows, for one
        what = f"the plug-in does not load ({type(error).__name__}: {error})"
        problems.append(f"{what}: install it {where}")
    for file in files:
        if not os.path.exists(os.path.expanduser(file.partition("=")[2])):
            problems.append(f"{file} does not exist there: put it on a folder that all nodes share")
    if hub_model is not None and (reason := _hub_problem(hub_model)):
        what = f"actor_rollout_ref.model.path={hub_model} is neither cached there nor to be had from the hub ({reason})"
        problems.append(f"{what}: set HF_TOKEN before Ray starts there, or name a folder")
    free = shutil.disk_usage(next(path for path in (Path(folder), *Path(folder).parents) if path.exists())).free
    if free < need:
        what = f"{_gib(free)} free for trainer.default_local_dir={folder}, of which a checkpoint takes {_gib(need)}"
        problems.append(f"{what}: make room, or name another folder")
    if wandb and not _wandb_key():
        problems.append("wandb has no API key there: set WANDB_API_KEY, or WANDB_MODE=offline, before Ray starts there")
    return problems, free


def _version(name: str) -> str | None:
    if name == "python":
        return platform.python_version()
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _hub_problem(model: str) -> str | None:
    """Why ``model`` can be had neither from this node's cache of the hub nor from the hub."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    if os.path.exists(model) or isinstance(try_to_load_from_cache(model, "config.json"), str):
        return None
    try:
        HfApi().auth_check(model)
    except Exception as error:
        return _first_line(error)
    return None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"


def _wandb_key() -> bool:
    """Whether wandb finds an API key here, or needs none."""
    import requests  # as wandb does to read ~/.netrc

    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun") or os.environ.get("WANDB_API_KEY"):
        return True
    return requests.utils.get_netrc_auth(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")) is not None


def check_cluster(report: "Report", config: DictConfig | None, distributions: list[str], patience: float) -> None:
    """Ask every node of the cluster that RAY_ADDRESS names, or that runs on this machine, and report what is missing.

    The ``distributions`` must have this process's versions on every node. The config's number of nodes must be there
    within ``patience`` seconds. Without a ``config`` one node must be, and what else depends on it is left out.
    """
    try:
        _start_ray(config, address="auto")
    except Exception as error:
        # Ray's own exceptions for this have no common class.
        way_out = "RAY_ADDRESS must name a running cluster, RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH its token"
        way_out += " (recipes/cluster/node.sh starts one and sets both)"
        report.say("FAIL", "Ray", f"{_first_line(error)}; {way_out}")
        return
    try:
        _check_nodes(report, config, distributions, config.trainer.nnodes if config else 1, patience)
    finally:
        ray.shutdown()


def check_worker(report: "Report", config: DictConfig | None, distributions: list[str]) -> None:
    """Start a Ray of its own on this machine, whatever cluster there is, and ask one of its workers.

    It has other packages than this process where ``ray_kwargs.ray_init.runtime_env`` says so, as where verl's workers
    are started by `uv run`.
    """
    try:
        _start_ray(config, address="local", num_cpus=1, include_dashboard=False)
    except Exception as error:  # Ray's own have no common class
        report.say("FAIL", "Ray", f"{_first_line(error)}; see ray_kwargs.ray_init.runtime_env, or give --no-ray")
        return
    try:
        _report_answer(report, "a Ray worker", _task().remote(_versions(distributions), *NOTHING))
    finally:
        ray.shutdown()


def _report_answer(report: "Report", subject: str, answer: ray.ObjectRef, with_room: bool = False) -> None:
    try:
        problems, free = ray.get(answer, timeout=PATIENCE)
    except Exception as error:  # of the task, of its worker, of the node
        why = f"no answer ({type(error).__name__}): {str(error).strip()}"
        report.say("FAIL", subject, f"{why}; Ray's logs there say more (/tmp/ray/session_latest/logs)")
        return
    for problem in problems:
        report.say("FAIL", subject, problem)
    if not problems:
        room = f", {_gib(free)} free for checkpoints" if with_room else ""
        report.say("ok", subject, f"the same versions as here, the plug-in registered{room}")


def _start_ray(config: DictConfig | None, **arguments: Any) -> None:
    runtime_env = config and OmegaConf.to_container(config.ray_kwargs.ray_init.get("runtime_env") or OmegaConf.create())
    ray.init(runtime_env=runtime_env or None, log_to_driver=False, logging_level=logging.ERROR, **arguments)


def _check_nodes(
    report: "Report", config: DictConfig | None, distributions: list[str], expected: int, patience: float
) -> None:
    from cppo_verl.plugin.preflight import local_files

    nodes = sorted(_alive(expected, patience), key=lambda node: node["NodeManagerAddress"])
    addresses = [node["NodeManagerAddress"] for node in nodes]
    way_out = "see Ray's logs on the others, or lower trainer.nnodes"
    too_few = f"{len(nodes)} of {expected} have joined Ray ({', '.join(addresses)}): {way_out}"
    report.check(len(nodes) >= expected, "nodes", f"{len(nodes)} alive", too_few)
    needed = NOTHING
    if config is not None:
        _check_slots(report, nodes, config)
        model, logger = config.actor_rollout_ref.model.path, config.trainer.logger
        hub_model = None if model.startswith(("/", "./", "../", "~")) or "://" in model else model
        folder, need = os.path.abspath(config.trainer.default_local_dir), LEAST_FREE
        try:
            need = _checkpoint_share(model, expected)
        except ValueError as error:
            report.say("FAIL", "model", str(error))
        wandb = "wandb" in ([logger] if isinstance(logger, str) else logger)
        needed = (local_files(config), hub_model, folder, need, wandb)
    task = _task()
    versions = _versions(distributions)
    answers = []
    for node in nodes:
        there = task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
        answers.append(there.remote(versions, *needed))
    for node, answer in zip(nodes, answers, strict=True):
        # Several nodes of Ray may share a machine, and then both names.
        subject = f"{node['NodeManagerHostname']} {node['NodeManagerAddress']}"
        _report_answer(report, subject, answer, with_room=config is not None)


def _versions(distributions: list[str]) -> dict[str, str | None]:
    return {name: _version(name) for name in ("python", *distributions)}


def _task() -> Any:
    """`check_node` as a Ray task."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    return ray.remote(num_cpus=0, max_retries=0)(check_node)


def _check_slots(report: "Report", nodes: list[dict], config: DictConfig) -> None:
    """A node may have none, as a head that only schedules does, where enough others have."""
    trainer, pools = config.trainer, gpu_pools(config)
    resources = [(node["NodeManagerAddress"], node["Resources"]) for node in nodes]
    slots = [(address, int(has.get("GPU", has.get("NPU", 0)))) for address, has in resources]
    enough = sum(count >= trainer.n_gpus_per_node for _, count in slots)
    wanted = " ".join(f"{key}.nnodes={count} {key}.n_gpus_per_node={gpus}" for key, (count, gpus, _) in pools.items())
    there = ", ".join(f"{address} has {count}" for address, count in slots)
    way_out = "lower the one or the other, or start Ray with --num-gpus there"
    good = f"{trainer.n_gpus_per_node} or more on {enough} node(s)"
    in_all = sum(count for _, count in slots) >= sum(count * gpus for count, gpus, _ in pools.values())
    report.check(enough >= trainer.nnodes and in_all, "GPUs", good, f"{wanted}, but in Ray {there}: {way_out}")

    each, needed = CPUS_PER_GPU * trainer.n_gpus_per_node, cpus_needed(config)
    cpus = [int(has.get("CPU", 0)) for _, has in resources]
    roomy = sum(has >= each and count >= trainer.n_gpus_per_node for has, (_, count) in zip(cpus, slots, strict=True))
    there = ", ".join(f"{address} has {has}" for (address, _), has in zip(slots, cpus, strict=True))
    reserved = f"verl reserves {each} on each of the trainer's nodes, {needed} in all, and would wait for ever here"
    bad = f"{reserved}; in Ray {there}: start Ray with --num-cpus there, which may be more than the cores"
    good = f"{sum(cpus)}, of which verl reserves {needed}"
    report.check(roomy >= trainer.nnodes and sum(cpus) >= needed, "CPUs", good, bad)


def gpu_pools(config: DictConfig) -> dict[str, tuple[int, int, int]]:
    """Of what the run reserves in Ray, {key of the config: number of nodes, GPUs of each, CPUs with each GPU}."""
    trainer, rollout = config.trainer, config.actor_rollout_ref.rollout
    pools = {"trainer": (trainer.nnodes, trainer.n_gpus_per_node, CPUS_PER_GPU)}
    if trainer.v1.trainer_mode.endswith("separate_async"):
        pools["actor_rollout_ref.rollout"] = (rollout.nnodes, rollout.n_gpus_per_node, CPUS_PER_ROLLOUT_GPU)
    for key, wanted in (("reward.reward_model", "enable_resource_pool"), ("distillation", "enabled")):
        pool = OmegaConf.select(config, key)
        if pool is not None and pool.get(wanted):
            pools[key] = (pool.nnodes, pool.n_gpus_per_node, CPUS_PER_GPU)
    return pools


def cpus_needed(config: DictConfig) -> int:
    """CPUs that verl reserves in Ray: with the GPUs, for TransferQueue's controller and for its storage units."""
    units = OmegaConf.select(config, "transfer_queue.backend.SimpleStorage.num_data_storage_units", default=0)
    return sum(count * gpus * cpus for count, gpus, cpus in gpu_pools(config).values()) + 1 + units


def _alive(expected: int, patience: float) -> list[dict]:
    deadline = time.monotonic() + patience
    while True:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        if len(nodes) >= expected or time.monotonic() > deadline:
            return nodes
        time.sleep(0.5)


def _checkpoint_share(model: str, nodes: int) -> int:
    """Bytes that one checkpoint takes on each node: every rank writes its own shards.

    Raises:
        ValueError: a file of weights is not readable.
    """
    from safetensors import SafetensorError, safe_open

    parameters = 0
    for file in Path(os.path.expanduser(model)).glob("*.safetensors"):
        try:
            with safe_open(file, "pt") as weights:
                shapes = [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is cut off, or a pointer of Git LFS: download it again ({error})") from error
        parameters += sum(map(math.prod, shapes))
    return parameters * BYTES_PER_PARAMETER // nodes or LEAST_FREE


def _gib(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB"
