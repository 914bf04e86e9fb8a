"""Ranks that are stopped or killed in the middle of a step: real processes, real collectives."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fork_server import Fork, Forks, rank_environments

from train.distributed.watchdog import EXIT_FAILED, EXIT_LOST, Watchdog

WORKER = Path(__file__).with_name("watchdog_worker.py")
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.endswith("_SOCKET_IFNAME")}
ENVIRONMENT |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
RESUMES = "the run ends here and resumes from its newest checkpoint when started again"
LOST = re.compile(
    r"^rank (\d) \(host \S+, pid (\d+)\) has given no sign of life for 2 s: it was stopped or "
    rf"killed, or its node is gone; {RESUMES}$",
    re.MULTILINE,
)


class Ranks:
    """Ranks of the worker on one node, under torchrun or as plain processes that meet by env://.

    Args:
        way: "torchrun" or "plain".
        folder: where the ranks write their pids.
        options: of the worker; those of torchrun begin with "--".
    """

    def __init__(self, way: str, forks: Forks, folder: Path, *options: str, ranks: int) -> None:
        self.folder, self._files = folder, (folder / "stdout", folder / "stderr")
        words = [option for option in options if not option.startswith("--")]
        self.processes: list[Fork] | list[subprocess.Popen[str]]
        if way == "torchrun":
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            launcher += [f"--nproc_per_node={ranks}", *(o for o in options if o.startswith("--"))]
            self.processes = [self._run([*launcher, str(WORKER), str(folder), *words])]
        else:
            arguments = [str(folder), *words]
            self.processes = forks.start_ranks(ranks, WORKER, arguments, folder, ENVIRONMENT)

    def _run(self, command: list[str]) -> "subprocess.Popen[str]":
        """Begin a command whose ranks say where it says."""
        with self._files[0].open("a") as out, self._files[1].open("a") as err:
            environment = {**ENVIRONMENT, "PYTHONUNBUFFERED": "1"}
            return subprocess.Popen(command, stdout=out, stderr=err, env=environment, text=True)

    def pid(self, rank: int, attempt: int = 0) -> int:
        """Wait until a rank is in its stride; its process id."""
        path = self.folder / f"attempt-{attempt}" / f"rank-{rank}"
        while not path.exists():
            assert any(process.poll() is None for process in self.processes), self.said()
            time.sleep(0.02)
        return int(path.read_text())

    def signal(self, rank: int, number: int) -> int:
        """Send a rank a signal when both are in their stride; its process id."""
        pids = [self.pid(0), self.pid(1)]
        os.kill(pids[rank], number)
        return pids[rank]

    def said(self) -> tuple[str, str]:
        """Standard output and error of all together."""
        if isinstance(self.processes[0], subprocess.Popen):
            out, err = (file.read_text() for file in self._files)
            return out, err
        texts = [process.output() for process in self.processes]
        return "".join(out for out, _ in texts), "".join(err for _, err in texts)

    def end(self) -> tuple[list[int], str, str]:
        """Wait for the end; exit codes, standard output and error of all together."""
        return [process.wait(60) for process in self.processes], *self.said()


Start = Callable[..., Ranks]


@pytest.fixture
def start(forks: Forks, tmp_path: Path) -> Iterator[Start]:
    begun: list[Ranks] = []

    def begin(way: str, *options: str, ranks: int = 2) -> Ranks:
        begun.append(Ranks(way, forks, tmp_path, *options, ranks=ranks))
        return begun[-1]

    yield begin
    for process in (process for ranks in begun for process in ranks.processes):
        if process.poll() is None:  # a test that failed
            for path in tmp_path.glob("attempt-*/rank-?"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(path.read_text()), signal.SIGKILL)
            process.kill()
            process.wait(60)


def _check_lost(rank: int, pid: int, said: str) -> None:
    """One line names the rank and its process, once, and no other is accused."""
    assert LOST.findall(said) == [(str(rank), str(pid))], said
    assert said.count(RESUMES) == 1


@pytest.mark.parametrize(("way", "rank"), [("torchrun", 0), ("plain", 0), ("plain", 1)])
def test_a_stopped_rank_ends_the_run_and_is_named(start, way, rank):
    ranks = start(way)
    pid = ranks.signal(rank, signal.SIGSTOP)
    codes, _, said = ranks.end()
    _check_lost(rank, pid, said)
    if way == "torchrun":  # which has a code of its own, and tells the ranks'
        assert codes == [1]
        assert re.search(rf"rank +: {rank} .*\n +exitcode +: -9 \(pid: {pid}\)", said)
        assert re.search(rf"rank +: {1 - rank} .*\n +exitcode +: {EXIT_LOST} ", said)
    else:
        assert codes[1 - rank] == EXIT_LOST
        assert codes[rank] == -signal.SIGKILL  # it is not left behind with what it holds


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_others_and_is_named(start, rank):
    ranks = start("plain", ranks=3)
    pid = ranks.signal(rank, signal.SIGKILL)
    codes, _, said = ranks.end()
    _check_lost(rank, pid, said)
    assert codes.pop(rank) == -signal.SIGKILL
    assert codes == [EXIT_LOST, EXIT_LOST]
    assert "Traceback" not in said


def test_torchrun_names_a_killed_rank_itself(start):
    ranks = start("torchrun", "--monitor-interval=1")
    pid = ranks.signal(1, signal.SIGKILL)
    codes, _, said = ranks.end()
    assert codes == [1]
    root = said[said.index("Root Cause") :]
    assert re.search(rf"rank +: 1 .*\n +exitcode +: -9 \(pid: {pid}\)", root)
    assert said.count("Traceback") == 1  # torchrun's own; none of the rank that was left


def test_torchrun_restarts_a_run_whose_rank_was_stopped(start):
    ranks = start("torchrun", "--max-restarts=1", "last_attempt=1", "steps=20", "store=yes")
    pid = ranks.signal(1, signal.SIGSTOP)
    codes, printed, said = ranks.end()
    _check_lost(1, pid, said)
    assert codes == [0]
    # At torchrun's own store the addresses of the ranks that are gone still stand.
    stores = [line for line in printed.splitlines() if line.startswith("attempt-")]
    assert len(stores) == 4 and len(set(stores)) == 2
    assert len({line.split()[1] for line in stores}) == 2
    assert ranks.pid(1, attempt=1) != pid


def test_a_lost_launcher_ends_its_ranks(start):
    ranks = start("torchrun")
    pids = [ranks.pid(0), ranks.pid(1)]
    ranks.processes[0].kill()
    until = time.monotonic() + 60
    while any(_lives(pid) for pid in pids):
        assert time.monotonic() < until
        time.sleep(0.05)
    _, said = ranks.said()
    assert said.count("torchrun on localhost has given no sign of life for 2 s") == 1


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_slow_rank_is_left_alone_and_a_normal_end_is_silent(start):
    ranks = start("plain", "sleep=4", "steps=20", "linger=1")
    assert ranks.end() == ([0, 0], "", "")


def test_a_rank_that_stands_still_is_named(start):
    ranks = start("plain", "sleep=100", "stall=3")
    codes, _, said = ranks.end()
    named = f"rank 1 (host {socket.gethostname()}, pid {ranks.pid(1)})"
    assert said == (
        f"{named} has stood still for 3 s at step 10 (data) while other ranks wait for it; "
        f"{RESUMES}\n"
    )
    assert codes[0] == EXIT_LOST
    assert codes[1] in (EXIT_LOST, -signal.SIGKILL)


def test_nobody_is_accused_after_all_were_stopped(start):
    """As when a laptop sleeps, or somebody looks at the processes with a debugger."""
    ranks = start("plain", "steps=300")
    assert ranks.pid(0) != ranks.pid(1)
    time.sleep(1)  # some rounds
    ranks.signal(0, signal.SIGSTOP)
    ranks.signal(1, signal.SIGSTOP)
    time.sleep(4)  # twice the timeout
    ranks.signal(1, signal.SIGCONT)
    ranks.signal(0, signal.SIGCONT)
    assert ranks.end() == ([0, 0], "", "")


def test_nobody_waits_for_a_round_at_the_end(start):
    """A round lasts longer here than `end` waits."""
    ranks = start("plain", "timeout=1000", "steps=20", "linger=1")
    assert ranks.end() == ([0, 0], "", "")


def test_the_main_ranks_error_is_told_while_the_others_still_wait_for_it(start):
    """The store is the main rank's, so it stays; whoever looks at its words has them by then."""
    ranks = start("plain", "timeout=8", "fail=of my own", "failing=0")
    main, other = ranks.processes
    while "ValueError: of my own" not in ranks.said()[1]:
        assert other.poll() is None, "ended before the main rank said anything"
        time.sleep(0.02)
    assert main.poll() is other.poll() is None
    codes, _, said = ranks.end()
    assert codes == [1, EXIT_FAILED]
    named = f"rank 0 (host {socket.gethostname()}, pid {ranks.pid(0)})"
    assert said.count(f"{named} ended with an error; the run ends here\n") == 1


def test_a_rank_with_an_error_of_its_own_ends_the_others(start):
    ranks = start("plain", "fail=of my own")
    codes, _, said = ranks.end()
    assert codes == [EXIT_FAILED, 1]
    assert said.count("ValueError: of my own") == 1
    assert said.count("Traceback") == 1
    named = f"rank 1 (host {socket.gethostname()}, pid {ranks.pid(1)})"
    assert said.count(f"{named} ended with an error; the run ends here\n") == 1


def test_on_one_node_the_ranks_listen_on_loopback_alone(tmp_path):
    """Though the host's name, in a namespace of the test, means an address of the outside."""
    outside = _outside_address()
    prefix = ("unshare", "--user", "--map-root-user", "--uts", "sh", "-c")
    shell = (*prefix, f'hostname {outside} && exec "$@"', "sh")
    can = shutil.which("unshare") and subprocess.run([*shell, "true"], capture_output=True)
    if not can or can.returncode:
        pytest.skip("unshare cannot make a namespace for a host name here")
    command = [*shell, sys.executable, str(WORKER), str(tmp_path), "steps=8", "ports=yes"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [
        subprocess.Popen(command, env=ENVIRONMENT | environment, **options)
        for environment in rank_environments(2)
    ]
    for process in both:
        printed, said = process.communicate(timeout=60)
        assert process.returncode == 0, said
        assert printed.split() == ["0100007F"]  # 127.0.0.1


def _outside_address() -> str:
    """An address of this machine that is not loopback; no packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no address but loopback")
        return str(probe.getsockname()[0])


def test_one_rank_alone_is_not_watched(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    watchdog = Watchdog.from_environment(1.0)
    watchdog.at(3, "data")
    watchdog.wait_for_verdict()
    watchdog.close()
    watchdog.close()
