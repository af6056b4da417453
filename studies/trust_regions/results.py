"""The raw results: a file for each cell, with a row for each seed and step and the cell's settings in its metadata."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from omegaconf import DictConfig

from cppo_verl.artifacts.atomic import replacing

METADATA = b"study"
MAIN_ARM = {"share": 0.05, "rollout": "float32", "staleness": 0}
"""The condition under which learning rates are chosen."""


class Cell(NamedTuple):
    rows: pd.DataFrame
    about: dict[str, Any]
    """method, share, seeds, thresholds, settings, command, versions, and of the loop's runs seconds."""


def file_of(config: DictConfig) -> Path:
    """Where a cell's result belongs."""
    parts = [config.rule, f"h{config.horizon}", f"u{config.updates}", f"share-{config.share}"]
    if config.learning_rate != "chosen":
        parts.append(f"lr-{config.learning_rate}")
    if config.rollout != MAIN_ARM["rollout"]:
        parts.append(config.rollout)
    if config.staleness:
        parts.append(f"stale-{config.staleness}")
    folder = config.seeds if isinstance(config.seeds, str) else "other"
    return Path(config.results_folder, folder, "_".join(parts) + ".parquet")


def write(file: Path, rows: pd.DataFrame, about: dict[str, Any]) -> None:
    """Write a cell whole or not at all, to five decimals."""
    types = {name: np.float32 if rows[name].dtype.kind == "f" else np.int32 for name in rows.columns}
    content = pa.Table.from_pandas(rows.round(5).astype(types), preserve_index=False)
    content = content.replace_schema_metadata({METADATA: json.dumps(about)})
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as (temporary,):
        pq.write_table(content, temporary, compression="zstd", compression_level=19)


def read(file: Path) -> Cell:
    content = pq.read_table(file)
    return Cell(content.to_pandas(), json.loads(content.schema.metadata[METADATA]))


def best_rate(config: DictConfig, grid: Sequence[float]) -> float:
    """The learning rate of the grid at which this method ended highest with this horizon and number of updates.

    Raises:
        FileNotFoundError: the grid has not been run.
    """
    scores = {}
    for rate in grid:
        file = file_of(DictConfig({**config, **MAIN_ARM, "seeds": "grid", "learning_rate": rate}))
        scores[rate] = final_accuracy(read(file).rows).mean()
    return max(scores, key=lambda rate: scores[rate])


def final_accuracy(rows: pd.DataFrame) -> pd.Series:
    """The study's primary metric, {seed: mean accuracy over the last tenth of the steps}."""
    last = rows["step"] > 0.9 * rows["step"].max()
    return rows[last].groupby("seed")["accuracy"].mean()
