"""What the CPU platform replaces in verl's agent loops, and whether verl still needs it."""

import asyncio
import inspect
from fractions import Fraction
from types import SimpleNamespace

import hydra
import numpy as np
import pytest
import torch
import transfer_queue
import verl.experimental.agent_loop.agent_loop as agent_loop
from omegaconf import OmegaConf
from ray import cloudpickle
from tensordict import TensorDict
from transformers import AutoTokenizer
from verl import DataProto
from verl.experimental.agent_loop import AgentLoopOutput
from verl.trainer.ppo.v1 import agent_loop_tq
from verl.utils.tensordict_utils import list_of_dict_to_tensordict
from verl.workers.rollout.llm_server import LLMServerClient
from verl.workers.rollout.router import GlobalRequestLoadBalancer

from cppo_verl.cpu.agent_loop_patches import JoinedPuts, OwnReward, instantiate, joined_queue
from cppo_verl.testing import tiny_models

VerlWorker = agent_loop_tq.AgentLoopWorkerTQ.__ray_metadata__.modified_class


class Store:
    """What is put, call by call: each takes a turn of the event loop."""

    def __init__(self, full=""):
        self.calls, self.full = [], full

    async def put(self, *, keys, fields, tags, partition_id):
        await asyncio.sleep(0.001)
        if partition_id == self.full:
            raise OSError("no room")
        self.calls.append((keys, fields, tags, partition_id))
        return len(self.calls)


def row(n):
    return {"responses": torch.arange(n), "extra_fields": {"n": n}}


def put_together(store, *puts):
    """Of puts of one row each, (key, row, partition), started at once: what each returned or raised."""

    async def run():
        joined = JoinedPuts(store.put, list_of_dict_to_tensordict)
        started = [joined(keys=[k], fields=[r], tags=[{"key": k}], partition_id=p) for k, r, p in puts]
        return await asyncio.gather(*started, return_exceptions=True)

    return asyncio.run(run())


def test_what_waits_for_a_put_is_put_at_once_and_is_what_verl_would_have_put():
    store = Store()
    assert put_together(store, *[(f"k{n}", row(n), "train") for n in (3, 1, 2)]) == [1, 1, 1]
    ((keys, fields, tags, partition),) = store.calls
    assert (keys, partition, tags) == (["k3", "k1", "k2"], "train", [{"key": k} for k in keys])
    assert fields.batch_size == (3,)
    for i, n in enumerate((3, 1, 2)):
        alone = list_of_dict_to_tensordict([row(n)])[0]
        assert fields["responses"].unbind()[i].tolist() == alone["responses"].tolist() == list(range(n))
        assert fields["extra_fields"][i] == alone["extra_fields"] == {"n": n}


def test_other_partitions_and_other_fields_are_put_apart():
    store = Store()
    put_together(store, ("a", row(1), "train"), ("b", row(1), "val"), ("c", row(1) | {"more": 1}, "train"))
    assert [(keys, partition) for keys, _, _, partition in store.calls] == [
        (["a"], "train"),
        (["b"], "val"),
        (["c"], "train"),
    ]


def test_a_failure_reaches_all_that_it_is_about_and_none_else():
    results = put_together(Store(full="val"), ("a", row(1), "val"), ("b", row(1), "train"), ("c", row(1), "val"))
    assert [str(result) for result in results] == ["no room", "1", "no room"]


@pytest.mark.parametrize("on_its_way", [False, True])
def test_a_put_that_is_cancelled_leaves_the_others_alone(on_its_way):
    async def run():
        started, go = asyncio.Event(), asyncio.Event()

        async def put(*, keys, **_):
            started.set()
            await go.wait()
            return keys

        joined = JoinedPuts(put, list_of_dict_to_tensordict)
        puts = [joined(keys=[n], fields=[row(n)], tags=[n], partition_id="train") for n in (1, 2)]
        first, second = map(asyncio.create_task, puts)
        await (started.wait() if on_its_way else asyncio.sleep(0))
        first.cancel()
        go.set()
        return await asyncio.wait_for(second, timeout=5)

    assert asyncio.run(run()) == [1, 2]


@pytest.mark.parametrize("joined", [False, True])
def test_verl_still_puts_each_response_by_itself(joined, monkeypatch):
    """When this fails without the patch, drop join_puts."""
    store = Store()
    puts, make = (JoinedPuts(store.put, list_of_dict_to_tensordict), list) if joined else (store.put, None)
    monkeypatch.setattr(agent_loop_tq, "tq", SimpleNamespace(async_kv_batch_put=puts))
    monkeypatch.setattr(agent_loop_tq, "list_of_dict_to_tensordict", make or list_of_dict_to_tensordict)
    worker = object.__new__(VerlWorker)
    vars(worker).update(processor=None, reward_loop_worker_handles=None, distillation_enabled=False)

    async def run():
        outputs = [
            AgentLoopOutput(prompt_ids=[1], response_ids=[2] * n, response_mask=[1] * n, metrics={}) for n in (1, 2, 3)
        ]
        settings = [{"uid": "u", "session_id": n, "global_steps": 1} for n in range(3)]
        await asyncio.gather(
            *[worker._agent_loop_postprocess(x, False, **more) for x, more in zip(outputs, settings, strict=True)]
        )

    asyncio.run(run())
    assert len(store.calls) == (1 if joined else 3)
    assert sorted(key for keys, *_ in store.calls for key in keys) == ["u_0_0", "u_1_0", "u_2_0"]


def test_the_queue_survives_the_way_of_the_workers_class_to_its_process():
    loaded = cloudpickle.loads(cloudpickle.dumps(VerlWorker))
    queue = inspect.unwrap(loaded._agent_loop_postprocess).__globals__["tq"]
    assert queue is joined_queue()
    assert queue.async_kv_put is transfer_queue.async_kv_put
    assert isinstance(queue.async_kv_batch_put, JoinedPuts)


@pytest.fixture
def config(compose, tmp_path):
    """Of a run whose reward is the share of digits in an answer."""
    tokenizer = tiny_models.build_tokenizer(["How many? "], ["12 34"])
    model = tiny_models.build_model(
        tokenizer,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    tiny_models.save(model, tokenizer, tmp_path / "model", "made_by.json", {})
    return compose(
        f"actor_rollout_ref.model.path={tmp_path / 'model'}",
        "reward.num_workers=0",
        "reward.custom_reward_function.path=pkg://cppo_verl.testing.tiny_models",
        "reward.custom_reward_function.name=share_of_digits",
    )


def answer(tokenizer, text):
    responses = torch.tensor([tokenizer.encode(text)])
    others = {"extra_info": {"index": 7}, "data_source": "any", "reward_model": {"ground_truth": ""}}
    return DataProto(
        TensorDict({"responses": responses, "attention_mask": torch.ones_like(responses)}, batch_size=1),
        {name: np.array([value], dtype=object) for name, value in others.items()},
    )


def test_a_reward_computed_in_place_is_the_rules_and_leaves_the_prompt_as_it_was(config):
    async def run():
        reward = OwnReward(config)
        data = answer(reward.worker.input_tokenizer, "12")
        result = await reward.compute_score.remote(data)
        return data, result

    data, result = asyncio.run(run())
    assert result["reward_score"] == tiny_models.share_of_digits("any", "12", "")["score"]
    assert data.non_tensor_batch["extra_info"][0] == {"index": 7}


def test_a_reward_model_is_not_computed_in_place(config):
    config.reward.reward_model.enable = True
    with pytest.raises(ValueError, match="reward.num_workers=0 computes rules alone: .* needs reward.num_workers=1"):
        OwnReward(config)


def test_verl_still_draws_one_of_its_reward_workers():
    """When this fails, drop score_in_place or adapt it."""
    source = inspect.getsource(agent_loop.AgentLoopWorker._compute_score)
    assert "random.choice(self.reward_loop_worker_handles)" in source


def test_a_loop_made_directly_gets_what_hydra_hands_it(config):
    """When hydra.utils.instantiate is no longer what verl calls, drop make_loops_directly."""
    assert "hydra.utils.instantiate(" in inspect.getsource(agent_loop.AgentLoopWorker._run_agent_loop)
    target = agent_loop._agent_loop_registry["single_turn_agent"]
    arguments = {
        "trainer_config": agent_loop.DictConfigWrap(config),
        "data_config": agent_loop.DictConfigWrap(config.data),
        "tokenizer": AutoTokenizer.from_pretrained(config.actor_rollout_ref.model.path),
        "dataset_cls": agent_loop.RLHFDataset,
    } | dict.fromkeys(["server_manager", "processor", "hf_model_type"])

    async def made_by(function):
        return vars(function(config=target, **arguments, tools=agent_loop.ToolListWrap([])))

    direct, hydras = asyncio.run(made_by(instantiate)), asyncio.run(made_by(hydra.utils.instantiate))
    loops = [made.pop("loop") for made in (direct, hydras)]
    builders = [vars(made.pop("continuous_token_builder")) for made in (direct, hydras)]
    assert direct == hydras and direct["config"] is config and loops[0] is not loops[1]
    assert builders[0].keys() == builders[1].keys()


def test_a_loop_with_arguments_of_its_own_is_hydras():
    made = instantiate(config={"_target_": "fractions.Fraction", "numerator": 1}, denominator=3)
    assert made == Fraction(1, 3)


class LoadBalancer:
    """verl's own, called like the handle of its actor."""

    def __init__(self, *servers):
        self.balancer, self.asked = GlobalRequestLoadBalancer({name: f"handle of {name}" for name in servers}), []

    def __getattr__(self, name):
        def remote(*args, **kwargs):
            self.asked.append(name)
            # Answered a turn of the event loop later, awaited or not.
            return asyncio.ensure_future(asyncio.sleep(0, getattr(self.balancer, name)(*args, **kwargs)))

        return SimpleNamespace(remote=remote)


def served(balancer, mode):
    """The servers of three responses at once, and how often the load balancer was asked for one and told of an end."""
    client = LLMServerClient(OmegaConf.create({"trainer": {"v1": {"trainer_mode": mode}}}), balancer)

    async def response(n):
        server = await client._acquire_server(f"request {n}")
        client._release_server(server[0], f"request {n}")
        return server

    async def run():
        return await asyncio.gather(*map(response, range(3)))

    servers = asyncio.run(run())
    return servers, balancer.asked.count("acquire_server"), balancer.asked.count("release_server")


def test_a_run_with_one_server_asks_for_it_once():
    assert served(LoadBalancer("a"), "sync") == ([("a", "handle of a")] * 3, 1, 0)


def test_verl_still_asks_for_the_server_of_each_response(monkeypatch):
    """When this fails, drop ask_once."""
    for name in ("_acquire_server", "_release_server"):
        monkeypatch.setattr(LLMServerClient, name, getattr(LLMServerClient, name).__wrapped__)
    assert served(LoadBalancer("a"), "sync") == ([("a", "handle of a")] * 3, 3, 3)


@pytest.mark.parametrize(("servers", "mode"), [(["a", "b"], "sync"), (["a"], "separate_async")])
def test_where_the_next_server_may_be_another_each_response_is_balanced(servers, mode):
    answers, acquired, released = served(LoadBalancer(*servers), mode)
    assert {name for name, _ in answers} <= set(servers)
    assert (acquired, released) == (3, 3)


def test_a_run_with_several_servers_asks_once_how_many_there_are():
    balancer = LoadBalancer("a", "b")
    served(balancer, "sync")
    assert balancer.asked.count("get_all_servers") == 1


def test_a_response_that_is_cancelled_leaves_the_question_for_the_server_to_the_others():
    client = LLMServerClient(OmegaConf.create({"trainer": {"v1": {"trainer_mode": "sync"}}}), LoadBalancer("a"))

    async def run():
        first, second = (asyncio.create_task(client._acquire_server(f"request {n}")) for n in range(2))
        await asyncio.sleep(0)
        first.cancel()
        return await second

    assert asyncio.run(run()) == ("a", "handle of a")
