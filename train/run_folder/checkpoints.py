"""Checkpoints of a training stage under way: when they are written, which are kept, which is read.

What one looks like, and how it comes to be whole, is in ``tpp/checkpoints/training_state.py``.
Beside them in ``checkpoints/`` there are links for people, ``latest`` and ``best``; nothing here
reads them. At most one checkpoint more than those that are kept is on the disk at a time.
"""

import errno
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from tpp.checkpoints.training_state import (
    DamagedState,
    TrainingState,
    check_state,
    read_notes,
    read_state,
    state_folder,
    state_folders,
    write_state,
)
from tpp.common.errors import UserError
from tpp.common.files import aside_of, is_aside, sync
from train.config.sections import CheckpointsSection
from train.copies import RunCopies

Result = TypeVar("Result")
# A network file system's server that was restarted, a path to a disk that is switched over.
_PASSING_ERRORS = {errno.ESTALE, errno.EIO}
_WAITS_SECONDS = (0.1, 0.4, 1.0)
# A checkpoint before it is renamed into its place, and an older one of the same step after it had
# to make way; not one that was being deleted.
_UNFINISHED = re.compile(r"\.(step-[0-9]+)(\.before)?\.[0-9]+\.tmp")
# Folder of them in a stage's own.
CHECKPOINTS = "checkpoints"


class CheckpointWriter:
    """Writes a stage's checkpoints while it trains on, and drops those that are not to be kept.

    One checkpoint is written at a time. The newest ``keep`` stay; every ``keep_every``-th stays for
    good, where they are counted over the whole stage and each holds its number, so that resuming
    changes nothing; with ``keep_best`` so does the one with the highest score, of equal ones the
    earliest. One that is damaged takes nobody's place, and stays until ``keep`` newer ones are
    whole.

    Args:
        folder: ``checkpoints`` of the stage; made with the first checkpoint.
        settings: what the configuration says.
        say: prints a line; called from the thread that calls these methods.
        copies: has each checkpoint copied; None for no copies.
    """

    def __init__(
        self,
        folder: Path,
        settings: CheckpointsSection,
        *,
        say: Callable[[str], None],
        copies: RunCopies | None = None,
    ) -> None:
        self._folder, self._settings, self._say = folder, settings, say
        self._run_copies = copies
        # An executor's thread is waited for when the interpreter ends, however it ends.
        self._executor = ThreadPoolExecutor(1, "checkpoint") if settings.asynchronous else None
        self._writing: Future[list[str]] | None = None
        self._buffers: dict[tuple[str, str], Tensor] = {}
        # What this process knows of the checkpoints on the disk.
        self._whole: dict[Path, bool] = {}
        self._notes: dict[Path, tuple[int, float | None] | None] = {}
        self._cannot_delete: set[Path] = set()

    def save(
        self, state: TrainingState, *, score: float | None = None, also_sync: Sequence[Path] = ()
    ) -> float:
        """Write a checkpoint of ``state`` as it is now; the caller may change it right after.

        Waits for the one before, if that is still being written.

        Args:
            state: its ``number`` and ``score`` are filled in here.
            score: what the best has most of, such as top-1 in per cent; None if not measured.
            also_sync: files that are on the disk before the checkpoint appears, such as logs.

        Returns:
            The seconds that the caller stood still.

        Raises:
            UserError: with ``on_error: stop``: the checkpoint before could not be written, or,
                if nothing is asynchronous, this one.
        """
        began = time.perf_counter()
        self.wait()
        state, files = replace(state, score=score), tuple(also_sync)
        if self._executor is None:
            self._tell(self._write(state, files))
        else:
            self._writing = self._executor.submit(self._write, self._copy(state), files)
        return time.perf_counter() - began

    @property
    def writing(self) -> bool:
        """Whether a checkpoint is being written now."""
        return self._writing is not None and not self._writing.done()

    def check(self) -> None:
        """Raise, or say, what went wrong in the write before, if that is done. Costs nothing.

        Raises:
            UserError: with ``on_error: stop``: it could not be written.
        """
        if self._run_copies is not None:
            self._tell(self._run_copies.take_lines())
        writing = self._writing
        if writing is not None and writing.done():
            self._writing = None
            self._tell(writing.result())

    def wait(self) -> None:
        """Wait until nothing is being written.

        Raises:
            UserError: as :meth:`check`.
        """
        if self._writing is not None:
            wait_for([self._writing])
            self.check()

    def close(self) -> None:
        """Wait, and end the thread. May be called twice.

        While an exception is being handled, an error of the writer is said, not raised.

        Raises:
            UserError: as :meth:`check`.
        """
        under_way = sys.exception() is not None
        try:
            self.wait()
        except Exception as error:
            if not under_way:
                raise
            self._say(str(error))
        finally:
            if self._executor is not None:
                self._executor.shutdown()

    def clean_up(self) -> None:
        """Drop all but those kept for good; for a stage that is done."""
        self.wait()
        try:
            self._tell(self._drop(self._kept_for_good()))
        except OSError as error:
            self._say(f"{self._folder}: cannot delete the checkpoints: {error.strerror}")
        with suppress(OSError):
            self._folder.rmdir()  # only if nothing is left in it

    def _tell(self, lines: list[str]) -> None:
        for line in lines:
            self._say(line)

    def _copy(self, state: TrainingState) -> TrainingState:
        """The state in memory of its own, which the next copy uses again."""
        with _one_thread():
            model = self._copies("model", state.model)
            average = self._copies("average", state.average)
            entries = {
                index: self._copies(f"optimizer {index}", values)
                for index, values in state.optimizer["state"].items()
            }
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()
        groups = deepcopy(state.optimizer["param_groups"])
        return replace(
            state,
            model=model,
            average=average,
            optimizer={"state": entries, "param_groups": groups},
            extra=deepcopy(state.extra),
            architecture=deepcopy(state.architecture),
        )

    def _copies(self, whose: str, values: Mapping[str, Any]) -> dict[str, Any]:
        copies = {}
        for key, value in values.items():
            if not isinstance(value, Tensor):
                copies[key] = deepcopy(value)
                continue
            buffer = self._buffers.get((whose, key))
            if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
                buffer = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
                self._buffers[whose, key] = buffer
            copies[key] = buffer.copy_(value.detach(), non_blocking=True)
        return copies

    def _write(self, state: TrainingState, also_sync: Sequence[Path]) -> list[str]:
        """Write, and drop older ones; returns lines to say. In the thread, if there is one."""
        target = state_folder(self._folder, state.step)
        self._whole.pop(target, None)
        self._notes.pop(target, None)
        try:
            number = self._number_before(target) + 1
            _sync_files(also_sync)
            write_state(target, replace(state, number=number))
            self._whole[target], self._notes[target] = True, (number, state.score)
            newest, for_good = self._newest(), self._kept_for_good()
            lines = self._drop(newest | for_good)
            if self._run_copies is not None:
                passing = newest - for_good - {target}
                self._run_copies.offer(str(target), is_checkpoint=True, passing=passing)
            return lines
        except (UserError, OSError) as error:
            # An OSError: the folder cannot be listed.
            text = str(error) if isinstance(error, UserError) else f"{target}: {error.strerror}"
            if self._settings.on_error == "stop":
                raise UserError(text) from None
            return [f"{text}; training goes on without it"]

    def _number_before(self, target: Path) -> int:
        """The number of the newest whole checkpoint before ``target``, 0 if there is none."""
        for path in state_folders(self._folder):
            if _step(path) < _step(target) and self._is_whole(path):
                notes = self._notes_of(path)
                return notes[0] if notes else 0
        return 0

    def _newest(self) -> set[Path]:
        """The newest whole ones, and those between them that are damaged."""
        kept, whole = set(), 0
        for path in state_folders(self._folder):
            if whole == self._settings.keep:
                break
            whole += self._is_whole(path)
            kept.add(path)
        return kept

    def _kept_for_good(self) -> set[Path]:
        best, every = self._best(), self._settings.keep_every
        kept = set() if best is None else {best}
        if every is not None:
            for path in state_folders(self._folder):
                notes = self._notes_of(path)
                if notes and notes[0] % every == 0:
                    kept.add(path)
        return kept

    def _best(self) -> Path | None:
        """The whole checkpoint with the highest score, of equal ones the earliest."""
        if not self._settings.keep_best:
            return None
        scores = {}
        for path in reversed(state_folders(self._folder)):
            notes = self._notes_of(path)
            if notes and notes[1] is not None and not math.isnan(notes[1]):
                scores[path] = notes[1]
        by_score = sorted(scores, key=lambda path: scores[path], reverse=True)  # keeps the order
        return next((path for path in by_score if self._is_whole(path)), None)

    def _is_whole(self, path: Path) -> bool:
        if path not in self._whole:
            try:
                check_state(path)
                self._whole[path] = True
            except (DamagedState, UserError, OSError):
                self._whole[path] = False
        return self._whole[path]

    def _notes_of(self, path: Path) -> tuple[int, float | None] | None:
        if path not in self._notes:
            try:
                self._notes[path] = read_notes(path)
            except (DamagedState, UserError, OSError):
                self._notes[path] = None
        return self._notes[path]

    def _drop(self, kept: set[Path]) -> list[str]:
        """Delete all checkpoints but these, and set the links; returns lines to say."""
        lines = []
        for path in state_folders(self._folder):
            if path in kept:
                continue
            try:
                _delete(path)
            except OSError as error:
                if path not in self._cannot_delete:
                    lines.append(f"{path}: cannot delete this old checkpoint: {error.strerror}")
                self._cannot_delete.add(path)
        whole = (path for path in state_folders(self._folder) if self._is_whole(path))
        self._link("latest", next(whole, None))
        self._link("best", self._best())
        return lines

    def _link(self, name: str, path: Path | None) -> None:
        """Point a link at a checkpoint, where the file system has links."""
        link = self._folder / name
        aside = aside_of(link)
        with suppress(OSError):
            if path is None:
                link.unlink()
                return
            aside.unlink(missing_ok=True)
            aside.symlink_to(path.name)
            try:
                aside.replace(link)
            finally:
                aside.unlink(missing_ok=True)


def newest_state(folder: Path) -> tuple[TrainingState | None, list[str]]:
    """The newest whole checkpoint below ``folder``, and why newer ones were passed over.

    Errors of a file system that may pass are waited for, a second or two.

    Returns:
        The checkpoint, None if there is no whole one, and ``path: why`` for each passed over.

    Raises:
        UserError: another version of this program wrote one, or the folder or one of them must
            not be read: passing over these would lose work that is not damaged.
    """
    passed_over: list[str] = []
    try:
        folders = _patiently(partial(state_folders, folder))
    except OSError as error:
        raise UserError(f"{folder}: cannot read the checkpoints: {error.strerror}") from None
    for path in folders:
        try:
            return _patiently(partial(read_state, path)), passed_over
        except DamagedState as error:
            passed_over.append(str(error))
        except PermissionError as error:
            raise UserError(f"{error.filename}: no permission to read the checkpoint") from None
        except OSError as error:
            passed_over.append(f"{error.filename or path}: {error.strerror}")
    return None, passed_over


def remove_leftovers(folder: Path) -> list[Path]:
    """Remove the hidden files and folders below ``folder`` that a killed process left.

    Call it before :func:`newest_state`, and only while no other process writes there. A checkpoint
    that was whole but not yet renamed into its place is not removed, it is put there.

    Returns:
        What was removed.
    """
    removed = []
    for root, folders, files in os.walk(folder):
        for name in sorted((*folders, *files)):
            path = Path(root) / name
            if is_aside(path) and not _rescued(path):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    with suppress(OSError):
                        path.unlink()
                removed += [] if os.path.lexists(path) else [path]
    return removed


@contextmanager
def _one_thread() -> Iterator[None]:
    """Copy with one thread: several wait for each other, and long where loaders take the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _rescued(aside: Path) -> bool:
    """Put a whole checkpoint in its place if there is none; whether that was so.

    By name, a new one comes before the one that it was to be exchanged for.
    """
    named = _UNFINISHED.fullmatch(aside.name)
    if named is None:
        return False
    target = aside.with_name(named[1])
    try:
        if os.path.lexists(target) or state_folder(aside.parent, check_state(aside)) != target:
            return False
        for path in (*aside.iterdir(), aside):
            sync(path)
        aside.rename(target)
        sync(target.parent)
    except (DamagedState, UserError, OSError):
        return False
    return True


def _delete(path: Path) -> None:
    """Rename and delete, so that a folder which is half deleted is none of the checkpoints."""
    gone = aside_of(path.with_name(f"{path.name}.old"))
    shutil.rmtree(gone, ignore_errors=True)
    with suppress(FileNotFoundError):
        path.rename(gone)
        shutil.rmtree(gone)


def _sync_files(paths: Sequence[Path]) -> None:
    for path in paths:
        try:
            sync(path)
        except FileNotFoundError:
            continue  # a log that is gone is no reason to have no checkpoint
        except OSError as error:
            raise UserError(f"{path}: cannot be written to the disk: {error.strerror}") from None


def _patiently(read: Callable[[], Result]) -> Result:
    for seconds in _WAITS_SECONDS:
        try:
            return read()
        except OSError as error:
            if error.errno not in _PASSING_ERRORS:
                raise
            time.sleep(seconds)
    return read()


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
