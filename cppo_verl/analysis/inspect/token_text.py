"""The text of single tokens, made readable."""

import unicodedata
from collections.abc import Iterable
from functools import cache
from itertools import pairwise

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

_BYTES = {character: byte for byte, character in bytes_to_unicode().items()}
"""The byte that a character stands for in the names of GPT-2's byte-level tokens."""
_SHOWN = {" ": "·", "\n": "¶", "\t": "\\t", "\r": "\\r"}


@cache
def load(path: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer at ``path``, or of that name in the local cache, without network and without running its code.

    Raises:
        ValueError: there is no tokenizer, or it is not readable.
    """
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a damaged file may raise anything
        lines = str(error).splitlines()
        raise ValueError(lines[0] if lines else type(error).__name__) from error


def of_dump(header: dict, folder: str | None, notes: list[str]) -> PreTrainedTokenizerBase | None:
    """The tokenizer in ``folder``, by default the one that the dump's header names; None, with a note, without any."""
    path = folder or header.get("tokenizer")
    if not isinstance(path, str):
        notes.append("the dump names no tokenizer: tokens are shown without text; give --tokenizer FOLDER")
        return None
    try:
        return load(path)
    except ValueError as error:
        notes.append(f"no tokenizer at {path} ({error}): tokens are shown without text; give --tokenizer FOLDER")
        return None


def texts(tokenizer: PreTrainedTokenizerBase | None, ids: Iterable[int]) -> dict[int, str]:
    """{id: its text with invisible characters made visible, or the id in brackets if it has no text}."""
    shown = {}
    for token in ids:
        text = None if tokenizer is None else _text(tokenizer, token)
        shown[token] = f"‹{token}›" if not text else visible(text)
    return shown


def _text(tokenizer: PreTrainedTokenizerBase, token: int) -> str | None:
    if not 0 <= token < len(tokenizer):
        return None
    name = str(tokenizer.convert_ids_to_tokens(token))
    text = str(tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False))
    if "\ufffd" in text:  # bytes that are not a whole character
        try:
            return bytes(_BYTES[character] for character in name).decode(errors="backslashreplace")
        except KeyError:
            return name
    # SentencePiece's decoder drops the blank before a word from a token on its own.
    return f" {text}" if name.startswith("▁") and not text.startswith(" ") else text


def visible(text: str) -> str:
    """Replace blanks, line ends, control and format characters by signs; give a combining character a base."""
    return "".join(_sign(character, before) for before, character in pairwise(f" {text}"))


def _sign(character: str, before: str) -> str:
    category = unicodedata.category(character)[0]
    if character in _SHOWN:
        return _SHOWN[character]
    if category in "CZ":
        return f"‹U+{ord(character):04X}›"
    return f"◌{character}" if category == "M" and before in _SHOWN else character
