"""The text of single tokens."""

import json

import pytest
from tokenizers_made import BLANKLESS, save_tokenizer

from cppo_verl.analysis.inspect import token_text


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_every_token_has_something_to_see(tokenizer):
    loaded = token_text.load(str(tokenizer))
    shown = token_text.texts(loaded, [*range(266), 266, -1, 10**9])
    assert shown[ord("a")] == "a" and shown[0xE2] == r"\xe2" and shown[0x0A] == "¶" and shown[0x20] == "·"
    assert shown[0x00] == "‹U+0000›" and shown[0x7F] == "‹U+007F›"
    assert [shown[256 + i] for i in range(9)] == [*BLANKLESS, "‹U+202E›tfel", "◌\u0301", "·¶"]
    assert shown[265] == "<eos>"
    assert (shown[266], shown[-1], shown[10**9]) == ("‹266›", "‹-1›", "‹1000000000›")
    assert token_text.texts(None, [7]) == {7: "‹7›"}


def test_a_sentencepiece_token_keeps_its_blank():
    class Pieces:
        def __len__(self):
            return 1

        def convert_ids_to_tokens(self, token):
            return "▁word"

        def decode(self, tokens, **kwargs):
            return "word"

    assert token_text.texts(Pieces(), [0]) == {0: "·word"}


def test_a_tokenizer_that_brings_code_is_refused_and_the_code_is_not_run(tmp_path):
    save_tokenizer(tmp_path)
    config = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": [None, "mine.Mine"]}, "trust_remote_code": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')")
    notes = []
    assert token_text.of_dump({"tokenizer": str(tmp_path)}, None, notes) is None
    assert "contains custom code" in notes[0] and not (tmp_path / "owned").exists()
