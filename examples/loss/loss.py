"""CPPO's loss in plain torch, without verl: what it makes of each token, and how to train with it.

python examples/loss/loss.py
"""

import torch

from cppo_verl.core import binary_divergence, build_trust_region, masked_surrogate, update_mask

DELTA, DELTA_B, W_MIN = 0.15, 0.02, 0.8


def cppo(log_pi, log_mu, advantages, mask):
    """The loss of a batch of responses, and what it was made from.

    Args:
        log_pi, log_mu: log-probabilities of the sampled tokens under the policy and under the one that sampled
            them, [B, L]; log_pi carries the gradient.
        advantages: A_t, [B, L].
        mask: true on the tokens that the model has written, [B, L]; neither on padding nor on a tool's output.
    """
    divergence = binary_divergence(log_pi.detach(), log_mu)
    region = build_trust_region(divergence, mask, delta=DELTA, delta_b=DELTA_B, w_min=W_MIN)
    keep = update_mask(region, log_pi.detach() - log_mu, advantages, delta=DELTA)
    loss = (masked_surrogate(log_pi, log_mu, advantages, keep) * mask).sum() / mask.sum()
    return loss, divergence, region, keep


def explain():
    """Three responses, token by token."""
    # The worked example: four tokens whose probability has risen, by D_t.
    rising = [(0.50, 0.60), (0.40, 0.45), (0.30, 0.44), (0.60, 0.62)]
    # Tokens of negative advantage: a large step away from one, a step back towards one, a small step away.
    falling = [(0.70, 0.50), (0.30, 0.50), (0.40, 0.39)]
    # The model calls a tool, which answers with two tokens (None), and goes on: t counts the model's tokens alone.
    with_tool = [(0.50, 0.53), None, None, (0.60, 0.64)]
    responses = [(1.0, rising), (-1.0, falling), (1.0, with_tool)]

    length = max(len(tokens) for _, tokens in responses)
    rows = [tokens + [None] * (length - len(tokens)) for _, tokens in responses]
    mask = torch.tensor([[token is not None for token in row] for row in rows])
    log_mu, log_pi = torch.tensor([[token or (1.0, 1.0) for token in row] for row in rows]).log().unbind(-1)
    advantages = torch.tensor([[advantage] * length for advantage, _ in responses])

    _, divergence, region, keep = cppo(log_pi, log_mu, advantages, mask)
    print("response   t     mu     pi    A    w_t    D_t  w_t D_t     c_t  M_t")
    for b, (advantage, tokens) in enumerate(responses):
        for i in range(len(tokens)):
            if not mask[b, i]:
                print(f"{b + 1:8d}   -  the tool's")
                continue
            t, mu, pi = mask[b, : i + 1].sum(), log_mu[b, i].exp(), log_pi[b, i].exp()
            w, d, wd, c = (x[b, i] for x in (region.weights, divergence, region.weighted_divergence, region.threshold))
            if keep[b, i]:
                why = "moves towards mu" if advantage * (pi - mu) <= 0 else ""
            else:
                why = "the prefix has spent the budget" if wd <= DELTA else "too far for one token"
            line = f"{b + 1:8d}  {t:2d}  {mu:.3f}  {pi:.3f}  {advantage:+.0f}  {w:.3f}  {d:.3f}    {wd:.3f}  {c:6.3f}"
            print(f"{line}    {keep[b, i]:.0f}  {why}".rstrip())


def train(iterations=20, updates=4, responses=256, length=12, vocabulary=6):
    """A policy with a table of logits for each position learns to write the tokens 0 1 2 3 ... in turn."""
    torch.manual_seed(0)
    logits = torch.zeros(length, vocabulary, requires_grad=True)
    optimizer = torch.optim.SGD([logits], lr=20.0)
    target = torch.arange(length) % vocabulary
    for iteration in range(iterations):
        with torch.no_grad():
            mu = torch.distributions.Categorical(logits=logits)
            tokens = mu.sample((responses,))
            log_mu = mu.log_prob(tokens)
            # A response ends after the first wrong token: later ones are padding.
            mask = (tokens == target).cumprod(-1).roll(1, -1).bool().index_fill(-1, torch.tensor(0), True)
            reward = ((tokens == target) & mask).sum(-1) / length
            advantages = ((reward - reward.mean()) / (reward.std() + 1e-6))[:, None].expand(-1, length)
        masked = []
        for _ in range(updates):
            log_pi = torch.distributions.Categorical(logits=logits).log_prob(tokens)
            loss, _, _, keep = cppo(log_pi, log_mu, advantages, mask)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            masked.append(1 - keep[mask].mean())
        if iteration % 5 == 4:
            shares = "  ".join(f"{share:5.1%}" for share in masked)
            print(f"iteration {iteration + 1:2d}  reward {reward.mean():.2f}  masked at each update  {shares}")


if __name__ == "__main__":
    explain()
    print()
    train()
