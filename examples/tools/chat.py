"""The tool example's model: a tiny Qwen3 in Qwen's chat format that half knows when to call a tool, and how."""

import re

import calculator
import torch
import warmup  # the quickstart's
from verl.tools.function_tool import get_function_tool

from cppo_verl.testing import tiny_models

PAD, START, END, UNKNOWN = "<|pad|>", "<|im_start|>", "<|im_end|>", "<unk>"
# Qwen's format for conversations with tools (Hermes'), without its instructions.
CHAT_TEMPLATE = """\
{%- if tools %}{{ '<|im_start|>system\\n' + (tools | tojson) + '<|im_end|>\\n' }}{% endif %}
{%- for m in messages %}
    {%- if m.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content }}
        {%- for call in m.tool_calls or [] %}
            {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
TOOLS = [get_function_tool("calculator").tool_schema.model_dump(exclude_unset=True, exclude_none=True)]
CALLS = 0.4  # share of the demonstrations that call the tool; the others guess
EXPRESSION = r"[0-9]+ \* [0-9]+"


def build_tokenizer(questions):
    """A fast tokenizer with one token per digit, line break, marker of the chat, and stretch of text between them."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    piece = r"[0-9]|\n|<\|\w+\|>|[^0-9\n<]+|<[^<0-9\n|]*"
    template = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel()), chat_template=CHAT_TEMPLATE)
    texts = [
        template.apply_chat_template(conversation(question, *turns), tools=TOOLS, tokenize=False)
        for question in questions
        for turns in (("0123456789 * 0", "0", "0"), ("0",))
    ]
    pieces = sorted({match for text in texts for match in re.findall(piece, text)} - {START, END})
    vocabulary = [PAD, START, END, UNKNOWN, *pieces]
    return tiny_models.word_tokenizer(
        vocabulary,
        piece,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
    )


def conversation(question, *turns):
    """Messages of a question and its answer, or of a question, an expression, its result and the answer."""
    *call, answer = turns
    messages = [{"role": "user", "content": question}]
    if call:
        expression, result = call
        function = {"name": "calculator", "arguments": {"expression": expression}}
        messages += [
            {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]},
            {"role": "tool", "content": result},
        ]
    return [*messages, {"role": "assistant", "content": f"<answer>{answer}</answer>"}]


def encode(tokenizer, messages):
    """Token ids of a conversation and its labels: what the model says itself, with the marker it ends with."""
    ids = tokenizer.apply_chat_template(messages, tools=TOOLS, return_dict=False)
    start, end = tokenizer.convert_tokens_to_ids([START, END])
    speaker = tokenizer.convert_tokens_to_ids("assistant")
    labels, said = [], False
    for position, token in enumerate(ids):
        labels.append(token if said else -100)
        if token == end:
            said = False
        elif position >= 2 and ids[position - 2 : position] == [start, speaker]:  # at the line break after it
            said = True
    return ids, labels


def demonstrations(tokenizer, questions, noise):
    """`warmup.train`'s ``demonstrate``: calls with a few wrong digits, and wild guesses."""

    def demonstrate(rng, count):
        for question in rng.sample(questions, count):
            if rng.random() < CALLS:
                expression = warmup.noisy(re.search(EXPRESSION, question)[0], noise, rng)
                result = calculator.calculator(expression)
                yield encode(tokenizer, conversation(question, expression, result, warmup.noisy(result, noise, rng)))
            else:
                yield encode(tokenizer, conversation(question, str(rng.randint(100, 9999))))

    return demonstrate


@torch.no_grad()
def accuracy(model, tokenizer, questions):
    """Share of the questions to which every token of a faultless conversation with a call is the likeliest one,
    once the model has chosen to call."""
    right = 0
    for question in questions:
        expression = re.search(EXPRESSION, question)[0]
        result = calculator.calculator(expression)
        ids, labels = (torch.tensor(x) for x in encode(tokenizer, conversation(question, expression, result, result)))
        said = (labels >= 0).nonzero()[1:, 0]
        likeliest = model(input_ids=ids[None]).logits[0].argmax(-1)
        right += bool((likeliest[said - 1] == labels[said]).all())
    return right / len(questions)


def warm_up(train_file, validation_file, output, settings):
    """Write tokenizer and model to ``output`` unless it already holds what these settings give."""
    import pandas

    def questions(path):
        return [prompt[0]["content"] for prompt in pandas.read_parquet(path)["prompt"]]

    def build():
        train = questions(train_file)
        tokenizer = build_tokenizer(train)
        model = warmup.build_model(tokenizer, settings)
        demonstrate = demonstrations(tokenizer, train, settings.noise)
        warmup.train(model, tokenizer, demonstrate, lambda: accuracy(model, tokenizer, train[:128]), settings)
        return model, tokenizer, accuracy(model, tokenizer, questions(validation_file))

    record = {"settings": warmup.asdict(settings), "data": warmup.sha256(train_file), "calls": CALLS}
    warmup.keep(output, record, build)
