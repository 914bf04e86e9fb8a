"""What a person sees of a run: TensorBoard, log.jsonl, and the terminal."""

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from torch.utils.tensorboard import SummaryWriter

from tpp.files import write_whole
from tpp.regularizer import LayerStatistics
from tpp.trainability import Trainability


class Monitor:
    """Writes one stage's events; on ranks other than the main one it does nothing.

    Args:
        run: the run folder.
        stage: the stage's name; TensorBoard shows each stage as a run of its own.
        total_steps: for the progress bar; None where the length is not known.
        start_step: first step of this process; entries of later steps, left by a process that
            was killed after its last checkpoint, are dropped.
        enabled: True on the main rank.
    """

    def __init__(
        self, run: Path, stage: str, total_steps: int | None, start_step: int, *, enabled: bool
    ) -> None:
        self.stage = stage
        self.enabled = enabled
        if not enabled:
            return
        self._log = run / "log.jsonl"
        if start_step > 0:
            _drop_later_entries(self._log, stage, start_step)
        self._writer = SummaryWriter(str(run / stage), purge_step=start_step or None)
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
            console=console,
            # A log file wants lines, not a bar redrawn ten times a second.
            disable=not console.is_terminal,
            transient=True,
        )
        self._task: TaskID = self._progress.add_task(
            stage, total=total_steps, completed=start_step, status=""
        )
        self._progress.start()

    def advance(self, step: int, status: str | None = None) -> None:
        """Move the progress bar to ``step`` steps done."""
        if self.enabled:
            self._progress.update(self._task, completed=step)
            if status is not None:
                self._progress.update(self._task, status=status)

    def scalars(self, event: str, step: int, values: Mapping[str, float], prefix: str = "") -> None:
        """Log scalars of one step: a line in log.jsonl and a point each in TensorBoard."""
        if not self.enabled:
            return
        for name, value in values.items():
            self._writer.add_scalar(prefix + name, value, step)
        self.event(event, step=step, **values)

    def layers(self, step: int, statistics: Mapping[str, LayerStatistics]) -> None:
        """Log the per-layer statistics of a pruning method."""
        if not self.enabled or not statistics:
            return
        for name in ("pruned_magnitude", "kept_magnitude", "correlation"):
            values = {layer: getattr(of_layer, name) for layer, of_layer in statistics.items()}
            for layer, value in values.items():
                self._writer.add_scalar(f"weights_{name}/{layer}", value, step)
            self._writer.add_scalar(f"weights/{name}", fmean(values.values()), step)
        self.event("layers", step=step, layers={k: vars(v) for k, v in statistics.items()})

    def trainability(self, step: int, found: Trainability) -> None:
        """Log the Jacobian's singular values; what is not finite is null in log.jsonl."""
        if not self.enabled:
            return
        values = {f"jsv_{name}": getattr(found, name) for name in ("mean", "std", "min", "max")}
        values["condition"] = found.condition
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        for name, value in finite.items():
            self._writer.add_scalar(f"trainability/{name}", value, step)
        self.event("trainability", step=step, **{name: finite.get(name) for name in values})

    def event(self, event: str, **values: Any) -> None:
        """Append a line to log.jsonl."""
        if self.enabled:
            entry = {"event": event, "stage": self.stage, "time": round(time.time(), 3), **values}
            with self._log.open("a") as file:
                file.write(json.dumps(entry) + "\n")

    def say(self, message: str) -> None:
        """Print a line above the progress bar."""
        if self.enabled:
            self._progress.print(message) if not self._progress.disable else say(message)

    def close(self) -> None:
        """Flush everything."""
        if self.enabled:
            self._progress.stop()
            self._writer.close()


def say(message: str) -> None:
    """Print a line on standard output at once, so that a job's log can be followed."""
    print(message, file=sys.stdout, flush=True)


def _drop_later_entries(log: Path, stage: str, start_step: int) -> None:
    """Remove what a killed process logged of steps that are now done again."""
    if not log.exists():
        return
    kept = []
    for line in log.read_text().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # the line that was being written at the kill
        if entry["stage"] != stage or entry.get("step", 0) <= start_step:
            kept.append(line)
    write_whole(log, "".join(f"{line}\n" for line in kept))
