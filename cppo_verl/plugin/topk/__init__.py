"""Top-K divergences on stock verl, in the order of the data; docs/seams.md draws it.

`vllm_server`: the rollout engine returns mu's K most likely tokens with each sampled one, without a second pass.
`agent_loop`: they are put beside the response that verl's agent loop made, into TransferQueue.
`loss`: in the actor's forward pass, verl's logits hook turns them into D_t, one number per token.
"""
