"""Loaded into every process of a test run by VERL_USE_EXTERNAL_MODULES=probe: what CPPO_VERL_PROBE names.

dump:FOLDER saves what each look at the logits was given and returned; shift moves mu's most likely tokens by one
token, in the rollout engine's answer; full leaves no room for the checkpoint of step 2. Also holds an agent loop of
two turns, and one whose samples depend on nothing but the weights, the prompt, the step and the number of the sample.
"""

import json
import os
import resource
import zlib
from pathlib import Path
from uuid import uuid4

import numpy as np
import torch
import wrapt

WHAT, _, FOLDER = os.environ.get("CPPO_VERL_PROBE", "").partition(":")


@wrapt.when_imported("cppo_verl.plugin.topk.loss")
def _dump(module):
    if WHAT != "dump":
        return
    original = module.divergence_of_logits

    def dumping(logits, data, divergence):
        result = original(logits, data, divergence)
        fields = ("input_ids", "prompts", "responses", "response_mask", "rollout_log_probs")
        rows = {name: [x.clone() for x in data[name].unbind()] for name in fields}
        folder = Path(FOLDER)
        folder.mkdir(exist_ok=True)
        saved = rows | {"logits": logits.detach().clone(), "divergence": result}
        torch.save(saved, folder / f"{os.getpid()}-{len(list(folder.iterdir())):03d}.pt")
        return result

    module.divergence_of_logits = dumping


@wrapt.when_imported("cppo_verl.plugin.topk.vllm_server")
def _shift(module):
    if WHAT != "shift":
        return
    original = module.captured

    def shifted(flat, top_k):
        result = original(flat, top_k)
        return result._replace(ids=np.roll(result.ids, 1, axis=0), codes=np.roll(result.codes, 1, axis=0))

    module.captured = shifted


@wrapt.when_imported("verl.utils.checkpoint.fsdp_checkpoint_manager")
def _full(module):
    if WHAT != "full":
        return
    original = module.FSDPCheckpointManager.save_checkpoint

    def save_checkpoint(self, local_path, hdfs_path=None, global_step=0, *args, **kwargs):
        if global_step == 2:
            _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, most))
        original(self, local_path, hdfs_path, global_step, *args, **kwargs)

    module.FSDPCheckpointManager.save_checkpoint = save_checkpoint


@wrapt.when_imported("verl.experimental.agent_loop.agent_loop")
def _register_two_turns(module):
    class TwoTurns(module.AgentLoopBase):
        """Two calls of the rollout engine with "tool output", tokens of the prompt, between their answers;
        the reward is a coin's, as the task's would be zero throughout and that of the tokens the same for
        all answers of an easy prompt."""

        async def run(self, sampling_params, **kwargs):
            prompt = await self.ct_build_initial_tokens(list(kwargs["raw_prompt"]))
            tool = prompt[:3]
            first = await self.server_manager.generate(
                request_id=uuid4().hex, prompt_ids=prompt, sampling_params=sampling_params | {"max_tokens": 5}
            )
            second = await self.server_manager.generate(
                request_id=uuid4().hex,
                prompt_ids=prompt + first.token_ids + tool,
                sampling_params=sampling_params | {"max_tokens": 20},
            )
            reward = float(uuid4().int % 2)
            return module.AgentLoopOutput(
                prompt_ids=prompt,
                response_ids=first.token_ids + tool + second.token_ids,
                response_mask=[1] * len(first.token_ids) + [0] * len(tool) + [1] * len(second.token_ids),
                response_logprobs=first.log_probs + [0.0] * len(tool) + second.log_probs,
                num_turns=4,
                metrics={},
                reward_score=reward,
                extra_fields=first.extra_fields | {"reward_extra_info": {"acc": reward}},
            )

    global two_turns
    two_turns = TwoTurns
    module._agent_loop_registry["two_turns"] = {"_target_": "probe.two_turns"}


@wrapt.when_imported("verl.experimental.agent_loop.single_turn_agent_loop")
def _register_seeded(module):
    class Seeded(module.SingleTurnAgentLoop):
        """verl's own with a seed a request. (verl's full_determinism gives all requests the same seed, and with it
        all samples of a prompt the same answer.)"""

        async def run(self, sampling_params, **kwargs):
            about = [list(kwargs["raw_prompt"]), kwargs["global_steps"], kwargs["session_id"]]
            seed = zlib.crc32(json.dumps(about).encode())
            return await super().run(sampling_params | {"seed": seed}, **kwargs)

    global seeded
    seeded = Seeded
    import verl.experimental.agent_loop.agent_loop as agent_loop

    agent_loop._agent_loop_registry["seeded"] = {"_target_": "probe.seeded"}
