"""Two runs on one folder, as real processes."""

import json
import os
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tpp.common.errors import UserError
from train.run_folder.lock import LOCK_FILE, RunLock

WORKER = Path(__file__).with_name("lock_worker.py")
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
# Another node: there, no lock of this one counts.
ELSEWHERE = ("host=elsewhere", "no-locks", "beat=0.1")


class Worker(subprocess.Popen[str]):
    """A process that takes a folder's lock and holds it until it is told to end."""

    def __init__(self, folder: Path, *options: str, **environment: str) -> None:
        super().__init__(
            [sys.executable, str(WORKER), str(folder), *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT | environment,
        )

    def holds(self) -> str:
        """Wait until it has the lock; what it then says."""
        assert select.select([self.stdout], [], [], 60)[0], "it still waits"
        line = self.stdout.readline()
        assert line.startswith("held"), self.communicate()[1]
        return line

    def end(self) -> tuple[int, str]:
        """Tell it to end; its exit code and what it said on standard error."""
        _, said = self.communicate("", timeout=60)
        return self.returncode, said


Start = Callable[..., Worker]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    workers: list[Worker] = []

    def begin(*options: str, **environment: str) -> Worker:
        workers.append(Worker(tmp_path / "run", *options, **environment))
        return workers[-1]

    yield begin
    for worker in workers:
        worker.kill()
        worker.communicate()


def _content(folder: Path) -> dict:
    return json.loads((folder / LOCK_FILE).read_text())


def test_the_second_is_refused_while_the_first_lives(start, tmp_path):
    first = start(SLURM_JOB_ID="4711", SECRET="not for the file")
    first.holds()
    code, said = start().end()
    assert code == 2
    assert said == (
        f"error: {tmp_path}/run: another run has this folder: process {first.pid} on "
        f"{socket.gethostname()}, SLURM job 4711, since {_content(tmp_path / 'run')['started']}; "
        "wait for it, end it, or choose another folder with output=...\n"
    )
    text = (tmp_path / "run" / LOCK_FILE).read_text()
    assert "not for the file" not in text and "SECRET" not in text
    assert first.end() == (0, "")
    assert _content(tmp_path / "run")["released"] is True
    third = start()
    third.holds()
    assert third.end() == (0, "")  # nothing is said of a clean release


def test_a_killed_run_is_replaced_at_once_though_its_child_lives(start, tmp_path):
    # With beats an hour apart, whoever watched for them would not be through in time.
    first = start("fork", "beat=3600")
    child = int(first.holds().split()[1])
    first.kill()
    first.wait()
    os.kill(child, 0)  # it lives, and has inherited the open file
    try:
        second = start()
        second.holds()
        code, said = second.end()
    finally:
        os.kill(child, signal.SIGKILL)
    assert code == 0
    assert said.startswith(
        f"{tmp_path}/run: taken over from a run that died: process {first.pid} on "
    )
    assert said.count("\n") == 1


def test_a_task_of_an_array_is_named_as_scancel_takes_it(start, tmp_path):
    """One of the tasks has the array's own id, which would cancel all of them."""
    with_its_id = {"SLURM_JOB_ID": "4711", "SLURM_ARRAY_JOB_ID": "4711"}
    first = start(**with_its_id, SLURM_ARRAY_TASK_ID="3")
    first.holds()
    code, said = start().end()
    assert code == 2 and ", SLURM job 4711_3, since" in said


def test_a_stopped_run_keeps_its_folder(start):
    first = start("beat=0.1")
    first.holds()
    first.send_signal(signal.SIGSTOP)
    code, said = start().end()
    first.send_signal(signal.SIGCONT)
    assert code == 2 and f"process {first.pid} on" in said


def test_a_beating_run_of_another_node_is_left_alone(start):
    first = start(*ELSEWHERE)
    first.holds()
    code, said = start("beat=0.1").end()
    assert code == 2 and f"process {first.pid} on elsewhere" in said
    assert first.end() == (0, "")


def test_a_run_of_another_node_that_beats_no_more_is_replaced(start):
    first = start(*ELSEWHERE)
    first.holds()
    first.kill()
    first.wait()
    second = start("beat=0.1")
    second.holds()
    code, said = second.end()
    assert code == 0 and f"died: process {first.pid} on elsewhere" in said


def test_another_boot_of_the_same_node_is_watched(start, tmp_path):
    first = start("beat=0.1", "no-locks")
    first.holds()
    first.kill()
    first.wait()
    path = tmp_path / "run" / LOCK_FILE
    entry = _content(tmp_path / "run") | {"boot": "another"}
    path.write_text(json.dumps(entry))
    second = start("beat=0.1")
    beat, until = 0, time.monotonic() + 60
    while second.poll() is None:  # here, the test is the node that was booted another time
        assert time.monotonic() < until
        beat += 1
        with path.open("r+") as file:
            file.write(json.dumps(entry | {"beat": 10**6 + beat}))
        time.sleep(0.02)
    code, said = second.end()
    assert code == 2 and f"process {first.pid} on" in said
    third = start("beat=0.1")
    third.holds()
    assert third.end()[0] == 0


def test_without_locks_the_heartbeat_decides(start):
    first = start("no-locks", "beat=0.1")
    first.holds()
    code, said = start("no-locks", "beat=0.1").end()
    assert code == 2 and f"process {first.pid} on" in said
    assert first.end() == (0, "")
    again = start("no-locks", "beat=0.1")
    again.holds()
    assert again.end() == (0, "")


@pytest.mark.parametrize("options", [(), ("no-locks", "beat=0.3")])
def test_of_many_that_start_at_once_exactly_one_wins(start, tmp_path, options):
    for _ in range(3):
        workers = [start("start", *options) for _ in range(3)]
        for worker in workers:
            assert worker.stdout.readline() == "ready\n"
        for worker in workers:
            worker.stdin.write("\n")
            worker.stdin.flush()
        alive, until = set(workers), time.monotonic() + 60
        while len(alive) > 1:
            assert time.monotonic() < until
            alive -= {worker for worker in alive if worker.poll() is not None}
            time.sleep(0.01)
        (winner,) = alive
        for worker in set(workers) - alive:
            code, said = worker.end()
            assert code == 2 and said.count("\n") == 1 and "another run has this folder" in said
        winner.holds()
        assert _content(tmp_path / "run")["pid"] == winner.pid
        assert winner.end() == (0, "")


def test_of_two_winners_without_locks_the_one_that_was_overwritten_ends(start, tmp_path):
    first = start("no-locks", "beat=0.05")
    first.holds()
    entry = _content(tmp_path / "run") | {"run": "other", "host": "elsewhere", "pid": 7}
    (tmp_path / "run" / LOCK_FILE).write_text(json.dumps(entry))  # as the other one would
    assert first.wait(timeout=60) == 2
    assert "another run has this folder: process 7 on elsewhere" in first.end()[1]
    assert _content(tmp_path / "run")["run"] == "other"


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b'{"host": "elsew',
        b"\x00" * 100,
        b"[" * 4000,
        b" " * 10_000_000,
        b'{"run": "a", "host": "e\\u001b[2J", "pid": 1, "boot": "", "job": "", "started": "", '
        b'"every": 1e308, "beat": 1, "released": false}',
        b'{"run": "a", "host": "e", "pid": "1; rm", "boot": "", "job": "", "started": "", '
        b'"every": NaN}',
    ],
    ids=["empty", "cut off", "zeros", "nested", "huge", "terminal codes", "types"],
)
def test_garbage_names_no_holder(start, tmp_path, garbage):
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / LOCK_FILE
    path.write_bytes(garbage)
    first = start("beat=3600")
    first.holds()
    assert _content(tmp_path / "run")["pid"] == first.pid
    assert path.stat().st_size < 4096
    path.write_bytes(garbage)
    code, said = start().end()  # the lock decides
    assert code == 2 and "another run has this folder: a process without a name" in said
    assert first.end() == (0, "")
    assert _content(tmp_path / "run")["released"] is True


def test_a_holder_whose_folder_vanishes_goes_on(start, tmp_path):
    first = start("beat=0.05")
    first.holds()
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(subprocess.TimeoutExpired):
        first.wait(timeout=0.5)
    assert first.end() == (0, "")
    assert not (tmp_path / "run").exists()


def test_a_copy_of_the_lock_file_does_not_end_its_holder(start, tmp_path):
    other = start("beat=0.1")
    other.holds()
    foreign = (tmp_path / "run" / LOCK_FILE).read_bytes()
    assert other.end() == (0, "")
    first = start("beat=0.1")
    first.holds()
    (tmp_path / "run" / LOCK_FILE).write_bytes(foreign)
    until = time.monotonic() + 60
    while _content(tmp_path / "run")["pid"] != first.pid:
        assert first.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    assert first.end() == (0, "")


def test_a_file_that_cannot_be_written_for_a_while_does_not_end_the_heartbeat(start, tmp_path):
    first = start("beat=0.05")
    first.holds()
    _, most = resource.prlimit(first.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(first.pid, resource.RLIMIT_FSIZE, (0, most))  # as a full disk would
    time.sleep(0.3)
    stopped = _content(tmp_path / "run")["beat"]
    time.sleep(0.3)
    assert _content(tmp_path / "run")["beat"] == stopped
    resource.prlimit(first.pid, resource.RLIMIT_FSIZE, (most, most))
    until = time.monotonic() + 60
    while _content(tmp_path / "run")["beat"] == stopped:
        assert time.monotonic() < until
        time.sleep(0.02)
    assert first.end() == (0, "")


def test_a_full_disk_is_refused_in_one_line(start, tmp_path):
    _as_root(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], tmp_path)
    try:
        with pytest.raises(OSError, match="No space left"):
            (tmp_path / "big").write_bytes(b"1" * 100_000)
        code, said = start().end()
    finally:
        _as_root(["umount", str(tmp_path)], Path("/"))
    assert (code, said.count("\n")) == (2, 1)
    assert "a run cannot keep its lock here (No space left on device)" in said


def test_a_read_only_file_system_is_refused_in_one_line(start, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    _as_root(["mount", "--bind", str(folder), str(folder)], tmp_path)
    try:
        _as_root(["mount", "-o", "remount,ro,bind", str(folder)], tmp_path)
        code, said = start().end()
    finally:
        _as_root(["umount", str(folder)], tmp_path)
    assert (code, said) == (
        2,
        f"error: {folder}/run.lock: a run cannot keep its lock here (Read-only file system); "
        "choose a folder that can be written to with output=...\n",
    )


def _as_root(command: list[str], where: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    done = subprocess.run(command, capture_output=True, text=True, cwd=where)
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")


def _symlink(folder: Path) -> None:
    (folder / "precious").write_text("kept")
    (folder / LOCK_FILE).symlink_to(folder / "precious")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_symlink, "run.lock: a symbolic link, which is not followed; remove it"),
        (lambda folder: (folder / LOCK_FILE).mkdir(), "run.lock: a run cannot keep its lock"),
        (lambda folder: os.mkfifo(folder / LOCK_FILE), "run.lock: not a file; remove it"),
    ],
    ids=["symlink", "folder", "pipe"],
)
def test_what_is_no_file_is_refused(tmp_path, spoil, said):
    spoil(tmp_path)
    with pytest.raises(UserError, match=said):
        RunLock(tmp_path).acquire()
    assert not (tmp_path / "precious").exists() or (tmp_path / "precious").read_text() == "kept"


def test_a_parent_that_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/run: a run cannot keep its lock here \(Not a dir"):
        RunLock(tmp_path / "file" / "run").acquire()
    with RunLock(tmp_path / "new" / "run"):  # parents are made
        assert (tmp_path / "new" / "run" / LOCK_FILE).is_file()
