"""Lets hydra find the config groups that this package ships, with nothing on the command line."""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin


class CPPOSearchPath(SearchPathPlugin):
    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append(provider="cppo_verl", path="pkg://cppo_verl.config")


def register_search_path() -> None:
    Plugins.instance().register(CPPOSearchPath)
