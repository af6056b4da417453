"""What the top-K divergences cost, each time beside its alternatives in one run and in turn.

    python tests/benchmarks/top_k.py logits [--dppo FILE] [--threads 2]
    python tests/benchmarks/top_k.py rollout --model FOLDER
    python tests/benchmarks/top_k.py step --quickstart FOLDER [--steps 20] [--rounds 2]

logits: log pi of the candidates from the logits of a forward pass and the sampled token's log-probability, which verl
has computed anyway, beside what computes it from the logits alone: verl's _chunked_topk_log_probs and the DPPO authors'
compute_topk_kl (FILE: verl/workers/actor/utils.py of their repository). And beside one plain read of the logits.
rollout: tokens a second of verl's vLLM server with the capture, with sampled log-probabilities only, and with vLLM's
plain dictionaries of candidates. step: a training step with divergence=topk_tv and with binary_tv, of the quickstart
whose data and model FOLDER holds.
"""

import argparse
import asyncio
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
import verl  # noqa: F401  loads the plug-in

from cppo_verl.core.divergence import gather_logits, log_probs_beside

VOCABULARY, TOP_K = 151_936, 20


def in_turn(functions, rounds):
    """Seconds of each call: {name: [one a round]}; a first round goes uncounted."""
    times = {name: [] for name in functions}
    for turn in range(rounds + 1):
        for name, function in functions.items():
            begin = time.perf_counter()
            function()
            if turn:
                times[name].append(time.perf_counter() - begin)
    return times


def ratio(times, name, other):
    return median(a / b for a, b in zip(times[name], times[other], strict=True))


# --- the logits -----------------------------------------------------------------------------------------------


def extra_bytes(function):
    """Most memory that torch's CPU allocator holds during a call beyond what it held before."""
    os.environ["KINETO_LOG_LEVEL"] = "5"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    held, most = 0, 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def logits(args):
    from verl.trainer.distillation.fsdp.losses import _chunked_topk_log_probs

    torch.set_num_threads(args.threads)
    dppo = None
    if args.dppo:
        spec = importlib.util.spec_from_file_location("dppo_utils", args.dppo)
        dppo = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(dppo)
    print(f"torch {torch.__version__}, {args.threads} thread(s), vocabulary {VOCABULARY}, K = {TOP_K}, median of 5")
    print("dtype     tokens    ours ms   verl / ours   dppo / ours   read / ours   extra memory: ours   verl")
    for dtype in (torch.bfloat16, torch.float32):
        for tokens in (1024, 2048, 4096):
            g = torch.Generator().manual_seed(0)
            x = torch.empty(tokens, VOCABULARY, dtype=dtype).normal_(generator=g)
            ids = torch.randint(0, VOCABULARY, (tokens, TOP_K + 1), generator=g)
            rows, log_mu = torch.arange(tokens), torch.full((tokens, TOP_K + 1), -3.1)
            log_pi = (x.gather(-1, ids[:, -1:]).float() - x.float().logsumexp(-1, keepdim=True)).squeeze(-1)
            functions = {
                "ours": lambda x=x, ids=ids, rows=rows, y=log_pi: log_probs_beside(gather_logits(x, ids, rows), y),
                "verl": lambda x=x, ids=ids: _chunked_topk_log_probs(x[None], ids[None]),
                "read": x.sum,
            }
            if dppo:
                functions["dppo"] = lambda x=x, ids=ids, log_mu=log_mu: dppo.compute_topk_kl(x, ids, log_mu)
            with torch.no_grad():
                times = in_turn(functions, rounds=5)
                memory = {name: extra_bytes(functions[name]) / x.nbytes for name in ("ours", "verl")}
            print(
                f"{str(dtype).removeprefix('torch.'):9}{tokens:7}{median(times['ours']) * 1e3:11.2f}"
                f"{ratio(times, 'verl', 'ours'):14.0f}"
                f"{ratio(times, 'dppo', 'ours') if dppo else float('nan'):14.0f}{ratio(times, 'read', 'ours'):14.0f}"
                f"{memory['ours']:21.4f}{memory['verl']:7.2f}"
            )


# --- the rollout ----------------------------------------------------------------------------------------------


def benchmark_server():
    """The plug-in's server that can also take the plain path."""
    import wrapt

    from cppo_verl.plugin.topk.vllm_server import TopKServer

    class PlainEngine(wrapt.ObjectProxy):
        async def generate(self, *, sampling_params, request_id, **kwargs):
            if request_id.startswith("dictionaries"):
                sampling_params.logprobs = TOP_K
            async for output in self.__wrapped__.generate(
                sampling_params=sampling_params, request_id=request_id, **kwargs
            ):
                yield output

    class Server(TopKServer):
        async def run_server(self, args):
            await super().run_server(args)
            self.engine = PlainEngine(self.engine)

    return Server


def rollout(args):
    import ray
    from hydra import compose, initialize_config_module
    from verl.workers.rollout.replica import RolloutMode

    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose(
            "ppo_trainer",
            ["+method=cppo", "divergence=topk_tv", "+platform=cpu", f"actor_rollout_ref.model.path={args.model}"],
        ).actor_rollout_ref
    ray.init(num_cpus=8, num_gpus=1, include_dashboard=False, log_to_driver=False)
    try:
        server = (
            ray.remote(benchmark_server())
            .options(max_concurrency=1000)
            .remote(
                config=config.rollout,
                model_config=config.model,
                rollout_mode=RolloutMode.STANDALONE,
                workers=[],
                replica_rank=0,
                node_rank=0,
                gpus_per_node=1,
                nnodes=1,
                cuda_visible_devices="0",
            )
        )
        ray.get(server.launch_server.remote())
        requests, length, number = 256, 96, 0

        async def generate(name, logprobs):
            nonlocal number
            calls = []
            for i in range(requests):
                number += 1
                sampling = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "ignore_eos": True, "max_tokens": length}
                calls.append(
                    server.generate.remote([5 + i % 10] * 24, sampling | {"logprobs": logprobs}, f"{name} {number}")
                )
            outputs = await asyncio.gather(*calls)
            assert all(len(output.log_probs) == length for output in outputs)

        kinds = {"sampled only": True, "capture": TOP_K, "dictionaries": True}
        times = in_turn(
            {name: lambda name=name, k=k: asyncio.run(generate(name, k)) for name, k in kinds.items()}, rounds=9
        )
    finally:
        ray.shutdown()
    print(f"{requests} requests of {length} tokens at once, median of 9")
    for name, seconds in times.items():
        print(f"{name:14}{requests * length / median(seconds):10.0f} tokens/s")
    print(f"capture over sampled only: {1 / ratio(times, 'capture', 'sampled only'):.2f}")
    print(f"capture over dictionaries: {1 / ratio(times, 'capture', 'dictionaries'):.2f}")


# --- the step -------------------------------------------------------------------------------------------------


def step(args):
    run = Path(__file__).parents[2] / "examples" / "quickstart" / "run.py"
    phases = ("step", "gen", "update_actor")
    seconds = {}
    for turn in range(args.rounds):
        for divergence in ("binary_tv", "topk_tv"):
            with tempfile.TemporaryDirectory() as folder:
                for name in ("data", "model"):
                    os.symlink((args.quickstart / name).resolve(), Path(folder) / name)
                command = [sys.executable, str(run), "--output", folder, f"divergence={divergence}"]
                command += [
                    f"trainer.total_training_steps={args.steps}",
                    "trainer.test_freq=-1",
                    "trainer.save_freq=-1",
                ]
                command += ["trainer.val_before_train=false", "trainer.logger=[console,file]"]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                lines = (Path(folder) / "logs" / "metrics-0.jsonl").read_text().splitlines()
            # The first step waits for vLLM to warm up.
            steps = [json.loads(line)["data"] for line in lines][1:]
            for phase in phases:
                seconds.setdefault((divergence, phase), []).extend(s[f"timing_s/{phase}"] for s in steps)
            print(
                f"round {turn + 1}, {divergence}: {median(s['timing_s/step'] for s in steps):.2f} s a step", flush=True
            )
    for phase in phases:
        binary, top_k = (median(seconds[divergence, phase]) for divergence in ("binary_tv", "topk_tv"))
        print(f"{phase:14} binary {binary:6.2f} s, top-K {top_k:6.2f} s, ratio {top_k / binary:.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("logits")
    command.add_argument("--dppo", type=Path)
    command.add_argument("--threads", type=int, default=2)
    command.set_defaults(run=logits)
    command = commands.add_parser("rollout")
    command.add_argument("--model", type=Path, required=True)
    command.set_defaults(run=rollout)
    command = commands.add_parser("step")
    command.add_argument("--quickstart", type=Path, required=True)
    command.add_argument("--steps", type=int, default=20)
    command.add_argument("--rounds", type=int, default=2)
    command.set_defaults(run=step)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
