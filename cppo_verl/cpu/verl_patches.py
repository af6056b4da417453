"""The one place in verl 0.9.1 that offers no seam. Applied on the CPU platform only."""

from functools import partial

import verl.utils.distributed as distributed


def apply() -> None:
    # initialize_global_process_group_ray joins "cpu:gloo" and "<device>:<backend>" into one string;
    # on this platform both name the CPU, which torch refuses as a duplicate.
    # tests/unit/cpu/test_verl_patches.py fails when verl no longer does so.
    distributed.initialize_global_process_group_ray = partial(
        distributed.initialize_global_process_group_ray, backend="cpu:gloo"
    )
