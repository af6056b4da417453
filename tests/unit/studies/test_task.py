import torch

from studies.trust_regions import task


def by_hand(prompt, length):
    digits = list(prompt)
    for _ in range(length):
        digits.append((digits[-1] + digits[-4]) % 10)
    return digits[4:]


def test_answers_follow_the_rule():
    prompts = task.prompts(20, torch.Generator().manual_seed(0))
    assert task.answers(prompts, 30).tolist() == [by_hand(p, 30) for p in prompts.tolist()]


def test_one_wrong_digit_makes_an_answer_wrong():
    prompts = task.prompts(16, torch.Generator().manual_seed(0))
    responses = task.answers(prompts, 16)
    assert task.rewards(prompts, responses).tolist() == [1.0] * 16
    responses[range(16), range(16)] = (responses[range(16), range(16)] + 1) % 10
    assert task.rewards(prompts, responses).tolist() == [0.0] * 16


def test_the_trainers_reward_is_the_loops():
    prompts = task.prompts(1, torch.Generator().manual_seed(0))
    right = "".join(map(str, task.answers(prompts, 8)[0].tolist()))
    assert task.compute_score("lagged_sum", right, right) == 1.0
    assert task.compute_score("lagged_sum", right + "1", right) == 0.0
    assert task.compute_score("lagged_sum", right[:-1] + "<eos>", right) == 0.0


def test_demonstrations_follow_the_rule_but_for_the_noise():
    shown = task.demonstrations(500, 20, 0.1, torch.Generator().manual_seed(0))
    follows = shown[:, 4:] == (shown[:, 3:-1] + shown[:, :-4]) % 10
    # A random digit is the right one every tenth time.
    assert abs(follows.float().mean() - (1 - 0.1 * 0.9)) < 0.01
