"""How the plug-in loads, each time in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def run_python(code, **env):
    return subprocess.run([sys.executable, "-c", code], env=os.environ | env, capture_output=True, text=True)


WHICH = "import verl; from verl.plugin.platform import get_platform; print(type(get_platform()).__name__)"


def test_with_an_accelerator_build_nothing_of_it_is_active():
    # A GPU machine whose driver does not answer: torch knows cuda, no device is there.
    pretend = "import torch; torch.accelerator.current_accelerator = lambda: torch.device('cuda'); "
    check = (
        "; import gc, sys; import verl.utils.distributed as d; print(gc.get_threshold()[0])"
        "; print(type(d.initialize_global_process_group_ray).__name__, 'cppo_verl.cpu.fsdp_engine' in sys.modules)"
    )
    out = run_python(pretend + WHICH + "; import verl.workers.engine" + check, VERL_PLATFORM="").stdout
    platform, threshold, *others = out.split()
    assert [platform, *others] == ["PlatformCUDA", "function", "False"]
    assert threshold != "50000"


def test_on_the_cpu_the_garbage_collector_runs_seldom():
    out = run_python(WHICH + "; import gc; print(gc.get_threshold()[0])", VERL_PLATFORM="cpu").stdout
    assert out.split() == ["PlatformCPU", "50000"]


RAY_SETTINGS = """
import os
for name in [name for name in os.environ if name.startswith("RAY_")]:
    del os.environ[name]
import ray, verl  # as verl.trainer.main_ppo imports them
print([name for name in os.environ if name.startswith(("RAY_enable", "RAY_prestart", "RAY_RUNTIME"))])
"""
START_RAY = """
import sys
from cppo_verl.cpu import forked_python
fewer = "fork_server.MODULES = fork_server.MODULES_WITH_RAY = []; fork_server.main"
forked_python.SERVER = forked_python.SERVER.replace("fork_server.main", fewer)
os.environ["RAY_ADDRESS"] = "local"
ray.init(num_cpus=1, include_dashboard=False, runtime_env=dict(env_vars=dict(OF_THE="run")))
ray.get(ray.remote(lambda: None).remote())
print(ray.get(ray.remote(lambda: "cppo_verl.cpu.fork_server" in sys.modules).remote()))
ray.init(ignore_reinit_error=True)  # by user code that does not know that Ray runs
print([server.poll() for server in forked_python.servers.values()])
print(ray._private.worker._global_node.get_logs_dir_path())
"""


def test_on_the_cpu_ray_collects_no_metrics_and_its_only_worker_is_a_fork():
    forked, ends, logs = run_python(RAY_SETTINGS + START_RAY, VERL_PLATFORM="cpu").stdout.splitlines()[-3:]
    assert (forked, ends) == ("True", "[None]")
    logs = Path(logs)
    for name in ("gcs_server.out", "raylet.out", "python-core-driver-*.log", "python-core-worker-*.log"):
        (file,) = logs.glob(name)
        assert "Disabled stats." in file.read_text(), name


def test_without_the_cpu_platform_rays_settings_are_left_as_they_are():
    pretend = "import torch; torch.accelerator.current_accelerator = lambda: torch.device('cuda')"
    assert run_python(pretend + RAY_SETTINGS, VERL_PLATFORM="").stdout.splitlines()[-1] == "[]"


def test_a_plug_in_that_fails_to_load_says_so_at_once():
    code = "import sys; sys.modules['cppo_verl.plugin.losses'] = None; import verl; print('went on')"
    result = run_python(code)
    assert "went on" in result.stdout
    assert "cppo_verl: the plug-in failed to load (above), verl runs without it" in result.stderr
    assert "ImportError" in result.stderr or "ModuleNotFoundError" in result.stderr


def test_importing_the_package_needs_torch_only():
    blocked = ("verl", "ray", "vllm", "hydra", "wrapt", "numpy")
    code = f"import sys, torch; sys.modules.update(dict.fromkeys({blocked})); import cppo_verl"
    result = run_python(code)
    assert result.returncode == 0, result.stderr


REGISTERED = "\nfrom cppo_verl.doctor.registrations import registrations; print(all(registrations().values()))"


@pytest.mark.parametrize("module", ["cppo_verl.cpu.platform", "cppo_verl.register", "cppo_verl.plugin.trainer"])
def test_any_module_may_be_the_first_import_of_a_process(module):
    result = run_python(f"import {module}{REGISTERED}", VERL_PLATFORM="cpu")
    assert result.stdout.split()[-1:] == ["True"], result.stderr
    assert "failed to load" not in result.stderr


HIDDEN = """
import sys

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name == {0!r} or name.startswith({0!r} + "."):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hide())
import verl
"""
LOSSES = """
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from cppo_verl.plugin.config import CPPOLossConfig, TRMLossConfig
print([bool(get_policy_loss_fn(cls().loss_mode)) for cls in (CPPOLossConfig, TRMLossConfig)])
"""


@pytest.mark.parametrize("module", ["transfer_queue", "verl.trainer.ppo.v1"])
def test_losses_and_their_configs_load_in_a_verl_without_its_new_trainer(module):
    result = run_python(HIDDEN.format(module) + LOSSES, VERL_PLATFORM="cpu")
    assert result.stdout.splitlines()[-1:] == ["[True, True]"], result.stderr
    assert "failed to load" not in result.stderr


def test_beside_another_rollout_engine_it_needs_no_vllm():
    result = run_python(HIDDEN.format("vllm") + REGISTERED, VERL_PLATFORM="cpu")
    assert result.stdout.split()[-1:] == ["True"], result.stderr
    assert "failed to load" not in result.stderr


def test_the_patches_of_vllm_import_no_verl():
    result = run_python("import sys, cppo_verl.cpu.vllm_patches; print('verl' in sys.modules)")
    assert result.stdout.split() == ["False"]
