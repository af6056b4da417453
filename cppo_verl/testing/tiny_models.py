"""Tiny models for runs without a GPU: a tokenizer made from a task's text, a Qwen with random weights.

The quickstart warms such a model up. A recipe that is shrunk for a check trains it as it is. Nothing is downloaded.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<user>' if m['role'] == 'user' else '<assistant>' }}{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def build_tokenizer(questions: Sequence[str], answers: Sequence[str]) -> "PreTrainedTokenizerFast":
    """Return a fast tokenizer with one token per digit and one per stretch of text between digits.

    The instructions at the end of every question are one token, so that a question is about as long as its numbers.
    Text made of other pieces becomes ``<unk>``.
    """
    tail = os.path.commonprefix([question[::-1] for question in questions])[::-1]
    # ".0" stays with the text after it: the decimals of a whole number carry no information.
    piece = (re.escape(tail) + "|" if tail else "") + r"[0-9]|(?:\.0)?[^0-9]+"
    pieces = sorted({match for text in [*questions, *answers] for match in re.findall(piece, text)})
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    speakers = ["<user>", "<assistant>"]
    vocabulary = ["<pad>", "<eos>", *speakers, "<unk>", *pieces]
    return word_tokenizer(vocabulary, piece, additional_special_tokens=speakers, chat_template=CHAT_TEMPLATE, **special)


def word_tokenizer(
    vocabulary: Sequence[str], piece: str, *, unk_token: str, **settings: Any
) -> "PreTrainedTokenizerFast":
    """Return a fast tokenizer for text that the regular expression ``piece`` cuts up; ids follow ``vocabulary``.

    ``settings`` go to transformers' ``PreTrainedTokenizerFast``.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({text: i for i, text in enumerate(vocabulary)}, unk_token=unk_token))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(piece), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=unk_token,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        **settings,
    )


def build_model(
    tokenizer: "PreTrainedTokenizerBase", architecture: str = "Qwen3", **settings: Any
) -> "PreTrainedModel":
    """Return a randomly initialised model in fp32, of an architecture by transformers' name: Qwen2, Qwen3, Qwen3Moe.

    ``settings`` go to transformers' config. The head size is 32, the smallest that vLLM's attention on the CPU offers;
    its kernel for experts asks for multiples of 32 too.
    """
    import transformers

    config = getattr(transformers, f"{architecture}Config")(
        vocab_size=len(tokenizer),
        head_dim=32,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
        **settings,
    )
    return getattr(transformers, f"{architecture}ForCausalLM")(config)


def save(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", folder: str | Path, marker: str, record: dict
) -> None:
    """Write model, tokenizer and ``record`` to ``folder``, whole or not at all; replace what it held.

    ``record`` becomes the JSON file ``marker``.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        made = Path(temporary, folder.name)
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        (made / marker).write_text(json.dumps(record, indent=2) + "\n")
        if folder.exists():
            shutil.rmtree(folder)
        made.rename(folder)


def share_of_digits(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: dict[str, Any] | None = None, **kwargs: Any
) -> dict[str, float]:
    """Return the share of a response's characters that are digits, as a verl reward.

    A random model never answers right, and prompts whose rewards are all equal stay out of the update: this reward
    differs between responses.
    """
    share = sum(character.isdigit() for character in solution_str) / max(len(solution_str), 1)
    return {"score": share, "acc": share}
