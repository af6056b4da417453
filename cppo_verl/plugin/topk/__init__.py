"""Top-K divergences on stock verl, in the order that the data takes.

`server`: the rollout engine returns mu's K most likely tokens with each sampled one, no second pass.
`agent_loop`: they are laid beside the response that verl's agent loop made of them, into TransferQueue.
`loss`: in the actor's forward pass, verl's look at the logits turns them into D_t, one number a token.
"""
