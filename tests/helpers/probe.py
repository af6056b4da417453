"""Loaded into every process of a test run by VERL_USE_EXTERNAL_MODULES=probe: what CPPO_VERL_PROBE names.

dump:FOLDER saves the logits of every micro-batch with what stands beside them and their divergences; full:STEP leaves
no room for the checkpoint of that step; metrics:FILE is what verl's file logger writes to; phase:NAME,STEP prints a
line as that part of the step begins; break:NAME breaks an assumption of the loss. Also holds two agent loops: the
samples of "seeded" depend on nothing but the weights, the prompt, the step and the sample's number; "colder" samples at
temperature 0.7, whatever it is asked for.
"""

import json
import os
import resource
import zlib
from pathlib import Path

import torch
import wrapt

WHAT, _, ARGUMENT = os.environ.get("CPPO_VERL_PROBE", "").partition(":")
if WHAT == "metrics":
    os.environ["VERL_FILE_LOGGER_PATH"] = ARGUMENT


@wrapt.when_imported("cppo_verl.plugin.topk.loss")
def _dump(module):
    if WHAT != "dump":
        return
    original = module.divergence_of_logits

    def dumping(logits, data, divergence):
        result = original(logits, data, divergence)
        fields = ("input_ids", "prompts", "responses", "response_mask", "rollout_log_probs")
        rows = {name: [x.clone() for x in data[name].unbind()] for name in fields}
        folder = Path(ARGUMENT)
        folder.mkdir(exist_ok=True)
        saved = rows | {"logits": logits.detach().clone(), "divergence": result}
        torch.save(saved, folder / f"{os.getpid()}-{len(list(folder.iterdir())):03d}.pt")
        return result

    module.divergence_of_logits = dumping


@wrapt.when_imported("verl.utils.checkpoint.fsdp_checkpoint_manager")
def _full(module):
    if WHAT != "full":
        return
    original = module.FSDPCheckpointManager.save_checkpoint

    def save_checkpoint(self, local_path, hdfs_path=None, global_step=0, *args, **kwargs):
        if global_step == int(ARGUMENT):
            _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, most))
        original(self, local_path, hdfs_path, global_step, *args, **kwargs)

    module.FSDPCheckpointManager.save_checkpoint = save_checkpoint


PHASES = {"generation": "on_sample_begin", "update": "_update_actor", "checkpoint": "_save_checkpoint"}


@wrapt.when_imported("cppo_verl.plugin.trainer")
def _tell_phase(module):
    if WHAT != "phase":
        return
    phase, _, step = ARGUMENT.partition(",")
    trainer, method = module.TrustRegionTrainerSync, PHASES[phase]
    original = getattr(trainer, method)

    def telling(self, *args, **kwargs):
        if self.global_steps == int(step):
            print(f"the {phase} of step {step} begins", flush=True)
        return original(self, *args, **kwargs)

    setattr(trainer, method, telling)


BREAKS = {
    "sign": lambda arguments: {"advantages": -arguments["advantages"]},
    "alignment": lambda arguments: {"old_log_prob": arguments["old_log_prob"].roll(1, -1)},
}


@wrapt.when_imported("verl.workers.utils.losses")
def _break_arguments(module):
    if WHAT != "break" or ARGUMENT not in BREAKS:
        return
    original = module.get_policy_loss_fn

    def broken(name):
        return lambda **arguments: original(name)(**arguments | BREAKS[ARGUMENT](arguments))

    module.get_policy_loss_fn = broken


@wrapt.when_imported("cppo_verl.core.trust_region")
def _break_mask(module):
    if WHAT == "break" and ARGUMENT == "mask":
        module.update_mask = lambda region, *_, **__: torch.ones_like(region.weights)


@wrapt.when_imported("verl.experimental.agent_loop.single_turn_agent_loop")
def _register_agent_loops(module):
    class Seeded(module.SingleTurnAgentLoop):
        """verl's own with a seed a request. (verl's full_determinism gives all requests the same seed, and with it
        all samples of a prompt the same answer.)"""

        async def run(self, sampling_params, **kwargs):
            about = [list(kwargs["raw_prompt"]), kwargs["global_steps"], kwargs["session_id"]]
            seed = zlib.crc32(json.dumps(about).encode())
            return await super().run(sampling_params | {"seed": seed}, **kwargs)

    class Colder(module.SingleTurnAgentLoop):
        async def run(self, sampling_params, **kwargs):
            return await super().run(sampling_params | {"temperature": 0.7}, **kwargs)

    global seeded, colder
    seeded, colder = Seeded, Colder
    import verl.experimental.agent_loop.agent_loop as agent_loop

    for name in ("seeded", "colder"):
        agent_loop._agent_loop_registry[name] = {"_target_": f"probe.{name}"}
