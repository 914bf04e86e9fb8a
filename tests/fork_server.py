"""Processes that begin where the imports end: what a run needs is imported once and then forked.

A run's imports (torch, torchvision, DALI, accelerate, TensorBoard) take ten times as long as a tiny
run. `Forks` starts this file as a process that has them and waits; each script that it is asked for
runs in a fork of it, as `python SCRIPT ARGUMENTS` would. How real launchers start real processes is
tested in tests/cluster, tests/chaos.py and wherever a test has a command line of its own.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
# One thread and no GPU from the imports on: a process with threads must not be forked.
BARE = {
    **{"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
    # Of pyarrow, which pandas imports where it is installed.
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}
PRELOADED = (
    *(
        "accelerate",
        "deepspeed",
        "nvidia.dali.plugin.pytorch",
        "torchvision",
        "torch.utils.tensorboard",
        "torch.utils.flop_counter",
        "scipy.special",
    ),
    "torch._dynamo",  # the optimizers import it when the first one is made
    *(
        "train.dry_run",
        "train.evaluate",
        "train.report",
        "train.reporting.page",
        "train.reporting.picture",
        "train.stages.sequence",
        "train.distributed.watchdog",
    ),
)


def rank_environments(ranks: int) -> list[dict[str, str]]:
    """What a launcher tells each of so many ranks on one node."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


class Fork:
    """One process; like subprocess.Popen as far as it goes."""

    def __init__(self, forks: "Forks", number: int, pid: int, out: Path, err: Path) -> None:
        self.pid = pid
        # By its own number: in a long test run a pid comes round again.
        self._forks, self._number, self._out, self._err = forks, number, out, err

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._forks.ended(self._number, 0)

    def wait(self, timeout: float) -> int:
        """The exit code; killed where it takes longer than ``timeout`` seconds."""
        code = self._forks.ended(self._number, timeout)
        if code is None:
            self.kill()
            raise subprocess.TimeoutExpired(str(self.pid), timeout, *self.output())
        return code

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send it a signal; nothing where it has ended, be it this moment."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def output(self) -> tuple[str, str]:
        """What it has written to stdout and to stderr."""
        return self._out.read_text(), self._err.read_text()


class Forks:
    """Starts scripts in forks of one process, which begins with the first of them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._server: subprocess.Popen[str] | None = None
        self._count = 0
        self._codes: dict[int, int] = {}

    def start(
        self, script: Path | str, arguments: list[str], cwd: Path, env: dict[str, str]
    ) -> Fork:
        """Run a script, or a module by its name, with ``env`` as its whole environment."""
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, **BARE},
                text=True,
            )
        self._count += 1
        out, err = (self._folder / f"{self._count}.{name}" for name in ("out", "err"))
        for file in (out, err):
            file.touch()
        request = {"script": str(script), "is_module": isinstance(script, str)}
        request |= {"arguments": arguments, "cwd": str(cwd), "env": env}
        request |= {"out": str(out), "err": str(err)}
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        while "pid" not in (answer := self._answer()):
            self._codes[answer["ended"]] = answer["code"]
        return Fork(self, self._count, answer["pid"], out, err)

    def start_ranks(
        self, ranks: int, script: Path | str, arguments: list[str], cwd: Path, env: dict[str, str]
    ) -> list[Fork]:
        """Start the ranks of one run, each told who it is as torchrun tells it."""
        told = rank_environments(ranks)
        return [self.start(script, arguments, cwd, {**env, **mine}) for mine in told]

    def run(
        self, ranks: int, script: Path | str, arguments: list[str], cwd: Path, timeout: float
    ) -> subprocess.CompletedProcess[str]:
        """Run the ranks of one run to their end."""
        environment = {**os.environ, **BARE}
        started = self.start_ranks(ranks, script, arguments, cwd, environment)
        return wait_for_all(started, timeout)

    def ended(self, number: int, timeout: float) -> int | None:
        """The exit code of the n-th process, None where it still runs after ``timeout`` seconds."""
        assert self._server is not None
        assert self._server.stdout is not None
        deadline = time.monotonic() + timeout
        while number not in self._codes:
            left = max(0.0, deadline - time.monotonic())
            if not select.select([self._server.stdout], [], [], left)[0]:
                return None
            answer = self._answer()
            self._codes[answer["ended"]] = answer["code"]
        return self._codes[number]

    def _answer(self) -> dict[str, int]:
        assert self._server is not None
        assert self._server.stdout is not None
        # Unbuffered, a byte at a time: what a buffer holds, select does not see.
        line = b""
        while not line.endswith(b"\n"):
            byte = os.read(self._server.stdout.fileno(), 1)
            assert byte, "the fork server ended"
            line += byte
        return json.loads(line)

    def close(self) -> None:
        """End the server; what it has started goes on."""
        if self._server is not None:
            assert self._server.stdin is not None
            self._server.stdin.close()
            self._server.wait(timeout=60)


def wait_for_all(ranks: list[Fork], timeout: float) -> subprocess.CompletedProcess[str]:
    """Wait for the end of a run, and have what all have said.

    As under any launcher, a rank that fails ends the others, and its exit code is the run's.
    """
    failed = 0
    deadline = time.monotonic() + timeout
    while running := [rank for rank in ranks if rank.poll() is None]:
        if time.monotonic() > deadline:
            for rank in running:
                rank.kill()
            if not failed:
                raise subprocess.TimeoutExpired("run", timeout, *running[0].output())
        codes = [code for rank in ranks if (code := rank.poll())]
        if codes and not failed:
            failed = codes[0]
            for rank in running:
                rank.kill(signal.SIGTERM)
            # One that waits for the others in a collective notes the signal and waits on.
            deadline = time.monotonic() + 10
        time.sleep(0.005)
    code = failed or next((code for rank in ranks if (code := rank.poll())), 0)
    out, err = ("".join(texts) for texts in zip(*(rank.output() for rank in ranks), strict=True))
    return subprocess.CompletedProcess("run", code, out, err)


def _serve(requests: IO[bytes], answers: int) -> dict[str, Any]:
    """Answer requests until there are no more; returns, in a fork, what it is to run."""
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    signal.set_wakeup_fd(writable)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)

    def tell(**answer: int) -> None:
        os.write(answers, json.dumps(answer).encode() + b"\n")

    count = 0
    running: dict[int, int] = {}  # which one has the pid now
    while True:
        if readable in select.select([requests, readable], [], [])[0]:
            os.read(readable, 4096)
            while (ended := _reap()) is not None:
                tell(ended=running.pop(ended[0]), code=os.waitstatus_to_exitcode(ended[1]))
            continue
        line = requests.readline()
        if not line:
            sys.exit(0)
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for number in (readable, writable, answers):
                os.close(number)
            return json.loads(line)
        count += 1
        running[pid] = count
        tell(pid=pid)


def _reap() -> tuple[int, int] | None:
    try:
        pid, status = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return None
    return (pid, status) if pid else None


def _become(request: dict[str, Any]) -> None:
    """Make this fork what ``python SCRIPT ARGUMENTS`` would be, and run it."""
    os.setsid()  # as a shell starts it: signals to its process group reach nobody else
    for number, path in ((0, os.devnull), (1, request["out"]), (2, request["err"])):
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.argv = [request["script"], *request["arguments"]]
    random.seed()  # as in a process of its own
    sys.modules["numpy"].random.seed()
    if request["is_module"]:
        sys.path[0] = request["cwd"]
        sys.modules.pop(request["script"], None)
        runpy.run_module(request["script"], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(request["script"]).parent)
        runpy.run_path(request["script"], run_name="__main__")


def main() -> None:
    """Import, serve, and in each fork run the script."""
    answers = os.dup(1)
    os.dup2(2, 1)  # imports print
    for name in PRELOADED:
        importlib.import_module(name)
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "an import has begun a thread"
    # What is imported stays: no collection has to look at it, or to copy its pages. At the end of a
    # process Python does, or extension modules would report leaks.
    gc.freeze()
    atexit.register(gc.unfreeze)
    _become(_serve(open(0, "rb", buffering=0, closefd=False), answers))  # noqa: SIM115


if __name__ == "__main__":
    main()
