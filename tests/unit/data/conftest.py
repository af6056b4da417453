import argparse
import unicodedata

import datasets
import pytest
from prepared import dapo_row, write


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def planted(tmp_path):
    """11 rows: 5 prompts, of which one is repeated in four writings and one has two answers."""
    cafe = "A caf\u00e9 sells 3 cakes"
    content = [
        dapo_row(cafe, "3"),
        dapo_row("Second", "2"),
        dapo_row(unicodedata.normalize("NFD", cafe), "3"),
        dapo_row("A caf\u00e9  sells\u00a03\ncakes", " 3"),
        dapo_row("\ufeff" + cafe, "3"),
        dapo_row("Torn", "5"),
        dapo_row("Torn", "6"),
        dapo_row("Torn", "5"),
        dapo_row("Second", "2"),
        dapo_row("second", "7"),
        dapo_row("Last", "-1"),
    ]
    return write(tmp_path / "in" / "dapo.parquet", content)


@pytest.fixture
def hub(monkeypatch):
    """A hub that serves what a test puts in; ``asked`` holds the calls."""

    def load_dataset(name, config=None, *, split=None, revision=None):
        hub.asked.append((name, config, split, revision))
        if name not in hub.serves:
            raise ConnectionError("no route to the hub")
        return datasets.Dataset.from_list(hub.serves[name])

    hub = argparse.Namespace(asked=[], serves={})
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return hub
