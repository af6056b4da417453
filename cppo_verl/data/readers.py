"""One reader per public data set: rows as they are published become rows in verl's RL schema.

A reader takes a ``datasets.Dataset``, its name for messages, and the part that it fills. It yields dicts as `rl_row`
makes them, and raises ValueError with the row's number for a row that cannot be used.
"""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

# The words of DAPO-Math-17k: a policy is asked in validation as it was in training. math_dapo, unlike math_verify,
# compares text and takes 033 for wrong where the answer is 33.
AIME_PROMPT = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n{}\n\nRemember to put your answer on its "
    'own line after "Answer:".'
)
# verl's gsm8k reads the number after "#### " in the last 300 characters.
GSM8K_PROMPT = (
    '{}\n\nReason step by step. The last line of your response should be of the form "#### N" where N is the final '
    "number, written without units."
)

PROMPTS = {"aime": AIME_PROMPT, "gsm8k": GSM8K_PROMPT}
"""{data set: the words around its problems}, where they are not the data set's own."""

Row = dict[str, Any]


def rl_row(data_source: str, prompt: list[dict] | str, ability: str, ground_truth: str, extra_info: dict) -> Row:
    """Return one problem in verl's RL schema; ``data_source`` selects the reward, a string is the user's message."""
    return {
        "data_source": data_source,
        "prompt": [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt,
        "ability": ability,
        "reward_model": {"style": "rule", "ground_truth": ground_truth},
        "extra_info": extra_info,
    }


def read_dapo(dataset: "Dataset", name: str, part: str) -> Iterator[Row]:
    """Read DAPO-Math-17k, which is in verl's schema already."""
    require_columns(dataset, name, "data_source", "prompt", "ability", "reward_model", "extra_info")
    for where, row in numbered_rows(dataset, name):
        if not isinstance(row["extra_info"], dict) or not row["extra_info"]:
            raise ValueError(f"{where}: extra_info must be a dict with the index, got {row['extra_info']!r}")
        yield rl_row(
            _text(row["data_source"], where, "data_source"),
            messages(row["prompt"], where),
            _text(row["ability"], where, "ability"),
            _ground_truth(row, where),
            row["extra_info"],
        )


def read_aime(dataset: "Dataset", name: str, year: str) -> Iterator[Row]:
    """Read one year of AIME. Published copies name their columns differently."""
    problem = _find_column(dataset, name, "problem", "question")
    # A few copies have no column of answers, only solutions with the answer in a box.
    answer = _find_column(dataset, name, "answer", "solution")
    for index, (where, row) in enumerate(numbered_rows(dataset, name)):
        content = AIME_PROMPT.format(_text(row[problem], where, problem))
        value = row[answer]
        if isinstance(value, float) and value.is_integer():  # a CSV column with an empty cell
            value = int(value)
        boxed = re.findall(r"\\boxed\{([^{}]*)\}", str(value))
        digits = (boxed[-1] if boxed else str(value)).strip().strip("$")
        if not re.fullmatch("[0-9]{1,3}", digits):
            raise ValueError(f"{where}: {answer} must be an integer from 0 to 999, got {row[answer]!r}")
        extra_info = {"split": "validation", "index": index, "year": int(year)}
        yield rl_row(f"aime{year[2:]}", content, "math", str(int(digits)), extra_info)


def read_gsm8k(dataset: "Dataset", name: str, part: str) -> Iterator[Row]:
    """Read GSM8K, whose answers end in "#### " and the number."""
    require_columns(dataset, name, "question", "answer")
    for index, (where, row) in enumerate(numbered_rows(dataset, name)):
        content = GSM8K_PROMPT.format(_text(row["question"], where, "question"))
        solution, separator, number = _text(row["answer"], where, "answer").rpartition("####")
        number = number.strip().replace(",", "")
        if not separator or not re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", number):
            raise ValueError(f"{where}: answer must end in #### and a number, got {row['answer'][-80:]!r}")
        extra_info = {"split": part, "index": index, "solution": solution.strip()}
        yield rl_row("openai/gsm8k", content, "math", number, extra_info)


def read_sanity_test(dataset: "Dataset", name: str, part: str) -> Iterator[Row]:
    """Read the sanity test of Precision-RL (arXiv 2510.26788).

    Public code that uses it shows two of its columns: prompt, whose messages ask for a boxed answer themselves, and
    reward_model. The rest of a row is ours: the data set itself could not be fetched where this was written.
    """
    require_columns(dataset, name, "prompt", "reward_model")
    for index, (where, row) in enumerate(numbered_rows(dataset, name)):
        prompt = messages(row["prompt"], where)
        if r"\boxed" not in prompt[-1]["content"]:
            asked = prompt[-1]["content"][-80:]
            raise ValueError(f"{where}: prompt must ask for its answer in \\boxed{{}}, got ...{asked!r}")
        yield rl_row("math", prompt, "math", _ground_truth(row, where), {"split": part, "index": index})


def read_prompts(dataset: "Dataset", name: str) -> list[list[dict]]:
    """Return the prompts of a file in verl's schema, each a list of messages."""
    require_columns(dataset, name, "prompt")
    return [messages(row["prompt"], where) for where, row in numbered_rows(dataset, name)]


def numbered_rows(dataset: "Dataset", name: str) -> Iterator[tuple[str, dict]]:
    """Yield each row with its place for messages, behind a progress bar where there is a terminal."""
    from tqdm import tqdm

    try:
        for index, row in enumerate(tqdm(dataset, desc=name, unit=" rows", disable=None)):
            yield f"{name}, row {index}", row
    except UnicodeDecodeError as error:  # Arrow takes any bytes for text, until they are read
        raise ValueError(f"{name} is not UTF-8: {error}; convert it") from error


def require_columns(dataset: "Dataset", name: str, *columns: str) -> None:
    missing = [column for column in columns if column not in dataset.column_names]
    if missing:
        raise ValueError(f"{name} has no column {', '.join(missing)}; it has {', '.join(dataset.column_names)}")


def messages(prompt: Any, where: str) -> list[dict]:
    """Return the role and the content of each message of ``prompt``, checked."""
    if not isinstance(prompt, list) or not prompt:
        raise ValueError(f"{where}: prompt must be a list of messages, got {prompt!r}")
    for message in prompt:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(f"{where}: a message of prompt must hold role and content, got {message!r}")
    return [{key: _text(message[key], where, f"prompt.{key}") for key in ("role", "content")} for message in prompt]


def _find_column(dataset: "Dataset", name: str, *aliases: str) -> str:
    """Return the column that is called like the first of ``aliases`` that exists; case does not matter."""
    columns = {column.lower(): column for column in dataset.column_names}
    for alias in aliases:
        if alias in columns:
            return columns[alias]
    raise ValueError(f"{name} has no column {' or '.join(aliases)}; it has {', '.join(dataset.column_names)}")


def _ground_truth(row: Row, where: str) -> str:
    """Return the checked ground truth of a row in verl's schema."""
    truth = row["reward_model"]
    if not isinstance(truth, dict) or "ground_truth" not in truth:
        raise ValueError(f"{where}: reward_model must hold ground_truth, got {truth!r}")
    return _text(truth["ground_truth"], where, "reward_model.ground_truth").strip()


def _text(value: Any, where: str, column: str) -> str:
    """Return ``value`` without byte order marks. Raises ValueError for text that no tokenizer should see."""
    if not isinstance(value, str):
        raise ValueError(f"{where}: {column} must be text, got {value!r}")
    value = value.replace("\ufeff", "")
    if not value.strip():
        raise ValueError(f"{where}: {column} is empty")
    if "\0" in value:
        raise ValueError(f"{where}: {column} holds a NUL character, {value[:80]!r}: mend the row in a local copy")
    return value
