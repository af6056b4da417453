"""Nodes of a cluster on one machine: each has a network, processes, a host name and a folder for Ray of its own.

The nodes share the file system. `ray stop` on one of them ends the Ray of no other, and none of this machine's.
"""

import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from ray._common.utils import get_default_ray_temp_dir
from trainer_run import Program, ends_with_the_test

HELPERS = Path(__file__).parent
ROOT = HELPERS.parents[1]
NODE = f"{ROOT}/recipes/cluster/node.sh"
# PID 1 adopts what has lost its parent, and a shell reaps it.
INIT = """
hostname "$1" && mount --bind "$2" "$4" && mount --bind "$3" /etc/hosts && echo up
while :; do sleep 3600; done
"""
# The trainer is another program where IN_PLACE_OF_THE_TRAINER names one; hydra's part of it never is.
IN_PLACE = """
if [[ -n ${IN_PLACE_OF_THE_TRAINER:-} && "$1 $2" == "-m verl.trainer.main_ppo" && " $* " != *" --cfg "* ]]; then
    shift 2 && set -- "$IN_PLACE_OF_THE_TRAINER" "$@"
fi
"""


def sh(*command):
    subprocess.run(command, check=True)


def add_bridge():
    """Add the bridge cppo<number> and return the number.

    The network 10.<number>.0.0/24 then belongs to no other cluster of the tests, and to nothing else on this machine.
    """
    addresses = subprocess.check_output(["ip", "-4", "address"], text=True)
    for number in range(20, 220):
        command = ["ip", "link", "add", f"cppo{number}", "type", "bridge"]
        if f" 10.{number}." not in addresses and subprocess.run(command).returncode == 0:
            return number
    raise RuntimeError("no bridge can be added")


class Node:
    def __init__(self, number, index, folder, hosts):
        self.name, self.address = f"node{index}", f"10.{number}.0.{index}"
        self.network, self.ray = f"cppo{number}-{index}", folder / f"ray{index}"
        self.ray.mkdir()
        # Where Ray writes down which cluster runs here, /tmp/ray without TMPDIR: a run outside must not find this one.
        place = Path(get_default_ray_temp_dir())
        place.mkdir(exist_ok=True)
        self.link = f"cppo{number}v{index}"
        sh("ip", "netns", "add", self.network)
        sh("ip", "link", "add", self.link, "type", "veth", "peer", "name", "eth0", "netns", self.network)
        sh("ip", "link", "set", self.link, "master", f"cppo{number}", "up")
        sh("ip", "-n", self.network, "link", "set", "lo", "up")
        sh("ip", "-n", self.network, "addr", "add", f"{self.address}/24", "dev", "eth0")
        sh("ip", "-n", self.network, "link", "set", "eth0", "up")
        sh("ip", "-n", self.network, "route", "add", "default", "via", f"10.{number}.0.254")
        unshare = ["unshare", "--pid", "--uts", "--mount", "--mount-proc", "--fork", "--kill-child"]
        self.process = subprocess.Popen(
            [
                "ip",
                "netns",
                "exec",
                self.network,
                *unshare,
                "bash",
                "-c",
                INIT,
                "init",
                self.name,
                self.ray,
                hosts,
                place,
            ],
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=partial(ends_with_the_test, signal.SIGKILL),
        )
        assert self.process.stdout.readline() == "up\n"
        (self.init,) = subprocess.check_output(["pgrep", "-P", str(self.process.pid)], text=True).split()

    def on(self, *command):
        """``command`` as it runs on this node."""
        return ["nsenter", "-t", self.init, "--net", "--pid", "--uts", "--mount", f"--wd={ROOT}", "--", *command]

    def logs(self):
        return b"".join(path.read_bytes() for path in self.ray.rglob("logs/*") if path.is_file())

    def end(self):
        self.process.kill()
        self.process.wait()
        for what in (["link", "del", self.link], ["netns", "del", self.network]):
            subprocess.run(["ip", *what], check=False)


class Cluster:
    """Two nodes, and a folder with the programs of Slurm that ``slurm.sbatch`` calls there."""

    def __init__(self, folder):
        if os.geteuid() or not shutil.which("ip"):
            pytest.skip("namespaces need root and iproute2")
        number = add_bridge()
        self.bridge, self.nodes, self.folder = f"cppo{number}", [], folder
        sh("ip", "addr", "add", f"10.{number}.0.254/24", "dev", self.bridge)
        sh("ip", "link", "set", self.bridge, "up")
        hosts = folder / "hosts"
        hosts.write_text("127.0.0.1 localhost\n" + "".join(f"10.{number}.0.{i} node{i}\n" for i in (1, 2)))
        for index in (1, 2):
            self.nodes.append(Node(number, index, folder, hosts))
        self.programs = folder / "bin"
        self.programs.mkdir()
        # a job of many nodes has more to say than its reader may wait for
        hostnames = "echo node1; sleep 0.2; echo node2"
        self.write("scontrol", f'if [[ $1 == show ]]; then {hostnames}; else echo "$@" >> {folder}/scontrol.log; fi')
        self.write("python", f'{IN_PLACE}exec {sys.executable} "$@"')

    def write(self, name, script):
        (self.programs / name).write_text(f"#!/bin/bash\n{script}\n")
        (self.programs / name).chmod(0o755)

    def start(self, command, environment=None):
        """A program whose Ray has one slot a node, as ``+platform=cpu`` needs it."""
        path = [str(self.programs), str(Path(sys.executable).parent), os.environ["PATH"]]
        paths = [str(HELPERS), str(ROOT), os.environ.get("PYTHONPATH", "")]
        own = {"PATH": ":".join(path), "PYTHONPATH": ":".join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
        own |= {"RAY_OVERRIDE_RESOURCES": '{"GPU": 1}', "SLURM_CPUS_ON_NODE": "16"}
        return Program(command, own | (environment or {}), signal.SIGTERM, cwd=ROOT, start_new_session=True)

    def by_hand(self, *command, environment=None):
        """``command`` by the same line on both nodes."""
        (self.folder / "token").touch(0o600)
        (self.folder / "token").write_text(secrets.token_hex(32))
        line = [NODE, f"{self.nodes[0].address}:6379", "2", str(self.folder / "token"), "--", *command]
        return [self.start(node.on(*line), environment) for node in self.nodes]

    def sbatch(self, *arguments, srun=None, environment=None):
        """``slurm.sbatch`` as Slurm starts it, and a srun that starts the program on both nodes."""
        each = " & ".join(shlex.join(node.on()) + ' "$@"' for node in self.nodes)
        self.write("srun", srun or f"while [[ $1 == --* ]]; do shift; done\n{each} & wait")
        slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2"}
        hosts = f'mount --bind {self.folder}/hosts /etc/hosts && exec bash {ROOT}/recipes/cluster/slurm.sbatch "$@"'
        batch = ["unshare", "--mount", "bash", "-c", hosts, "slurm.sbatch", *arguments]
        return self.start(batch, slurm | (environment or {}))

    def requeued(self):
        log = self.folder / "scontrol.log"
        calls = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return calls

    def end(self):
        for node in self.nodes:
            node.end()
        subprocess.run(["ip", "link", "del", self.bridge], check=False)
