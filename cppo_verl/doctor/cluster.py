"""The cluster check: whether every node of a Ray cluster can run a training command (``cppo-verl doctor --cluster``).

`describe_node` runs as a task on each node, also on one without this package: Ray sends it by value, and it imports
there what it needs.
"""

import logging
import math
import os
import platform
import shutil
import socket
import sys
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import ray
from omegaconf import DictConfig, OmegaConf
from ray import cloudpickle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

BYTES_PER_PARAMETER = 12  # of a checkpoint: weights and Adam's two moments in fp32
LEAST_FREE = 1 << 30  # bytes that a checkpoint folder must have free where the model's size is not known


def describe_node(distributions: list[str], files: list[str], hub_model: str | None, folder: str | None) -> dict:
    """What the node that this runs on has; `_problems` compares it with what the run needs.

    Args:
        files: of the config, as ``key=path``.
        hub_model: name of a model on the hub, if the run needs one from there.
        folder: of the checkpoints; it need not exist yet.
    """
    versions: dict[str, str | None] = {"python": platform.python_version()} | dict.fromkeys(distributions)
    for name in distributions:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    found: dict = {"host": socket.gethostname(), "python": sys.executable, "versions": versions}
    try:
        from cppo_verl.doctor.registrations import registrations

        found["registrations"] = registrations()
    except Exception as error:  # verl's own of a platform that only the plug-in knows, for one
        found["import_error"] = f"{type(error).__name__}: {error}"
    found["missing"] = [x for x in files if not os.path.exists(os.path.expanduser(x.partition("=")[2]))]
    if hub_model is not None:
        found["hub"] = _hub_problem(hub_model)
    if folder is not None:
        existing = next(path for path in (Path(folder), *Path(folder).parents) if path.exists())
        found["free"] = shutil.disk_usage(existing).free
    found["wandb"] = _wandb_key()
    return found


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


def check_cluster(report, config: DictConfig | None, distributions: list[str], patience: float) -> None:
    """Ask every node of the cluster that RAY_ADDRESS names, or that runs on this machine, and report what is missing.

    The ``distributions`` must have this process's versions on every node. The config's number of nodes must be there
    within ``patience`` seconds. Without a ``config`` one node must be, and what else depends on it is left out.
    """
    runtime_env = config and OmegaConf.to_container(config.ray_kwargs.ray_init.get("runtime_env") or OmegaConf.create())
    try:
        ray.init("auto", runtime_env=runtime_env or None, log_to_driver=False, logging_level=logging.ERROR)
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


def _check_nodes(report, config: DictConfig | None, distributions: list[str], expected: int, patience: float) -> None:
    from cppo_verl.plugin.preflight import local_files

    nodes = sorted(_alive(expected, patience), key=lambda node: node["NodeManagerAddress"])
    addresses = [node["NodeManagerAddress"] for node in nodes]
    way_out = "see Ray's logs on the others, or lower trainer.nnodes"
    too_few = f"{len(nodes)} of {expected} have joined Ray ({', '.join(addresses)}): {way_out}"
    report.check(len(nodes) >= expected, "nodes", f"{len(nodes)} alive", too_few)
    files: list[str] = []
    hub_model = folder = None
    if config is not None:
        _check_slots(report, nodes, config.trainer)
        files, folder = local_files(config), os.path.abspath(config.trainer.default_local_dir)
        model = config.actor_rollout_ref.model.path
        hub_model = None if model.startswith(("/", "./", "../", "~")) or "://" in model else model
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    task = ray.remote(num_cpus=0, max_retries=0)(describe_node)
    answers = []
    for node in nodes:
        there = task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
        answers.append(there.remote(distributions, files, hub_model, folder))
    here = describe_node(distributions, [], None, None)["versions"]
    for address, answer in zip(addresses, answers, strict=True):
        try:
            found = ray.get(answer, timeout=300)
        except Exception as error:  # of the task, of its worker, of the node
            report.say("FAIL", f"node {address}", f"no answer ({type(error).__name__}): {str(error).strip()}")
            continue
        problems = _problems(found, here, config, expected)
        where = f"{found['host']} {address}"
        for problem in problems:
            report.say("FAIL", where, problem)
        if not problems:
            free = f", {_gib(found['free'])} free for checkpoints" if config is not None else ""
            report.say("ok", where, f"the versions of this machine, the plug-in registered{free}")


def _check_slots(report, nodes: list[dict], trainer: DictConfig) -> None:
    """A node may have none, as a head that only schedules does, where enough others have."""
    resources = {node["NodeManagerAddress"]: node["Resources"] for node in nodes}
    slots = {address: int(has.get("GPU", has.get("NPU", 0))) for address, has in resources.items()}
    enough = sum(count >= trainer.n_gpus_per_node for count in slots.values())
    wanted = f"trainer.nnodes={trainer.nnodes} trainer.n_gpus_per_node={trainer.n_gpus_per_node}"
    there = ", ".join(f"{address} has {count}" for address, count in slots.items())
    way_out = "lower the one or the other, or start Ray with --num-gpus there"
    good = f"{trainer.n_gpus_per_node} or more on {enough} node(s)"
    report.check(enough >= trainer.nnodes, "GPUs", good, f"{wanted}, but in Ray {there}: {way_out}")


def _alive(expected: int, patience: float) -> list[dict]:
    deadline = time.monotonic() + patience
    while True:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        if len(nodes) >= expected or time.monotonic() > deadline:
            return nodes
        time.sleep(0.5)


def _problems(found: dict, here: dict, config: DictConfig | None, nodes: int) -> list[str]:
    """What would break the run on a node that `describe_node` describes, each with the way out."""
    problems = []
    for name, wanted in here.items():
        there = found["versions"][name]
        if there != wanted:
            what = "is not installed" if there is None else f"is {there}"
            problems.append(f"{name} {what}, here it is {wanted}: install the same for {found['python']} there")
    if error := found.get("import_error"):
        problems.append(f"the plug-in does not load ({error}): pip install it for {found['python']} there")
    missing = [name for name, ok in found.get("registrations", {}).items() if not ok]
    if missing:
        problems.append(f"verl has not loaded the plug-in ({', '.join(missing)}): pip install it there")
    problems += [f"{path} does not exist there: put it on a folder that all nodes share" for path in found["missing"]]
    if config is None:
        return problems
    if error := found.get("hub"):
        model = f"actor_rollout_ref.model.path={config.actor_rollout_ref.model.path}"
        way_out = "set HF_TOKEN before Ray starts there, or name a folder"
        problems.append(f"{model} is neither cached there nor to be had from the hub ({error}): {way_out}")
    free, need = found["free"], _checkpoint_share(config, nodes)
    if free < need:
        where = f"trainer.default_local_dir={config.trainer.default_local_dir}"
        way_out = "make room, or name another folder"
        problems.append(f"{_gib(free)} free for {where}, of which a checkpoint takes {_gib(need)}: {way_out}")
    logger = config.trainer.logger
    if "wandb" in ([logger] if isinstance(logger, str) else logger) and not found["wandb"]:
        problems.append("wandb has no API key there: set WANDB_API_KEY, or WANDB_MODE=offline, before Ray starts there")
    return problems


def _checkpoint_share(config: DictConfig, nodes: int) -> int:
    """Bytes that one checkpoint takes on each node: every rank writes its own shards."""
    from safetensors import safe_open

    parameters = 0
    for file in Path(os.path.expanduser(config.actor_rollout_ref.model.path)).glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            parameters += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    return parameters * BYTES_PER_PARAMETER // nodes or LEAST_FREE


def _gib(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB"
