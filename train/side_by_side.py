"""Processes of a sweep side by side: which may start, where, and how they end.

Each is ``train/main.py`` in a run folder of its own, whose lock that process takes. Whoever kills
the sweep leaves them going; a signal that it can answer ends them with a checkpoint.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tpp.common.errors import UserError, printable
from train.run_folder.lock import LockWatch

_LOOK = 0.05  # seconds between two looks at the processes
_LOOK_AT_OTHERS = 1.0  # and at those of other sweeps
_PATIENCE = 20.0  # until a process that was asked to end is killed
_LOG_END = 4096


@dataclass(frozen=True)
class Place:
    """Where a process runs.

    Attributes:
        environment: what it finds there beside the sweep's own.
        threads: its share of the cores; None for as many as it likes.
        name: for lines, such as ``GPU 1``; empty where there is one place.
    """

    environment: dict[str, str] = field(default_factory=dict)
    threads: int | None = None
    name: str = ""


def places(jobs: int | None, *, with_launcher: bool) -> list[Place]:
    """Where processes run at once: ``jobs`` on each GPU, or on the CPU.

    Args:
        jobs: None for one process at a time that has everything.
        with_launcher: whether a launcher starts several ranks, which then share GPUs and cores as
            it says.

    Raises:
        UserError: there are fewer cores than processes.
    """
    if jobs is None:
        return [Place()]
    if jobs < 1:
        raise UserError(f"--jobs {jobs}: at least 1 run at once")
    if with_launcher:
        return [Place() for _ in range(jobs)]
    gpus, cores = _gpus(), _cores()
    total = jobs * max(len(gpus), 1)
    if total > cores:
        on = f"--jobs {jobs} on {len(gpus)} GPUs" if gpus else f"--jobs {jobs}"
        most = cores // max(len(gpus), 1)
        hint = f"at most --jobs {most}" if most else "too few for one on each"
        raise UserError(f"{on}: {total} runs at once, and {cores} cores; {hint}")
    threads = cores // total
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdecimal() and int(given):
        threads = min(threads, int(given))
    common = {"OMP_NUM_THREADS": str(threads)}
    if not gpus:
        return [Place(common, threads) for _ in range(jobs)]
    return [
        Place({**common, "CUDA_VISIBLE_DEVICES": gpu}, threads, f"GPU {gpu}")
        for _ in range(jobs)
        for gpu in gpus
    ]


def _gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names those that this process sees."""
    import torch

    count = torch.cuda.device_count()
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    named = [str(gpu) for gpu in range(count)] if given is None else given.split(",")
    return [gpu.strip() for gpu in named[:count]]


def _cores() -> int:
    cores = len(os.sched_getaffinity(0))
    given = os.environ.get("SLURM_CPUS_PER_TASK", "")  # not every cluster binds tasks to cores
    return min(cores, int(given)) if given.isdecimal() and int(given) else cores


@dataclass(eq=False)
class Job:
    """One process that may have to wait for others.

    Attributes:
        label: what it is called in lines.
        folder: its run folder.
        command: what starts it in a place.
        is_done: whether all that it is to do is done, by whomever.
        lacks: what is not there yet and has to be, and the job that makes it, if there is one;
            empty when it can start.
        prepare: called right before it starts.
        log: file that takes its output; None for the sweep's own.
        needed: whether other jobs wait for it. It then waits for another process that is at it;
            else it is left to that one.
    """

    label: str
    folder: Path
    command: Callable[[Place], list[str]]
    is_done: Callable[[], bool]
    lacks: "Callable[[], Sequence[tuple[str, Job | None]]]"
    prepare: Callable[[], None]
    log: Path | None = None
    needed: bool = False


class Running:
    """Runs jobs, as many at once as there are places.

    Args:
        jobs: in the order in which they are to start, where nothing is to be waited for.
        where: the places.
    """

    def __init__(self, jobs: Sequence[Job], where: Sequence[Place]) -> None:
        self._waiting, self._free = list(jobs), list(where)
        self._running: dict[Job, tuple[subprocess.Popen[bytes], Place, float]] = {}
        self._watches: dict[Job, LockWatch] = {}
        self._looked: dict[Job, float] = {}
        self._failed: list[str] = []

    def to_the_end(self) -> list[str]:
        """Run all of them; returns a line for each that failed.

        However it is left, no process of it is left behind.
        """
        try:
            while self._waiting or self._running:
                for job in list(self._running):
                    self._look_after(job)
                for job in list(self._waiting):
                    if self._free:
                        self._start_if_possible(job)
                time.sleep(_LOOK)
        finally:
            self._end_all()
        return self._failed

    def _start_if_possible(self, job: Job) -> None:
        lacks = job.lacks()
        never = [what for what, maker in lacks if maker is None or not self._may_come(maker)]
        if never:
            self._waiting.remove(job)
            self._failed.append(f"{job.label}: not started, as {never[0]} is not there")
        elif not lacks and not self._is_anothers(job):
            self._waiting.remove(job)
            if not job.is_done():
                self._start(job)

    def _may_come(self, job: Job) -> bool:
        return job in self._waiting or job in self._running

    def _is_anothers(self, job: Job) -> bool:
        """Whether another process is at work on it; then it waits, or is left to that one."""
        now = time.monotonic()
        if now - self._looked.get(job, -_LOOK_AT_OTHERS) < _LOOK_AT_OTHERS:
            return True
        new = job not in self._watches
        holder = self._watches.setdefault(job, LockWatch(job.folder)).holder()
        if holder is None:
            return False
        self._looked[job] = now
        if not job.needed:
            self._waiting.remove(job)
            self._say(f"{job.label}: another process is at work on {job.folder}; left alone")
        elif new:
            self._say(f"{job.label}: waits for {holder}, which is at work on {job.folder}")
        return True

    def _start(self, job: Job) -> None:
        try:
            job.prepare()
        except (UserError, OSError) as error:
            self._fail(f"{job.label}: {printable(str(error))}")
            return
        place = self._free.pop(0)
        command = job.command(place)
        environment = {**os.environ, **place.environment}
        if job.log is None:
            self._say(f"{job.label}: {shlex.join(command)}")
            # Ctrl-C reaches the sweep alone, which then ends them with a checkpoint.
            process = subprocess.Popen(command, env=environment, start_new_session=True)
        else:
            on = f" on {place.name}" if place.name else ""
            self._say(f"{job.label}: started{on}; what it says is in {job.log}")
            job.log.parent.mkdir(parents=True, exist_ok=True)
            with job.log.open("a") as log:
                log.write(f"{shlex.join(command)}\n")
                log.flush()
                process = subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        self._running[job] = process, place, time.monotonic()

    def _look_after(self, job: Job) -> None:
        process, place, began = self._running[job]
        code = process.poll()
        if code is None:
            return
        del self._running[job]
        self._free.append(place)
        if not code:
            if job.log is not None:
                self._say(f"{job.label}: done after {time.monotonic() - began:.0f} s")
        elif job.is_done():
            self._say(f"{job.label}: done by another process")
        elif LockWatch(job.folder).holder() is not None:
            self._watches.pop(job, None)  # it was first; that is said once more
            self._waiting.append(job)
        else:
            last = _last_line(job.log) if job.log else ""
            self._fail(f"{job.label}: exit code {code}{last}")

    def _fail(self, line: str) -> None:
        self._failed.append(line)
        print(f"{line}; the sweep goes on", file=sys.stderr, flush=True)

    def _say(self, line: str) -> None:
        print(line, flush=True)

    def _end_all(self) -> None:
        processes = [process for process, _, _ in self._running.values()]
        for process in processes:
            process.terminate()
        until = time.monotonic() + _PATIENCE
        for process in processes:
            try:
                process.wait(timeout=max(until - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _last_line(log: Path) -> str:
    """What a process said last, in brackets."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _LOG_END))
        lines = file.read().decode(errors="replace").split("\n")
    said = [line.strip() for line in lines if line.strip()]
    return f" ({printable(said[-1], 200)})" if said else ""


def end_on_signals() -> None:
    """Let the signals that end a process end this one by an exception, as Ctrl-C does."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves it
            signal.signal(number, _leave)


def _leave(number: int, _: object) -> None:
    sys.exit(128 + number)
