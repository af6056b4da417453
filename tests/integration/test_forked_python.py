"""The Python that forks: what a program sees in it is what it sees in a plain one."""

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cppo_verl.cpu import forked_python

STATE = """
import json, os, resource, signal, sys
sys.stderr.write("to stderr")
print(json.dumps({
    "argv": sys.argv, "name": __name__, "file": globals().get("__file__"), "stdin": sys.stdin.read(),
    "environment": {k: v for k, v in os.environ.items() if k != "RAY_CLIENT_MODE"},  # importing ray sets it
    "folder": os.getcwd(), "passed": os.read(int(os.environ["PASSED"]), 100).decode(), "umask": os.umask(0),
    "path": [x for x in sys.path if "thirdparty_files" not in x],  # importing ray adds them
    "parent": os.getppid(), "files": resource.getrlimit(resource.RLIMIT_NOFILE),
    "niceness": os.getpriority(os.PRIO_PROCESS, 0),
    "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    "main": sys.modules["__main__"].__dict__ is globals(), "executable": sys.executable, "flags": list(sys.flags),
}))
sys.exit(7)
"""
PARENT = "import os; print(os.getpid(), os.getppid())\n"


DRIVER = """
import sys
sys.path.remove("")
import json
from cppo_verl.cpu import forked_python
if len(sys.argv) > 1:
    names = "fork_server.MODULES, fork_server.MODULES_WITH_RAY"
    names += f" = {sys.argv[1]}; fork_server.main"
    forked_python.SERVER = forked_python.SERVER.replace("fork_server.main", names)
print(json.dumps(forked_python.use_for_workers({})["env_vars"]), flush=True)
sys.stdin.read()
"""


class Server:
    """A fork server, the process that has started it, and how to run Python in its forks.

    It imports its own modules where no others are given.
    """

    def __init__(self, modules: str = "", with_ray: str = ""):
        others = [repr((modules.split(), with_ray.split()))] if modules or with_ray else []
        environment = os.environ | {"RAY_ADDRESS": "local"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.driver = subprocess.Popen([sys.executable, "-c", DRIVER, *others], env=environment, **pipes)
        variables = json.loads(self.driver.stdout.readline())
        self.socket, self.environment = Path(variables[forked_python.SOCKET]), os.environ | variables

    def start(self, *arguments: str, **options) -> subprocess.Popen:
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": self.environment} | options
        return subprocess.Popen([*forked_python.command(), *arguments], text=True, **options)

    def run(self, *arguments: str, **options) -> subprocess.CompletedProcess:
        process = self.start(*arguments, **options)
        out, err = process.communicate()
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def pid(self) -> int:
        """The server's, as its forks have it for a parent."""
        return int(self.run("-c", PARENT).stdout.split()[1])


@pytest.fixture
def start_server(tmp_path, monkeypatch):
    """Makes a server that imports these modules; ``source`` is that of a module "made"."""
    servers = []

    def start(modules: str = "", source: str = "", with_ray: str = "") -> Server:
        (tmp_path / "made.py").write_text(source)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        servers.append(Server(modules, with_ray))
        return servers[-1]

    yield start
    for server in servers:
        server.driver.communicate()
        shutil.rmtree(server.socket.parent, ignore_errors=True)


@pytest.fixture
def server(start_server):
    return start_server("json")


def gone(pid: int) -> bool:
    """Whether a process ends within ten seconds; one that waits for its parent's call has ended."""
    for _ in range(1000):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("form", ["script", "-c"])
def test_program_sees_what_it_sees_in_plain_python(server, tmp_path, form):
    script = tmp_path / "program.py"
    script.write_text(STATE)
    program = [str(script)] if form == "script" else ["-c", STATE]
    results = []
    for python in ([sys.executable], forked_python.command()):
        end, other = os.pipe()
        os.write(other, b"through a pipe")
        os.close(other)
        result = subprocess.run(
            [*python, *program, "an argument", "--another=x"],
            input="to stdin",
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=server.environment | {"PASSED": str(end), "ONLY": "here"},
            pass_fds=[end],
            preexec_fn=lambda: (os.nice(3), signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGUSR2])),
        )
        os.close(end)
        assert result.stderr == "to stderr", result.stderr
        results.append((result.returncode, json.loads(result.stdout)))
    (code, plain), (forked_code, forked) = results
    assert code == forked_code == 7
    assert (plain.pop("parent"), forked.pop("parent")) == (os.getpid(), server.pid())
    assert server.pid() != os.getpid()
    assert {k: (v, forked[k]) for k, v in plain.items() if v != forked[k]} == {}


def test_programs_are_forks_of_one_process(server):
    runs = [server.run("-c", PARENT).stdout.split() for _ in range(2)]
    assert runs[0][0] != runs[1][0]
    assert runs[0][1] == runs[1][1]
    assert b"fork_server" in Path(f"/proc/{runs[0][1]}/cmdline").read_bytes()


def test_variables_that_imports_set_stay_unless_the_program_has_its_own(start_server):
    server = start_server("made", "import os\nos.environ.update(SET='by import', OWN='by import')\n")
    server.environment["OWN"] = "given"
    result = server.run("-c", "import os; print(os.environ['SET'], os.environ['OWN'], sep=', ')")
    assert result.stdout == "by import, given\n"


def test_what_reads_rays_variables_is_imported_with_those_of_the_first_worker(start_server):
    server = start_server(source="import os\nseen = os.environ.get('RAY_OF', 'none')\n", with_ray="made")
    code = "import os, made; print(made.seen, os.environ.get('RAY_OF', 'none'))"
    for own, seen in (("first", "first first"), ("second", "first second"), (None, "first none")):
        environment = server.environment | ({"RAY_OF": own} if own else {})
        assert server.run("-c", code, env=environment).stdout == f"{seen}\n"


@pytest.mark.parametrize(
    "end",
    [
        "raise ValueError('why')",
        "import os; os.abort()",
        "import os; os._exit(9)",
        "import os; os.kill(os.getpid(), 9)",
    ],
)
def test_end_is_that_of_plain_python(server, end):
    plain = subprocess.run([sys.executable, "-c", end], capture_output=True, text=True)
    forked = server.run("-c", end)
    assert forked.returncode == plain.returncode
    assert forked.stderr.splitlines()[-1:] == plain.stderr.splitlines()[-1:]


def test_signals_reach_the_program(server):
    handler = "import signal, sys, time\nsignal.signal(15, lambda *_: sys.exit(5))\n"
    process = server.start("-c", handler + "print('ready', flush=True)\ntime.sleep(60)")
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    process.communicate()
    assert process.returncode == 5


def test_program_ends_with_the_process_that_stands_for_it(server):
    process = server.start("-c", "import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(60)")
    pid = int(process.stdout.readline())
    process.kill()
    process.communicate()
    assert gone(pid)
    assert server.run("-c", "print(1)").stdout == "1\n"


def test_killed_server_takes_its_forks_along_and_is_not_needed(server):
    parent = server.pid()
    process = server.start("-c", "import time\nprint('ready', flush=True)\ntime.sleep(60)")
    assert process.stdout.readline() == "ready\n"
    os.kill(parent, signal.SIGKILL)
    process.communicate()
    assert process.returncode == 1
    result = server.run("-c", PARENT)
    assert (result.returncode, int(result.stdout.split()[1])) == (0, os.getpid())


@pytest.mark.parametrize("end", ["terminate", "kill", "communicate"])
def test_server_ends_with_the_process_that_starts_ray_and_leaves_nothing(server, end):
    parent = server.pid()
    getattr(server.driver, end)()
    assert gone(parent)
    assert not server.socket.parent.exists()
    assert int(server.run("-c", PARENT).stdout.split()[1]) == os.getpid()


def test_client_that_ends_before_it_asks_is_forgotten(server):
    for sent in (b"", b"\0" * 7 + b"\5", b"\0" * 7 + b"\5{"):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(server.socket))
            client.sendall(sent)
    assert server.run("-c", "print(1)").stdout == "1\n"


def test_process_with_threads_is_not_forked(start_server):
    server = start_server(
        "made", "import threading, time\nthreading.Thread(target=time.sleep, args=[60], daemon=True).start()\n"
    )
    result = server.run("-c", PARENT)
    assert int(result.stdout.split()[1]) == os.getpid()


def test_program_that_does_not_wait_for_a_slow_server_runs_once(start_server, tmp_path):
    server = start_server("made", "import time\ntime.sleep(4)\n")
    impatient = tmp_path / "impatient.py"
    impatient.write_text(Path(forked_python.__file__).read_text().replace("IMPORTING = 30", "IMPORTING = 0.1"))
    program = f"{PARENT}open({str(tmp_path / 'runs')!r}, 'a').write('run ')"
    result = subprocess.run(
        [sys.executable, "-IS", impatient, "-c", program], env=server.environment, capture_output=True, text=True
    )
    assert int(result.stdout.split()[1]) == os.getpid()
    assert int(server.run("-c", PARENT).stdout.split()[1]) != os.getpid()  # the server is ready by now
    assert (tmp_path / "runs").read_text() == "run "


@pytest.mark.parametrize("when", ["modules", "with_ray"])
def test_module_that_cannot_be_imported_is_left_to_the_program(start_server, when):
    server = start_server(**{when: "no_such_module json"})
    result = server.run("-c", f"{PARENT}import no_such_module")
    assert int(result.stdout.split()[1]) == os.getpid()
    assert result.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'no_such_module'"


def test_library_to_be_loaded_first_needs_a_plain_python_unless_it_is_loaded(server):
    loaded = next(line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/libc.so" in line)
    for library, forked in ((loaded, True), (__file__, False)):
        environment = server.environment | {"LD_PRELOAD": library}
        result = server.run("-c", PARENT, env=environment)
        assert (int(result.stdout.split()[1]) != os.getpid()) == forked, library


def test_forks_can_be_renamed(start_server):
    server = start_server("ray setproctitle")
    server.environment |= {"NEW": "1", "HOME": "/"}
    show = "print(open('/proc/self/cmdline').read().strip(chr(0)))"
    assert (
        server.run("-c", f"import setproctitle; setproctitle.setproctitle('VLLM::Part'); {show}").stdout
        == "VLLM::Part\n"
    )
    assert server.run("-c", f"import ray; ray._raylet.setproctitle('ray::Part'); {show}").stdout == "ray::Part\n"


def test_module_in_the_folder_of_the_run_is_imported(start_server, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "only_here.py").write_text("")
    (tmp_path / "here" / "json.py").write_text("raise ValueError('another json')")
    monkeypatch.chdir(tmp_path / "here")
    server = start_server("only_here")
    code = "import os, sys; print('only_here' in sys.modules, os.getcwd() in sys.path)"
    assert server.run("-c", code).stdout == "True False\n"


def test_spawned_processes_are_forks_too(server, tmp_path):
    script = tmp_path / "program.py"
    script.write_text(
        "import multiprocessing, os\n"
        "def work(queue):\n    queue.put(os.getppid())\n"
        "if __name__ == '__main__':\n"
        "    context = multiprocessing.get_context('spawn')\n"
        "    queue = context.Queue()\n"
        "    process = context.Process(target=work, args=[queue])\n"
        "    process.start()\n"
        "    print(queue.get(), os.getppid())\n"
        "    process.join()\n"
        "    print(process.exitcode)\n"
    )
    result = server.run(str(script))
    child, own, code = result.stdout.split()
    assert (child, code) == (own, "0"), result.stderr


def test_server_whose_forks_would_share_ids_does_not_serve(start_server):
    server = start_server("made", "import ray\nray.UniqueID.from_random()\n")
    result = server.run("-c", PARENT)
    assert int(result.stdout.split()[1]) == os.getpid()


def test_forks_of_verl_log_as_its_trainer_does_and_share_no_randomness(start_server):
    """With the modules of a run: one thread, so that it forks, and generators that differ from fork to fork."""
    server = start_server()
    code = (
        "import logging, os, sys\nassert 'vllm.v1.worker.cpu_worker' in sys.modules\n"
        "assert {x.level for x in logging.root.handlers} == {logging.NOTSET}\n"
        "import random, uuid, tempfile, threading, numpy, ray\n"
        "id = lambda: print(ray.UniqueID.from_random().hex())\n"
        "print(random.random(), uuid.uuid4(), numpy.random.rand(), next(tempfile._get_candidate_names()))\n"
        "id(); thread = threading.Thread(target=id); thread.start(); thread.join()\n"
    )
    deadline = time.monotonic() + 600  # it imports, and what does not wait for it is a plain Python
    while server.pid() == os.getpid() and time.monotonic() < deadline:
        pass
    runs = [server.run("-c", code) for _ in range(2)]
    first, second = (run.stdout.split() for run in runs)
    assert len(first) == 6, runs[0].stderr
    assert not set(first) & set(second)


@pytest.mark.parametrize(
    ("address", "runtime_env", "forked"),
    [
        ("local", {"env_vars": {"A": "1"}, "working_dir": None, "py_executable": None}, True),
        ("local", None, True),
        (None, {}, False),
        ("192.0.2.1:6379", {}, False),
        ("local", {"py_executable": "uv run python"}, False),
        ("local", {"pip": ["a"]}, False),
    ],
)
def test_hook_leaves_other_pythons_alone(monkeypatch, address, runtime_env, forked):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr(forked_python, "start_server", lambda environment: f"started with A={environment.get('A')}")
    given = dict(runtime_env or {})
    result = forked_python.use_for_workers(runtime_env)
    if not forked:
        assert result == given
        return
    variables = given.get("env_vars", {})
    assert result["py_executable"] == shlex.join(forked_python.command())
    assert result["env_vars"] == variables | {
        "OMP_NUM_THREADS": "3",
        forked_python.SOCKET: f"started with A={variables.get('A')}",
    }


def test_without_a_path_for_its_socket_the_workers_are_plain(monkeypatch, tmp_path):
    (long := tmp_path / ("x" * 100)).mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert forked_python.use_for_workers({"env_vars": {"A": "1"}}) == {"env_vars": {"A": "1"}}
    assert not list(long.iterdir())


def test_another_ray_of_the_same_process_has_another_server(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("RAY_ADDRESS", "local")
    try:
        first, second = (forked_python.use_for_workers({})["env_vars"][forked_python.SOCKET] for _ in range(2))
        assert first != second
        assert list(forked_python.servers) == [str(x) for x in tmp_path.iterdir()] == [os.path.dirname(second)]
    finally:
        for server in forked_python.servers.values():
            server.kill()
            server.wait()
        forked_python.servers.clear()


def test_without_a_server_it_is_a_plain_python():
    result = subprocess.run([*forked_python.command(), "-c", PARENT], env={}, capture_output=True, text=True)
    assert int(result.stdout.split()[1]) == os.getpid(), result.stderr
