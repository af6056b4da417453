"""Build the quickstart's model: a tiny Qwen3 that half knows how to sort.

    python examples/quickstart/warmup.py --train data/train.parquet --validation data/validation.parquet --output model

Reads the files that ``cppo_verl.data.reasoning_gym.write_parquet`` wrote, makes a tokenizer of the pieces that their
texts are made of, and trains a randomly initialised model on noisy demonstrations, so that reinforcement
learning starts from a policy that is sometimes right. A second run with the same settings and data does
nothing. Nothing is downloaded.
"""

import argparse
import hashlib
import json
import random
import re
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from cppo_verl.testing import tiny_models

# torch and what brings it are imported where they are used: a run whose model is there already does without them.


@dataclass(frozen=True)
class Settings:
    """What the warmed-up model depends on, with the data."""

    hidden_size: int = 96
    layers: int = 3
    heads: int = 3
    batch_size: int = 64  # demonstrations
    learning_rate: float = 2e-3  # constant after 100 steps
    noise: float = 0.08  # share of the digits of a demonstration's answer that are replaced at random
    target: float = 0.25  # sampled accuracy to stop at: what is missing is left to reinforcement learning
    steps: int = 2000  # to stop at in any case
    seed: int = 1


def noisy(answer, share, rng):
    """``answer`` with each digit, outside of ".0", replaced by a random one with probability ``share``."""
    return re.sub(r"(?<!\.)[0-9]", lambda digit: rng.choice("0123456789") if rng.random() < share else digit[0], answer)


def encode(tokenizer, question, answer=None):
    """Token ids of the chat; up to and with ``<assistant>`` where no answer is given."""
    messages = [{"role": "user", "content": question}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return tokenizer.apply_chat_template(messages, add_generation_prompt=answer is None, return_dict=False)


def train(model, tokenizer, demonstrate, accuracy, settings):
    """Supervised warm-up to ``settings.target``.

    Args:
        demonstrate: of a random generator and a number, so many pairs of token ids and labels, -100 where a token
            is not to be learnt.
        accuracy: what is compared with the target, without arguments.
    """
    import torch

    rng = random.Random(settings.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 100))
    start = time.monotonic()
    for step in range(settings.steps):
        pairs = list(demonstrate(rng, settings.batch_size))
        ids, labels = ([torch.tensor(pair[i]) for pair in pairs] for i in (0, 1))
        pad = torch.nn.utils.rnn.pad_sequence
        ids = pad(ids, batch_first=True, padding_value=tokenizer.pad_token_id)  # (B, L), padded right:
        labels = pad(labels, batch_first=True, padding_value=-100)  # causal attention never sees the padding
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 49:
            # When a task is learnt varies with the seed and the machine's arithmetic, so the accuracy
            # decides, not a number of steps.
            reached = accuracy()
            seconds = time.monotonic() - start
            progress(f"warm-up step {step + 1}  loss {loss.item():.3f}  accuracy {reached:.2f}  {seconds:.0f} s")
            if reached >= settings.target:
                break


def demonstrations(tokenizer, frame, noise):
    """`train`'s ``demonstrate`` for the rows of ``frame``: noisy answers, and the loss on them alone."""
    prompts = [encode(tokenizer, prompt[0]["content"]) for prompt in frame["prompt"]]
    answers = [reward["ground_truth"] for reward in frame["reward_model"]]

    def demonstrate(rng, count):
        for i in rng.sample(range(len(prompts)), count):
            answer = tokenizer.encode(noisy(answers[i], noise, rng)) + [tokenizer.eos_token_id]
            yield prompts[i] + answer, [-100] * len(prompts[i]) + answer

    return demonstrate


def accuracy(model, tokenizer, frame, samples=1):
    """Share of right answers on the rows of ``frame``, ``samples`` a row, at temperature 1."""
    from cppo_verl.rewards.reasoning_gym import compute_score

    questions = [prompt[0]["content"] for prompt in frame["prompt"]]
    batch = tokenizer.pad(
        {"input_ids": [encode(tokenizer, q) for q in questions for _ in range(samples)]}, return_tensors="pt"
    )
    output = model.generate(**batch, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=32)
    responses = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    rows = [row for _, row in frame.iterrows() for _ in range(samples)]
    scores = [
        compute_score(row["data_source"], response, row["reward_model"]["ground_truth"], row["extra_info"])["acc"]
        for row, response in zip(rows, responses, strict=True)
    ]
    return sum(scores) / len(scores)


def progress(text):
    """Rewrite the current line of the terminal."""
    sys.stdout.write(f"\r{text:<78}")
    sys.stdout.flush()


def warm_up(train_file, validation_file, output, settings):
    """Write tokenizer and model to ``output`` unless it already holds what these settings give."""

    def build():
        import pandas

        frame = pandas.read_parquet(train_file)
        questions = [prompt[0]["content"] for prompt in frame["prompt"]]
        tokenizer = tiny_models.build_tokenizer(questions, [reward["ground_truth"] for reward in frame["reward_model"]])
        model = build_model(tokenizer, settings)
        demonstrate = demonstrations(tokenizer, frame, settings.noise)
        train(model, tokenizer, demonstrate, lambda: accuracy(model, tokenizer, frame.head(128)), settings)
        return model, tokenizer, accuracy(model, tokenizer, pandas.read_parquet(validation_file), samples=4)

    keep(output, {"settings": asdict(settings), "data": sha256(train_file)}, build)


def build_model(tokenizer, settings):
    return tiny_models.build_model(
        tokenizer,
        hidden_size=settings.hidden_size,
        intermediate_size=2 * settings.hidden_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def keep(output, record, build):
    """Write the model and tokenizer that ``build`` returns to ``output``, with the accuracy it returns third and the
    ``record`` of what they were made from; nothing if ``output`` already holds what that gives."""
    output = Path(output)
    marker = output / "warmup.json"
    if marker.exists():
        found = json.loads(marker.read_text())
        if found | record == found:
            print(f"{output}: already warmed up, sampled accuracy {found['accuracy']:.3f}")
            return
    if output.exists() and not marker.exists():
        raise ValueError(f"{output} exists and was not written by this script: give another --output")

    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # at this size threads wait for each other more than they compute
    torch.manual_seed(record["settings"]["seed"])
    model, tokenizer, reached = build()
    parameters = sum(p.numel() for p in model.parameters())
    print(f"\n{output}: {parameters:,} parameters, sampled accuracy {reached:.3f}")
    tiny_models.save(model, tokenizer, output, marker.name, record | {"accuracy": reached})


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--train", required=True, help="train.parquet")
    parser.add_argument("--validation", required=True, help="validation.parquet")
    parser.add_argument("--output", required=True, help="folder of the model")
    for name, default in asdict(Settings()).items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help="default: %(default)s")
    arguments = vars(parser.parse_args())
    files = [arguments.pop(name) for name in ("train", "validation", "output")]
    warm_up(*files, Settings(**arguments))


if __name__ == "__main__":
    main()
