"""Writing shards, which a killed process goes on with."""

import json
import os
import shutil
import time
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress

from data_pipelines.images.folders import SCAN_THREADS
from data_pipelines.images.header import Header
from data_pipelines.images.image_index import INDEX_FILE, ImageIndex, save_index
from data_pipelines.images.order import Int64s, permutation
from data_pipelines.images.plain_file import LARGEST_MEMBER, open_plain
from data_pipelines.images.source import said_of_known
from data_pipelines.sets.claim import claimed, in_threads, progress_bar
from data_pipelines.sets.shard_format import (
    BLOCK,
    QUALITY,
    SETTINGS_FILE,
    SHARD_BYTES,
    SKIPPED_FILE,
    add_member,
    converted,
    entry_bytes,
    header_at,
    index_line,
    member_header,
    reading_error,
    settings_of,
    source_bytes,
    text_of_index,
)
from tpp.common.errors import UserError, printable
from tpp.common.files import aside_of, in_bytes, sync, write_whole

# Part of the settings: to be raised with every change of what is written.
_VERSION = 1
_LOOKED_UP_AT_ONCE = 1000
Sizes = NDArray[np.int32]


class _Stored(NamedTuple):
    """What one shard holds.

    Attributes:
        images: which of the source's images, as they follow each other; n of them.
        offsets: where each image's bytes begin in the tar file.
        byte_sizes: how many they are.
        sizes: height and width, shape (n, 2).
        skipped: images that belong here but are broken, and why.
    """

    images: list[int]
    offsets: list[int]
    byte_sizes: list[int]
    sizes: list[tuple[int, int]]
    skipped: list[tuple[int, str]]


@dataclass(frozen=True)
class Written:
    """What :func:`write_shards` did.

    Attributes:
        out: the folder.
        images, shards: how many there are now.
        reused: how many of the shards were there before.
        bytes_before, bytes_after: of these images, in the source and in the shards.
        resize: length of the shorter side to which longer ones were scaled; None: no scaling.
        scaled: how many images that was done to.
        side_before, side_after: mean length of the shorter side in pixels; before, only if scaling.
        skipped: how many broken images were left out.
        seconds: time it took.
    """

    out: Path
    images: int
    shards: int
    reused: int
    bytes_before: int
    bytes_after: int
    resize: int | None
    scaled: int
    side_before: float
    side_after: float
    skipped: int
    seconds: float


@dataclass(frozen=True, eq=False)
class _Packing:
    """Everything that says what the shards of a folder hold."""

    index: ImageIndex
    out: Path
    resize: int | None
    quality: int
    skip_broken: bool
    shards: list[Int64s]
    stop: Event = field(default_factory=Event)

    def tar(self, number: int) -> Path:
        return self.out / f"shard-{number:06d}.tar"

    def name(self, image: int) -> str:
        return self.index.name(image)

    def stored(self, image: int) -> tuple[bytes | memoryview, Header]:
        """The bytes that stand for an image in its shard.

        Raises:
            ValueError: the image is broken.
            UserError: it cannot be read.
        """
        if self.index.broken[image]:
            raise ValueError("broken, says the index")
        return converted(source_bytes(self.index, image), self.resize, self.quality)

    def skip(self, image: int, reason: str) -> tuple[int, str]:
        """An entry of the list of skipped images, where skipping is allowed."""
        if not self.skip_broken:
            listed = "" if self.index.called else f"; tpp index {self.index.root} lists them"
            raise UserError(
                f"{self.name(image)}: a broken image ({reason}); mend it or get it anew, or leave "
                f"out all broken ones with --skip-broken{listed}"
            )
        return image, reason


def write_shards(
    index: ImageIndex,
    out: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    seed: int = 0,
    resize: int | None = None,
    quality: int = QUALITY,
    threads: int | None = None,
    skip_broken: bool = False,
) -> Written:
    """Write the images of an index as tar shards, with DALI's index files and an index of images.

    Which sample lies where is a function of the index, the images' sizes and the settings alone;
    the shards are the same to the bit every time (scaled images: with the same Pillow). A run that
    was killed is gone on with by doing the same again: whole shards are kept. The index comes last,
    so a folder without it is unfinished.

    Images stay as they are, byte for byte, unless they are scaled, or are neither JPEG nor PNG:
    those become PNGs, which loses nothing. Scaled images are JPEGs, grey or RGB (CMYK is
    converted), without metadata. An EXIF rotation is neither carried out nor kept; the loaders
    ignore it anyway.

    Args:
        index: the images, in files of their own or in larger ones.
        out: the folder to write; made if need be.
        shard_bytes: how large a shard may be; with scaling, about.
        seed: of the order in which samples are laid into shards, which mixes the classes.
        resize: scale images whose shorter side is longer than this many pixels to this length.
        quality: of the JPEGs that scaling makes, 1 to 100; colour at half resolution (4:2:0).
        threads: shards written at once; by default one per processor.
        skip_broken: leave broken images out, and list them in :data:`SKIPPED_FILE`.

    Raises:
        UserError: a setting is out of range; ``out`` lies in the source or holds something else;
            an image is broken or cannot be read; there is no room, or writing fails.
    """
    started = time.monotonic()
    if resize is not None and resize < 1:
        raise UserError(f"shards: resize must be 1 or more, not {resize}")
    if not 1 <= quality <= 100:
        raise UserError(f"shards: quality must be 1 to 100, not {quality}")
    threads = threads or len(os.sched_getaffinity(0))
    _check_place(index, out)
    _check_known_broken(index, skip_broken)
    with progress_bar() as progress, claimed(out):
        byte_sizes, sizes = _look_up(index, resize, threads, progress)
        scaled = np.zeros(len(index), np.bool_) if resize is None else sizes.min(1) > resize
        expected = _expected_bytes(byte_sizes, sizes, scaled, resize, quality)
        settings = {
            "version": _VERSION,
            "source": index.fingerprint,
            "source bytes": _digest(byte_sizes),
            "shard bytes": shard_bytes,
            "seed": seed,
            "resize": resize,
            "quality": None if resize is None else quality,
        }
        begun = _check_settings(out, settings)
        order = permutation(seed, 0, len(index))
        shards = np.split(order, shard_starts(expected[order], shard_bytes)[1:])
        packing = _Packing(index, out, resize, quality, skip_broken, shards)
        try:
            found = _read_shards(packing, threads, progress) if begun else {}
            missing = [number for number in range(len(shards)) if number not in found]
            _check_room(out, sum(int(entry_bytes(expected[shards[n]]).sum()) for n in missing))
            write_whole(out / SETTINGS_FILE, json.dumps(settings, indent=1) + "\n")
            new = _write_shards(packing, missing, threads, progress)
            stored = [value for _, value in sorted({**found, **new}.items())]
            made = _save(packing, stored)
        except OSError as error:
            raise UserError(f"{out}: cannot write the shards ({error.strerror})") from None
    held = np.concatenate([np.array(one.images, np.int64) for one in stored])
    return Written(
        out=out,
        images=len(made),
        shards=len(made.containers),
        reused=len(found),
        bytes_before=int(byte_sizes[held].sum()),
        bytes_after=int(made.byte_sizes.sum()),
        resize=resize,
        scaled=int(scaled[held].sum()),
        side_before=float(sizes[held].min(1).mean()),
        side_after=float(made.sizes.min(1).mean()),
        skipped=len(index) - len(made),
        seconds=time.monotonic() - started,
    )


def shard_starts(byte_sizes: Int64s, shard_bytes: int) -> list[int]:
    """The place of each shard's first sample, when samples are laid into shards one by one.

    A shard ends before the sample that would make its tar file larger than ``shard_bytes``; it
    has at least one.

    Args:
        byte_sizes: length of each sample's image, in the order of the samples, shape (n,).
        shard_bytes: how large a shard may be.
    """
    ends = np.cumsum(entry_bytes(byte_sizes))
    room = shard_bytes - 2 * BLOCK
    starts, before = [0], 0
    while (end := int(np.searchsorted(ends, before + room, side="right"))) < len(ends):
        starts.append(max(end, starts[-1] + 1))
        if starts[-1] == len(ends):
            return starts[:-1]
        before = int(ends[starts[-1] - 1])
    return starts


def _check_place(index: ImageIndex, out: Path) -> None:
    root, place = index.root.resolve(), out.resolve()
    if place == root or (root in place.parents and not index.containers):
        raise UserError(
            f"{out}: lies in the data that is read, {index.root}; choose a folder outside of it"
        )


def _check_known_broken(index: ImageIndex, skip_broken: bool) -> None:
    if index.broken.any() and not skip_broken:
        raise UserError(
            f"{said_of_known(index)}; mend or delete them and make the index anew, or leave them "
            "out with --skip-broken"
        )


def _check_settings(out: Path, settings: dict[str, Any]) -> bool:
    """Whether shards with these settings were begun in ``out``.

    Raises:
        UserError: others were, or something that this command did not write is in the way.
    """
    found = settings_of(out)
    if found is None:
        strange = sorted([*out.glob("shard-*"), *out.glob(INDEX_FILE)])
        if strange:
            raise UserError(
                f"{out}: {strange[0].name} is there and not from this command; choose another "
                "folder or empty this one"
            )
        return False
    for key, value in settings.items():
        if found.get(key, "") != value:
            before = printable(str(found.get(key)))
            raise UserError(
                f"{out}: holds shards of another source or with other settings: {key} is "
                f"{before}, now {value}; choose another folder or empty this one"
            )
    return True


def _check_room(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out).free
    if needed > free:
        raise UserError(
            f"{out}: the shards need about {in_bytes(needed)}, and {in_bytes(free)} are free"
        )


def _look_up(
    index: ImageIndex, resize: int | None, threads: int, progress: Progress
) -> tuple[Int64s, Sizes]:
    """Byte sizes, and for scaling the sizes in pixels, where the index does not know them.

    Images that cannot be read have 0, 0 pixels; their turn comes later.
    """
    byte_sizes, sizes = index.byte_sizes.copy(), index.sizes.copy()
    byte_sizes[index.broken] = byte_sizes[index.broken].clip(0)
    unknown = byte_sizes < 0
    if resize is not None:
        unknown |= (sizes.min(1) == 0) & ~index.broken
    missing = np.flatnonzero(unknown)

    def look(images: Int64s) -> None:
        for image in images.tolist():
            try:
                path, offset, _ = index.location(image)
                if byte_sizes[image] < 0:
                    byte_sizes[image] = Path(path).stat().st_size
                if resize is not None:
                    with os.fdopen(open_plain(path), "rb") as file:
                        header = header_at(file, offset, int(byte_sizes[image]))
                        sizes[image] = header[1:3] if header else (0, 0)
            except OSError as error:
                raise reading_error(index, image, error) from None

    jobs = np.split(missing, range(_LOOKED_UP_AT_ONCE, len(missing), _LOOKED_UP_AT_ONCE))
    in_threads("looking up sizes", look, jobs, max(threads, SCAN_THREADS), progress)
    return byte_sizes, sizes


def _expected_bytes(
    byte_sizes: Int64s, sizes: Sizes, scaled: NDArray[np.bool_], resize: int | None, quality: int
) -> Int64s:
    """How long each image will be in its shard: exact, but for scaled images.

    Those take about 0.35 bytes a pixel at quality 90 (measured on ImageNet), and otherwise in
    proportion to libjpeg's quantisation steps to the power of -0.6.
    """
    if resize is None:
        return byte_sizes
    steps = max(200 - 2 * quality if quality >= 50 else 5000 // quality, 1)
    expected = byte_sizes.copy()
    pixels = sizes[scaled].max(1) * (resize**2 / sizes[scaled].min(1))
    expected[scaled] = pixels * 0.35 * (steps / 20) ** -0.6
    return expected


def _digest(numbers: Int64s) -> str:
    return sha256(numbers.astype("<i8").tobytes()).hexdigest()[:12]


def _read_shards(packing: _Packing, threads: int, progress: Progress) -> dict[int, _Stored]:
    """What the shards hold that an earlier run has left whole, by number; others are cleared."""
    for leftover in packing.out.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)
    numbers = range(len(packing.shards))
    there = [number for number in numbers if packing.tar(number).with_suffix(".idx").exists()]
    read = in_threads("reading shards", partial(_read_shard, packing), there, threads, progress)
    return {n: stored for n, stored in zip(there, read, strict=True) if stored is not None}


def _write_shards(
    packing: _Packing, numbers: list[int], threads: int, progress: Progress
) -> dict[int, _Stored]:
    """Write the shards of these numbers; until all are there, the folder has no index."""
    if numbers:
        (packing.out / INDEX_FILE).unlink(missing_ok=True)
    written = in_threads(
        "writing shards", partial(_write_shard, packing), numbers, threads, progress, packing.stop
    )
    return dict(zip(numbers, written, strict=True))


def _write_shard(packing: _Packing, number: int) -> _Stored:
    """Write a tar file and its index file; a shard whose images are all broken is not written."""
    tar = packing.tar(number)
    aside = aside_of(tar)
    stored, lines = _Stored([], [], [], [], []), []
    try:
        with aside.open("wb") as file:
            for image in packing.shards[number].tolist():
                if packing.stop.is_set():
                    raise CancelledError
                try:
                    data, header = packing.stored(image)
                except ValueError as error:
                    stored.skipped.append(packing.skip(image, str(error)))
                    continue
                key, label = f"{image:08d}", str(packing.index.labels[image]).encode()
                members = [("jpg" if header.format == "jpeg" else "png", data), ("cls", label)]
                places = [
                    add_member(file, f"{key}.{ending}", content) for ending, content in members
                ]
                lines.append(index_line(key, [e for e, _ in members], places))
                stored.images.append(image)
                stored.offsets.append(places[0][0])
                stored.byte_sizes.append(places[0][1])
                stored.sizes.append((header.height, header.width))
            file.write(bytes(2 * BLOCK))
        # An index file says that its shard is whole.
        tar.with_suffix(".idx").unlink(missing_ok=True)
        if lines:
            sync(aside)
            aside.replace(tar)
            write_whole(tar.with_suffix(".idx"), text_of_index(lines))
    except OSError as error:
        raise UserError(
            f"{tar}: cannot write this shard ({error.strerror}); the same command goes on from here"
        ) from None
    finally:
        aside.unlink(missing_ok=True)
    return stored


def _read_shard(packing: _Packing, number: int) -> _Stored | None:
    """What a shard of an earlier run holds; None if it is not what would be written now."""
    tar, wanted = packing.tar(number), packing.shards[number].tolist()
    stored, lines, end, belong = _Stored([], [], [], [], []), [], 0, set(wanted)
    try:
        text = tar.with_suffix(".idx").read_text()
        with os.fdopen(open_plain(tar), "rb") as file:
            for line in text.splitlines()[1:]:
                image, length = int(Path(line.split()[3]).stem), int(line.split()[2])
                # Samples follow each other without a gap.
                offset = end + BLOCK
                if not 0 <= length <= LARGEST_MEMBER or image not in belong:
                    return None
                header = header_at(file, offset, length)
                if header is None:
                    return None
                key, label = f"{image:08d}", str(packing.index.labels[image])
                endings = ["jpg" if header.format == "jpeg" else "png", "cls"]
                file.seek(end)
                if file.read(BLOCK) != member_header(f"{key}.{endings[0]}", length):
                    return None
                end = offset + -(-length // BLOCK) * BLOCK + 2 * BLOCK
                stored.images.append(image)
                stored.offsets.append(offset)
                stored.byte_sizes.append(length)
                stored.sizes.append((header.height, header.width))
                places = [(offset, length), (end - BLOCK, len(label))]
                lines.append(index_line(key, endings, places))
            size = os.fstat(file.fileno()).st_size
    except (OSError, ValueError, IndexError):
        return None
    held = set(stored.images)
    if (
        text != text_of_index(lines)
        or size != end + 2 * BLOCK
        or stored.images != [image for image in wanted if image in held]
    ):
        return None
    for image in wanted:
        if image not in held:
            try:
                packing.stored(image)
                return None
            except ValueError as error:
                stored.skipped.append(packing.skip(image, str(error)))
    return stored


def _save(packing: _Packing, stored: list[_Stored]) -> ImageIndex:
    """Write the list of skipped images and the index of the shards, in the order of the source."""
    index = packing.index
    skipped = sorted(entry for one in stored for entry in one.skipped)
    listing = packing.out / SKIPPED_FILE
    if skipped:
        rows = (f"{packing.name(image)}\t{reason}\n" for image, reason in skipped)
        text = "path\treason\n" + "".join(rows)
        write_whole(listing, text.encode(errors="surrogateescape"))
    else:
        listing.unlink(missing_ok=True)
    kept = [(number, one) for number, one in enumerate(stored) if one.images]
    if not kept:
        raise UserError(f"{index.root}: none of its {len(index):,} images can be read")
    images = np.concatenate([np.array(one.images, np.int64) for _, one in kept])
    places = np.argsort(images)
    source = index.subset(images[places]) if skipped else index
    counts = [len(one.images) for _, one in kept]
    tars = [packing.tar(number) for number, _ in kept]
    made = ImageIndex.of(
        packing.out,
        source.files,
        source.labels,
        source.classes,
        byte_sizes=np.concatenate([np.array(one.byte_sizes, np.int64) for _, one in kept])[places],
        sizes=np.concatenate([np.array(one.sizes, np.int32) for _, one in kept])[places],
        containers=[tar.name for tar in tars],
        container=np.repeat(np.arange(len(kept), dtype=np.int32), counts)[places],
        offsets=np.concatenate([np.array(one.offsets, np.int64) for _, one in kept])[places],
        marks=np.array([tar.stat().st_size for tar in tars], np.int64),
        passed_over=index.passed_over,
    )
    save_index(made, packing.out / INDEX_FILE)
    return made
