"""``python -m cppo_verl prepare``: public data sets as parquet files in verl's RL schema.

Every data set gets a folder with ``train.parquet``, ``validation.parquet`` or both, and ``manifest.json``:
where the rows came from, how many were dropped and why, and the SHA-256 of each file.

Two prompts are equal when they are after Unicode NFC and with every run of white space as one blank. A
prompt that comes with more than one answer is dropped: no reward for it can be right, and refusing the
file would refuse the public DAPO-Math-17k, in which a few such prompts are known. Contamination compares
problems in the same way, without the instruction around them; a reworded problem is not found.
"""

import hashlib
import json
import re
import shlex
import sys
import unicodedata
import warnings
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from cppo_verl.artifacts.atomic import replacing
from cppo_verl.data import reasoning_gym


class Hub(NamedTuple):
    """A data set of the Hugging Face hub; ``split`` None stands for its only one."""

    id: str
    revision: str
    config: str | None = None
    split: str | None = None


# Part -> where its rows come from; parts I and II of an AIME may stand in two data sets. The commits are
# those that other public work pins; none could be fetched where this table was written.
HUB = {
    "dapo": {"train": [Hub("BytedTsinghua-SIA/DAPO-Math-17k", "65877096c24ffa7abc4e4fa5edb95cf3413a5674")]},
    "aime": {
        "2024": [Hub("Maxwell-Jia/AIME_2024", "8d88b2876a82a080e2f172cc9b25d0d9d2cb4792")],
        "2025": [Hub("yentinglin/aime_2025", "6f71d77b0b89b9dabe07ab466c51df33f514df7f")],
        "2026": [Hub("MathArena/aime_2026", "d2de22f3c656b4f56cf8981212186377d1e23bc3")],
    },
    "gsm8k": {
        "train": [Hub("openai/gsm8k", "740312add88f781978c0658806c59bc2815b9866", "main", "train")],
        "validation": [Hub("openai/gsm8k", "740312add88f781978c0658806c59bc2815b9866", "main", "test")],
    },
}
# The public file repeats each of its prompts about a hundred times.
DAPO_ROWS = range(17_000, 18_000)
AIME_ROWS = 30
READERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}

# math_dapo compares text: it does not know that 033 is 33.
AIME_PROMPT = (
    "Solve the competition problem below, reasoning step by step. The last line of your response should be of the "
    "form Answer: $Answer where $Answer is the final integer, written without leading zeros or units.\n\n{}"
)
# verl's gsm8k reads the number after "#### " in the last 300 characters.
GSM8K_PROMPT = (
    '{}\n\nReason step by step. The last line of your response should be of the form "#### N" where N is the final '
    "number, written without units."
)


def add_arguments(parser) -> None:
    """Add one subcommand for each data set to ``parser``, an ``argparse.ArgumentParser``."""
    datasets = parser.add_subparsers(dest="dataset", required=True)
    helps = {
        "dapo": "DAPO-Math-17k, deduplicated (train)",
        "aime": "AIME 2024, 2025 and 2026 (validation)",
        "gsm8k": "GSM8K (train and validation)",
        "reasoning-gym": "one reasoning-gym task (train and validation)",
    }
    for name, text in helps.items():
        dataset = datasets.add_parser(name, help=text, description=text)
        dataset.add_argument("--output", type=Path, metavar="FOLDER", help=f"default: data/{name.replace('-', '_')}")
        dataset.add_argument("--force", action="store_true", help="write again, over files that differ")
        dataset.add_argument(
            "--expect-rows", type=int, metavar="N", help="fail unless N rows are left (of train, if there is one)"
        )
        if name == "reasoning-gym":
            dataset.add_argument("task", help="a reasoning-gym name, such as number_sorting")
            dataset.add_argument("--train-size", type=int, default=4096, metavar="N")
            dataset.add_argument("--validation-size", type=int, default=256, metavar="N")
            dataset.add_argument("--seed", type=int, default=0)
            dataset.add_argument("--task-settings", nargs="*", default=[], metavar="KEY=VALUE", help="VALUE is JSON")
        else:
            part = {"dapo": "", "aime": "YEAR=", "gsm8k": "train|validation="}[name]
            dataset.add_argument(
                "--source",
                nargs="+",
                default=[],
                metavar=f"{part}PLACE",
                help="a file, or a folder of files, of " + ", ".join(READERS) + ", or hf:ID[@REVISION]; several for "
                "one part are joined; without it the hub's, at a pinned revision",
            )
            dataset.add_argument("--revision", help="commit, tag or branch of the hub's data set")
        if name == "aime":
            dataset.add_argument("--years", nargs="+", choices=HUB["aime"], default=list(HUB["aime"]))
        else:
            dataset.add_argument(
                "--against",
                nargs="+",
                type=Path,
                default=[],
                metavar="FILE",
                help="validation files of which no problem should be trained on",
            )
            dataset.add_argument("--drop-contaminated", action="store_true", help="leave such problems out of train")


def run(args) -> int:
    """Prepare what ``add_arguments`` parsed; return 0, or 1 with the reason on stderr and no file changed."""
    try:
        prepare(args)
    except (ValueError, OSError) as error:
        print(f"prepare {args.dataset}: {error}", file=sys.stderr)
        return 1
    return 0


def prepare(args) -> None:
    """Write the files that ``args`` asks for, or nothing where they are already there.

    Raises ValueError for input that cannot be used and FileExistsError for a file that this request did
    not write; no file is changed then.
    """
    folder = args.output or Path("data") / args.dataset.replace("-", "_")
    against = getattr(args, "against", [])
    request = {
        "dataset": args.dataset,
        "against": [_sha256(path) for path in against],
        "drop_contaminated": getattr(args, "drop_contaminated", False),
    }
    if args.dataset == "reasoning-gym":
        names = ["train", "validation"]
        request |= {key: getattr(args, key) for key in ("task", "train_size", "validation_size", "seed")}
        request["task_settings"] = dict(map(_setting, args.task_settings))
    else:
        names = ["validation"] if args.dataset == "aime" else list(HUB[args.dataset])
        places = _places(args)
        request["sources"] = {part: [_describe(place) for place in places[part]] for part in places}

    done = _already(folder, names, request, args.force)
    if done:
        _check_rows(args, done["files"][f"{names[0]}.parquet"]["deduplicated"], from_hub=False)
        print(f"{folder} is up to date: same request, and the files are as written (--force writes them again)")
        return

    sources = []
    if args.dataset == "reasoning-gym":
        parts, files = _reasoning_gym(request)
    else:
        parts, files = _from_places(args.dataset, places, sources)
    from_hub = args.dataset != "reasoning-gym" and all(isinstance(p, Hub) for part in places.values() for p in part)
    _check_rows(args, files[names[0]]["deduplicated"], from_hub)
    if "train" in parts:
        held_out = [_prompts(path) for path in against]
        if "validation" in parts:
            held_out.append([_text_of(row["prompt"]) for row in parts["validation"]])
        if held_out:
            leaked = _leaked([_text_of(row["prompt"]) for row in parts["train"]], held_out)
            files["train"]["contaminated"] = sum(leaked)
            if args.drop_contaminated:
                parts["train"] = [row for row, out in zip(parts["train"], leaked, strict=True) if not out]
            print(
                f"train: {sum(leaked)} of {len(leaked)} prompts are validation prompts, "
                + ("dropped" if args.drop_contaminated else "kept (--drop-contaminated drops them)")
            )
    for name in names:
        if not parts[name]:
            raise ValueError(f"no row of {name} is left: {files[name]}")
        _check_rewarded(parts[name])
    _write(folder, parts, files, request=request, sources=sources)


def _write(folder, parts, files, **manifest) -> None:
    import pandas

    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.parquet" for name in parts]
    # The manifest goes first: wherever a kill falls between the renames, the files that are there can be
    # told from foreign ones, and the same command makes up for the rest.
    with replacing(folder / "manifest.json", *paths) as (manifest_path, *temporary):
        for (name, rows), path in zip(parts.items(), temporary, strict=True):
            pandas.DataFrame(rows).to_parquet(path, index=False)
            files[name] |= {"rows": len(rows), "sha256": _sha256(path)}
        manifest["files"] = {f"{name}.parquet": files[name] for name in parts}
        manifest["command"] = "python -m cppo_verl " + shlex.join(sys.argv[1:])
        packages = ("cppo-verl", "verl", "datasets", "pandas", "pyarrow", "reasoning-gym")
        manifest["versions"] = {package: version(package) for package in packages}
        manifest_path.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for path, rows in zip(paths, parts.values(), strict=True):
        print(f"wrote {path}: {len(rows)} rows")


def _already(folder, names, request, force):
    """The manifest, if it and all files are what ``request`` writes; None if there is something to write."""
    manifest_path = folder / "manifest.json"
    present = {name: folder / f"{name}.parquet" for name in names if (folder / f"{name}.parquet").exists()}
    if force or not present:
        return None
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
        before = manifest["request"]
        recorded = {name: manifest["files"][path.name]["sha256"] for name, path in present.items()}
    except (OSError, ValueError, KeyError, TypeError):
        raise FileExistsError(
            f"{', '.join(map(str, present.values()))} exists and {manifest_path} does not describe it: give another "
            "--output, or --force to overwrite it"
        ) from None
    if before != request:
        differs = "; ".join(f"{k} was {before.get(k)}, is {v}" for k, v in request.items() if before.get(k) != v)
        raise FileExistsError(f"{folder} holds another request's files ({differs}): give another --output, or --force")
    for name, path in present.items():
        if _sha256(path) != recorded[name]:
            raise FileExistsError(f"{path} has changed since it was written: move it away, or give --force")
    return manifest if len(present) == len(names) else None


def _check_rows(args, rows, from_hub) -> None:
    if args.expect_rows is not None:
        if rows != args.expect_rows:
            raise ValueError(f"{rows} rows are left, --expect-rows is {args.expect_rows}")
    elif args.dataset == "dapo" and from_hub and rows not in DAPO_ROWS:
        raise ValueError(
            f"{rows} rows are left, expected {DAPO_ROWS[0]} to {DAPO_ROWS[-1]}: if the data set has changed, say so "
            f"with --expect-rows {rows}"
        )


def _check_rewarded(rows) -> None:
    """Raise ValueError for a data_source for which neither verl nor this package has a reward."""
    with warnings.catch_warnings():
        # verl warns of each engine whose framework is not installed.
        warnings.simplefilter("ignore")
        from verl.utils.reward_score import default_compute_score

    for data_source, row in {row["data_source"]: row for row in rows}.items():
        if data_source.startswith(reasoning_gym.PREFIX):
            continue
        try:
            default_compute_score(data_source, "", row["reward_model"]["ground_truth"])
        except NotImplementedError:
            raise ValueError(
                f"data_source {data_source!r} is unknown to verl's default_compute_score, training would stop at its "
                "first reward: rename it (math_dapo, aime..., openai/gsm8k) in a local copy"
            ) from None


# Where the rows come from.


def _places(args) -> dict[str, list]:
    """Part -> its places, each a Path or a Hub: what --source gives, and the table's for the other parts."""
    table = HUB[args.dataset]
    parts = list(dict.fromkeys(args.years)) if args.dataset == "aime" else list(table)
    given = {}
    for text in args.source:
        part, _, place = text.partition("=")
        if part not in parts and len(parts) == 1:
            part, place = parts[0], text
        if part not in parts or not place:
            raise ValueError(f"--source {text}: expected PART=PLACE, where PART is one of {', '.join(parts)}")
        if place.startswith("hf:"):
            name, _, revision = place.removeprefix("hf:").partition("@")
            place = table[part][0]._replace(id=name, revision=revision or "main")
        else:
            place = Path(place)
        given.setdefault(part, []).append(place)
    places = {part: given.get(part, table[part]) for part in parts}
    if args.revision:
        ids = {place.id for part in places.values() for place in part if isinstance(place, Hub)}
        if len(ids) != 1:
            raise ValueError(
                f"--revision {args.revision} needs one hub data set, this command reads {sorted(ids) or 'local files'}"
                f": pin each of them, --source {parts[0]}=hf:ID@REVISION"
            )
        for part, found in places.items():
            places[part] = [p._replace(revision=args.revision) if isinstance(p, Hub) else p for p in found]
    return places


def _local_files(path) -> list[Path]:
    """The readable files at ``path``, all of one kind."""
    if not path.exists():
        raise ValueError(f"{path} does not exist; a data set of the hub is written hf:ID")
    files = sorted(f for f in path.iterdir() if f.suffix.lower() in READERS) if path.is_dir() else [path]
    if len({READERS.get(file.suffix.lower()) for file in files} - {None}) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise ValueError(f"{path}: expected files of one kind of {', '.join(READERS)}, found {names}")
    return files


def _describe(place) -> dict:
    """What makes two places the same, as JSON: a local file is its content, wherever it lies."""
    if isinstance(place, Hub):
        return place._asdict()
    return {"files": {file.name: _sha256(file) for file in _local_files(place)}}


def _load(place):
    """The ``datasets.Dataset`` at ``place``, its name for messages, and its description with the commit resolved."""
    import datasets

    try:
        if isinstance(place, Hub):
            name, way_out = f"{place.id}@{place.revision}", "without the network give a local copy with --source"
            if not re.fullmatch("[0-9a-f]{40}", place.revision):
                from huggingface_hub import HfApi

                place = place._replace(revision=HfApi().dataset_info(place.id, revision=place.revision).sha)
            loaded = datasets.load_dataset(place.id, place.config, split=place.split, revision=place.revision)
        else:
            name, way_out = str(place), "is it whole, not empty, and UTF-8?"
            files = _local_files(place)
            kind = READERS[files[0].suffix.lower()]
            loaded = datasets.load_dataset(kind, data_files=[str(file) for file in files], split="train")
    # What can go wrong here is anything that the hub, the network and four parsers raise.
    except Exception as error:
        reason = error.__cause__ or error
        raise ValueError(f"cannot read {name}: {type(reason).__name__}: {reason}; {way_out}") from error
    if isinstance(loaded, dict):
        if len(loaded) != 1:
            raise ValueError(f"{name} has the splits {', '.join(loaded)}; expected one: give a local copy of it")
        (loaded,) = loaded.values()
    if not len(loaded):
        raise ValueError(f"{name} holds no rows")
    return loaded, name, _describe(place)


def _from_places(dataset, places, sources):
    """Rows of each file, and its counts; ``sources`` is extended by what was read."""
    read_rows = {"dapo": _dapo, "aime": _aime, "gsm8k": _gsm8k}[dataset]

    def rows(part):  # a generator: DAPO's 1.8 million rows are not held at once
        for place in places[part]:
            loaded, name, description = _load(place)
            sources.append({"part": part, **description})
            yield from read_rows(loaded, name, part)

    parts, files = {}, {}
    for part in places:
        kept, counts = deduplicate(rows(part))
        print(
            f"{part}: {counts['read']} rows read, {counts['duplicates']} duplicates and {len(counts['conflicting'])} "
            f"prompts with conflicting answers dropped, {len(kept)} left"
        )
        for conflict in counts["conflicting"][:3]:
            print(f"  {' | '.join(conflict['answers'])}  <-  {conflict['prompt'][:100]}")
        if dataset == "aime":
            if len(kept) != AIME_ROWS:
                raise ValueError(
                    f"AIME {part} has {AIME_ROWS} problems, {len(kept)} are left of {counts['read']} rows: are both "
                    f"parts, I and II, in {', '.join(str(p.id if isinstance(p, Hub) else p) for p in places[part])}?"
                )
            total = files.setdefault("validation", {"read": 0, "duplicates": 0, "deduplicated": 0})
            for key in total:
                total[key] += counts[key]
            parts.setdefault("validation", []).extend(kept)
        else:
            parts[part], files[part] = kept, counts
    return parts, files


def deduplicate(rows) -> tuple[list[dict], dict]:
    """The first row of each prompt that has one answer only, and the counts.

    ``read = duplicates + len(conflicting) + deduplicated``; ``conflicting`` lists the prompts that were
    dropped with their answers.
    """
    first, answers, read = {}, {}, 0
    for row in rows:
        read += 1
        prompt = normalise(_text_of(row["prompt"]))
        first.setdefault(prompt, row)
        answers.setdefault(prompt, {})[row["reward_model"]["ground_truth"]] = None
    kept = [row for prompt, row in first.items() if len(answers[prompt]) == 1]
    conflicting = [{"prompt": p, "answers": list(found)} for p, found in answers.items() if len(found) > 1]
    duplicates = read - len(first)
    return kept, {"read": read, "duplicates": duplicates, "conflicting": conflicting, "deduplicated": len(kept)}


def _reasoning_gym(request):
    # Nothing is deduplicated: its questions may have several right answers, and the verifier knows them.
    try:
        train, validation = reasoning_gym.make_rows(
            request["task"],
            train_size=request["train_size"],
            validation_size=request["validation_size"],
            seed=request["seed"],
            **request["task_settings"],
        )
    except (TypeError, AssertionError) as error:
        raise ValueError(f"--task-settings {request['task_settings']} of {request['task']!r}: {error}") from error
    files = {
        "train": {"read": request["train_size"], "deduplicated": len(train)},
        "validation": {"read": len(validation), "deduplicated": len(validation)},
    }
    return {"train": train, "validation": validation}, files


def _setting(text):
    key, separator, value = text.partition("=")
    if not key or not separator:
        raise ValueError(f"--task-settings {text}: expected KEY=VALUE")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


# One reader for each data set: loaded data set, its name, part -> rows in verl's schema.


def _dapo(dataset, name, part):
    _require(dataset, name, "data_source", "prompt", "ability", "reward_model", "extra_info")
    for where, row in _progress(dataset, name):
        truth = row["reward_model"]
        if not isinstance(truth, dict) or "ground_truth" not in truth:
            raise ValueError(f"{where}: reward_model must hold ground_truth, got {truth!r}")
        if not isinstance(row["extra_info"], dict) or not row["extra_info"]:
            raise ValueError(f"{where}: extra_info must be a dict with the index, got {row['extra_info']!r}")
        yield _row(
            _text(row["data_source"], where, "data_source"),
            _messages(row["prompt"], where),
            _text(row["ability"], where, "ability"),
            _text(truth["ground_truth"], where, "reward_model.ground_truth").strip(),
            row["extra_info"],
        )


def _aime(dataset, name, year):
    problem = _column(dataset, name, "problem", "question")
    # A few copies have no column of answers, only solutions with the answer in a box.
    answer = _column(dataset, name, "answer", "solution")
    for index, (where, row) in enumerate(_progress(dataset, name)):
        content = AIME_PROMPT.format(_text(row[problem], where, problem))
        value = row[answer]
        if isinstance(value, float) and value.is_integer():  # a CSV column with an empty cell
            value = int(value)
        boxed = re.findall(r"\\boxed\{([^{}]*)\}", str(value))
        digits = (boxed[-1] if boxed else str(value)).strip().strip("$")
        if not re.fullmatch("[0-9]{1,3}", digits):
            raise ValueError(f"{where}: {answer} must be an integer from 0 to 999, got {row[answer]!r}")
        extra_info = {"split": "validation", "index": index, "year": int(year)}
        yield _row(f"aime{year[2:]}", _user(content), "math", str(int(digits)), extra_info)


def _gsm8k(dataset, name, part):
    _require(dataset, name, "question", "answer")
    for index, (where, row) in enumerate(_progress(dataset, name)):
        content = GSM8K_PROMPT.format(_text(row["question"], where, "question"))
        solution, separator, number = _text(row["answer"], where, "answer").rpartition("####")
        number = number.strip().replace(",", "")
        if not separator or not re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", number):
            raise ValueError(f"{where}: answer must end in #### and a number, got {row['answer'][-80:]!r}")
        extra_info = {"split": part, "index": index, "solution": solution.strip()}
        yield _row("openai/gsm8k", _user(content), "math", number, extra_info)


def _row(data_source, prompt, ability, ground_truth, extra_info):
    return {
        "data_source": data_source,
        "prompt": prompt,
        "ability": ability,
        "reward_model": {"style": "rule", "ground_truth": ground_truth},
        "extra_info": extra_info,
    }


def _user(content):
    return [{"role": "user", "content": content}]


def _progress(dataset, name):
    from tqdm import tqdm

    try:
        for index, row in enumerate(tqdm(dataset, desc=name, unit=" rows", disable=None)):
            yield f"{name}, row {index}", row
    except UnicodeDecodeError as error:  # Arrow takes any bytes for text, until they are read
        raise ValueError(f"{name} is not UTF-8: {error}; convert it") from error


def _require(dataset, name, *columns):
    missing = [column for column in columns if column not in dataset.column_names]
    if missing:
        raise ValueError(f"{name} has no column {', '.join(missing)}; it has {', '.join(dataset.column_names)}")


def _column(dataset, name, *aliases):
    """The column called as the first of ``aliases`` that there is, in any case."""
    columns = {column.lower(): column for column in dataset.column_names}
    for alias in aliases:
        if alias in columns:
            return columns[alias]
    raise ValueError(f"{name} has no column {' or '.join(aliases)}; it has {', '.join(dataset.column_names)}")


def _text(value, where, column) -> str:
    """``value`` without byte order marks; raises ValueError for what is not text that a tokenizer should see."""
    if not isinstance(value, str):
        raise ValueError(f"{where}: {column} must be text, got {value!r}")
    value = value.replace("\ufeff", "")
    if not value.strip():
        raise ValueError(f"{where}: {column} is empty")
    if "\0" in value:
        raise ValueError(f"{where}: {column} holds a NUL character, {value[:80]!r}: mend the row in a local copy")
    return value


def _messages(prompt, where) -> list[dict]:
    if not isinstance(prompt, list) or not prompt:
        raise ValueError(f"{where}: prompt must be a list of messages, got {prompt!r}")
    for message in prompt:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(f"{where}: a message of prompt must hold role and content, got {message!r}")
    return [{key: _text(message[key], where, f"prompt.{key}") for key in ("role", "content")} for message in prompt]


# Equality of prompts.


def normalise(text: str) -> str:
    """``text`` in Unicode NFC, without byte order marks, every run of white space one blank."""
    return " ".join(unicodedata.normalize("NFC", text.replace("\ufeff", "")).split())


def _text_of(messages) -> str:
    return "\n\n".join(message["content"] for message in messages)


def _prompts(path) -> list[str]:
    """The prompts of a file in verl's schema."""
    loaded, name, _ = _load(path)
    _require(loaded, name, "prompt")
    return [_text_of(_messages(row["prompt"], where)) for where, row in _progress(loaded, name)]


def _leaked(train, held_out) -> list[bool]:
    """Which of the prompts ``train`` pose a problem that one of the lists ``held_out`` of prompts poses."""
    problems = {problem for prompts in held_out for problem in _problems(prompts)}
    return [problem in problems for problem in _problems(train)]


def _problems(prompts) -> list[str]:
    """The normalised problem of each prompt of one file.

    Files word their instructions differently, so whole prompts of two files are hardly ever equal. The first
    and the last paragraph are taken for instructions where more than half of the file's prompts share them.
    """
    split = [[normalise(p) for p in re.split(r"\n\s*\n", prompt) if p.strip()] for prompt in prompts]
    distinct = {tuple(paragraphs) for paragraphs in split}
    for end in (0, -1):
        counts = Counter(paragraphs[end] for paragraphs in distinct)
        for paragraphs in split:
            if len(paragraphs) > 1 and 2 * counts[paragraphs[end]] > len(distinct) > 1:
                paragraphs.pop(end)
    return [" ".join(paragraphs) for paragraphs in split]


def _sha256(path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
