"""CPPO on conversations with a tool: data, a warmed-up tiny Qwen3, verl's trainer and tool agent loop, a summary.

    python examples/tools/run.py [--output FOLDER] [hydra overrides of verl's trainer]

The task is to multiply two numbers of two digits, which so small a model cannot do without the calculator. It is
warmed up on demonstrations that call the calculator (40 %) or guess (60 %). What the calculator says stands inside
the response without being the model's: verl's response mask is 0 there, so that these tokens are not trained on and
do not advance t, and the weights, the budget and the masks of CPPO run on over them.

Each part is skipped if FOLDER already holds it; an interrupted training continues from its last checkpoint.
"""

import json
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "quickstart"))

import chat  # noqa: E402
import run as quickstart  # noqa: E402
import warmup  # noqa: E402

TASK = "products"
TASK_SETTINGS = {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2}
ACCURACY = f"val-core/reasoning_gym/{TASK}/acc/mean@4"


def main(argv=None):
    begin = time.monotonic()
    output, overrides = quickstart.arguments(argv, __doc__, "outputs/tools")
    files = quickstart.write_data(output / "data", TASK, TASK_SETTINGS)
    chat.warm_up(*files, output / "model", warmup.Settings(batch_size=32, noise=0.05, target=0.8))
    file = quickstart.trainer_process.quoted(HERE.resolve() / "calculator.py")
    tool = f"actor_rollout_ref.rollout.multi_turn.function_tool_path={file}"
    code = quickstart.train(output, [tool, *overrides], HERE / "tools.yaml", progress)
    if code == 0:
        summarise(output, time.monotonic() - begin)
    return code


def calls(values):
    """Tool calls a response: one of none has two turns, each call adds two."""
    return values["num_turns/mean"] / 2 - 1


def progress(step, values):
    parts = [quickstart.progress(step, values)]
    if "num_turns/mean" in values:
        parts.append(f"calls a response {calls(values):.2f}")
    if ACCURACY in values:
        parts.append(f"validation accuracy {values[ACCURACY]:.3f}")
    return "  ".join(parts)


def summarise(output, seconds):
    steps = quickstart.read(*quickstart.attempts(output))
    accuracy = [f"{values[ACCURACY]:.3f}" for _, values in steps if ACCURACY in values] or ["not run"]
    called = [calls(values) for _, values in steps if "num_turns/mean" in values]
    last = max((output / "rollouts").glob("*.jsonl"), key=lambda path: int(path.stem))
    conversations = [json.loads(line) for line in last.read_text().splitlines()]
    shown = max(conversations, key=lambda row: "<tool_response>" in row["output"])
    print(
        f"""
validation accuracy (Avg@4)  {accuracy[0]} -> {accuracy[-1]}
calls a response             {called[0]:.2f} -> {called[-1]:.2f}
time                         {seconds / 60:.1f} minutes
conversations                {quickstart.relative(output / "rollouts")}/*.jsonl, one of step {last.stem}:

{shown["input"]}{shown["output"]}"""
    )


if __name__ == "__main__":
    sys.exit(main())
