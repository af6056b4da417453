"""Top-K divergences from logits that several ranks share: their rows, as sequence parallelism splits them, or their
columns, as Megatron's tensor parallelism does."""

import logit_parts
import pytest
import torch
from logit_parts import SPLITS, K, problem
from torch.multiprocessing import spawn

from cppo_verl.core import top_k_divergence


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """[(ranks, case, kind, values)] of each rank."""
    store = tmp_path_factory.mktemp("shards") / "store"
    with torch.multiprocessing.Manager() as manager:
        found = manager.list()
        spawn(logit_parts.measure, args=(str(store), ["tv", "kl"], found), nprocs=logit_parts.RANKS)
        return list(found)


@pytest.mark.parametrize("kind", ["tv", "kl"])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_divergence_is_that_of_the_whole_logits(found, size, split, kind):
    logits, log_mu, sampled = problem()
    want = top_k_divergence(logits.double().log_softmax(-1), log_mu, sampled, K, kind)
    got = [values for *what, values in found if what == [size, split, kind]]
    assert len(got) == size and all(values == got[0] for values in got)
    assert want.max() > 0.1
    torch.testing.assert_close(torch.tensor(got[0]).double(), want, rtol=1e-6, atol=1e-6)


def test_no_rows_are_no_fault_and_ids_that_are_no_tokens_have_no_logit(found):
    others = {(what, tuple(values)) for _, what, kind, values in found if not kind}
    assert others == {("no rows", (0, K + 1)), ("ids that are no tokens", (False, True, True))}
