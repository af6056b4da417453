"""What the trainer leaves in TransferQueue and takes from it, with TransferQueue itself."""

import subprocess
import sys

import pytest

# In a process of its own: tests before it may have had another Ray in theirs.
RUN = """
import sys
import numpy as np
import ray, torch
import transfer_queue as tq
from omegaconf import OmegaConf
from tensordict import NonTensorStack, TensorDict
from transfer_queue import KVBatchMeta
from types import SimpleNamespace
from verl.utils.tensordict_utils import list_of_dict_to_tensordict
from cppo_verl.cpu.agent_loop_patches import Columns
from cppo_verl.plugin.trainer import ActorWorkers, TrustRegionTrainer, fields_of_models, forget_trained_responses

ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
tq.init(OmegaConf.create({"backend": {"SimpleStorage": {"num_data_storage_units": 1}}}))
forget_trained_responses()  # of an empty queue
for prompt in ("waits", "trained"):
    tq.kv_put(key=prompt, partition_id="train", tag={"is_prompt": True, "status": "pending", "global_steps": 1})
    keys = [f"{prompt}_{session}_0" for session in range(2)]
    fields = TensorDict({"responses": torch.ones(2, 3)}, batch_size=2)
    tq.kv_batch_put(keys=keys, partition_id="train", fields=fields, tags=[{"status": "success"}] * 2)
tq.kv_put(key="waits", partition_id="train", tag={"status": "finished"})
tq.kv_clear(keys=["trained"], partition_id="train")  # as verl does where it draws a batch
tq.save_checkpoint(sys.argv[1])
tq.load_checkpoint(sys.argv[1])
print("restored:", *sorted(tq.kv_list("train")["train"]))
forget_trained_responses()
print("kept:", *sorted(tq.kv_list("train")["train"]), flush=True)
keys = ["waits_0_0", "waits_1_0"]
columns = {name: NonTensorStack(*[{"row": row} for row in keys]) for name in ("raw_prompt", "multi_modal_inputs")}
tensor = torch.nested.nested_tensor([torch.ones(3)] * 2, layout=torch.jagged)
stored = TensorDict({"log_probs": tensor, "returns": tensor, **columns}, 2)
tq.kv_batch_put(keys=keys, partition_id="train", fields=stored)
batch = KVBatchMeta(keys=keys, tags=[{}] * 2, partition_id="train")
print("all of:", *fields_of_models(batch))
batch.fields = ["raw_prompt", "log_probs"]
print("some of:", *fields_of_models(batch))


class Workers:
    def compute_log_prob(self, batch):
        print("a worker gets:", *batch.fields)
        return {"metrics": {}}

    update_actor = compute_ref_log_prob = compute_log_prob


for call in ("update_actor", "compute_log_prob", "compute_ref_log_prob"):
    getattr(ActorWorkers(Workers()), call)(batch)
print("the trainer keeps:", *batch.fields, flush=True)

# Two prompts of two responses of unequal length; the first prompt's have one reward.
keys = ["alike_0_0", "alike_1_0", "differ_0_0", "differ_1_0"]
masks = torch.nested.nested_tensor([torch.ones(n, dtype=torch.int64) for n in (3, 1, 2, 4)], layout=torch.jagged)
scores = torch.nested.nested_tensor([torch.ones(1), torch.ones(1), torch.zeros(1), torch.ones(1)], layout=torch.jagged)
uids = NonTensorStack(*[key.split("_")[0] for key in keys])
stored = TensorDict({"uid": uids, "response_mask": masks, "loss_mask": masks, "rm_scores": scores}, 4)
tq.kv_batch_put(keys=keys, partition_id="train", fields=stored)
batch = KVBatchMeta(keys=keys, tags=[{}] * 4, partition_id="train")
trainer = object.__new__(TrustRegionTrainer)
trainer.config = OmegaConf.create({
    "actor_rollout_ref": {
        "actor": {"loss_agg_mode": "token-mean", "ppo_mini_batch_size": 1, "policy_loss": {"mask_std_0": True}},
        "rollout": {"n": 2},
    },
    "algorithm": {"use_kl_in_reward": False, "adv_estimator": "grpo"},
})
trainer.actor_rollout_wg = SimpleNamespace(_dispatch_info={"actor": [0]})


def stored_masks():
    data = tq.kv_batch_get(keys=keys, partition_id="train", select_fields=["response_mask", "loss_mask"])
    return [[row.tolist() for row in data[name].unbind()] for name in ("response_mask", "loss_mask")]


put, tq.kv_batch_put = tq.kv_batch_put, lambda **what: print("puts:", *what["keys"]) or put(**what)
metrics, before = {}, stored_masks()
original = trainer._leave_out(batch, metrics)
print("left out:", *metrics.values(), *stored_masks())
trainer._put(batch, *original)
print("put back:", stored_masks() == before)
tq.kv_batch_put = put

# Tensors of one length and of several, and every kind of Python object, with an object in place of a tensor.
rows = [
    {
        "responses": torch.arange(n),
        "score": torch.tensor([0.5 * n]),
        "routed": torch.ones(2) if n == 2 else None,
        "extra": {"pair": (1, [n]), "share": np.float32(n)},
        "turns": [n, n],
        "array": np.arange(3),
        "uid": f"prompt {n}",
        "number": np.int64(n),
        "nothing": None,
        "function": lambda: None,
    }
    for n in (3, 1, 2)
]
keys, got = ["row_0", "row_1", "row_2"], []
for make in (list_of_dict_to_tensordict, lambda rows: Columns(rows, list_of_dict_to_tensordict)):
    tq.kv_batch_put(keys=keys, partition_id="rows", fields=make(rows))
    schema = tq.get_client().kv_retrieve_meta(keys, "rows").field_schema
    stored = tq.kv_batch_get(keys=keys, partition_id="rows")
    values = {name: [repr(x).split(" at 0x")[0] for x in stored[name]] for name in sorted(stored.keys())}
    got.append((values, {name: schema[name]["is_non_tensor"] for name in sorted(schema)}))
    tq.kv_clear(keys=keys, partition_id="rows")
print("columns:", got[0] == got[1], len(got[0][0]), *got[0][0]["extra"])
tq.close()
ray.shutdown()
"""


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    command = [sys.executable, "-c", RUN, str(tmp_path_factory.mktemp("queue") / "transfer_queue")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_batch_that_the_saved_step_has_trained_on_is_not_restored_for_ever(output):
    assert "restored: trained_0_0 trained_1_0 waits waits_0_0 waits_1_0\n" in output
    assert "kept: waits waits_0_0 waits_1_0\n" in output


def test_the_workers_of_the_models_get_what_they_read_and_no_column_of_the_dataset(output):
    assert "all of: log_probs multi_modal_inputs responses\n" in output
    assert "some of: log_probs\n" in output
    assert output.count("a worker gets: log_probs\n") == 3
    assert "the trainer keeps: raw_prompt log_probs\n" in output


def test_the_rows_that_are_left_out_of_an_update_are_changed_and_put_back_and_no_others(output):
    assert "left out: 0.5 [[0, 0, 0], [0], [1, 1], [1, 1, 1, 1]] [[1, 0, 0], [0], [1, 1], [1, 1, 1, 1]]\n" in output
    assert output.count("puts: alike_0_0 alike_1_0\n") == output.count("puts:") == 2
    assert "put back: True\n" in output


def test_columns_of_python_objects_come_back_as_from_a_tensordict(output):
    assert "columns: True 10 {'pair'" in output
