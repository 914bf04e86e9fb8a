"""Run a sweep: every method at every pruning ratio with every seed, from one dense network.

    python -m train.sweep --config configs/cifar10/table1.yaml [--list] [key.sub=value ...]

Each run is a process of its own (train/main.py) with a folder of its own. What is done is
skipped, what was broken off goes on where it was, and a run that fails costs nothing but itself.
"""

import argparse
import contextlib
import errno
import fcntl
import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from tpp.common.errors import UserError, run_command
from tpp.common.paths import user_path

if TYPE_CHECKING:
    from train.grid import State, SweepRun


def run_sweep(runs: "Sequence[SweepRun]", launcher: Sequence[str]) -> list[str]:
    """Run what is not done, one after the other; returns a line for each run that failed.

    Raises:
        UserError: a run's dense network is not there, and making it is not among ``runs``.
    """
    from train.grid import state_of

    states = {run.number: state_of(run) for run in runs}
    for run in runs:
        needed = run.starts_from
        if needed and not states[run.number].done and 0 not in states and not needed.exists():
            raise UserError(f"{needed}: run {run.number} starts from it; run number 0 first")
    failed: list[str] = []
    for run in runs:
        label = f"run {run.number} ({run.name})"
        if states[run.number].done:
            print(f"{label}: done before, skipped", flush=True)
        elif run.starts_from is not None and not run.starts_from.exists():
            failed.append(f"{label}: not started, as {run.starts_from} is not there")
        else:
            code = _run_alone(run, label, launcher)
            if code:
                failed.append(f"{label}: exit code {code}")
                print(f"{failed[-1]}; the sweep goes on", file=sys.stderr, flush=True)
    return failed


def _run_alone(run: "SweepRun", label: str, launcher: Sequence[str]) -> int:
    """Run in a process of its own, unless another one is at it; returns its exit code."""
    from train.grid import state_of

    with _lock(run.folder) as lock:
        if lock is None:
            print(f"{label}: another process is at work on {run.folder}; left alone", flush=True)
            return 0
        if state_of(run).done:  # by a process that held the lock a moment ago
            return 0
        command = run.command(launcher)
        print(f"{label}: {shlex.join(command)}", flush=True)
        # The process keeps the lock's file open: should this one be killed, the lock stays for
        # as long as the run goes on.
        process = subprocess.Popen(command, pass_fds=[lock])
        try:
            return process.wait()
        finally:
            if process.poll() is None:
                _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[int | None]:
    """Hold a run folder; gives None where another process holds it, else an open file.

    The kernel drops the lock when the last process that has the file open ends, however it ends.
    A file system without locks gives none: there nobody but the user keeps two sweeps apart, and
    the tasks of a SLURM array, which never share a run, need no help.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(f"{folder}: cannot write there ({error.strerror})") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            os.close(file)
            yield None
            return
        print(f"{folder}: no lock on this file system ({error.strerror})", file=sys.stderr)
    try:
        yield file
    finally:
        os.close(file)


def _chosen(runs: "Sequence[SweepRun]", text: str | None) -> "list[SweepRun]":
    """The runs that --only names: ``3``, ``1-5,9``, or ``7-`` for all from 7 on."""
    if text is None:
        return list(runs)
    first, last = runs[0].number, runs[-1].number
    numbers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:(-)(\d*))?", part.strip())
        start = int(match[1]) if match else -1
        end = int(match[3] or last) if match and match[2] else start
        if not first <= start <= end <= last:
            raise UserError(f"--only {text}: expected N, N-M or N- within {first}-{last}")
        numbers.update(range(start, end + 1))
    return [run for run in runs if run.number in numbers]


def _as_ranges(numbers: Sequence[int]) -> str:
    """Rising numbers as SLURM writes an array: ``1-5,9``."""
    parts = []
    for _, group in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        block = [number for _, number in group]
        parts.append(f"{block[0]}-{block[-1]}" if len(block) > 1 else str(block[0]))
    return ",".join(parts)


def _launcher(text: str | None) -> list[str]:
    """What starts train/main.py; programs of this environment come first."""
    if text is None:
        return [sys.executable]
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"--launcher {text}: {error}") from None
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    program = shutil.which(words[0], path=path) if words else None
    if program is None:
        raise UserError(f"--launcher {text}: there is no such program")
    return [program, *words[1:]]


def _print_list(runs: "Sequence[SweepRun]", finetunings: Sequence[str]) -> None:
    from train.grid import state_of
    from train.tasks.classification import TOP1

    table = Table()
    table.add_column("Run", justify="right")
    table.add_column("Method")
    table.add_column("Ratio")
    table.add_column("Seed", justify="right")
    for label in finetunings:
        table.add_column(f"{TOP1.column}\n{label}", justify="right")
    table.add_column("State")
    states = [state_of(run) for run in runs]
    for run, state in zip(runs, states, strict=True):
        top1s = _top1s(run, state, finetunings)
        place = ("dense", "", "") if run.method is None else (run.method, run.ratio, str(run.seed))
        table.add_row(str(run.number), *place, *top1s, state.text)
    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(table)
    done = sum(state.done for state in states)
    begun = sum(state.text.startswith("under way") for state in states)
    print(f"{done} done, {begun} under way, {len(runs) - done - begun} waiting")


def _top1s(run: "SweepRun", state: "State", finetunings: Sequence[str]) -> list[str]:
    from train.tasks.classification import TOP1

    if state.results is None:
        return [""] * len(finetunings)
    if run.method is None:
        dense = state.results.dense
        found = [None if dense is None else dense.scores.get(TOP1.name)]
        found += [None] * (len(finetunings) - 1)
    else:
        stages = [state.results.stages.get(run.evaluations[label]) for label in finetunings]
        found = [None if stage is None else stage.scores.get(TOP1.name) for stage in stages]
    return ["" if top1 is None else TOP1.number(top1) for top1 in found]


def main() -> None:
    """Run or list a sweep."""
    parser = argparse.ArgumentParser(
        prog="python -m train.sweep",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
        epilog="example: python -m train.sweep --config configs/cifar10/table1.yaml "
        "data.root=/data/cifar10",
    )
    parser.add_argument("--config", type=user_path, metavar="FILE", required=True, help="the sweep")
    parser.add_argument(
        "--output", type=user_path, metavar="DIR", help="folder of the runs; default: the file's"
    )
    parser.add_argument("--list", action="store_true", help="show all runs and how far they are")
    parser.add_argument(
        "--pending", action="store_true", help="print the numbers of what is not done: 1-5,9"
    )
    parser.add_argument("--only", metavar="N[,N-M]", help="these runs; 7- means from 7 on")
    parser.add_argument(
        "--launcher",
        metavar="COMMAND",
        help='what starts train/main.py, such as "torchrun --nproc_per_node 4"; default: python',
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key.sub=value",
        help="settings of every run; those of a stage go to the runs that train in it",
    )
    arguments = parser.parse_intermixed_args()
    from train.grid import expand, load_sweep, state_of

    sweep = load_sweep(arguments.config, arguments.output)
    runs = _chosen(expand(sweep, arguments.overrides), arguments.only)
    if arguments.list:
        _print_list(runs, list(sweep.finetuning))
    elif arguments.pending:
        print(_as_ranges([run.number for run in runs if not state_of(run).done]))
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        failed = run_sweep(runs, _launcher(arguments.launcher))
        done = sum(state_of(run).done for run in runs)
        print("\n".join((*failed, f"{sweep.name}: {done} of {len(runs)} runs are done")))
        sys.exit(1 if failed else 0)


if __name__ == "__main__":
    run_command(main)
