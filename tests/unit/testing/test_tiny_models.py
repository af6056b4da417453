"""The tiny tokenizer and model, and the folder that they are saved to."""

import json

import pytest

from cppo_verl.testing import tiny_models

QUESTIONS = ["Sort 12, 7. Answer in 1 line.", "Sort 30, 4. Answer in 1 line."]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_models.build_tokenizer(QUESTIONS, ["7, 12"])


@pytest.fixture(scope="module")
def model(tokenizer):
    sizes = dict(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1
    )
    return tiny_models.build_model(tokenizer, **sizes)


def test_tokenizer_has_a_token_per_digit_and_one_for_the_common_ending(tokenizer):
    ids = tokenizer.encode(QUESTIONS[0], add_special_tokens=False)
    assert tokenizer.decode(ids) == QUESTIONS[0]
    assert tokenizer.convert_ids_to_tokens(ids)[1:3] == ["1", "2"]
    assert tokenizer.convert_ids_to_tokens(ids)[-1].endswith(". Answer in 1 line.")
    assert tokenizer.unk_token_id in tokenizer.encode("other words")


def test_model_has_the_tokenizers_vocabulary(tokenizer, model):
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.head_dim == 32


def test_save_replaces_the_folder_whole_or_not_at_all(tokenizer, model, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    tiny_models.save(model, tokenizer, folder, "made.json", {"seed": 1})
    (folder / "left over").touch()
    tiny_models.save(model, tokenizer, folder, "made.json", {"seed": 2})
    assert json.loads((folder / "made.json").read_text()) == {"seed": 2}
    assert not (folder / "left over").exists()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(tokenizer, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        tiny_models.save(model, tokenizer, folder, "made.json", {"seed": 3})
    assert json.loads((folder / "made.json").read_text()) == {"seed": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_share_of_digits_counts_characters():
    assert tiny_models.share_of_digits("", "12ab", "") == {"score": 0.5, "acc": 0.5}
    assert tiny_models.share_of_digits("", "", "")["score"] == 0.0
