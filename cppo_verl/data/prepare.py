"""Write public data sets as parquet files in verl's RL schema.

Each data set gets a folder with train.parquet, validation.parquet or both, and manifest.json: where the rows came from,
how many were dropped and why, and the SHA-256 of each file. Prompts that come with more than one answer are dropped.
"""

import argparse
import json
import os
import shlex
import sys
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cppo_verl.artifacts.atomic import replacing
from cppo_verl.data import reasoning_gym
from cppo_verl.data.dedup import contaminated, deduplicate, text_of
from cppo_verl.data.readers import PROMPTS, Row, read_aime, read_dapo, read_gsm8k, read_prompts, read_sanity_test
from cppo_verl.data.sources import HUB, READERS, HubDataset, Place, choose_places, describe, load, sha256
from cppo_verl.rewards.reasoning_gym import PREFIX

DATASETS = {
    "dapo": "DAPO-Math-17k, deduplicated (train)",
    "aime": "AIME 2024, 2025 and 2026 (validation)",
    "gsm8k": "GSM8K (train and validation)",
    "sanity-test": "1,460 MATH problems that DeepSeek-R1-Distill-Qwen-1.5B solves at times, Precision-RL (train)",
    "reasoning-gym": "one reasoning-gym task (train and validation)",
}
FILES = {"dapo": ["train"], "sanity-test": ["train"], "aime": ["validation"]}
FILES |= dict.fromkeys(["gsm8k", "reasoning-gym"], ["train", "validation"])
# Distinct prompts of a data set on the hub. DAPO's file repeats each of them about a hundred times.
HUB_ROWS = {"dapo": range(17_000, 18_000), "sanity-test": range(1460, 1461)}
AIME_ROWS = 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one subcommand per data set."""
    datasets = parser.add_subparsers(dest="dataset", required=True)
    for name, text in DATASETS.items():
        dataset = datasets.add_parser(name, help=text, description=text)
        dataset.add_argument("--output", type=Path, metavar="FOLDER", help=f"default: data/{name.replace('-', '_')}")
        dataset.add_argument("--force", action="store_true", help="write again, over files that differ")
        rows = "fail unless N rows are left (of train, if there is one)"
        dataset.add_argument("--expect-rows", type=int, metavar="N", help=rows)
        if name == "reasoning-gym":
            dataset.add_argument("task", help="a reasoning-gym name, such as number_sorting")
            dataset.add_argument("--train-size", type=int, default=4096, metavar="N")
            dataset.add_argument("--validation-size", type=int, default=256, metavar="N")
            dataset.add_argument("--seed", type=int, default=0)
            dataset.add_argument("--task-settings", nargs="*", default=[], metavar="KEY=VALUE", help="VALUE is JSON")
        else:
            metavar = {"aime": "YEAR=PLACE", "gsm8k": "train|validation=PLACE"}.get(name, "PLACE")
            revision = "its newest revision" if name == "sanity-test" else "a pinned revision"
            places = f"a file, or a folder of files, of {', '.join(READERS)}, or hf:ID[@REVISION]; several for one "
            places += f"part are joined; default: the hub, at {revision}"
            dataset.add_argument("--source", nargs="+", default=[], metavar=metavar, help=places)
        if name == "aime":
            dataset.add_argument("--years", nargs="+", choices=HUB["aime"], default=list(HUB["aime"]))
            dataset.set_defaults(against=[], drop_contaminated=False)  # nothing of it is trained on
        else:
            against = "validation files of which no problem should be trained on"
            dataset.add_argument("--against", nargs="+", type=Path, default=[], metavar="FILE", help=against)
            dataset.add_argument("--drop-contaminated", action="store_true", help="leave such problems out of train")


def run(args: argparse.Namespace) -> int:
    try:
        prepare(args)
    except (ValueError, OSError) as error:
        print(f"prepare {args.dataset}: {error}", file=sys.stderr)
        return 1
    return 0


def prepare(args: argparse.Namespace) -> None:
    """Write the files that ``args`` asks for, or nothing if they are there already.

    Raises ValueError for input that cannot be used, and FileExistsError for a file that this request did not write. In
    both cases no file is changed.
    """
    folder = args.output or Path("data") / args.dataset.replace("-", "_")
    names = FILES[args.dataset]
    if args.drop_contaminated and not args.against and "validation" not in names:
        raise ValueError(f"--drop-contaminated of {args.dataset} needs the validation files: --against FILE")
    places: dict[str, list[Place]] = {}
    if args.dataset != "reasoning-gym":
        parts_read = args.years if args.dataset == "aime" else HUB[args.dataset]
        places = choose_places(args.dataset, parts_read, args.source)
    request = _request(args, places)
    written = _already_written(folder, names, request, args.force)
    if written:
        _check_count(args, written["files"][f"{names[0]}.parquet"]["deduplicated"], from_hub=False)
        print(f"{folder} is up to date: same request, and the files are as written (--force writes them again)")
        return

    _check_writable(folder)
    sources: list[dict] = []
    parts, files = _read(args.dataset, places, sources) if places else _generate(request)
    from_hub = bool(places) and all(isinstance(p, HubDataset) for part in places.values() for p in part)
    _check_count(args, files[names[0]]["deduplicated"], from_hub)
    if "train" in parts:
        _hold_out(args, parts, files)
    for name in names:
        if not parts[name]:
            raise ValueError(f"no row of {name} is left: {files[name]}")
        _check_rewarded(parts[name])
    _write(folder, parts, files, request=request, sources=sources)


def _request(args: argparse.Namespace, places: dict[str, list[Place]]) -> dict[str, Any]:
    """Return what decides the content of the files, as JSON."""
    against = [sha256(path) for path in args.against]
    request = {"dataset": args.dataset, "against": against, "drop_contaminated": args.drop_contaminated}
    if args.dataset in PROMPTS:
        request["prompt"] = PROMPTS[args.dataset]
    if places:
        return request | {"sources": {part: [describe(place) for place in found] for part, found in places.items()}}
    sizes = {key: getattr(args, key) for key in ("task", "train_size", "validation_size", "seed")}
    return request | sizes | {"task_settings": dict(map(_parse_setting, args.task_settings))}


def _parse_setting(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not key or not separator:
        raise ValueError(f"--task-settings {text}: expected KEY=VALUE")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def _already_written(folder: Path, names: list[str], request: dict, force: bool) -> dict | None:
    """Return the manifest if it and all files are what ``request`` writes, None if there is something to write."""
    manifest_path = folder / "manifest.json"
    present = [path for name in names if (path := folder / f"{name}.parquet").exists()]
    if force or not (present or manifest_path.exists()):
        return None
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
        before = manifest["request"]
        recorded = [manifest["files"][path.name]["sha256"] for path in present]
    except (OSError, ValueError, KeyError, TypeError):
        found = f"{', '.join(map(str, present)) or manifest_path} exists and {manifest_path} does not describe it"
        raise FileExistsError(f"{found}: give another --output, or --force to overwrite it") from None
    if before != request:
        differs = "; ".join(f"{k} was {before.get(k)}, is {v}" for k, v in request.items() if before.get(k) != v)
        raise FileExistsError(f"{folder} holds another request's files ({differs}): give another --output, or --force")
    for path, checksum in zip(present, recorded, strict=True):
        if sha256(path) != checksum:
            raise FileExistsError(f"{path} has changed since it was written: move it away, or give --force")
    return manifest if len(present) == len(names) else None


def _check_writable(folder: Path) -> None:
    """Raise ValueError, before minutes of reading, where ``folder`` can be neither made nor written to."""
    nearest = next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(place))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        what = "is no folder" if not nearest.is_dir() else "cannot be written to"
        raise ValueError(f"{nearest} {what}: give another --output")


def _generate(request: dict) -> tuple[dict[str, list[Row]], dict[str, dict]]:
    """Return rows and counts per file. A question may have several right answers, so nothing is deduplicated."""
    sizes = {key: request[key] for key in ("train_size", "validation_size", "seed")}
    try:
        train, validation = reasoning_gym.make_rows(request["task"], **sizes, **request["task_settings"])
    except (TypeError, AssertionError) as error:
        raise ValueError(f"--task-settings {request['task_settings']} of {request['task']!r}: {error}") from error
    parts = {"train": train, "validation": validation}
    return parts, {name: {"read": request[f"{name}_size"], "deduplicated": len(rows)} for name, rows in parts.items()}


def _read(
    dataset: str, places: dict[str, list[Place]], sources: list[dict]
) -> tuple[dict[str, list[Row]], dict[str, dict]]:
    """Return rows and counts per file; extend ``sources`` by what was read."""
    readers = {"dapo": read_dapo, "aime": read_aime, "gsm8k": read_gsm8k, "sanity-test": read_sanity_test}
    read_rows = readers[dataset]

    def rows(part: str) -> Iterator[Row]:  # a generator: DAPO's 1.8 million rows are not held at once
        for place in places[part]:
            with load(place) as (loaded, name, description):
                sources.append({"part": part, **description})
                yield from read_rows(loaded, name, part)

    parts: dict[str, list[Row]] = {}
    files: dict[str, dict] = {}
    for part in places:
        kept, counts = deduplicate(rows(part))
        dropped = f"{counts['duplicates']} duplicates and {len(counts['conflicting'])} prompts with conflicting answers"
        print(f"{part}: {counts['read']} rows read, {dropped} dropped, {len(kept)} left")
        for conflict in counts["conflicting"][:3]:
            print(f"  {' | '.join(conflict['answers'])}  <-  {conflict['prompt'][:100]}")
        if dataset != "aime":
            parts[part], files[part] = kept, counts
            continue
        if len(kept) != AIME_ROWS:
            read = ", ".join(str(getattr(place, "id", place)) for place in places[part])
            found = f"{len(kept)} are left of {counts['read']} rows"
            raise ValueError(f"AIME {part} has {AIME_ROWS} problems, {found}: are both parts, I and II, in {read}?")
        total = files.setdefault("validation", {"read": 0, "duplicates": 0, "deduplicated": 0})
        for key in total:
            total[key] += counts[key]
        parts.setdefault("validation", []).extend(kept)
    return parts, files


def _check_count(args: argparse.Namespace, rows: int, from_hub: bool) -> None:
    if args.expect_rows not in (None, rows):
        raise ValueError(f"{rows} rows are left, --expect-rows is {args.expect_rows}")
    expected = HUB_ROWS.get(args.dataset) if from_hub and args.expect_rows is None else None
    if expected and rows not in expected:
        numbers = f"{expected[0]} to {expected[-1]}" if len(expected) > 1 else f"{expected[0]}"
        way_out = f"if the data set has changed, say so with --expect-rows {rows}"
        raise ValueError(f"{rows} rows are left, expected {numbers}: {way_out}")


def _hold_out(args: argparse.Namespace, parts: dict[str, list[Row]], files: dict[str, dict]) -> None:
    """Count the training problems that are validation problems; drop them if ``args`` says so."""
    held_out = []
    for path in args.against:
        with load(path) as (loaded, name, _):
            held_out.append([text_of(prompt) for prompt in read_prompts(loaded, name)])
    if "validation" in parts:
        held_out.append([text_of(row["prompt"]) for row in parts["validation"]])
    if not held_out:
        return
    flags = contaminated([text_of(row["prompt"]) for row in parts["train"]], held_out)
    files["train"]["contaminated"] = sum(flags)
    if args.drop_contaminated:
        parts["train"] = [row for row, known in zip(parts["train"], flags, strict=True) if not known]
    done = "dropped" if args.drop_contaminated else "kept (--drop-contaminated drops them)"
    print(f"train: {sum(flags)} of {len(flags)} prompts are validation prompts, {done}")


def _check_rewarded(rows: list[Row]) -> None:
    """Raise ValueError for a data_source that neither verl nor this package has a reward for."""
    with warnings.catch_warnings():
        # verl warns about each engine whose framework is not installed.
        warnings.simplefilter("ignore")
        from verl.utils.reward_score import default_compute_score

    for data_source, row in {row["data_source"]: row for row in rows}.items():
        if data_source.startswith(PREFIX):
            continue
        try:
            default_compute_score(data_source, "", row["reward_model"]["ground_truth"])
        except NotImplementedError:
            raise ValueError(
                f"data_source {data_source!r} is unknown to verl's default_compute_score, training would stop at its "
                "first reward: rename it (math_dapo, aime..., openai/gsm8k) in a local copy"
            ) from None


def _write(folder: Path, parts: dict[str, list[Row]], files: dict[str, dict], **manifest: Any) -> None:
    import pandas

    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.parquet" for name in parts]
    # The manifest is renamed first. If the process is killed between the renames, the manifest still tells its own
    # files from foreign ones, and the same command completes the rest.
    with replacing(folder / "manifest.json", *paths) as (manifest_path, *temporary):
        for (name, rows), path in zip(parts.items(), temporary, strict=True):
            pandas.DataFrame(rows).to_parquet(path, index=False)
            files[name] |= {"rows": len(rows), "sha256": sha256(path)}
        manifest["files"] = {f"{name}.parquet": files[name] for name in parts}
        manifest["command"] = "cppo-verl " + shlex.join(sys.argv[1:])
        packages = ("cppo-verl", "verl", "datasets", "pandas", "pyarrow", "reasoning-gym")
        manifest["versions"] = {package: version(package) for package in packages}
        manifest_path.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for path, rows in zip(paths, parts.values(), strict=True):
        print(f"wrote {path}: {len(rows)} rows")
