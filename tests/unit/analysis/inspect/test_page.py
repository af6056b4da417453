"""Which responses the page of `inspect` shows."""

import json
import math

from token_dumps import CPPO, METHODS, RUN_HEADER, dumped, save

from cppo_verl.analysis.inspect import methods
from cppo_verl.analysis.inspect.page import most_masked, page_values


def test_responses_in_the_page_are_of_every_update_the_most_masked_first(tmp_path):
    _, _, by_row = dumped(tmp_path, METHODS["cppo"])
    responses = [response for of_row in by_row.values() for response in of_row]
    share = [float(r.rejected[r.mask].mean()) for r in responses]
    rows = most_masked(responses, responses, 5)
    assert sorted(responses[row].update for row in rows[:3]) == [0, 1, 2]
    for row in rows[:3]:
        assert share[row] == max(s for r, s in zip(responses, share, strict=True) if r.update == responses[row].update)
    assert share[rows[0]] >= share[rows[1]] >= share[rows[2]] and share[rows[3]] >= share[rows[4]]
    assert sorted(most_masked(responses, responses, 999)) == list(range(len(responses)))


def test_a_threshold_that_bounds_nothing_is_none_in_the_page_and_not_infinity(tmp_path):
    loss = {"divergence": "binary_kl", "delta": math.inf, "budget": "none"}
    _, _, by_row = dumped(tmp_path / "recorded", CPPO(**loss))
    responses = [response for of_row in by_row.values() for response in of_row]
    assert all(math.isinf(r.threshold[r.mask].max()) for r in responses)
    method = RUN_HEADER["method"] | loss
    save(tmp_path / "recorded", 3, responses, **RUN_HEADER | {"method": method, "divergence": "binary_kl"})
    read = methods.read(tmp_path / "recorded")
    data = page_values(read, methods.choose(read, ["run", "dppo"]), 99, None)["data"]
    json.dumps(data, allow_nan=False)
    assert [d["delta"] for d in data["responses"][0]["decisions"]] == [None, 0.05]
    assert not any(sum(d["share"] for d in r["decisions"][:1]) for r in data["responses"])
