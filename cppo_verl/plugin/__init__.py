"""Everything that runs inside verl's processes; verl's entry point imports `cppo_verl.register`.

verl is imported first, because importing it loads ``register``, which needs this package's modules whole.
"""

import verl  # noqa: F401
