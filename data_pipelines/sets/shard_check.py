"""Comparing shards with the images that they were made of."""

import os
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipelines.images.header import find_damage, read_header
from data_pipelines.images.image_index import INDEX_FILE, ImageIndex, Location, open_images
from data_pipelines.images.order import Int64s
from data_pipelines.sets.archives import DAMAGE
from data_pipelines.sets.claim import in_threads, progress_bar
from data_pipelines.sets.shard_format import (
    index_line,
    scaled_size,
    settings_of,
    source_bytes,
    text_of_index,
)
from tpp.common.errors import UserError


@dataclass(frozen=True)
class Verified:
    """What :func:`verify_shards` has compared: images kept as they were, and converted ones."""

    images: int
    kept: int
    converted: int
    seconds: float


def verify_shards(index: ImageIndex, out: Path, *, threads: int | None = None) -> Verified:
    """Read shards once more and compare them with their source, sample by sample.

    The members of every tar file are found by Python's own reader, and the index files and the
    index of images must say the same; names, labels and, where they were kept, the images' bytes
    must be the source's. Of converted images the format and size are checked, and that they are
    whole: their bytes would be others with another Pillow.

    Args:
        index: the source.
        out: the folder of the shards.
        threads: shards read at once; by default one per processor.

    Raises:
        UserError: the shards are unfinished or of another source, or some sample is wrong.
    """
    started = time.monotonic()
    settings = settings_of(out)
    if settings is None or not (out / INDEX_FILE).exists():
        raise UserError(f"{out}: holds no finished shards; write them first, without --verify")
    made = open_images(out)
    names = set(made.files)
    held = np.flatnonzero([name in names for name in index.files])
    if settings.get("source") != index.fingerprint or (
        index.subset(held).fingerprint != made.fingerprint
    ):
        raise UserError(f"{out}: holds shards of another source than {index.root}")

    def check(number: int) -> tuple[list[str], int]:
        return _check_shard(index, made, held, settings.get("resize"), number)

    with progress_bar() as progress:
        threads = threads or len(os.sched_getaffinity(0))
        numbers = range(len(made.containers))
        checked = in_threads("checking shards", check, numbers, threads, progress)
    problems = [problem for found, _ in checked for problem in found]
    if problems:
        more = f" (and {len(problems) - 1:,} more)" if len(problems) > 1 else ""
        raise UserError(f"{problems[0]}{more}; delete {out} and write it anew")
    kept = sum(count for _, count in checked)
    return Verified(len(made), kept, len(made) - kept, time.monotonic() - started)


def _check_shard(
    index: ImageIndex, made: ImageIndex, held: Int64s, resize: int | None, number: int
) -> tuple[list[str], int]:
    """What is wrong with a shard, and how many of its images are the source's byte for byte."""
    tar = made.root / made.containers[number]
    problems, lines, kept = [], [], 0
    try:
        index_text = tar.with_suffix(".idx").read_text()
        with tarfile.open(tar, "r:") as archive:
            members = archive.getmembers()
            for member, label in zip(members[::2], members[1::2], strict=False):
                key, ending = member.name.split(".")
                places = [(part.offset_data, part.size) for part in (member, label)]
                lines.append(index_line(key, [ending, "cls"], places))
                row = int(np.searchsorted(held, int(key)))
                location = Location(str(tar), *places[0])
                if row == len(held) or held[row] != int(key) or made.location(row) != location:
                    problems.append(f"{tar}: {member.name}: not where the index says")
                    continue
                data, text = (_member_bytes(archive, part) for part in (member, label))
                if label.name != f"{key}.cls" or text != str(index.labels[int(key)]).encode():
                    problems.append(f"{tar}: {label.name}: not the label of {member.name}")
                wrong, same = _compare(index, int(key), data, resize, ending)
                if wrong is None and tuple(made.sizes[row]) != read_header(data)[1:3]:
                    wrong = "not of the size that the index says"
                if wrong is not None:
                    problems.append(f"{tar}: {member.name}: {wrong}")
                kept += same
    except (OSError, *DAMAGE) as error:
        return [f"{tar}: cannot be read ({error})"], 0
    if len(lines) != np.count_nonzero(made.container == number):
        problems.append(f"{tar}: holds {len(lines):,} samples, the index says otherwise")
    if index_text != text_of_index(lines):
        problems.append(f"{tar.with_suffix('.idx')}: does not fit its shard")
    return problems, kept


def _member_bytes(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    if file is None:
        raise ValueError(f"{member.name} is not a file")
    return file.read()


def _compare(
    index: ImageIndex, image: int, stored: bytes, resize: int | None, ending: str
) -> tuple[str | None, bool]:
    """What is wrong with a stored image; and whether it was to be kept byte for byte."""
    original = source_bytes(index, image)
    try:
        before = read_header(original)
    except ValueError as error:
        return f"{index.name(image)} is broken now ({error})", False
    size = scaled_size(before, resize)
    kept = size is None and before.format != "other"
    if kept and stored != original.tobytes():
        return f"not the bytes of {index.name(image)}", kept
    damage = find_damage(stored)
    if damage is not None:
        return f"a broken image ({damage})", kept
    header = read_header(stored)
    if header[1:3] != (size or before[1:3]):
        return f"not of the size that {index.name(image)} should have", kept
    if ending != {"jpeg": "jpg", "png": "png"}.get(header.format):
        return f"holds an image of format {header.format}", kept
    return None, kept
