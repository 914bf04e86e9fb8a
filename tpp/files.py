"""Files that appear whole or not at all."""

import os
from pathlib import Path


def aside_of(path: Path) -> Path:
    """Where to write what is to become ``path``: hidden, beside it, this process's own."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def sync(path: Path) -> None:
    """Have the disk hold a file's bytes, or a folder's entries, before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file aside, have it on the disk, and rename it; text as UTF-8."""
    aside = aside_of(path)
    try:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)
        sync(aside)
        aside.replace(path)
        sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)
