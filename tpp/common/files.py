"""Files and folders that appear whole or not at all."""

import errno
import json
import os
import re
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tpp.common.errors import UserError

# What aside_of makes, and what safetensors makes beside the file that it is to write.
_LEFTOVER = re.compile(r"\..+\.[0-9]+\.tmp|\.tmp[A-Za-z0-9]{6}", re.DOTALL)
# How long the client of a network file system may go on showing what was before a rename.
_PATIENCE_SECONDS = 3.0
_LOOK_EVERY_SECONDS = 0.05


def aside_of(path: Path) -> Path:
    """Where to write what is to become ``path``: hidden, beside it, this process's own."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def is_aside(path: Path) -> bool:
    """Whether a file or folder is called as one that is not finished, of whatever process."""
    return _LEFTOVER.fullmatch(path.name) is not None


def sync(path: Path) -> None:
    """Have the disk hold a file's bytes, or a folder's entries, before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def forget(path: Path) -> None:
    """Drop a synced file from the page cache, so that reading it asks the disk.

    The memory that it took is free again for files that are read often, such as images. Where the
    system has no such call, nothing happens.
    """
    if not hasattr(os, "posix_fadvise"):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def move(aside: Path, target: Path, arrived: Callable[[], bool]) -> None:
    """Rename ``aside`` to ``target`` and have the disk hold that.

    A network file system may show a rename late, or say that there was nothing to rename: where
    the server's answer was lost, the client asks again, and by then it is done. So what counts is
    what is found at ``target``, within three seconds.

    Args:
        aside: a file or folder, synced.
        target: its new place, in the same folder. A file there is replaced; a folder must be empty.
        arrived: whether what is at ``target`` is what was moved; an OSError means no.

    Raises:
        OSError: the rename was refused, or cannot be seen.
    """
    lost: OSError | None = None
    try:
        aside.replace(target)
    except FileNotFoundError as error:
        lost = error
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not _without_error(arrived):
        if time.monotonic() > deadline or not target.parent.is_dir():
            raise lost or OSError(errno.EIO, "it was renamed into place, but is not there")
        time.sleep(_LOOK_EVERY_SECONDS)
    sync(target.parent)


def _without_error(arrived: Callable[[], bool]) -> bool:
    try:
        return arrived()
    except OSError:
        return False


def new_file(path: Path) -> int:
    """Make an empty file; the permissions that it gets here, by the user's umask.

    For programs that make their own files readable by nobody else, as safetensors does: what
    they wrote is given these with ``chmod``.
    """
    with path.open("wb") as file:
        return stat.S_IMODE(os.fstat(file.fileno()).st_mode)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file aside, have it on the disk, and rename it; text as UTF-8."""
    aside = aside_of(path)
    data = content.encode() if isinstance(content, str) else content
    try:
        aside.write_bytes(data)
        sync(aside)
        move(aside, path, lambda: path.read_bytes() == data)
    finally:
        aside.unlink(missing_ok=True)


def write_json_option(path: Path, content: Any) -> None:
    """Write what a command's ``--json`` asks for, with the folders above it.

    Raises:
        UserError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--json {path}: cannot write it: {error.strerror}") from None


def in_bytes(count: int) -> str:
    """A number of bytes in words."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:,.1f} {unit}"
    return f"{count} bytes"
