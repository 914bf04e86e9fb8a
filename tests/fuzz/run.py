"""Fuzz the parsers for as long as you like: python -m tests.fuzz.run [--target NAME] [--seconds S].

Every target runs in a process of its own, so that an input that ends the process or never returns
is a finding like any other. Inputs that fail are written into the target's corpus folder, which
the test suite goes through.
"""

import argparse
import hashlib
import importlib
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random

from rich.console import Console
from rich.table import Table

from tests.fuzz.harness import CORPUS, Tally, Target, mutate, seeds_of, tally_one

# Bytes of address space; most of it is what torch maps when it is imported.
_ADDRESS_SPACE = 16 * 2**30
# Seconds of the wall clock without an answer after which a process counts as stuck.
_PATIENCE = 120.0


def all_targets() -> dict[str, Target]:
    """The targets of all modules ``targets_*.py`` beside this one, by name."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("targets_*.py")):
        for target in importlib.import_module(f"tests.fuzz.{path.stem}").TARGETS:
            found[target.name] = target
    return found


def _work(name: str, seed: int, seconds: float, folder: Path, pipe: Connection) -> None:
    """Child: mutate and check until the time is up; each input is on the disk before it runs."""
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))
    target, random = all_targets()[name], Random(seed)
    seeds = seeds_of(target, folder)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        data, tally = mutate(random, seeds, target), Tally()
        (folder / "current").write_bytes(data)
        tally_one(target, folder / "case", data, tally)
        pipe.send((list(tally.outcomes), tally.failures))
    pipe.send(None)


def fuzz_target(target: Target, seconds: float, seed: int) -> tuple[Tally, int]:
    """Fuzz one target; what has become of its inputs, and how many seeds were used up."""
    tally, used, end = Tally(), 0, time.monotonic() + seconds
    context = multiprocessing.get_context("spawn")
    while (left := end - time.monotonic()) > 0:
        with tempfile.TemporaryDirectory() as scratch:
            ours, theirs = context.Pipe(duplex=False)
            arguments = (target.name, seed + used, left, Path(scratch), theirs)
            child = context.Process(target=_work, args=arguments)
            child.start()
            theirs.close()
            used += 1
            reason = _listen(ours, tally)
            child.kill()
            child.join()
            if reason:
                tally.outcomes["failed"] += 1
                current = Path(scratch) / "current"
                data = current.read_bytes() if current.exists() else b""
                tally.failures.append((data, f"{reason} (exit code {child.exitcode})"))
                if not data:  # not even the seeds were read
                    break
    return tally, used


def _listen(pipe: Connection, tally: Tally) -> str | None:
    """Count what a child reports; why it ended before its time, if it did."""
    while pipe.poll(_PATIENCE):
        try:
            message = pipe.recv()
        except EOFError:
            return "the process ended"
        if message is None:
            return None
        outcomes, failures = message
        tally.outcomes.update(outcomes)
        tally.failures += failures
    return f"nothing came for {_PATIENCE:.0f} s"


def keep(target: Target, data: bytes) -> Path:
    """Put an input into the target's corpus; its name is its hash."""
    path = CORPUS / target.name / hashlib.sha256(data).hexdigest()[:16]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def main() -> None:
    """Fuzz the chosen targets one after the other and print a table."""
    targets = all_targets()
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.run", description=__doc__)
    parser.add_argument("--target", choices=sorted(targets), action="append", help="default: all")
    parser.add_argument("--seconds", type=float, default=60, help="for each target")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the mutations")
    arguments = parser.parse_args()
    table = Table("target", "inputs", "accepted", "refused", "failures", "seeds")
    failed = 0
    for name in arguments.target or targets:
        tally, used = fuzz_target(targets[name], arguments.seconds, arguments.seed)
        seen: set[str] = set()
        for data, reason in tally.failures:
            last = reason.strip().splitlines()[-1]
            if last not in seen:  # one input for each kind of failure is enough
                seen.add(last)
                print(f"{name}: {keep(targets[name], data)}: {json.dumps(reason[-1500:])}")
        failed += len(tally.failures)
        found = tally.outcomes
        counts = (tally.inputs, found["accepted"], found["refused"], found["failed"])
        seeds = f"{arguments.seed}-{arguments.seed + used - 1}"
        table.add_row(name, *(f"{count:,}" for count in counts), seeds)
    Console().print(table)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
