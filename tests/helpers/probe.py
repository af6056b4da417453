"""Loaded into every process of a test run by VERL_USE_EXTERNAL_MODULES=probe: what CPPO_VERL_PROBE names.

dump:FOLDER saves the logits of every micro-batch with what stands beside them and their divergences; full:STEP leaves
no room for the checkpoint of that step; NAME:STEP, with a name of `PHASES` or "checkpoint", prints a line in that part
of the step and waits for the file CPPO_VERL_PROBE_GO; clock:STEP sets the trainer's wall clock back by a day at that
step and forth by two at the next; breaks:FILE breaks one of `BREAKS` a step, whose name is in FILE meanwhile. Several
are separated by commas.
Also holds two agent loops: "seeded", whose samples depend on nothing but the weights, the prompt, the step and the
sample's number, and "broken", which samples at another temperature where that is the step's break.
"""

import json
import os
import resource
import time
import zlib
from functools import partial
from pathlib import Path

import torch
import wrapt

PROBES = dict(part.partition(":")[::2] for part in os.environ.get("CPPO_VERL_PROBE", "").split(","))


@wrapt.when_imported("cppo_verl.plugin.topk.loss")
def _dump(module):
    if "dump" not in PROBES:
        return
    first, second = module.retained_logits, module.token_divergence
    shown = []

    def showing(logits, data, layout):
        shown.append(logits.detach().clone())
        return first(logits, data, layout)

    def dumping(retained, log_probs, data, kind):
        result = second(retained, log_probs, data, kind)
        fields = ("input_ids", "prompts", "responses", "response_mask", "rollout_log_probs")
        rows = {name: [x.clone() for x in data[name].unbind()] for name in fields}
        folder = Path(PROBES["dump"])
        folder.mkdir(exist_ok=True)
        divergence = [x[: len(y)].clone() for x, y in zip(result, rows["responses"], strict=True)]
        saved = rows | {"logits": shown.pop(), "divergence": divergence}
        torch.save(saved, folder / f"{os.getpid()}-{len(list(folder.iterdir())):03d}.pt")
        return result

    module.retained_logits, module.token_divergence = showing, dumping


@wrapt.when_imported("verl.utils.checkpoint.fsdp_checkpoint_manager")
def _full(module):
    if "full" not in PROBES:
        return
    original = module.FSDPCheckpointManager.save_checkpoint

    def save_checkpoint(self, local_path, hdfs_path=None, global_step=0, *args, **kwargs):
        if global_step == int(PROBES["full"]):
            _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, most))
        original(self, local_path, hdfs_path, global_step, *args, **kwargs)

    module.FSDPCheckpointManager.save_checkpoint = save_checkpoint


PHASES = {"generation": "on_sample_begin", "update": "_update_actor"}
"""Methods of the trainer with which a part of a step begins."""


def before(module, method, action):
    """Call ``action`` before a method of each of the plug-in's trainers."""
    for mode in ("Sync", "ColocateAsync", "SeparateAsync"):
        trainer = getattr(module, f"TrustRegionTrainer{mode}")
        original = getattr(trainer, method)

        def wrapped(self, *args, _original=original, **kwargs):
            action(self)
            return _original(self, *args, **kwargs)

        setattr(trainer, method, wrapped)


def tell(phase, step):
    print(f"the {phase} of step {step} begins", flush=True)
    deadline = time.monotonic() + 600  # for a test that has failed
    while not os.path.exists(os.environ["CPPO_VERL_PROBE_GO"]) and time.monotonic() < deadline:
        time.sleep(0.1)


def tell_at(phase, trainer):
    if trainer.global_steps == int(PROBES[phase]):
        tell(phase, trainer.global_steps)


@wrapt.when_imported("cppo_verl.plugin.trainer")
def _tell_phase(module):
    for phase in PHASES.keys() & PROBES.keys():
        before(module, PHASES[phase], partial(tell_at, phase))


@wrapt.when_imported("verl.utils.fs")
def _tell_checkpoint(module):
    """Between the weights and the rest: verl then makes sure of the folder."""
    if "checkpoint" not in PROBES:
        return
    original, step = module.local_mkdir_safe, PROBES["checkpoint"]

    def local_mkdir_safe(path):
        if path.endswith(f"global_step_{step}"):
            tell("checkpoint", step)
        return original(path)

    module.local_mkdir_safe = local_mkdir_safe


@wrapt.when_imported("cppo_verl.plugin.trainer")
def _jump(module):
    if "clock" not in PROBES:
        return
    now, step, offsets = time.time, int(PROBES["clock"]), {0: -86400, 1: 86400}

    def jump(self):
        time.time = lambda: now() + offsets.get(self.global_steps - step, 0)

    before(module, "on_sample_begin", jump)


BREAKS = ["none", "temperature", "shift", "mask", "denominator", "sync", "signs", "signs", "signs", "logits"]
"""What is broken at step 1, 2, ..."""


def broken():
    return Path(PROBES["breaks"]).read_text() if "breaks" in PROBES else "none"


@wrapt.when_imported("cppo_verl.plugin.trainer")
def _name_break(module):
    if "breaks" not in PROBES:
        return

    def name(self):
        Path(PROBES["breaks"]).write_text(BREAKS[self.global_steps - 1])

    def forget_to_sync(self):
        if BREAKS[self.global_steps] == "sync":  # before the next step
            self.checkpoint_manager.update_weights = lambda *_: None
        else:
            vars(self.checkpoint_manager).pop("update_weights", None)

    before(module, "on_sample_begin", name)
    before(module, "on_step_end", forget_to_sync)


@wrapt.when_imported("cppo_verl.plugin.losses")
def _break_loss(module):
    if "breaks" not in PROBES:
        return
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY

    from cppo_verl.core import trust_region

    original, update_mask = POLICY_LOSS_REGISTRY["cppo"], trust_region.update_mask

    def loss(*, old_log_prob, advantages, config, **kwargs):
        what = broken()
        if what == "shift":
            old_log_prob = old_log_prob.roll(1, -1)
        if what == "signs":
            advantages = -advantages
        if what == "logits":
            old_log_prob = old_log_prob + 5
        if what == "denominator":  # of one micro-batch instead of four
            config.global_batch_info["batch_num_tokens"] = config.global_batch_info["batch_num_tokens"] / 4
        all_kept = lambda region, *_, **__: torch.ones_like(region.weights)  # noqa: E731
        trust_region.update_mask = all_kept if what == "mask" else update_mask
        return original(old_log_prob=old_log_prob, advantages=advantages, config=config, **kwargs)

    POLICY_LOSS_REGISTRY["cppo"] = loss


@wrapt.when_imported("verl.experimental.agent_loop.single_turn_agent_loop")
def _register_loops(module):
    class Broken(module.SingleTurnAgentLoop):
        async def run(self, sampling_params, **kwargs):
            changed = {"temperature": 0.5} if broken() == "temperature" else {}
            return await super().run(sampling_params | changed, **kwargs)

    class Seeded(module.SingleTurnAgentLoop):
        """verl's own with a seed a request. (verl's full_determinism gives all requests the same seed, and with it
        all samples of a prompt the same answer.)"""

        async def run(self, sampling_params, **kwargs):
            about = [list(kwargs["raw_prompt"]), kwargs["global_steps"], kwargs["session_id"]]
            seed = zlib.crc32(json.dumps(about).encode())
            return await super().run(sampling_params | {"seed": seed}, **kwargs)

    import verl.experimental.agent_loop.agent_loop as agent_loop

    for name, loop in (("broken", Broken), ("seeded", Seeded)):
        globals()[f"{name}_loop"] = loop
        agent_loop._agent_loop_registry[name] = {"_target_": f"probe.{name}_loop"}
