"""``python -m data_pipelines.shards DIR --out DIR`` packs a data set into tar shards.

A parallel file system then sees a few large files instead of millions of small ones. The shards
are WebDataset's (https://github.com/webdataset/webdataset): plain tar files in which a sample is
two members that follow each other, ``KEY.jpg`` or ``KEY.png`` and ``KEY.cls``, the label. Beside
each one lies the index file that DALI's readers.webdataset takes, and beside all of them an index
of images (:mod:`data_pipelines.image_index`) by which this package reads each image on its own.
"""

import argparse
import json
import os
import re
import shutil
import tarfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from threading import Event
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.progress import Progress

from data_pipelines.archives import DAMAGE, LARGEST_MEMBER
from data_pipelines.batch import decode_with_pil
from data_pipelines.header import Header, find_damage, open_with_pil, read_header
from data_pipelines.image_index import (
    INDEX_FILE,
    SCAN_THREADS,
    ImageIndex,
    Location,
    open_images,
    save_index,
)
from data_pipelines.index import parts_of
from data_pipelines.making import claimed, progress_bar
from data_pipelines.order import Int64s, permutation
from data_pipelines.plain_file import open_plain
from data_pipelines.source import Bytes, read_bytes
from tpp.errors import UserError, printable, run_command
from tpp.files import aside_of, in_bytes, sync, write_whole
from tpp.reading import read_json

SETTINGS_FILE = ".shards.json"
SKIPPED_FILE = ".skipped.tsv"
# ImageNet's training images are 141 such shards, and a process keeps all of them open (`source`).
SHARD_BYTES = 1_000_000_000
QUALITY = 90
# Part of the settings: to be raised with every change of what is written.
_VERSION = 1
_BLOCK = 512
# An image header lies within this, but for files with long metadata in front.
_HEAD = 1 << 16
_LOOKED_UP_AT_ONCE = 1000
_UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

Sizes = NDArray[np.int32]
Job = TypeVar("Job")
Result = TypeVar("Result")


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
        return _converted(_source_bytes(self.index, image), self.resize, self.quality)

    def skip(self, image: int, reason: str) -> tuple[int, str]:
        """An entry of the list of skipped images, where skipping is allowed."""
        if not self.skip_broken:
            raise UserError(
                f"{self.name(image)}: a broken image ({reason}); mend it or get it anew, or leave "
                f"out all broken ones with --skip-broken; python -m data_pipelines.index "
                f"{self.index.root} lists them"
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
            _check_room(out, sum(int(_entry_bytes(expected[shards[n]]).sum()) for n in missing))
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
    ends = np.cumsum(_entry_bytes(byte_sizes))
    room = shard_bytes - 2 * _BLOCK
    starts, before = [0], 0
    while (end := int(np.searchsorted(ends, before + room, side="right"))) < len(ends):
        starts.append(max(end, starts[-1] + 1))
        if starts[-1] == len(ends):
            return starts[:-1]
        before = int(ends[starts[-1] - 1])
    return starts


def _entry_bytes(byte_sizes: Int64s) -> Int64s:
    """What a sample takes in a tar file: two headers, the image and the label in whole blocks."""
    return (3 + -(-byte_sizes // _BLOCK)) * _BLOCK


def _check_place(index: ImageIndex, out: Path) -> None:
    root, place = index.root.resolve(), out.resolve()
    if place == root or (root in place.parents and not index.containers):
        raise UserError(
            f"{out}: lies in the data that is read, {index.root}; choose a folder outside of it"
        )


def _check_known_broken(index: ImageIndex, skip_broken: bool) -> None:
    known = np.flatnonzero(index.broken)
    if len(known) and not skip_broken:
        raise UserError(
            f"{index.file}: says that {len(known):,} of {len(index):,} images are broken (first: "
            f"{index.name(int(known[0]))}); mend or delete them and make the index anew, or "
            "leave them out with --skip-broken"
        )


def _settings_of(out: Path) -> dict[str, Any] | None:
    """The settings of the shards in a folder; None if there are no shards of this command.

    Raises:
        UserError: they cannot be read.
    """
    path = out / SETTINGS_FILE
    if not path.exists():
        return None
    try:
        found = read_json(path, "the settings of the shards")
    except UserError as error:
        problem = str(error).removeprefix(f"{path}: ")
        raise UserError(f"{path}: cannot be read ({problem}); empty the folder") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds no settings of shards; empty the folder")
    return found


def _check_settings(out: Path, settings: dict[str, Any]) -> bool:
    """Whether shards with these settings were begun in ``out``.

    Raises:
        UserError: others were, or something that this command did not write is in the way.
    """
    found = _settings_of(out)
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


def _in_threads(
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
                        header = _header_at(file, offset, int(byte_sizes[image]))
                        sizes[image] = header[1:3] if header else (0, 0)
            except OSError as error:
                raise _reading_error(index, image, error) from None

    jobs = np.split(missing, range(_LOOKED_UP_AT_ONCE, len(missing), _LOOKED_UP_AT_ONCE))
    _in_threads("looking up sizes", look, jobs, max(threads, SCAN_THREADS), progress)
    return byte_sizes, sizes


def _header_at(file: BinaryIO, offset: int, length: int) -> Header | None:
    """The header of an image within a file, from its first bytes if possible; None: it has none."""
    length = min(length, LARGEST_MEMBER)
    for read in sorted({min(_HEAD, length), length}):
        file.seek(offset)
        with suppress(ValueError):
            return read_header(file.read(read))
    return None


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


def _reading_error(index: ImageIndex, image: int, error: OSError) -> UserError:
    return UserError(f"{index.name(image)}: cannot read this image ({error.strerror})")


def _source_bytes(index: ImageIndex, image: int) -> Bytes:
    """An image's bytes.

    Raises:
        UserError: the file cannot be read, or has changed. That is no broken image, to be left out
            for good.
    """
    known = int(index.byte_sizes[image])
    try:
        data = read_bytes(index.location(image))
        if known not in (-1, len(data)):
            raise ValueError(f"{len(data):,} bytes instead of {known:,}")
    except OSError as error:
        raise _reading_error(index, image, error) from None
    except ValueError as error:
        raise UserError(
            f"{index.name(image)}: is no longer as its index says ({error}); make that anew"
        ) from None
    return data


def _scaled_size(header: Header, resize: int | None) -> tuple[int, int] | None:
    """Height and width to scale an image to, the longer rounded down; None: it stays."""
    shorter = min(header.height, header.width)
    if resize is None or shorter <= resize:
        return None
    return resize * header.height // shorter, resize * header.width // shorter


def _converted(data: Bytes, resize: int | None, quality: int) -> tuple[bytes | memoryview, Header]:
    """An image as it is stored: its own bytes, or those of a JPEG or PNG made of it.

    Raises:
        ValueError: the image is broken.
    """
    damage = find_damage(data)
    if damage is not None:
        raise ValueError(damage)
    header = read_header(data)
    size = _scaled_size(header, resize)
    if size is None and header.format != "other":
        return data.data, header
    with open_with_pil(data) as opened:
        grey = Image.getmodebase(opened.mode) == "L"
    image = decode_with_pil(data, 1 if grey else 3)
    # Comments and profiles would be written too, for nobody to read.
    image.info = {}
    encoded = BytesIO()
    if size is None:
        image.save(encoded, "PNG")
    else:
        # Of PIL's filters, all of which average over what they leave out, Lanczos keeps the most
        # detail: the loaders will scale the image once more.
        image = image.resize(size[::-1], Image.Resampling.LANCZOS)
        # A grey image's one channel must not be called subsampled: some decoders stumble over it.
        image.save(encoded, "JPEG", quality=quality, subsampling="4:4:4" if grey else "4:2:0")
    return encoded.getvalue(), read_header(encoded.getvalue())


def _read_shards(packing: _Packing, threads: int, progress: Progress) -> dict[int, _Stored]:
    """What the shards hold that an earlier run has left whole, by number; others are cleared."""
    for leftover in packing.out.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)
    numbers = range(len(packing.shards))
    there = [number for number in numbers if packing.tar(number).with_suffix(".idx").exists()]
    read = _in_threads("reading shards", partial(_read_shard, packing), there, threads, progress)
    return {n: stored for n, stored in zip(there, read, strict=True) if stored is not None}


def _write_shards(
    packing: _Packing, numbers: list[int], threads: int, progress: Progress
) -> dict[int, _Stored]:
    """Write the shards of these numbers; until all are there, the folder has no index."""
    if numbers:
        (packing.out / INDEX_FILE).unlink(missing_ok=True)
    written = _in_threads(
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
                places = [_add(file, f"{key}.{ending}", content) for ending, content in members]
                lines.append(_index_line(key, [e for e, _ in members], places))
                stored.images.append(image)
                stored.offsets.append(places[0][0])
                stored.byte_sizes.append(places[0][1])
                stored.sizes.append((header.height, header.width))
            file.write(bytes(2 * _BLOCK))
        # An index file says that its shard is whole.
        tar.with_suffix(".idx").unlink(missing_ok=True)
        if lines:
            sync(aside)
            aside.replace(tar)
            write_whole(tar.with_suffix(".idx"), _index_text(lines))
    except OSError as error:
        raise UserError(
            f"{tar}: cannot write this shard ({error.strerror}); the same command goes on from here"
        ) from None
    finally:
        aside.unlink(missing_ok=True)
    return stored


def _add(file: BinaryIO, name: str, content: bytes | memoryview) -> tuple[int, int]:
    """Append a member to a tar file; where its bytes are and how many."""
    file.write(_member_header(name, len(content)))
    offset = file.tell()
    file.write(content)
    file.write(bytes(-len(content) % _BLOCK))
    return offset, len(content)


def _member_header(name: str, size: int) -> bytes:
    """What precedes a member: the header of POSIX.1-1988 (ustar), which every reader knows."""
    member = tarfile.TarInfo(name)
    member.size = size
    return member.tobuf(tarfile.USTAR_FORMAT)


def _index_line(key: str, endings: list[str], places: list[tuple[int, int]]) -> str:
    """A sample in DALI's index file: ending, offset, length and name of each member."""
    return " ".join(
        f"{ending} {offset} {length} {key}.{ending}"
        for ending, (offset, length) in zip(endings, places, strict=True)
    )


def _index_text(lines: list[str]) -> str:
    return "\n".join([f"v1.2 {len(lines)}", *lines]) + "\n"


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
                offset = end + _BLOCK
                if not 0 <= length <= LARGEST_MEMBER or image not in belong:
                    return None
                header = _header_at(file, offset, length)
                if header is None:
                    return None
                key, label = f"{image:08d}", str(packing.index.labels[image])
                endings = ["jpg" if header.format == "jpeg" else "png", "cls"]
                file.seek(end)
                if file.read(_BLOCK) != _member_header(f"{key}.{endings[0]}", length):
                    return None
                end = offset + -(-length // _BLOCK) * _BLOCK + 2 * _BLOCK
                stored.images.append(image)
                stored.offsets.append(offset)
                stored.byte_sizes.append(length)
                stored.sizes.append((header.height, header.width))
                places = [(offset, length), (end - _BLOCK, len(label))]
                lines.append(_index_line(key, endings, places))
            size = os.fstat(file.fileno()).st_size
    except (OSError, ValueError, IndexError):
        return None
    held = set(stored.images)
    if (
        text != _index_text(lines)
        or size != end + 2 * _BLOCK
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
    )
    save_index(made, packing.out / INDEX_FILE)
    return made


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
    settings = _settings_of(out)
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
        checked = _in_threads("checking shards", check, numbers, threads, progress)
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
                lines.append(_index_line(key, [ending, "cls"], places))
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
    if index_text != _index_text(lines):
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
    original = _source_bytes(index, image)
    try:
        before = read_header(original)
    except ValueError as error:
        return f"{index.name(image)} is broken now ({error})", False
    size = _scaled_size(before, resize)
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


def byte_count(text: str) -> int:
    """A number of bytes, as '256MB' or '1 GiB'.

    Raises:
        UserError: it is no such number; a unit is needed.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?b)", text.strip(), re.IGNORECASE)
    count = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if count < 1:
        raise UserError(f"--shard-size must be such as 256MB or 1GB, not {text!r}")
    return count


def print_written(written: Written) -> None:
    """Say what :func:`write_shards` did, in aligned lines."""
    size = in_bytes(written.bytes_after)
    reused = f" ({written.reused:,} of them there before)" if written.reused else ""
    speed = written.images / max(written.seconds, 1e-9)
    print(f"images       {written.images:,}")
    if written.resize is not None:
        print(f"scaled       {written.scaled:,} to a shorter side of {written.resize} pixels")
        before = f"{written.side_before:,.0f} before"
        print(f"shorter side {written.side_after:,.0f} pixels on average, {before}")
    if written.skipped:
        print(f"skipped      {written.skipped:,} broken, see {written.out / SKIPPED_FILE}")
    print(f"shards       {written.shards:,}{reused}")
    print(f"image bytes  {size}, {in_bytes(written.bytes_before)} before")
    print(f"seconds      {written.seconds:,.1f} ({speed:,.0f} images/s)")
    print(f"written to   {written.out}")


def _parts(folder: Path) -> dict[str, Path]:
    """The folders to read, by the names of those to write; '' is the one given itself."""
    parts = {part.name: part for part in parts_of(folder) if part != folder}
    if "test" in parts and "val" not in parts:
        parts["val"] = parts.pop("test")
    return parts or {"": folder}


def main() -> None:
    """Write or verify the shards of a folder, or of the train and val folders in it."""
    parser = argparse.ArgumentParser(
        prog="python -m data_pipelines.shards",
        description="Pack a folder of images into tar shards for a parallel file system.",
    )
    add = parser.add_argument
    add(
        "folder",
        metavar="DIR",
        type=Path,
        help="folder with one folder of images per class, or with such folders train and val",
    )
    add("--out", metavar="DIR", type=Path, required=True, help="folder to write")
    add("--shard-size", default="1GB", help="of a tar file (default 1GB)")
    add("--seed", type=int, default=0, help="of the samples' order in the shards (default 0)")
    add("--resize", metavar="N", type=int, help="scale larger images to a shorter side of N pixels")
    add("--quality", type=int, default=QUALITY, help=f"of scaled JPEGs (default {QUALITY})")
    add("--threads", type=int, help="shards at once (default: one per processor)")
    add("--skip-broken", action="store_true", help="leave broken images out and list them")
    add("--verify", action="store_true", help="compare shards written before with DIR")
    options = parser.parse_args()
    if options.threads is not None and options.threads < 1:
        raise UserError(f"--threads must be at least 1, not {options.threads}")
    shard_bytes = byte_count(options.shard_size)
    sources = {name: open_images(path) for name, path in _parts(options.folder).items()}
    for number, (name, index) in enumerate(sources.items()):
        if number:
            print()
        if options.verify:
            _print_verified(verify_shards(index, options.out / name, threads=options.threads))
            continue
        print_written(
            write_shards(
                index,
                options.out / name,
                shard_bytes=shard_bytes,
                seed=options.seed,
                resize=options.resize,
                quality=options.quality,
                threads=options.threads,
                skip_broken=options.skip_broken,
            )
        )


def _print_verified(verified: Verified) -> None:
    print(f"images       {verified.images:,}, all as they should be")
    print(f"same bytes   {verified.kept:,}")
    print(f"converted    {verified.converted:,}, whole and of the right size")
    print(f"seconds      {verified.seconds:,.1f}")


if __name__ == "__main__":
    run_command(main)
