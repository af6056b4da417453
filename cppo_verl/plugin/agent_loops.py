"""The agent loop for DeepSeek's distilled Qwens, for which verl 0.9.1 has none that starts."""

from typing import Any

from verl.experimental.agent_loop.agent_loop import register
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop


@register("single_turn_deepseek")
class DeepSeekSingleTurn(SingleTurnAgentLoop):
    """verl's single turn for models that have a Qwen's layers and DeepSeek's chat template.

    verl chooses by config.json's model_type what joins the turns of a chat. For theirs, qwen2, it asks the tokenizer
    for <|im_end|>. They have no such token, and every prompt fails (verl's issue 7637).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | {"hf_model_type": "deepseek_v3"})
