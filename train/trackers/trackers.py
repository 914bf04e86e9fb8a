"""Showing a run to services while it trains, without ever waiting for one.

log.jsonl is the queue: what is to be told is on the disk already, exactly as it is after a resume,
and a thread for each service on the main rank reads it at the pace of that service. Training knows
nothing of them. A service that is down for a day costs no memory, and no point.
"""

import hashlib
import json
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from tpp.common.errors import UserError, printable, reason_of
from tpp.common.redaction import without_secrets
from train.config.config import Config, as_yaml
from train.config.tracking import services_of, without_passwords
from train.distributed.stopping import Stopped
from train.run import Run
from train.run_folder.log import say
from train.run_folder.results import Results, read_results
from train.run_folder.same_run import stage_settings
from train.trackers.memory import Memory
from train.trackers.points import LogReader, Places, Point
from train.trackers.services import SERVICES, About, Ending, Service

LOG, RESULTS = "log.jsonl", "results.json"
_LOOK_EVERY = 2.0  # seconds
_LONGEST_PAUSE = 60.0  # seconds between two attempts to reach a service
# Seconds between attempts at the end, each with those that a service's library makes by itself.
_PAUSES_AT_END = (1.0, 2.0, 4.0, 8.0)
# A signal leaves seconds for everything.
_WAIT_STOPPED = 5.0
_LONGEST_REASON = 300
_NO_FIGURES = ("images", "wall_seconds")


class Trackers:
    """The services that a run is shown in.

    Args:
        about: the run.
        names: of the services.
        training: whether the run is under way, or was before.
        tell: says a line.
    """

    def __init__(
        self,
        about: About,
        names: Iterable[str],
        *,
        training: bool = True,
        tell: Callable[[str], None] = say,
    ) -> None:
        self._about, self._names, self._tell = about, list(names), tell
        self._training = training
        self._places = Places(about.trained)
        self._senders: list[_Sender] = []

    def ready(self, stage: str, steps: Mapping[str, int]) -> None:
        """Let the log of a stage be read.

        Args:
            stage: that trains; its log is as it is to be.
            steps: of the stages that are done.
        """
        if stage in self._places.trained:
            self._places.add(stage, steps)

    def start(self) -> None:
        """Begin to tell; the main thread goes on at once."""
        if self._senders or not self._names:
            return
        folder = self._about.folder
        memory = Memory(folder, self._about.settings)
        if memory.begun_anew:
            self._tell("trackers: a stage is run again with other settings: a new run of each")
        for name in self._names:
            reader = LogReader(folder / LOG, layers=self._about.tracking.layers)
            sender = _Sender(
                SERVICES[name](self._about),
                reader,
                self._places,
                memory,
                self._tell,
                training=self._training,
            )
            self._senders.append(sender)
            sender.start()

    def close(self, ending: Ending, *, wait: float | None = None) -> bool:
        """Let the services take what is left, for a while, and say what they have not taken.

        Args:
            ending: how the run ends.
            wait: seconds; by default what the configuration says.

        Returns:
            Whether they have taken everything.
        """
        if wait is None:
            wait = self._about.tracking.wait
            wait = min(wait, _WAIT_STOPPED) if ending == "stopped" else wait
        until = time.monotonic() + wait
        for sender in self._senders:
            sender.end(ending)
        complete = True
        for sender in self._senders:
            sender.join(max(0.0, until - time.monotonic()))
            line = sender.what_is_left()
            if line is not None:
                complete = False
                self._tell(line)
        return complete


class _Sender(threading.Thread):
    """Tells one service, and tries again where it does not answer."""

    def __init__(
        self,
        service: Service,
        reader: LogReader,
        places: Places,
        memory: Memory,
        tell: Callable[[str], None],
        *,
        training: bool,
    ) -> None:
        super().__init__(name=f"tracker {service.name}", daemon=True)
        self._service, self._reader, self._places = service, reader, places
        self._memory, self._folder, self._say = memory, service.about.folder, tell
        self._wake, self._given_up = threading.Event(), threading.Event()
        self._training = training
        self._ending: Ending | None = None
        known = memory.of(service.place)
        self._told = known.get("step", -1)
        self._results: dict[str, float] = known.get("results", {})
        self._batch: list[Point] = []
        self._opened = self._complained = self._closed = False
        self._refused = self._summarized = 0

    # ---- for the main thread -----------------------------------------------------------------

    def end(self, ending: Ending) -> None:
        """Tell what is left, and end."""
        self._ending = ending
        self._wake.set()

    def what_is_left(self) -> str | None:
        """What the service has not taken, in a line; from here on it is told nothing more."""
        self._given_up.set()
        name, parts = self._service.name, []
        left, total = self._count()
        if left:
            to = f" to {self._service.address}" if self._service.address else ""
            parts.append(f"{left:,} of {total:,} points were not sent{to}")
            if not self._opened and not self._complained:
                parts.append("no answer so far")
        if self._refused:
            parts.append(f"{self._refused:,} of {total:,} points were refused")
        if self._opened and not self._closed and not left:
            parts.append("did not say in time that it has everything")
        if self.is_alive():
            self._service.abandon()
        if not parts:
            return None
        again = self._training and self._ending == "stopped"
        later = "when the run goes on, or " if again else ""
        command = f"tpp track --to {name} {self._folder}"  # also where the run names another
        return f"trackers: {name}: {', '.join(parts)}; sent {later}by {command}"

    def _count(self) -> tuple[int, int]:
        """Points that are left, and all."""
        reader = LogReader(self._folder / LOG, layers=False)
        told, left, total = self._told, 0, 0
        while points := reader.read(self._places):
            total += len(points)
            left += sum(point.at > told for point in points)
        return left, total

    # ---- the thread --------------------------------------------------------------------------

    def run(self) -> None:
        """Tell what comes, until the end."""
        pause, failed = _LOOK_EVERY, 0
        while not self._given_up.is_set():
            ending = self._ending  # what was logged before it is read below
            try:
                more = self._go_on()
                pause, failed = _LOOK_EVERY, 0
            except Exception as error:  # whatever a service's library raises, training goes on
                more = False
                self._complain(error)
                if ending is None:
                    pause = min(2 * pause, _LONGEST_PAUSE)
                elif failed == len(_PAUSES_AT_END):
                    return
                else:
                    pause = _PAUSES_AT_END[failed]
                    failed += 1
            else:
                if ending is not None and not more:
                    self._close(ending)
                    return
            if not more:
                self._wake.wait(pause)
                if ending is None:
                    self._wake.clear()
                else:
                    self._given_up.wait(pause)

    def _go_on(self) -> bool:
        """Tell what there is; whether there may be more at once."""
        if not self._opened:
            self._open()
        if not self._opened:
            return False
        if not self._batch:
            self._batch = self._reader.read(self._places)
        read = bool(self._batch)
        try:
            while self._batch and not self._given_up.is_set():
                self._send(self._batch[0])
                self._told = max(self._told, self._batch[0].at)
                del self._batch[0]
        finally:
            self._note(step=self._told)
        if not read:
            self._summarize()
        return read

    def _open(self) -> None:
        service, place = self._service, self._service.place
        service.load()
        if self._given_up.is_set():
            return  # it took so long that nobody waits any more
        identity = self._memory.of(place).get("id")
        if identity is None and service.shares_identity:
            identity = self._memory.id_of(service.name)
        found = service.open(identity)
        self._note(id=found)
        told = service.told()
        if told is not None:
            self._told = told
        self._opened = True
        self._tell(f"trackers: {service.name}: {service.where()}")

    def _send(self, point: Point) -> None:
        if point.at <= self._told:
            return  # a process that was killed has sent it
        try:
            self._service.send(point)
        except Exception as error:
            if not self._service.refuses(error):
                raise
            self._refused += 1
            self._complain(error)

    def _summarize(self) -> None:
        try:
            written = (self._folder / RESULTS).stat().st_mtime_ns
        except OSError:  # there is none yet
            return
        if written == self._summarized:
            return
        values = figures(_results(self._folder))
        new = {key: value for key, value in values.items() if self._results.get(key) != value}
        if new:
            self._service.summarize(new, max(self._told, 0))
            self._results = {**self._results, **new}
            self._note(results=self._results)
        self._summarized = written

    def _close(self, ending: Ending) -> None:
        try:
            self._service.close(ending)
            self._closed = True
        except Exception as error:
            self._complain(error)

    def _note(self, **values: Any) -> None:
        with suppress(OSError):  # a full disk is said by what else is written there
            self._memory.note(self._service.place, **values)

    def _complain(self, error: Exception) -> None:
        if not self._complained:
            self._complained = True
            then = "training goes on, and what is missing there is sent when it answers"
            if not self._training:
                then = "it is asked again"
            self._tell(f"trackers: {self._service.name}: {_said(error)}; {then}")

    def _tell(self, line: str) -> None:
        # At the end of a process a thread that prints may end it in an error of Python's.
        if not self._given_up.is_set():
            self._say(line)


def figures(results: Results | None) -> dict[str, float]:
    """The figures of a run's stages, as ``STAGE/NAME``; of the last one also ``final/NAME``.

    Their units are those of results.json: accuracies in per cent, parameters and MACs as numbers.
    """
    if results is None:
        return {}
    found: dict[str, float] = {}
    final: dict[str, float] = {}
    for name, stage in results.stages.items():
        own = {key: value for key, value in stage.to_dict().items() if _is_figure(value)}
        found |= {f"{name}/{key}": value for key, value in own.items()}
        final |= {key: value for key, value in own.items() if key not in _NO_FIGURES}
    if results.status == "finished":
        found |= {f"final/{key}": value for key, value in final.items()}
    return found


def _is_figure(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)


def about_run(config: Config) -> About:
    """What services are told of a run that is under way."""
    folder = Path(config.output)
    trained = tuple(name for name, stage in config.stages.items() if stage.does.trains)
    configuration = yaml.safe_load(as_yaml(config)) | made_with(_results(folder))
    settings = {name: _digest(config, name) for name in trained}
    return About(config.name, folder, config.tracking, configuration, trained, settings)


def made_with(results: Results | None) -> dict[str, Any]:
    """Of results.json what belongs to the configuration: code, device, versions."""
    fields = ("git_commit", "device", "ranks", "engine", "versions")
    return {"made_with": {name: getattr(results, name) for name in fields}} if results else {}


def _results(folder: Path) -> Results | None:
    try:
        return read_results(folder / RESULTS)
    except UserError:  # there is none yet
        return None


def _digest(config: Config, stage: str) -> str:
    settings = json.dumps(stage_settings(config, stage), sort_keys=True)
    return hashlib.sha256(settings.encode()).hexdigest()[:16]


def _said(error: Exception) -> str:
    """What an exception says, without what is secret in the environment."""
    text = without_secrets(without_passwords(reason_of(error)))
    return printable(text, _LONGEST_REASON)


def steps_done(done: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """The steps of stages that are done, by what they found."""
    return {name: found["steps"] or 0 for name, found in done.items()}


@contextmanager
def tracked(run: Run) -> Iterator[None]:
    """Show a run in the services that it names, from its first stage that trains to its end."""
    if not run.is_main or not services_of(run.config.trackers):
        yield
        return
    trackers = Trackers(about_run(run.config), services_of(run.config.trackers))

    def opened(stage: str) -> None:
        trackers.ready(stage, steps_done(run.done))
        trackers.start()

    for stage in run.done:
        trackers.ready(stage, steps_done(run.done))
    run.on_open = opened
    ending: Ending = "failed"
    try:
        yield
        ending = "finished" if len(run.done) == len(run.config.stages) else "stopped"
        trackers.start()  # where nothing is trained, there are results
    except Stopped:
        ending = "stopped"
        raise
    finally:
        trackers.close(ending)
