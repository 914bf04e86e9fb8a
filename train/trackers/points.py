"""The curves of a run as log.jsonl has them, read while it is written."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tpp.common.errors import UserError
from tpp.common.reading import parse_json
from train.tags import points_of

# Points in memory at once; the others wait in the file.
_AT_ONCE = 200


@dataclass
class Point:
    """What all curves have at one step.

    Attributes:
        stage: of the run.
        step: in that stage.
        time: when it was logged, in seconds since 1970.
        values: by tag.
        at: the step over all stages.
        number: of the stage among those that train, from 1 on.
    """

    stage: str
    step: int
    time: float
    values: dict[str, float]
    at: int = 0
    number: int = 0


@dataclass
class Places:
    """Where each stage that trains stands among the steps of all of them.

    A stage has as many steps as it trains, and one for what is measured before the first. So no
    two points share a step, also where several stages come from one.

    Attributes:
        trained: the stages that train, in their order.
        begins: the step over all stages of a stage's step 0, of stages whose log can be read: of
            the others a process that was killed may have left lines that count no more.
    """

    trained: tuple[str, ...]
    begins: dict[str, int] = field(default_factory=dict)
    added: int = 0

    def add(self, stage: str, steps: Mapping[str, int]) -> None:
        """Let a stage's log be read, as soon as its steps before it are known.

        Args:
            stage: it.
            steps: of the stages that are done.
        """
        before = self.trained[: self.trained.index(stage)]
        self.begins[stage] = sum(steps.get(name, 0) + 1 for name in before)
        self.added += 1

    def number(self, stage: str) -> int:
        """Which of the stages that train it is, from 1 on."""
        return self.trained.index(stage) + 1


class LogReader:
    """Reads log.jsonl from where it was read up to; from its beginning where it was written anew.

    What is logged at one step comes as one point, as soon as a later step or the end of the stage
    says that nothing more will come: what is due at the step at which a run is stopped is
    measured when it goes on.

    Args:
        log: the file; it need not be there yet.
        layers: whether the curves of single layers are wanted.
    """

    def __init__(self, log: Path, *, layers: bool) -> None:
        self._log, self._layers = log, layers
        self._added, self._read = -1, 0
        self._open: Point | None = None

    def read(self, places: Places, *, most: int = _AT_ONCE) -> list[Point]:
        """The next points, not many more than ``most``; empty where there are none yet."""
        found: list[Point] = []
        try:
            file = self._log.open("rb")
        except FileNotFoundError:
            return found
        added, begins = places.added, dict(places.begins)  # the main thread adds to it
        with file:
            if added != self._added or os.fstat(file.fileno()).st_size < self._read:
                self._added, self._read, self._open = added, 0, None
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n") or len(found) >= most:
                    break
                entry = _parsed(line)
                stage = entry.get("stage")
                if stage in places.trained and stage not in begins:
                    break
                self._read += len(line)
                if stage in begins:
                    self._take(entry, places, begins[stage], found)
        return found

    def _take(self, entry: dict[str, Any], places: Places, begin: int, found: list[Point]) -> None:
        stage, step, now = entry["stage"], entry.get("step"), self._open
        ends = entry.get("event") == "stage" and entry.get("status") == "end"
        values = points_of(entry, layers=self._layers) if isinstance(step, int) else {}
        if now is not None and (ends or (values and (now.stage, now.step) != (stage, step))):
            found.append(now)
            self._open = now = None
        if not values or not isinstance(step, int):
            return
        if now is not None:
            now.values |= values
            return
        self._open = Point(
            stage, step, float(entry["time"]), values, begin + step, places.number(stage)
        )


def _parsed(line: bytes) -> dict[str, Any]:
    """A line of the log; empty where it is none."""
    try:
        entry = parse_json(line.decode(), "log.jsonl")
        return entry if isinstance(entry, dict) and "time" in entry else {}
    except (UserError, UnicodeDecodeError):
        return {}
