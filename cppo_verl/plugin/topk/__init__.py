"""Top-K divergences on stock verl, in the order of the data; docs/seams.md draws it.

`vllm_server`: the rollout engine returns mu's K most likely tokens with each sampled one, without a second pass.
`agent_loop`: they are put beside the response that verl's agent loop made, into TransferQueue.
`loss`: verl's logits hook keeps the actor's logits of them; with the sampled tokens' log-probabilities they make D_t.
"""
