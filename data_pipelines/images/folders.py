"""Folders of class folders: what lies in them, and how to see that it has changed."""

import os
from collections.abc import Sequence
from pathlib import Path

from tpp.common.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
# Listing a folder of a network file system is all waiting; local ones do not mind.
SCAN_THREADS = 16


def folder_mark(folder: Path) -> int:
    """What changes when files come or go in a folder: its time of change; -1 if there is none."""
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return -1


def byte_size(path: str) -> int:
    """How many bytes a file has; -1 if that cannot be told."""
    try:
        return Path(path).stat().st_size
    except OSError:
        return -1


def image_names(folder: Path) -> list[str]:
    """Sorted names of the images in a folder, told by their suffix."""
    names = visible(folder, folders=False)
    return [name for name in names if name.lower().endswith(IMAGE_SUFFIXES)]


def visible(folder: Path, *, folders: bool) -> list[str]:
    """Sorted names of the folders, or else of the files, in ``folder`` that are not hidden.

    Links count as what they lead to, wherever that is; those to nothing as files.

    Raises:
        UserError: the folder cannot be listed; or a link to nothing may have been a folder.
    """
    try:
        with os.scandir(folder) as entries:
            shown = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(f"{folder}: cannot list the data folder ({error.strerror})") from None
    if folders:
        _check_links(shown)
    return sorted(entry.name for entry in shown if _is_folder(entry) == folders)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder or leads to one; what leads in a circle is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _check_links(entries: Sequence[os.DirEntry[str]]) -> None:
    """Check that every link leads somewhere: a class that is left out would shift the labels."""
    for entry in entries:
        try:
            _ = entry.is_symlink() and entry.stat()
        except OSError as error:
            raise UserError(
                f"{entry.path}: a link that leads nowhere ({error.strerror}), where class folders "
                "are expected; mend or delete it"
            ) from None
