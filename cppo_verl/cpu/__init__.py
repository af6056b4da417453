"""What lets verl's trainer, FSDP2 engine and vLLM rollout run on a machine without a GPU."""
