"""One run per folder: the second is refused while the first lives, and takes over when it died."""

import errno
import fcntl
import os
import re
import secrets
import socket
import stat
import sys
import threading
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Annotated

from pydantic import BaseModel, Field, ValidationError

from tpp.common.errors import UserError

LOCK_FILE = "run.lock"
# A holder on another node is dead when this many of its beats have not come.
_WATCHED_BEATS = 3
_BEAT_LIMITS = (0.05, 60.0)
_SIZE = 1023
_LARGEST = 4096
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
# Seconds for which a lock that is taken is tried again: whoever has just taken it is about to
# write its name, and whoever only looks lets go at once.
_PATIENCE = 0.5
_NAMELESS = "a process without a name"

_Text = Annotated[str, Field(max_length=200, pattern=r"^[\w.:+-]*$")]


class Holder(BaseModel, extra="ignore", strict=True):
    """What a lock file says of the run that holds it.

    Attributes:
        run: a random name, of this one process.
        host, pid: where it runs.
        boot: the node's boot id; empty where the system has none.
        job: SLURM's id of the job, or of an array's task; empty outside SLURM.
        started: local time, ISO 8601.
        every: seconds between two beats.
        beat: how often the holder has given a sign of life.
        released: whether it has ended cleanly.
    """

    run: _Text
    host: _Text
    pid: int = Field(ge=0, lt=2**32)
    boot: _Text
    job: _Text
    started: _Text
    every: float = Field(allow_inf_nan=False)
    beat: int = 0
    released: bool = False

    def __str__(self) -> str:
        job = f", SLURM job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.started}"


def _slurm_job() -> str:
    """As scancel takes it: of an array this task alone, also where it has the array's own id."""
    array, task = (os.environ.get(f"SLURM_ARRAY_{name}", "") for name in ("JOB_ID", "TASK_ID"))
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")


class RunLock:
    """The lock of a run folder, for the process that writes into it; a context manager.

    A POSIX record lock on ``run.lock`` decides between processes of one node and, where the file
    system has locks across nodes, between nodes. Where it has none or only a node's own, a
    heartbeat decides: the holder rewrites the file every ``beat`` seconds. No two nodes' clocks
    are compared.

    The process must not open ``run.lock`` in another way, as for a second lock of the same folder
    or a copy of it: closing that drops the record lock, until the next beat takes it again.

    Args:
        folder: the run folder; made if it is not there.
        beat: seconds between two signs of life.
    """

    def __init__(self, folder: Path, *, beat: float = 5.0) -> None:
        self._folder, self._path = folder, folder / LOCK_FILE
        self._descriptor: int | None = None
        self._released = threading.Event()
        self._thread: threading.Thread | None = None
        self._me = Holder(
            run=secrets.token_hex(8),
            host=_plain(socket.gethostname()),
            pid=os.getpid(),
            boot=_boot_id(),
            job=_plain(_slurm_job()),
            started=datetime.now().astimezone().isoformat(timespec="seconds"),
            every=beat,
        )

    def acquire(self) -> None:
        """Take the lock, and over from a run that died.

        Raises:
            UserError: another run holds it, or the file cannot be made; one line.
        """
        until = time.monotonic() + _PATIENCE
        watched: Holder | None = None
        while True:
            locked, holder = self._look()
            if locked is False:
                self._close()
                if time.monotonic() > until:
                    raise self._refusal(holder)
                time.sleep(_PATIENCE / 20)
                continue
            proven_dead = locked is True and holder is not None and self._was_here(holder)
            if holder is None or proven_dead or holder == watched:
                break
            # Let go of it while watching: only a file that is opened anew is sure to be read anew
            # from a server, and closing that one would drop the lock anyway.
            self._close()
            if watched is not None:  # somebody else has taken over meanwhile
                raise self._refusal(holder)
            self._watch(holder)
            watched = holder
        self._begin(holder)

    def release(self) -> None:
        """Give the lock back; nothing where it is not held."""
        if self._thread is None or self._descriptor is None:
            return
        self._released.set()
        self._thread.join()
        self._me.released = True
        with suppress(OSError):  # a full disk: the record lock goes all the same
            self._write(self._descriptor)
        self._close()
        self._thread = None

    def __enter__(self) -> "RunLock":
        self.acquire()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def _look(self) -> tuple[bool | None, Holder | None]:
        """Open the file, try to lock it, and read which run holds it and has not released it."""
        self._descriptor = self._open()
        try:
            locked = _lock(self._descriptor)
            holder = _read(self._descriptor)
        except OSError as error:
            self._close()
            raise self._cannot(error) from None
        return locked, None if holder is None or holder.released else holder

    def _watch(self, holder: Holder) -> None:
        """Wait for a holder's next beats, and return when it has ended or they have not come.

        Raises:
            UserError: it lives.
        """
        for _ in range(_WATCHED_BEATS):
            time.sleep(_beat_of(holder))
            _, now = self._look()
            self._close()
            if now is not None and now != holder:
                raise self._refusal(now)

    def _begin(self, before: Holder | None) -> None:
        assert self._descriptor is not None
        try:
            self._write(self._descriptor)
        except OSError as error:
            self._close()
            raise self._cannot(error) from None
        if before is not None:
            message = f"{self._folder}: taken over from a run that died: {before}"
            print(message, file=sys.stderr, flush=True)
        self._thread = threading.Thread(target=self._keep_beating, name="run.lock", daemon=True)
        self._thread.start()

    def _was_here(self, holder: Holder) -> bool:
        """Whether a holder was on this node since it was booted, where a record lock is proof."""
        here = (self._me.host, self._me.boot)
        return bool(self._me.boot) and here == (holder.host, holder.boot)

    def _open(self) -> int:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
            descriptor = os.open(self._path, flags, 0o666)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise UserError(
                    f"{self._path}: a symbolic link, which is not followed; remove it"
                ) from None
            raise self._cannot(error) from None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise UserError(f"{self._path}: not a file; remove it")
        return descriptor

    def _cannot(self, error: OSError) -> UserError:
        return UserError(
            f"{error.filename or self._path}: a run cannot keep its lock here ({error.strerror}); "
            "choose a folder that can be written to with output=..."
        )

    def _refusal(self, holder: Holder | None) -> UserError:
        return refusal(self._folder, holder)

    def _write(self, descriptor: int) -> None:
        # Always of one size, so that a reader never sees the end of a longer entry before it.
        content = self._me.model_dump_json().encode().ljust(_SIZE) + b"\n"
        os.pwrite(descriptor, content, 0)
        os.ftruncate(descriptor, len(content))
        os.fsync(descriptor)  # other nodes see what has reached the server

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _keep_beating(self) -> None:
        assert self._descriptor is not None
        while not self._released.wait(self._me.every):
            # A full disk, a server that is away, a folder that is gone: the run goes on.
            with suppress(OSError):
                locked = _lock(self._descriptor)  # a restarted server may have forgotten it
                other = _read(self._descriptor)
                if other is not None and self._is_rival(other, locked):
                    self._yield_to(other)
                self._me.beat += 1
                self._write(self._descriptor)

    def _is_rival(self, other: Holder, locked: bool | None) -> bool:
        """Whether a name in this run's file is of another run that has taken the folder."""
        if other.released or other.run == self._me.run:
            return False
        # With the lock in hand, a name of this node's can only be a file that was copied here.
        return not (locked and self._was_here(other))

    def _yield_to(self, other: Holder) -> None:
        """End the process: two runs began at once where no lock kept them apart."""
        os.write(2, f"error: {self._refusal(other)}\n".encode())
        os._exit(2)


class LockWatch:
    """Looks again and again whether a run lives that holds a folder; it never waits.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: tuple[Holder, float] | None = None  # and since when it has said the same

    def holder(self) -> str | None:
        """Who has the folder; None where nobody has, or is known to have died.

        A run on another node counts as alive until so many of its beats have not come as
        :class:`RunLock` waits for.
        """
        if not (self._folder / LOCK_FILE).exists():
            return None
        lock = RunLock(self._folder)
        locked, holder = lock._look()
        lock._close()
        if locked is False:
            return str(holder or _NAMELESS)
        if holder is None or (locked and lock._was_here(holder)):
            return None
        now = time.monotonic()
        if self._seen is None or self._seen[0] != holder:
            self._seen = holder, now
        silent = now - self._seen[1]
        return None if silent > _WATCHED_BEATS * _beat_of(holder) else str(holder)


def _beat_of(holder: Holder) -> float:
    """Seconds between two of its beats, within what one waits for."""
    return min(max(holder.every, _BEAT_LIMITS[0]), _BEAT_LIMITS[1])


def holder_of(folder: Path) -> Holder | None:
    """What a run folder's lock file says; None where there is none, or a damaged one.

    Not for a process that holds the lock itself: it would lose it.
    """
    try:
        with (folder / LOCK_FILE).open("rb") as file:
            return _read(file.fileno())
    except OSError:
        return None


def refusal(folder: Path, holder: Holder | None) -> UserError:
    """Why a run cannot have a folder."""
    return UserError(
        f"{folder}: another run has this folder: {holder or _NAMELESS}; "
        "wait for it, end it, or choose another folder with output=..."
    )


def _lock(descriptor: int) -> bool | None:
    """Whether the record lock was obtained; None where the file system has none."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


def _read(descriptor: int) -> Holder | None:
    """The holder that a lock file names; None for an empty or a damaged one."""
    content = os.pread(descriptor, _LARGEST + 1, 0)
    if len(content) > _LARGEST:
        return None
    try:
        return Holder.model_validate_json(content)
    except ValidationError:
        return None


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _plain(text: str) -> str:
    """A name without what a terminal could take for a command."""
    return re.sub(r"[^\w.:+-]", "_", text)[:200]
