"""Which responses the page of `inspect` shows."""

from token_dumps import METHODS, dumped

from cppo_verl.analysis.inspect.page import most_masked


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
