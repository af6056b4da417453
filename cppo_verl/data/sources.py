"""Where the rows of a data set come from: the Hugging Face hub at a pinned commit, or local files."""

import hashlib
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple


class HubDataset(NamedTuple):
    """A data set of the Hugging Face hub at one revision."""

    id: str
    revision: str
    config: str | None = None
    split: str | None = None
    """None takes the only one, and refuses a data set that has several."""


Place = HubDataset | Path

# {data set: {part: places that are read one after the other}}. The commits are those that other public work pins; none
# could be fetched where this table was written. None was found for the sanity test: its branch is resolved when read.
HUB: dict[str, dict[str, list[HubDataset]]] = {
    "dapo": {"train": [HubDataset("BytedTsinghua-SIA/DAPO-Math-17k", "65877096c24ffa7abc4e4fa5edb95cf3413a5674")]},
    "aime": {
        "2024": [HubDataset("Maxwell-Jia/AIME_2024", "8d88b2876a82a080e2f172cc9b25d0d9d2cb4792")],
        "2025": [HubDataset("yentinglin/aime_2025", "6f71d77b0b89b9dabe07ab466c51df33f514df7f")],
        "2026": [HubDataset("MathArena/aime_2026", "d2de22f3c656b4f56cf8981212186377d1e23bc3")],
    },
    "gsm8k": {
        "train": [HubDataset("openai/gsm8k", "740312add88f781978c0658806c59bc2815b9866", "main", "train")],
        "validation": [HubDataset("openai/gsm8k", "740312add88f781978c0658806c59bc2815b9866", "main", "test")],
    },
    "sanity-test": {"train": [HubDataset("sail/Sanity-Test-R1D-1.5B", "main", split="train")]},
}
READERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}
"""{suffix of a file: the builder of the `datasets` library that reads it}."""


def choose_places(dataset: str, parts: Iterable[str], sources: Iterable[str]) -> dict[str, list[Place]]:
    """Return {part: its places} for the ``parts`` of a data set of `HUB`: what ``--source`` gives, else the hub's.

    Each of ``sources`` is "PART=PLACE", or "PLACE" where there is one part. Raises ValueError for one without a part.
    """
    table, wanted = HUB[dataset], list(dict.fromkeys(parts))
    given: dict[str, list[Place]] = {}
    for text in sources:
        part, _, place = text.partition("=")
        if part not in wanted and len(wanted) == 1:
            part, place = wanted[0], text
        if part not in wanted or not place:
            raise ValueError(f"--source {text}: expected PART=PLACE, where PART is one of {', '.join(wanted)}")
        given.setdefault(part, []).append(_parse_place(place, table[part][0]))
    return {part: given.get(part, list(table[part])) for part in wanted}


def _parse_place(text: str, default: HubDataset) -> Place:
    if not text.startswith("hf:"):
        return Path(text)
    name, _, revision = text.removeprefix("hf:").partition("@")
    return default._replace(id=name, revision=revision or "main")


def describe(place: Place) -> dict[str, Any]:
    """Return what identifies a place, as JSON: for local files their content, wherever they are."""
    if isinstance(place, HubDataset):
        return place._asdict()
    return {"files": {file.name: sha256(file) for file in _local_files(place)}}


@contextmanager
def load(place: Place) -> Iterator[tuple[Any, str, dict[str, Any]]]:
    """Give the ``datasets.Dataset`` at ``place``, its name for messages, and its description.

    Local files are read and described from copies that last as long as the context: a file may change meanwhile, its
    path may look like a pattern, and the `datasets` library tells a file that it has read before by path and time.
    A branch or tag of the hub is resolved first, so that the description holds the commit. Raises ValueError with the
    way out for what cannot be read, has several splits, or holds no rows.
    """
    import datasets

    if isinstance(place, HubDataset):
        name, way_out = f"{place.id}@{place.revision}", "without the network give a local copy with --source"
    else:
        name, way_out = str(place), "is it whole, not empty, and UTF-8?"
    Path(datasets.config.HF_DATASETS_CACHE).mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="prepare-", dir=datasets.config.HF_DATASETS_CACHE) as folder:
        try:
            if isinstance(place, HubDataset):
                place = _at_commit(place)
                loaded = datasets.load_dataset(place.id, place.config, split=place.split, revision=place.revision)
                description = describe(place)
            else:
                files = _local_files(place)
                kind = READERS[files[0].suffix.lower()]
                copies = [shutil.copyfile(file, Path(folder, f"{n}{file.suffix}")) for n, file in enumerate(files)]
                paths = list(map(str, copies))
                loaded = datasets.load_dataset(kind, data_files=paths, split="train", cache_dir=f"{folder}/cache")
                description = {"files": {file.name: sha256(x) for file, x in zip(files, copies, strict=True)}}
        # The hub, the network and four parsers each raise errors of their own.
        except Exception as error:
            reason = error.__cause__ or error
            raise ValueError(f"cannot read {name}: {type(reason).__name__}: {reason}; {way_out}") from error
        if isinstance(loaded, dict):
            if len(loaded) != 1:
                raise ValueError(f"{name} has the splits {', '.join(loaded)}; expected one: give a local copy of it")
            (loaded,) = loaded.values()
        if not len(loaded):
            raise ValueError(f"{name} holds no rows")
        yield loaded, name, description


def _at_commit(place: HubDataset) -> HubDataset:
    if re.fullmatch("[0-9a-f]{40}", place.revision):
        return place
    from huggingface_hub import HfApi

    commit = HfApi().dataset_info(place.id, revision=place.revision).sha
    if commit is None:
        raise ValueError("the hub names no commit for it")
    return place._replace(revision=commit)


def _local_files(path: Path) -> list[Path]:
    """Return the readable files at ``path``, all of one kind."""
    if not path.exists():
        raise ValueError(f"{path} does not exist; a data set of the hub is written hf:ID")
    files = sorted(f for f in path.iterdir() if f.suffix.lower() in READERS) if path.is_dir() else [path]
    if len({READERS.get(file.suffix.lower()) for file in files} - {None}) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise ValueError(f"{path}: expected files of one kind of {', '.join(READERS)}, found {names}")
    return files


def sha256(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
