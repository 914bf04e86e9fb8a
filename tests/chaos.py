"""Kills training runs at random moments, and checks that nothing of it is left in the end.

    python tests/chaos.py [--kills N] [--seed S] [--ranks N ...] [--lanes N] [--flips]
                          [--output FILE.json] [--keep]

A tiny run with all five stages is made undisturbed, once per number of ranks. Then it is started,
killed with SIGKILL, started again, and so on; where it comes to its end, it is compared with the
undisturbed one, and begun anew. The moments are drawn from the seed: any time, or some milliseconds
after something has appeared in the run folder, such as the folder that a checkpoint is written to.
On several ranks, one kill in three hits a single rank. With --flips, a bit of the newest checkpoint
is flipped or one of its files cut short after every other kill, as long as an older one is there.

After every kill
    each checkpoint on the disk is whole; the next process resumes from the newest of them
After every damage
    the damaged checkpoint is passed over, and said to be
At the end of every run
    the same files, none of them hidden; the same bytes in every tensor of every checkpoint; plans
    and results.json as they were but for times; in log.jsonl and in TensorBoard's events every step
    once, with the same values (a training report that covers fewer steps after a resumption: none)

A violation is told, its run folder and output are kept, and the exit code is 1.
"""

import argparse
import contextlib
import json
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import psutil
import yaml
from rich.console import Console
from rich.table import Table
from safetensors import deserialize
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tiny_run import make_tiny_data, tiny_run  # noqa: E402

from train.run_folder.checkpoints import newest_state  # noqa: E402

# Seconds after which a run is taken to hang, and one that has lost a rank to go on without it.
LIMIT = 300.0
LIMIT_WITHOUT_A_RANK = 180.0
# Runs that go wrong until a lane gives up.
ENOUGH = 10
# Of log.jsonl's entries, those that belong to a step, and what differs between equal runs.
OF_A_STEP = ("train", "evaluate", "layers")
TIMES = (
    *("time", "images_per_second", "step_time", "data_wait", "checkpoint_stall"),
    *("tflops", "mfu", "peak_memory_gib"),
)
# Names in a run folder: a checkpoint under way, one in its place, and a file about to be renamed.
WRITING = r"[^/]+/checkpoints/\.step-\d+\.\d+\.tmp"
WRITTEN = r"[^/]+/checkpoints/step-\d+"
ASIDE = r"[^/]+/\.[^/]+"


@dataclass(frozen=True)
class Moment:
    """When to kill what.

    Attributes:
        sign: regular expression of a name in the run folder, see :func:`names`, that was not there
            at the process's start; empty for the start itself.
        count: how many such names must have appeared.
        delay: seconds from then on.
        rank: the only rank to be killed; None for all processes at once.
    """

    sign: str = ""
    count: int = 1
    delay: float = 0.0
    rank: int | None = None


# What to wait for, of how many one is drawn, and the seconds within which the kill follows: about
# as long as what begins, or follows, takes.
SIGNS = (
    (WRITING, 4, 0.03),
    (WRITTEN, 4, 0.03),
    (r"prune", 1, 0.5),
    (ASIDE, 6, 0.005),
    (r"[^/]+/done\.json", 3, 0.3),
    (r"\.?results\.json.*", 6, 0.01),
    (r"log\.jsonl@\d+", 20, 0.1),
)


def draw(random: Random, ranks: int, seconds_left: float) -> Moment:
    """A moment of one of the kinds, each as likely as another, of a run with so much to go."""
    rank = random.randrange(ranks) if ranks > 1 and random.random() < 1 / 3 else None
    kind = random.randrange(len(SIGNS) + 1)
    if kind == len(SIGNS):
        return Moment(delay=random.uniform(0, seconds_left), rank=rank)
    sign, most, spread = SIGNS[kind]
    return Moment(sign, random.randint(1, most), random.uniform(0, spread), rank)


def names(run: Path) -> set[str]:
    """Paths below the run folder, and ``log.jsonl@SIZE`` and ``results.json@INODE``."""
    found, above = set(), len(f"{run}/")
    for folder, folders, files in os.walk(run):
        found |= {f"{folder}/{name}"[above:] for name in (*folders, *files)}
    with contextlib.suppress(FileNotFoundError):
        found.add(f"log.jsonl@{(run / 'log.jsonl').stat().st_size}")
        found.add(f"results.json@{(run / 'results.json').stat().st_ino}")
    return found


class Process:
    """train/main.py under way, with all that it has started; killed on leaving the context."""

    def __init__(self, config: Path, ranks: int, output: Path) -> None:
        launcher = [sys.executable]
        if ranks > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        # Ranks are in sessions of their own, and orphans once their launcher is dead; what they
        # have inherited tells them.
        self._mark = uuid.uuid4().hex
        with output.open("w") as file:
            self._popen = subprocess.Popen(
                [*launcher, str(ROOT / "train" / "main.py"), "--config", str(config)],
                cwd=config.parent,
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    "CUDA_VISIBLE_DEVICES": "",
                    "TPP_CHAOS": self._mark,
                },
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.started = time.time()
        self._tree = [psutil.Process(self._popen.pid)]
        self._looked = time.monotonic()

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def wait(self, run: Path, moment: Moment) -> bool:
        """Wait until it is time; False if the process ended before."""
        sign, before, appeared = re.compile(moment.sign), names(run), set[str]()
        while moment.sign and len(appeared) < moment.count:
            if self._ended():
                return False
            new = names(run) - before
            appeared |= {name for name in new if sign.fullmatch(name)}
            time.sleep(0.002 if new else 0.02)  # while it imports, nothing happens
        due = time.monotonic() + moment.delay
        while (left := due - time.monotonic()) > 0:
            if self._ended():
                return False
            time.sleep(min(left, 0.05))
        return self._popen.poll() is None

    def kill(self, rank: int | None = None) -> bool:
        """SIGKILL to everything, or to one rank; False if there is no such rank."""
        hit = False
        for process in self._tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                if rank is None or process.environ().get("RANK") == str(rank):
                    process.kill()
                    hit = True
        if rank is not None:
            return hit
        while late := list(self._marked()):
            for process in late:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self._popen.poll()
        self._popen.wait()
        return True

    def end(self, seconds: float) -> int | None:
        """Wait for the end: the exit code, or None if it takes longer."""
        try:
            return self._popen.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def _ended(self) -> bool:
        """Whether it has; by the way, take note of the processes that there are to be killed."""
        if time.monotonic() - self._looked > 0.3:
            with contextlib.suppress(psutil.NoSuchProcess):
                root = self._tree[0]
                self._tree = [root, *root.children(recursive=True)]
            self._looked = time.monotonic()
        return self._popen.poll() is not None or time.time() - self.started > LIMIT

    def _marked(self) -> Iterator[psutil.Process]:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("TPP_CHAOS") == self._mark:
                    yield process


Entry = dict[str, Any]


def read_log(run: Path) -> list[Entry]:
    """The entries of log.jsonl; of a line that is no JSON, ``{"event": "broken"}``."""
    entries = []
    with contextlib.suppress(FileNotFoundError):
        for line in (run / "log.jsonl").read_text(errors="replace").splitlines():
            try:
                entries.append(json.loads(line))
            except ValueError:
                entries.append({"event": "broken", "line": line})
    return entries


@dataclass(frozen=True)
class Record:
    """What a run has left behind, without its times.

    Attributes:
        files: names of all files; of an event file, its folder and ``events``.
        tensors: type, shape and bytes by file and name.
        plans: by file.
        results: results.json.
        log: entries by stage and event, for :data:`OF_A_STEP`, and the ends of the stages.
        curves: steps by stage and tag of TensorBoard.
        broken: lines of log.jsonl that are no JSON.
    """

    files: list[str]
    tensors: dict[str, tuple[str, list[int], bytes]]
    plans: dict[str, Any]
    results: Any
    log: dict[str, list[Entry]]
    curves: dict[str, list[int]]
    broken: list[str]

    @classmethod
    def read(cls, run: Path) -> "Record":
        """Read a run folder."""
        paths = sorted(path for path in run.rglob("*") if path.is_file())
        shown = {str(path.relative_to(run)): path for path in paths}
        log = defaultdict(list)
        entries = read_log(run)
        for entry in entries:
            if entry["event"] in OF_A_STEP or entry.get("status") == "end":
                log[f"{entry['stage']} {entry['event']}"].append(entry)
        return cls(
            files=sorted({re.sub(r"(.*events)\.out\.tfevents\..*", r"\1", name) for name in shown}),
            tensors=dict(
                tensor
                for name, path in shown.items()
                if path.suffix == ".safetensors"
                for tensor in _tensors(name, path)
            ),
            plans={n: json.loads(p.read_text()) for n, p in shown.items() if p.name == "plan.json"},
            results=_without_times(json.loads((run / "results.json").read_text())),
            log=dict(log),
            curves=dict(curve for path in run.iterdir() for curve in _curves(path)),
            broken=[entry["line"] for entry in entries if entry["event"] == "broken"],
        )


def _tensors(name: str, path: Path) -> Iterator[tuple[str, tuple[str, list[int], bytes]]]:
    for tensor, content in deserialize(path.read_bytes()):
        yield f"{name}: {tensor}", (content["dtype"], content["shape"], bytes(content["data"]))


def _curves(stage: Path) -> Iterator[tuple[str, list[int]]]:
    """As TensorBoard shows them, all points."""
    if any(stage.glob("events.out.tfevents.*")):
        events = EventAccumulator(str(stage), size_guidance={"scalars": 0}).Reload()
        for tag in events.Tags()["scalars"]:
            yield f"{stage.name} {tag}", [event.step for event in events.Scalars(tag)]


def _without_times(results: Any) -> Any:
    # The commit is the checkout's, which may move on while this goes on for hours; and each lane is
    # started in a folder of its own.
    if isinstance(results, dict):
        others = ("git_commit", "started_in")
        kept = (key for key in results if "seconds" not in key and key not in others)
        return {key: _without_times(results[key]) for key in kept}
    return results


def differences(truth: Record, found: Record, resumed: set[tuple[str, int]]) -> list[str]:
    """What is not as in the undisturbed run.

    Args:
        truth: the undisturbed run.
        found: the other one.
        resumed: stages and steps at which it was taken up.
    """
    told = [f"log.jsonl: broken line {line[:100]!r}" for line in found.broken]
    told += [f"{name} is missing" for name in truth.files if name not in found.files]
    told += [f"{name} is left over" for name in found.files if name not in truth.files]
    for what in ("tensors", "plans"):
        was, is_ = getattr(truth, what), getattr(found, what)
        told += [f"{name} differs" for name in was if name in is_ and was[name] != is_[name]]
    if truth.tensors.keys() ^ found.tensors.keys():
        told.append(f"tensors: {sorted(truth.tensors.keys() ^ found.tensors.keys())[:3]}")
    if truth.results != found.results:
        told += [f"results.json: {part}" for part in _apart(truth.results, found.results)]
    for key in sorted(truth.log.keys() | found.log.keys()):
        was, is_ = truth.log.get(key, []), found.log.get(key, [])
        steps = [[entry["step"] for entry in side] for side in (was, is_)]
        if steps[0] != steps[1]:
            told.append(f"log.jsonl: {key}: steps {steps[0]} became {steps[1]}")
        elif other := _other_values(was, is_, resumed):
            told.append(f"log.jsonl: {key}: {other}")
    tags = defaultdict(list)
    for tag in sorted(truth.curves.keys() | found.curves.keys()):
        points = [side.curves.get(tag, []) for side in (truth, found)]
        if points[0] != points[1]:
            tags[f"steps {points[0]} became {points[1]}"].append(tag)
    return told + [f"TensorBoard: {', '.join(tags[what])}: {what}" for what in tags]


def _apart(was: Any, is_: Any, key: str = "") -> Iterator[str]:
    if isinstance(was, dict) and isinstance(is_, dict):
        for name in was.keys() | is_.keys():
            yield from _apart(was.get(name), is_.get(name), f"{key}.{name}".strip("."))
    elif was != is_:
        yield f"{key} was {was!r} and is {is_!r}"


def _other_values(was: list[Entry], is_: list[Entry], resumed: set[tuple[str, int]]) -> str | None:
    """The first values that differ, but for training reports cut short by a resumption."""
    last = 0
    for one, other in zip(was, is_, strict=True):
        step = one["step"]
        cut = any(stage == one["stage"] and last < at < step for stage, at in resumed)
        last = step
        if one["event"] == "train" and cut:
            continue
        keys = sorted((one.keys() | other.keys()) - {*TIMES})
        if apart := [name for name in keys if one.get(name) != other.get(name)]:
            name = apart[0]
            return f"step {step}: {name} {one.get(name)} became {other.get(name)}; also {apart[1:]}"
    return None


@dataclass
class Tally:
    """What has happened so far.

    Attributes:
        kills: made, and how many of a single rank.
        survived: kills of runs that came to the right end.
        landed: kills by what was going on.
        runs: that came to their end.
        flips: checkpoints damaged, and how many of them were found to be.
        lost: the most steps that were logged before a kill and had to be done again.
        resumes: seconds from a process's start to the first logged step after a resumption.
        after_imports: of these, the seconds after config.yaml was written.
        not_ended: runs that did not end by themselves when a rank was killed.
        violations: what should not be.
    """

    kills: int = 0
    of_one_rank: int = 0
    survived: int = 0
    landed: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    flips: int = 0
    found: int = 0
    lost: int = 0
    resumes: list[float] = field(default_factory=list)
    after_imports: list[float] = field(default_factory=list)
    not_ended: int = 0
    violations: list[str] = field(default_factory=list)

    def add(self, other: "Tally") -> None:
        """Add another lane's."""
        for name, value in vars(other).items():
            total = getattr(self, name)
            setattr(self, name, max(total, value) if name == "lost" else total + value)

    def figures(self) -> dict[str, Any]:
        """For people and JSON."""
        rounded = [
            round(median(seconds), 2) if seconds else None
            for seconds in (self.resumes, self.after_imports)
        ]
        return {
            "kills made": self.kills,
            "of one rank only": self.of_one_rank,
            **{f"in {place}": self.landed[place] for place in PLACES},
            "runs finished": self.runs,
            "kills survived": self.survived,
            "checkpoints damaged": self.flips,
            "damage found": self.found,
            "steps lost at most": self.lost,
            "resumptions": len(self.resumes),
            "resume, median s": rounded[0],
            "of it after imports, s": rounded[1],
            "did not end without a rank": self.not_ended,
            "violations": len(self.violations),
        }


PLACES = (
    "start-up",
    "a step",
    "a checkpoint's write",
    "prune",
    "between stages",
    "evaluate",
    "the end",
)


class Lane:
    """One run folder, in which a run is killed and started again.

    Args:
        folder: for the run folder, the configuration and the processes' output; made.
        config: what to run; ``output`` is replaced.
        ranks: processes that train.
        truth: the undisturbed run.
    """

    def __init__(self, folder: Path, config: dict[str, Any], ranks: int, truth: Record) -> None:
        self.tally = Tally()
        self.ranks = ranks
        self._folder, self._truth = folder, truth
        self._run, self._config = folder / "run", folder / "config.yaml"
        self._stages: list[str] = list(config["stages"])
        folder.mkdir(parents=True)
        self._config.write_text(
            yaml.safe_dump({**config, "output": str(self._run)}, sort_keys=False)
        )
        self.failures = 0
        self._anew()

    @property
    def stage(self) -> str | None:
        """The first stage that is not done."""
        return next((s for s in self._stages if not (self._run / s / "done.json").exists()), None)

    def kill(self, moment: Moment) -> bool:
        """Start, and kill at the moment; False if the run ended before, and was compared."""
        before = names(self._run)
        with self._start() as process:
            came = process.wait(self._run, moment)
            alone = came and moment.rank is not None and process.kill(moment.rank)
            if alone:
                self.tally.not_ended += process.end(LIMIT_WITHOUT_A_RANK) is None
            elif not came:
                code = process.end(LIMIT)
            process.kill()
        if not came:
            self._finished(process, code)
            return False
        self.tally.kills += 1
        self.tally.of_one_rank += alone
        self._kills += 1
        place = self._place(process, before)
        self.tally.landed[place] += 1
        print(f"{self._folder.name}: kill {self.tally.kills} in {place}, next is {self.stage}")
        self._check(self._after_start(process) + self._after_kill())
        return True

    def finish(self) -> None:
        """Let the run come to its end, if there is one under way, and compare."""
        if self._kills:
            with self._start() as process:
                code = process.end(LIMIT)
            self._finished(process, code)

    def damage(self, random: Random) -> bool:
        """Flip a bit or cut a file of the newest checkpoint; False if that is not possible.

        An older whole one is needed, and none that is being written.
        """
        if self.stage is None:
            return False
        whole = [path for path, is_whole in self._checkpoints() if is_whole]
        # One that lacks nothing but its name may be put in its place, newer than the damaged one.
        if len(whole) < 2 or any(re.fullmatch(WRITING, name) for name in names(self._run)):
            return False
        flips = random.random() < 0.5
        file = random.choice(sorted(path for path in whole[-1].iterdir() if path.stat().st_size))
        content = bytearray(file.read_bytes())
        place = random.randrange(len(content))
        if flips:
            content[place] ^= 1 << random.randrange(8)
            what = f"a bit flipped in byte {place} of {len(content)}"
        else:
            del content[place:]
            what = f"cut to {place} bytes"
        file.write_bytes(content)
        print(f"{self._folder.name}: {file.relative_to(self._run)}: {what}")
        self.tally.flips += 1
        self._damaged.add(whole[-1])
        self._to_find[whole[-1]] = f"{file.relative_to(self._run)}: {what}"
        self._newest = int(whole[-2].name[5:])
        return True

    def _anew(self) -> None:
        shutil.rmtree(self._run, ignore_errors=True)
        for output in self._folder.glob("output-*.txt"):
            output.unlink()
        self._kills = self._starts = 0
        self._resumed: set[tuple[str, int]] = set()
        self._damaged: set[Path] = set()
        self._to_find: dict[Path, str] = {}
        # Stage, last step logged and newest checkpoint at the last kill.
        self._stage_then: str | None = self._stages[0]
        self._newest = 0

    def _start(self) -> Process:
        self._starts += 1
        return Process(self._config, self.ranks, self._output)

    @property
    def _output(self) -> Path:
        return self._folder / f"output-{self._starts:03}.txt"

    def _checkpoints(self) -> list[tuple[Path, bool]]:
        """Checkpoints of the stage under way by step, and whether each is whole."""
        folder = self._run / (self.stage or "") / "checkpoints"
        found = []
        for path in sorted(folder.glob("step-*")):
            with tempfile.TemporaryDirectory() as alone:
                (Path(alone) / path.name).symlink_to(path)
                state, passed_over = newest_state(Path(alone))
            found.append((path, state is not None and not passed_over))
        return found

    def _place(self, process: Process, before: set[str]) -> str:
        """What was going on when it was killed."""
        stage, new = self.stage, names(self._run) - before
        if any(re.fullmatch(WRITING, name) for name in new):
            return "a checkpoint's write"
        if stage is None:
            return "the end"
        if stage == "prune" and (self._run / stage).exists():
            return "prune"
        if self._entries(process, stage):
            return "a step"
        if any(name.endswith("done.json") for name in new):
            return "evaluate" if stage == "evaluate" else "between stages"
        return "start-up"

    def _entries(self, process: Process, stage: str) -> list[Entry]:
        return [
            entry
            for entry in read_log(self._run)
            # log.jsonl has milliseconds.
            if entry.get("stage") == stage and entry["time"] >= process.started - 0.001
        ]

    def _after_start(self, process: Process) -> list[str]:
        """Check where the process took the run up, if it came so far."""
        stage = self._stage_then
        entries = self._entries(process, stage) if stage else []
        at = next((e["step"] for e in entries if e.get("status") == "start"), None)
        if stage is None or at is None:
            return []
        told = []
        if at < self._newest:
            told.append(f"{stage}: taken up at step {at}, with step {self._newest} on the disk")
        if at:
            self._resumed.add((stage, at))
            self._time(process, entries)
        output = self._output.read_text()
        for path, what in self._to_find.items():
            if re.search(rf"passed over.*{stage}.*{path.name}", output):
                self.tally.found += 1
            else:
                told.append(f"{what}, which was not passed over")
        self._to_find = {}
        return told

    def _time(self, process: Process, entries: list[Entry]) -> None:
        first = next((entry["time"] for entry in entries if entry["event"] == "train"), None)
        if first is not None:
            self.tally.resumes.append(first - process.started)
            imported = (self._run / "config.yaml").stat().st_mtime
            self.tally.after_imports.append(first - imported)

    def _after_kill(self) -> list[str]:
        """Check what is on the disk, and take note of it."""
        self._stage_then, self._newest = self.stage, 0
        told = []
        for path, whole in self._checkpoints():
            if whole:
                self._newest = int(path.name[5:])
                self._damaged.discard(path)
            elif path not in self._damaged:
                inside = sorted(file.name for file in path.iterdir())
                told.append(f"{path.relative_to(self._run)} is not whole: {inside}")
        logged = [
            entry["step"]
            for entry in read_log(self._run)
            if entry["event"] == "train" and entry["stage"] == self.stage
        ]
        self.tally.lost = max(self.tally.lost, max(logged, default=0) - self._newest)
        return told

    def _finished(self, process: Process, code: int | None) -> None:
        told = []
        if code is None:
            told = [f"no end after {LIMIT:g} s"]
        elif code:
            last = self._output.read_text().strip().splitlines()[-1:]
            told = [f"ended with exit code {code}: {' '.join(last)}"]
        else:
            told = self._after_start(process)
            told += differences(self._truth, Record.read(self._run), self._resumed)
        kills = self._kills
        if not self._check(told):
            self.tally.survived += kills
            print(f"{self._folder.name}: finished as the undisturbed run, after {kills} kills")
            self._anew()
        self.tally.runs += 1

    def _check(self, told: list[str]) -> list[str]:
        """If there is something to tell, keep the evidence and begin anew."""
        if told:
            self.failures += 1
            place = self._folder / f"evidence-{self.failures}"
            place.mkdir()
            for path in (*self._folder.glob("output-*.txt"), self._run):
                if path.exists():
                    path.rename(place / path.name)
            (place / "violations.txt").write_text("\n".join(told) + "\n")
            self.tally.violations += [f"{place}: {line}" for line in told]
            print(f"VIOLATION, see {place}:", *told, sep="\n    ")
            self._anew()
        return told


@dataclass(frozen=True)
class Undisturbed:
    """A run that nobody kills.

    Attributes:
        record: what it leaves behind.
        seconds: that it takes.
        startup: of these, before the first stage.
        done: by stage, the seconds from the start to its end.
    """

    record: Record
    seconds: float
    startup: float
    done: dict[str, float]

    def left(self, stage: str | None) -> float:
        """Seconds that a process takes which begins with ``stage``."""
        stages = list(self.done)
        passed = stages[: stages.index(stage)] if stage else stages
        return self.seconds - (self.done[passed[-1]] - self.startup if passed else 0)


def undisturbed(folder: Path, config: dict[str, Any], ranks: int) -> Undisturbed:
    """Make the run below ``folder``.

    Raises:
        RuntimeError: it fails.
    """
    folder.mkdir(parents=True)
    run, path, output = folder / "run", folder / "config.yaml", folder / "output.txt"
    path.write_text(yaml.safe_dump({**config, "output": str(run)}, sort_keys=False))
    with Process(path, ranks, output) as process:
        code = process.end(LIMIT)
        seconds = time.time() - process.started
    if code != 0:
        raise RuntimeError(f"the undisturbed run ended with exit code {code}: {output.read_text()}")

    def since_start(name: str) -> float:
        return (run / name).stat().st_mtime - process.started

    done = {stage: since_start(f"{stage}/done.json") for stage in config["stages"]}
    return Undisturbed(Record.read(run), seconds, min(done.values()), done)


def chaos_run(data: Path) -> dict[str, Any]:
    """The tiny run, somewhat longer, so that every training stage has several checkpoints."""
    config = tiny_run(data, Path("run"))
    config["training"]["evaluate_every"] = 1.0
    config["method"]["stabilize_steps"] = 15
    for stage in ("dense", "finetune"):
        config["stages"][stage]["epochs"] = 3
    return config


def run_lane(lane: Lane, truth: Undisturbed, kills: int, random: Random, flips: bool) -> Tally:
    """Kill so many times at moments that are drawn, and let the last run come to its end."""
    while lane.tally.kills < kills and lane.failures < ENOUGH:
        lane.kill(draw(random, lane.ranks, truth.left(lane.stage)))
        if flips and random.random() < 0.5:
            lane.damage(random)
    lane.finish()
    return lane.tally


def run_series(folder: Path, options: argparse.Namespace, ranks: int) -> Tally:
    """All kills on one number of ranks."""
    config = chaos_run(folder / "data")
    truth = undisturbed(folder / f"undisturbed-{ranks}", config, ranks)
    print(f"{ranks} rank(s), undisturbed: {truth.seconds:.0f} s")
    lanes = options.lanes if ranks == 1 else 1
    shares = [len(range(lane, options.kills, lanes)) for lane in range(lanes)]
    total = Tally()
    with ThreadPoolExecutor(lanes) as pool:
        running = [
            pool.submit(
                run_lane,
                Lane(folder / f"ranks-{ranks}-lane-{number}", config, ranks, truth.record),
                truth,
                kills,
                Random(f"{options.seed} {ranks} {number}"),
                options.flips,
            )
            for number, kills in enumerate(shares)
        ]
        for lane in running:
            total.add(lane.result())
    return total


def show(tallies: dict[int, Tally]) -> None:
    """Print the figures, a column per number of ranks."""
    table = Table("", *(f"{ranks} rank" + "s" * (ranks > 1) for ranks in tallies))
    columns = [tally.figures() for tally in tallies.values()]
    for name in columns[0]:
        table.add_row(name, *(str(column[name]) for column in columns))
    Console().print(table)


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError
    return number


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    number: Callable[[str], int] = _positive
    parser.add_argument("--kills", type=number, default=40, help="per number of ranks; default 40")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--ranks", type=number, nargs="+", default=[1, 2], metavar="N")
    parser.add_argument("--lanes", type=number, default=2, help="runs side by side, on one rank")
    parser.add_argument("--flips", action="store_true", help="damage checkpoints between the kills")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="the figures, as JSON")
    parser.add_argument("--keep", action="store_true", help="keep the folders of all runs")
    return parser.parse_args()


def main() -> None:
    """Run as asked; exit code 1 on a violation."""
    options = parse_arguments()
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of every resumption
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    print(f"runs in {folder}")
    make_tiny_data(folder / "data")
    tallies = {ranks: run_series(folder, options, ranks) for ranks in options.ranks}
    show(tallies)
    violations = [line for tally in tallies.values() for line in tally.violations]
    if options.output:
        content = {
            "seed": options.seed,
            "flips": options.flips,
            "ranks": {ranks: tally.figures() for ranks, tally in tallies.items()},
            "violations": violations,
            "on": {
                "cores": os.cpu_count(),
                "python": platform.python_version(),
                "torch": metadata.version("torch"),
            },
        }
        options.output.write_text(json.dumps(content, indent=1) + "\n")
    for line in violations:
        print(line)
    if not violations and not options.keep:
        shutil.rmtree(folder)
    sys.exit(bool(violations))


if __name__ == "__main__":
    main()
