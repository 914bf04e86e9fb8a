"""Class folders, written from the images of an archive."""

import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from threading import Event

import numpy as np

from data_pipelines.images.folders import visible
from data_pipelines.images.image_index import ImageIndex
from data_pipelines.images.source import read_bytes
from tpp.common.errors import UserError
from tpp.common.files import aside_of, sync

RUN_AGAIN = "the same command goes on from here"
_LONGEST_NAME = 255  # bytes, on all file systems in use


def write_class_folders(
    index: ImageIndex, out: Path, threads: int, advance: Callable[[int], None]
) -> int:
    """Copy the images of an index into class folders, each of which appears whole or not at all.

    Args:
        index: images of known sizes in bytes, sorted by class.
        out: the folder to make; class folders that an earlier call has finished are kept.
        threads: how many classes are written at the same time.
        advance: called with the number of images done.

    Returns:
        How many class folders were kept.

    Raises:
        UserError: a folder in ``out`` holds something else, an image cannot be read, or writing
            fails.
    """
    for name in index.classes:
        if "/" in name or name.startswith(".") or len(os.fsencode(name)) > _LONGEST_NAME:
            raise UserError(f"{index.root}: class {name!r} cannot be the name of a folder")
    out.mkdir(parents=True, exist_ok=True)
    for leftover in out.glob(".*.tmp"):
        shutil.rmtree(leftover)
    bounds = np.searchsorted(index.labels, np.arange(len(index.classes) + 1))
    images = {
        name: range(bounds[label], bounds[label + 1]) for label, name in enumerate(index.classes)
    }
    kept = visible(out, folders=True)
    for name in kept:
        expected = [index.files[image].rsplit("/", 1)[1] for image in images.get(name, [])]
        found = visible(out / name, folders=False)
        if not expected or found != sorted(expected):
            raise UserError(
                f"{out / name}: holds {len(found):,} files, {len(expected):,} images belong there; "
                "delete this folder and do the same again"
            )
        advance(len(expected))
    stop = Event()
    with ThreadPoolExecutor(threads) as pool:
        futures = [
            pool.submit(_write_class, index, images[name], out / name, advance, stop)
            for name in index.classes
            if name not in set(kept)
        ]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    sync(out)
    return len(kept)


def _write_class(
    index: ImageIndex, images: range, folder: Path, advance: Callable[[int], None], stop: Event
) -> None:
    """Write one class folder aside, have it on the disk, and rename it."""
    aside = aside_of(folder)
    try:
        aside.mkdir()
        for image in images:
            if stop.is_set():
                return
            _copy(index, image, aside / index.files[image].rsplit("/", 1)[1])
            advance(1)
        # After all are written: the disk has had time for most of them by now.
        for file in aside.iterdir():
            sync(file)
        sync(aside)
        aside.rename(folder)
        sync(folder.parent)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot write this class ({error.strerror}); {RUN_AGAIN}"
        ) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _copy(index: ImageIndex, image: int, path: Path) -> None:
    location = index.location(image)
    try:
        content = read_bytes(location)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{location.path}: cannot read {index.files[image]} at byte {location.offset:,} "
            f"({getattr(error, 'strerror', None) or error}); {RUN_AGAIN}"
        ) from None
    path.write_bytes(content.data)
    written, expected = path.stat().st_size, int(index.byte_sizes[image])
    if written != expected:
        raise UserError(f"{path}: {written:,} bytes written instead of {expected:,}; {RUN_AGAIN}")
