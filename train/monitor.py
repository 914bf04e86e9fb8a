"""What a person sees of a run: TensorBoard, log.jsonl, and the terminal."""

import errno
import itertools
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from tpp.common.errors import UserError
from tpp.measure.trainability import Trainability
from tpp.regularization.regularizer import LayerStatistics
from train.run_folder.log import drop_later_entries, say
from train.tags import ALL_STAGES, describe_tag, layer_points

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Monitor:
    """Writes one stage's events; on ranks other than the main one it does nothing.

    Args:
        run: the run folder.
        stage: the stage's name; TensorBoard shows each stage as a run of its own.
        total_steps: for the progress bar; None where the length is not known.
        start_step: steps done before this process; entries of later ones, left by a process that
            was killed after its last checkpoint, are dropped; with 0, all of this stage are.
        before: steps of the stages that it comes from.
        configuration: of the run, as YAML, to be read beside the curves.
        enabled: True on the main rank.
        on_error: when the disk is full or the like: ``stop`` raises, ``continue`` says so once and
            goes without.

    Raises:
        UserError: from any method, with ``stop``: a file cannot be written.
    """

    def __init__(
        self,
        run: Path,
        stage: str,
        total_steps: int | None,
        start_step: int,
        *,
        before: int,
        configuration: str,
        enabled: bool,
        on_error: Literal["stop", "continue"] = "stop",
    ) -> None:
        self.stage = stage
        self.enabled = enabled
        if not enabled:
            return
        self._log = run / "log.jsonl"
        if self._log.is_symlink():
            raise UserError(f"{self._log}: a symbolic link, which a log is not written through")
        drop_later_entries(self._log, stage, start_step)
        # TensorBoard forgets what it has seen from this step on; those of the checkpoint stay.
        self._events = run / stage
        # The scores over all stages count steps otherwise, and a writer forgets by its own count.
        self._before, self._over_all = before, self._events / ALL_STAGES
        purge = start_step + 1 if start_step else 0
        self._described: set[str] = set()
        self._writers: dict[Path, SummaryWriter] = {
            self._events: self._open_events(self._events, purge_step=purge),
            self._over_all: self._open_events(self._over_all, purge_step=before + purge),
        }
        if start_step == 0:
            text = f"```yaml\n{configuration}```"
            self._writers[self._events].add_text("configuration", text, 0)
        self._on_error, self._told = on_error, set[Path]()
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps,"),
            TimeRemainingColumn(),
            TextColumn("left "),
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
        self._points(step, {prefix + name: value for name, value in values.items()})
        if event == "evaluate":
            scores = {name: value for name, value in values.items() if name != "images"}
            points = {f"{ALL_STAGES}/{name}": value for name, value in scores.items()}
            self._points(self._before + step, points, self._over_all)
        self.event(event, step=step, **values)

    def layers(self, step: int, statistics: Mapping[str, LayerStatistics]) -> None:
        """Log the per-layer statistics of a pruning method."""
        if not self.enabled or not statistics:
            return
        layers = {layer: vars(of_layer) for layer, of_layer in statistics.items()}
        self._points(step, layer_points(layers))
        self.event("layers", step=step, layers=layers)

    def trainability(self, step: int, found: Trainability) -> None:
        """Log the Jacobian's singular values; what is not finite is null in log.jsonl."""
        if not self.enabled:
            return
        values = {f"jsv_{name}": getattr(found, name) for name in ("mean", "std", "min", "max")}
        values["condition"] = found.condition
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self._points(step, {f"trainability/{name}": value for name, value in finite.items()})
        self.event("trainability", step=step, **{name: finite.get(name) for name in values})

    def event(self, event: str, **values: Any) -> None:
        """Append a line to log.jsonl."""
        if self.enabled:
            entry = {"event": event, "stage": self.stage, "time": round(time.time(), 3), **values}
            line = json.dumps(entry) + "\n"
            with self._writing(self._log), self._log.open("ab", buffering=0) as file:
                end = file.tell()
                if file.write(line.encode()) < len(line.encode()):  # the disk is full
                    file.truncate(end)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _open_events(self, folder: Path, **options: Any) -> "SummaryWriter":
        from torch.utils.tensorboard import SummaryWriter  # the main rank alone waits for it

        return SummaryWriter(str(folder), **options)

    def flush(self) -> list[Path]:
        """Hand everything to the system; returns the files that are to be synced to the disk."""
        if not self.enabled:
            return []
        folders = (self._events, self._over_all)
        for folder in folders:
            with self._writing(folder):
                if folder not in self._writers:  # it died of an error; there may be room again
                    self._writers[folder] = self._open_events(folder)
                self._writers[folder].flush()
        # Not of the folders below: the checkpoints there come and go while they are written.
        files = (folder.glob("events.out.tfevents.*") for folder in folders)
        return [self._log, *itertools.chain.from_iterable(files)]

    def _points(self, step: int, values: Mapping[str, float], folder: Path | None = None) -> None:
        from torch.utils.tensorboard.summary import scalar  # with the writers

        folder = folder or self._events
        with self._writing(folder):
            for name, value in values.items():
                if (writer := self._writers.get(folder)) is None:
                    continue
                summary = scalar(name, value)
                if name not in self._described:  # TensorBoard keeps that of the first point
                    self._described.add(name)
                    summary.value[0].metadata.summary_description = describe_tag(name)
                writer._get_file_writer().add_summary(summary, step)

    @contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        """Do what was set to be done when a file cannot be written."""
        try:
            yield
        except OSError as error:
            self._writers.pop(path, None)  # its thread ends with the first error
            message = f"{path}: cannot be written ({error.strerror or error})"
            if self._on_error == "stop":
                raise UserError(message) from None
            if path not in self._told:
                self._told.add(path)
                self.say(f"{message}; going on without it")

    def say(self, message: str) -> None:
        """Print a line above the progress bar."""
        if self.enabled:
            self._progress.print(message) if not self._progress.disable else say(message)

    def close(self) -> None:
        """Flush everything."""
        if self.enabled:
            self._progress.stop()
            for folder, writer in [*self._writers.items()]:
                with self._writing(folder):
                    writer.close()
