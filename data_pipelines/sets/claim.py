"""What the commands that make data sets have in common: a bar, a lock and threads."""

import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tpp.common.errors import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")


def progress_bar() -> Progress:
    """Bars on a terminal; nothing in a log file."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Make a folder and keep a second process out of it, where the file system has locks.

    It is removed again if nothing came to be in it.

    Raises:
        UserError: it cannot be made, or another process has it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{folder}: cannot make this folder ({error.strerror})") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder}: another process is making this folder at the moment; wait for it"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)
        with suppress(OSError):
            folder.rmdir()


def in_threads(
    what: str,
    work: Callable[[Job], Result],
    jobs: Sequence[Job],
    threads: int,
    progress: Progress,
    stop: Event | None = None,
) -> list[Result]:
    """The results of all jobs, in their order; the first error sets ``stop`` and ends the rest."""
    task = progress.add_task(what, total=len(jobs))
    pool = ThreadPoolExecutor(threads)
    try:
        # Ctrl-C may come even here, when the first job is already under way.
        futures = [pool.submit(work, job) for job in jobs]
        pending = set(futures)
        while pending:
            # A Ctrl-C just before the wait is only seen after it.
            done, pending = wait(pending, timeout=1, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
                progress.advance(task)
    except BaseException:
        if stop is not None:
            stop.set()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    return [future.result() for future in futures]
