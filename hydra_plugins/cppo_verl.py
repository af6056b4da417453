"""hydra's plug-ins of cppo_verl. Every hydra application of the environment imports this file: nothing heavy here."""

from collections.abc import Sequence
from typing import cast

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.utils import JobReturn, JobStatus, configure_log, setup_globals
from hydra.errors import CompactHydraException
from hydra.plugins.launcher import Launcher
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException


class ConfigGroups(SearchPathPlugin):
    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append(provider="cppo_verl", path="pkg://cppo_verl.config")


class Processes(Launcher):
    """hydra/launcher=processes, see config/hydra/launcher/processes.yaml and `cppo_verl.launch.hydra_launcher`."""

    def __init__(self, jobs: int) -> None:
        if not isinstance(jobs, int) or isinstance(jobs, bool) or jobs < 1:
            raise ValueError(f"hydra.launcher.jobs={jobs} is not permitted: an integer >= 1")
        self.jobs = jobs

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.loader, self.config = hydra_context.config_loader, config
        try:
            config.hydra.sweep.dir  # noqa: B018  the sweeper reads it next
        except OmegaConfBaseException as error:
            written = cast(dict, OmegaConf.to_container(config.hydra.sweep))["dir"]
            raise CompactHydraException(
                f"hydra.sweep.dir={written} leads to no folder: give what it refers to one value, one with a comma "
                "in quotes within quotes (\"output='a,b'\"), or add hydra.sweep.dir=FOLDER"
            ) from error

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from cppo_verl.launch.hydra_launcher import sweep

        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        if exit_code := sweep(self.loader, self.config, job_overrides, self.jobs):
            raise SystemExit(exit_code)
        return [JobReturn(overrides=overrides, status=JobStatus.COMPLETED) for overrides in job_overrides]
