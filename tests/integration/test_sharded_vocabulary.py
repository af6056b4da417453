"""Top-K divergences from logits whose vocabulary is split over ranks, as Megatron's tensor parallelism splits it."""

import pytest
import torch
import vocabulary_shards
from torch.multiprocessing import spawn
from vocabulary_shards import CASES, K, problem

from cppo_verl.core import top_k_divergence


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """[(ranks, case, kind, values)] of each rank."""
    store = tmp_path_factory.mktemp("shards") / "store"
    with torch.multiprocessing.Manager() as manager:
        found = manager.list()
        spawn(vocabulary_shards.measure, args=(str(store), ["tv", "kl"], found), nprocs=vocabulary_shards.RANKS)
        return list(found)


@pytest.mark.parametrize("kind", ["tv", "kl"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_divergence_is_that_of_the_whole_vocabulary_without_padding(found, size, case, kind):
    tokens, columns = CASES[case]
    logits, log_mu, sampled = problem(tokens, columns)
    want = top_k_divergence(logits[:, :tokens].double().log_softmax(-1), log_mu, sampled, K, kind)
    got = [values for *what, values in found if what == [size, case, kind]]
    assert len(got) == size and all(values == got[0] for values in got)
    assert want.max() > 0.1
    torch.testing.assert_close(torch.tensor(got[0]).double(), want, rtol=1e-6, atol=1e-6)


def test_no_rows_are_no_fault_and_ids_that_are_no_tokens_have_no_probability(found):
    others = {(what, tuple(values)) for _, what, kind, values in found if not kind}
    assert others == {("no rows", (0, K + 1)), ("ids that are no tokens", (False, True, True))}
