"""All contact with verl, vLLM and hydra. ``register`` is what verl's entry point imports."""
