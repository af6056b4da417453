"""Equality of prompts and of the problems in them."""

from cppo_verl.data.dedup import contaminated, deduplicate, normalise, problems


def test_normalise_ignores_white_space_byte_order_marks_and_unicode_form():
    assert normalise("\ufeff caf\u0065\u0301 \u00a0\n x ") == "caf\u00e9 x"
    assert normalise("A") != normalise("a")


def test_deduplicate_drops_a_prompt_with_two_answers():
    rows = [
        {"prompt": [{"content": prompt}], "reward_model": {"ground_truth": answer}}
        for prompt, answer in [("a", "1"), ("b", "2"), ("a ", "1"), ("b", "3")]
    ]
    kept, counts = deduplicate(rows)
    assert kept == rows[:1]
    assert counts == {
        "read": 4,
        "duplicates": 2,
        "conflicting": [{"prompt": "b", "answers": ["2", "3"]}],
        "deduplicated": 1,
    }


def test_contaminated_compares_problems_without_their_instructions():
    train = ["Do:\n\nA b", "Do:\n\nC", "Do:\n\nD"]
    assert contaminated(train, [["E\n\nThink.", "A  b\n\nThink.", "F\n\nThink."], ["D"]]) == [True, False, True]


def test_problems_keep_what_fewer_than_half_of_the_prompts_share():
    prompts = ["One\n\nx = 1", "Two\n\nx = 1", "Two", "Three\n\ny"]
    assert problems(prompts) == ["One x = 1", "Two x = 1", "Two", "Three y"]
    assert problems(["One\n\nx = 1"]) == ["One x = 1"]
    assert problems(["Add:", "Add:\n\nx", "Add:\n\ny"]) == ["Add:", "x", "y"]  # a problem is never empty
