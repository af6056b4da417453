"""The record that a sweep keeps in each job's folder: the job's command, and how its last attempt ended."""

import json
from pathlib import Path

from cppo_verl.artifacts.atomic import replacing

RECORD = "job.json"


def write_record(folder: Path, command: list[str], swept: list[str], exit_code: int | None) -> None:
    """Note a job's command, its swept overrides ("key=value"), and its exit code, None until it has ended."""
    with replacing(folder / RECORD) as (file,):
        file.write_text(json.dumps({"command": command, "swept": swept, "exit_code": exit_code}, indent=1))


def read_record(folder: Path) -> dict | None:
    """Return {"command", "swept", "exit_code"} or None without a record; raise ValueError if it is damaged."""
    try:
        record = json.loads((folder / RECORD).read_text())
        if not all(isinstance(text, str) for key in ("command", "swept") for text in [*record[key]]):
            raise TypeError("its command is no list of texts")
        return {key: record[key] for key in ("command", "swept", "exit_code")}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{folder / RECORD} is damaged ({error!r}): move {folder} away to run it anew") from error


def has_finished(folder: Path, command: list[str]) -> bool:
    """Return whether ``command`` has ended in ``folder`` with exit code 0; raise ValueError if this is another's."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file where a job has its folder: move it, or choose another hydra.sweep.dir")
    if (record := read_record(folder)) is None:  # an attempt that was killed early has left a lock, or temporary files
        if folder.exists() and any(not path.name.startswith("job.") for path in folder.iterdir()):
            raise ValueError(f"{folder} holds what no sweep has made: move it, or choose another hydra.sweep.dir")
        return False
    there, here = set(record["command"]), set(command)
    if there != here:
        raise ValueError(
            f"{folder} holds the run of another command (there: {' '.join(sorted(there - here)) or '-'}; here: "
            f"{' '.join(sorted(here - there)) or '-'}): choose another hydra.sweep.dir, or move it"
        )
    return record["exit_code"] == 0
