"""What verl and hydra run of this package. ``register`` is what verl's entry point imports.

verl comes first: importing it loads ``register``, which needs this package's modules whole.
"""

import verl  # noqa: F401
