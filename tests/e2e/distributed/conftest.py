import pytest
from two_ranks import on_one_node


@pytest.fixture(scope="session")
def on_policy(interrupted, tmp_path_factory):
    """Two ranks on one node, uninterrupted: what a run that was stopped and one on two nodes are compared with."""
    return on_one_node(tmp_path_factory.mktemp("on_policy"), interrupted).finish()
