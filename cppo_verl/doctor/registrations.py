"""Which parts of the plug-in verl knows in a process, for the doctor here and on the other nodes of a cluster."""

import warnings


def registrations() -> dict[str, bool]:
    """Whether verl knows each part of the plug-in in this process."""
    with warnings.catch_warnings():
        # verl warns of each engine whose framework is not installed.
        warnings.simplefilter("ignore")
        import verl  # noqa: F401  loads the plug-in
        from hydra.core.plugins import Plugins
        from hydra.plugins.search_path_plugin import SearchPathPlugin
        from verl.plugin.platform import PlatformRegistry, get_platform
        from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY
        from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY
        from verl.workers.engine import EngineRegistry
        from verl.workers.rollout.replica import RolloutReplicaRegistry

    from cppo_verl.plugin.constants import LOSS_MODES, TOP_K_ROLLOUT, TRAINER_MODES

    search_paths = Plugins.instance().discover(SearchPathPlugin)
    found = {
        "policy losses": set(LOSS_MODES) <= POLICY_LOSS_REGISTRY.keys(),
        "trainers": set(TRAINER_MODES) <= TRAINER_REGISTRY.keys(),
        "top-K rollout": TOP_K_ROLLOUT in RolloutReplicaRegistry._registry,
        "hydra groups": any(plugin.__module__ == "hydra_plugins.cppo_verl" for plugin in search_paths),
        "platform cpu": PlatformRegistry.get("cpu") is not None,
    }
    if get_platform().device_name == "cpu":
        try:
            engine = EngineRegistry.get_engine_cls("language_model", "fsdp2").__module__
        except ValueError:
            engine = ""
        found["FSDP2 engine on cpu"] = engine.startswith("cppo_verl")
    return found
