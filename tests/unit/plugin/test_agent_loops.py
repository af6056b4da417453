import asyncio
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from verl.experimental.agent_loop.agent_loop import DictConfigWrap, _agent_loop_registry
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop

from cppo_verl.plugin.agent_loops import DeepSeekSingleTurn

TEMPLATE = "{% for m in messages %}<｜User｜>{{ m.content }}{% endfor %}<｜Assistant｜>"


@pytest.fixture(scope="module")
def tokenizer():
    """Like that of DeepSeek-R1-Distill-Qwen: a Qwen's bytes, DeepSeek's markers, no unknown token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_alone = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    markers = ["<｜User｜>", "<｜Assistant｜>"]
    return PreTrainedTokenizerFast(
        tokenizer_object=bytes_alone,
        eos_token="<｜end▁of▁sentence｜>",
        extra_special_tokens=markers,
        chat_template=TEMPLATE,
    )


def make(loop, tokenizer, compose):
    config = compose("data.max_prompt_length=16")
    wrapped = (DictConfigWrap(config), DictConfigWrap(config.data))

    async def made():  # an agent loop asks for the event loop that it runs in
        return loop(wrapped[0], SimpleNamespace(), tokenizer, None, SimpleNamespace, wrapped[1], hf_model_type="qwen2")

    return asyncio.run(made())


def test_it_is_registered_by_its_name():
    target = OmegaConf.select(OmegaConf.create(_agent_loop_registry), "single_turn_deepseek._target_")
    assert target == "cppo_verl.plugin.agent_loops.DeepSeekSingleTurn"


def test_verls_own_does_not_start_for_a_distilled_qwen(tokenizer, compose):
    """It is not needed any more once this fails."""
    with pytest.raises(ValueError, match="does not define required token"):
        make(SingleTurnAgentLoop, tokenizer, compose)


def test_it_builds_a_distilled_qwens_prompt_by_its_own_template(tokenizer, compose):
    builder = make(DeepSeekSingleTurn, tokenizer, compose).continuous_token_builder
    prompt = builder.build_initial_tokens([{"role": "user", "content": "1+1?"}])
    assert "".join(tokenizer.convert_ids_to_tokens(prompt)) == "<｜User｜>1+1?<｜Assistant｜>"
