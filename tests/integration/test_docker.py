"""The images' files, as far as they can be checked without Docker; `make lint` lints them."""

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
import yaml
from commands import start_up
from docker.utils.build import exclude_paths
from dockerfile_parse import DockerfileParser
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
DOCKERFILES = sorted((ROOT / "docker").glob("Dockerfile.*"))


def instructions(dockerfile):
    parser = DockerfileParser(fileobj=io.BytesIO(dockerfile.read_bytes()))
    return [(i["instruction"], i["value"]) for i in parser.structure if i["instruction"] != "COMMENT"]


def values(dockerfile, instruction):
    return [value for name, value in instructions(dockerfile) if name == instruction]


def context(root):
    """The files below ``root`` that Docker's client sends to a build, by the repository's .dockerignore."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    paths = exclude_paths(str(root), [line for line in lines if line and not line.startswith("#")])
    return {path for path in paths if (root / path).is_file()}


@pytest.fixture(params=DOCKERFILES, ids=lambda path: path.name)
def dockerfile(request):
    return request.param


def test_a_build_sees_the_package_and_nothing_private(tmp_path):
    tracked = subprocess.check_output(["git", "ls-files", "cppo_verl", "examples", "requirements"], cwd=ROOT, text=True)
    wanted = {*tracked.split(), "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"}
    assert wanted <= context(ROOT)

    private = [".env", ".git/config", "ray_token", "data/train.parquet", "outputs/model.pt", ".venv/bin/python"]
    for path in [*private, "cppo_verl/__pycache__/runs.pyc", "setup.py", "cppo_verl/artifacts/run_reader.py"]:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    assert context(tmp_path) == {"setup.py", "cppo_verl/artifacts/run_reader.py"}


def test_what_is_copied_is_in_the_context(dockerfile):
    sent = context(ROOT)
    copies = [shlex.split(value) for value in values(dockerfile, "COPY") if not value.startswith("--from")]
    assert copies
    for *sources, _ in copies:
        for source in sources:
            assert source == "." or any(path == source or path.startswith(source + "/") for path in sent), source


def test_the_cpu_image_is_installed_by_the_script_that_make_runs():
    script = "requirements/install-cpu.sh"
    made = subprocess.check_output(["make", "--dry-run", "install", "VENV=fresh"], cwd=ROOT, text=True)
    built = "\n".join(values(ROOT / "docker" / "Dockerfile.cpu", "RUN"))
    for text in (made, built):
        assert script in text
        # What the script installs stands there only.
        assert "vllm" not in text and "torch" not in text
    assert os.access(ROOT / script, os.X_OK)


def test_an_image_runs_without_root_and_hands_signals_on(dockerfile):
    assert values(dockerfile, "USER")[-1] == "1001:1001"
    assert json.loads(values(dockerfile, "ENTRYPOINT")[-1])[0] == "tini"
    assert json.loads(values(dockerfile, "CMD")[-1])[0] == "python"
    assert json.loads(values(dockerfile, "VOLUME")[-1]) == ["/workspace", "/models", "/home/cppo"]


def pins(name):
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    wanted = (Requirement(line) for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(requirement.name): requirement for requirement in wanted}


def test_the_gpu_image_holds_what_the_gpu_extra_asks_for():
    constraints = pins("gpu-constraints.txt")
    versions = {name: next(iter(r.specifier)).version for name, r in constraints.items()}
    wanted = [*pins("gpu.txt").values(), *map(Requirement, requires("verl"))]
    environment = {"python_version": "3.12"}
    for requirement in wanted:
        extras = ("", "vllm", "fsdp", "verl-core")
        if requirement.marker and not any(requirement.marker.evaluate(environment | {"extra": e}) for e in extras):
            continue
        name = canonicalize_name(requirement.name)
        assert requirement.specifier.contains(versions[name]), f"{requirement}, but constrained to {versions[name]}"

    [base] = {value for value in values(ROOT / "docker" / "Dockerfile.gpu", "ARG") if value.startswith("BASE=")}
    cuda = re.search(r"nvidia/cuda:(\d+\.\d+)\.\d+-cudnn-devel-ubuntu24\.04$", base)[1]
    assert versions["cuda-toolkit"].startswith(cuda + "."), "what torch is built for"


def test_every_pip_call_of_the_gpu_image_is_constrained():
    calls = [run for run in values(ROOT / "docker" / "Dockerfile.gpu", "RUN") if "pip install" in run]
    assert len(calls) == 4
    assert all("pip install -c requirements/gpu-constraints.txt" in run for run in calls)


def test_the_plug_in_installs_from_a_builds_context_alone(tmp_path):
    checkout, site = tmp_path / "checkout", tmp_path / "site"
    for path in context(ROOT):
        (checkout / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, checkout / path)
    pip = [sys.executable, "-m", "pip", "--quiet", "install", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", site, "."], cwd=checkout, check=True)

    environment = os.environ | {"PYTHONPATH": str(site), "VERL_PLATFORM": "cpu"}
    where = [sys.executable, "-c", "import cppo_verl; print(cppo_verl.__file__)"]
    assert subprocess.check_output(where, cwd=tmp_path, env=environment, text=True).startswith(str(site))
    command = [sys.executable, "-m", "verl.trainer.main_ppo", "--cfg", "job", "+method=cppo", "+platform=cpu"]
    config = yaml.safe_load(subprocess.check_output(command, cwd=tmp_path, env=environment, text=True))
    assert config["actor_rollout_ref"]["actor"]["policy_loss"]["loss_mode"] == "cppo"
    assert config["trainer"]["device"] == "cpu"
    command = [sys.executable, "-m", "cppo_verl", "inspect", str(ROOT / "examples/analysis/run"), "--method", "run"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, stdout=subprocess.DEVNULL)
    assert "<select" in (tmp_path / "inspect.html").read_text()


def test_the_smoke_run_of_the_readme_fits_one_gpu():
    import verl  # noqa: F401  loads the plug-in
    from hydra import compose, initialize_config_dir
    from verl.utils.config import omega_conf_to_dataclass

    readme = (ROOT / "docker/README.md").read_text().replace("\\\n", " ")
    [overrides] = re.findall(r"^docker run .* --gpus all .*/quickstart/run\.py (.*)$", readme, re.M)
    with initialize_config_dir(str(ROOT / "examples/quickstart"), version_base=None):
        config = compose("quickstart", overrides=["output=/workspace", *shlex.split(overrides)])
    start_up(config)
    for part in ("actor", "rollout"):
        omega_conf_to_dataclass(config.actor_rollout_ref[part])
    assert (config.trainer.nnodes, config.trainer.n_gpus_per_node) == (1, 1)
    assert config.actor_rollout_ref.rollout.tensor_model_parallel_size == 1
    assert config.trainer.device == "cuda"
    assert config.trainer.total_training_steps == 2
    assert config.actor_rollout_ref.actor.policy_loss.loss_mode == "cppo"


def test_the_compose_files_fit_the_images():
    one = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())
    [trainer] = one["services"].values()
    build = trainer["build"]
    assert (ROOT / "docker" / build["context"] / build["dockerfile"]).samefile(ROOT / "docker/Dockerfile.gpu")
    volumes = json.loads(values(ROOT / "docker/Dockerfile.gpu", "VOLUME")[-1])
    assert sorted(volume.split(":")[1] for volume in trainer["volumes"]) == sorted(volumes)

    two = yaml.safe_load((ROOT / "docker/compose.two-nodes.yaml").read_text())
    [node] = two["services"].values()
    assert node["extends"] == {"file": "compose.yaml", "service": "trainer"}
    tini = json.loads(values(ROOT / "docker/Dockerfile.gpu", "ENTRYPOINT")[-1])
    *_, script, address, nodes, token, separator, entrypoint = node["entrypoint"]
    assert node["entrypoint"][: len(tini)] == tini
    for path in (script, entrypoint):
        assert os.access(ROOT / path.removeprefix("/opt/cppo_verl/"), os.X_OK)
    # The token comes as a file, and nothing is published beyond what the host's network shows.
    assert token == "/run/secrets/" + node["secrets"][0]
    assert (address.endswith("}:6379"), nodes, separator) == (True, "2", "--")
    assert "ports" not in node
