"""verl platform "cpu": logical GPU slots of Ray, gloo, weights handed over in shared memory.

VERL_PLATFORM=cpu chooses it, or detection where no accelerator answers and torch itself was built without one. With an
accelerator build of torch it is never detected, so that a GPU machine with a broken driver fails as it does without
this plug-in. This module imports verl in its functions only, because importing verl loads the plug-in, which imports
this module.
"""

import contextlib
import resource
from types import ModuleType
from typing import Any

import psutil
import torch
from torch.types import Device


def _nothing(*args: object, **kwargs: object) -> None:
    """Stand for what only an accelerator has."""


class CPUDevice(ModuleType):
    """torch.cpu, extended by the functions of torch.cuda that verl calls."""

    empty_cache = ipc_collect = staticmethod(_nothing)
    get_rng_state = staticmethod(torch.get_rng_state)
    set_rng_state = staticmethod(torch.set_rng_state)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    @staticmethod
    def get_device_name(index: Device = None) -> str:
        return "CPU"

    @staticmethod
    def mem_get_info(device: Device = None) -> tuple[int, int]:
        """Free and total memory of the machine in bytes."""
        memory = psutil.virtual_memory()
        return memory.available, memory.total

    @staticmethod
    def memory_allocated(device: Device = None) -> int:
        """Resident memory of this process in bytes."""
        return psutil.Process().memory_info().rss

    @staticmethod
    def max_memory_allocated(device: Device = None) -> int:
        """Peak resident memory of this process in bytes."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    memory_reserved, max_memory_reserved = memory_allocated, max_memory_allocated


class PlatformCPU:
    """What verl asks of a platform; `register_platform` adds verl's base class."""

    device_name = vendor_name = "cpu"
    device_module = CPUDevice("cppo_verl.cpu_device")
    nvtx_range = contextlib.nullcontext
    manual_seed = manual_seed_all = staticmethod(torch.manual_seed)
    set_device = synchronize = set_allocator_settings = empty_cache = staticmethod(_nothing)
    profiler_start = profiler_stop = cudart = staticmethod(_nothing)

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        return torch.accelerator.current_accelerator() is None

    def current_device(self) -> torch.device:
        # verl moves tensors .to() this; an index would mean an accelerator.
        return torch.device("cpu")

    def device_count(self) -> int:
        return 1

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        # Ray sets it for its "GPU" resource, which stands for processes here.
        return "CUDA_VISIBLE_DEVICES"

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

    def is_ipc_supported(self) -> bool:
        return False


def register_platform() -> None:
    from verl.plugin.platform import PlatformBase, PlatformRegistry

    PlatformRegistry.register(platform="cpu")(type("PlatformCPU", (PlatformCPU, PlatformBase), {}))


def is_active() -> bool:
    """Whether verl runs on this platform in this process."""
    from verl.plugin.platform import get_platform

    return isinstance(get_platform(), PlatformCPU)
