"""What the archives of ImageNet (ILSVRC 2012) hold, as indexes: nothing is unpacked.

The archives are plain tars, so an image is a stretch of one of them: with an index, the loaders'
way of reading and the writers of class folders and shards take images right out of an archive.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from data_pipelines.images.image_index import ImageIndex
from data_pipelines.sets import matlab
from data_pipelines.sets.archives import Member, archive_files, compression_of, tar_members
from tpp.common.errors import UserError

TRAIN_IMAGES, VAL_IMAGES, CLASSES = 1_281_167, 50_000, 1_000
META_FILE = "data/meta.mat"
TRUTH_FILE = "data/ILSVRC2012_validation_ground_truth.txt"
_WNID = re.compile(r"n\d{8}")
_VAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")
# The devkit has 2.5 MB; unpacked a little more.
_LARGEST_DEVKIT = 16 * 2**20
# What the first member of an archive tells of the archive, and the option that wants it.
_TELLTALES = (
    (re.compile(r"n\d{8}\.tar"), "the archive of training images; give it as --train"),
    (re.compile(r"n\d{8}_.*\.JPEG"), "the archive of a single class; the one of all is needed"),
    (_VAL_NAME, "the archive of validation images; give it as --val"),
    (re.compile(r"ILSVRC2012_test_.*"), "the archive of test images, which have no labels"),
    (re.compile(r"meta\.mat|.*ground_truth\.txt|.*\.m"), "the devkit; give it as --devkit"),
)


@dataclass(frozen=True)
class Devkit:
    """What the development kit says.

    Attributes:
        train_counts: number of training images of each class (WordNet id), sorted by class.
        val_classes: class of each validation image, in the order of the images' numbers.
    """

    train_counts: dict[str, int]
    val_classes: list[str]


def read_devkit(path: Path) -> Devkit:
    """Read ILSVRC2012_devkit_t12.tar.gz: the classes and what the validation images show.

    Classes are the leaves (num_children of 0) of meta.mat's ``synsets``.

    Raises:
        UserError: the archive is another one, is damaged, or its two files do not fit together.
    """
    contents, first = {}, None
    for name, content in archive_files(path, _LARGEST_DEVKIT):
        first = first or name
        for wanted in (META_FILE, TRUTH_FILE):
            if name == wanted or name.endswith(f"/{wanted}"):
                contents[wanted] = content
    for wanted in (META_FILE, TRUTH_FILE):
        if wanted not in contents:
            raise UserError(f"{path}: no {wanted} in this devkit{_looks_like(first)}")
    leaves = _leaves(contents[META_FILE], f"{path}: {META_FILE}")
    wnids = {number: wnid for number, wnid, _ in leaves}
    truth = f"{path}: {TRUTH_FILE}"
    try:
        numbers = [int(line) for line in contents[TRUTH_FILE].decode("ascii").split()]
        val_classes = [wnids[number] for number in numbers]
    except ValueError:
        raise UserError(f"{truth}: expected one class number a line") from None
    except KeyError as error:
        raise UserError(f"{truth}: {error} is not the number of a class in {META_FILE}") from None
    return Devkit(dict(sorted((wnid, count) for _, wnid, count in leaves)), val_classes)


def _leaves(content: bytes, where: str) -> list[tuple[int, str, int]]:
    """ILSVRC2012_ID, WNID and num_train_images of the synsets that have no children."""
    # Found by its path: what runs here may have been started from anywhere.
    command = [sys.executable, "-P", matlab.__file__]
    threads = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, input=content, capture_output=True, env=os.environ | threads)
    leaves = json.loads(found.stdout) if found.returncode == 0 else "the reader crashed"
    if isinstance(leaves, str):
        raise UserError(f"{where}: cannot read its synsets ({leaves}); get the devkit once more")
    for _, wnid, _ in leaves:
        if not _WNID.fullmatch(wnid):
            raise UserError(f"{where}: {wnid!r} is no WordNet id; expected such as n01440764")
    if not leaves or len({wnid for _, wnid, _ in leaves}) < len(leaves):
        raise UserError(f"{where}: no classes, or one twice; get the devkit once more")
    return leaves


def train_index(path: Path, threads: int, advance: Callable[[int], None]) -> ImageIndex:
    """Index ILSVRC2012_img_train.tar: a tar for each class, which holds the class's images.

    Args:
        path: the archive.
        threads: how many classes are read at the same time.
        advance: called with the number of images found, class by class.

    Raises:
        UserError: the archive is another one, is damaged or unsafe.
    """
    with _plain(path) as (descriptor, size):
        tars = list(tar_members(descriptor, 0, size, str(path), largest=size))
        _check_names(path, tars, re.compile(r"n\d{8}\.tar"), "n01440764.tar")
        by_class = {PurePosixPath(tar.name).stem: tar for tar in tars}

        def images(wnid: str) -> list[Member]:
            tar, where = by_class[wnid], f"{path}: {wnid}.tar"
            members = tar_members(descriptor, tar.offset, tar.size, where)
            found = sorted(members, key=lambda member: PurePosixPath(member.name).name)
            _check_names(where, found, re.compile(rf"{wnid}_.*\.JPEG"), f"{wnid}_10026.JPEG")
            advance(len(found))
            return found

        classes = sorted(by_class)
        with ThreadPoolExecutor(threads) as pool:
            found = list(pool.map(images, classes))
    labels = np.repeat(np.arange(len(classes)), [len(some) for some in found])
    return _index(path, size, classes, labels, [member for some in found for member in some])


def check_train_counts(path: Path, index: ImageIndex, devkit: Devkit) -> None:
    """Hold the training images of an archive against what the devkit says.

    Raises:
        UserError: classes are missing or too many, or a class has another number of images.
    """
    counts = dict(zip(index.classes, np.bincount(index.labels).tolist(), strict=True))
    for what, wnids in (
        ("misses", sorted(set(devkit.train_counts) - set(counts))),
        ("has, unlike the devkit,", sorted(set(counts) - set(devkit.train_counts))),
    ):
        if wnids:
            more = f" and {len(wnids) - 1} more" if len(wnids) > 1 else ""
            raise UserError(
                f"{path}: {what} class {wnids[0]}{more}; "
                f"expected the {len(devkit.train_counts):,} classes of the devkit"
            )
    for wnid, count in counts.items():
        if count != devkit.train_counts[wnid]:
            raise UserError(
                f"{path}: {wnid}.tar has {count:,} images, by the devkit it should have "
                f"{devkit.train_counts[wnid]:,}; get the archive once more"
            )
    _check_total(path, len(index), TRAIN_IMAGES, index.classes)


def val_index(path: Path, devkit: Devkit) -> ImageIndex:
    """Index ILSVRC2012_img_val.tar: all images in one folder, whose classes the devkit knows.

    Raises:
        UserError: the archive is another one, is damaged or unsafe, or holds other images than
            the devkit says.
    """
    with _plain(path) as (descriptor, size):
        members = list(tar_members(descriptor, 0, size, str(path)))
    _check_names(path, members, _VAL_NAME, "ILSVRC2012_val_00000001.JPEG")
    by_number = {_val_number(member.name): member for member in members}
    expected = len(devkit.val_classes)
    if sorted(by_number) != list(range(1, expected + 1)):
        missing = sorted(set(range(1, expected + 1)) - set(by_number))
        first = f"; the first missing is ILSVRC2012_val_{missing[0]:08d}.JPEG" if missing else ""
        raise UserError(
            f"{path}: {len(by_number):,} images, the devkit has the classes of {expected:,}{first}"
        )
    classes = list(devkit.train_counts)
    _check_total(path, len(by_number), VAL_IMAGES, classes)
    unseen = sorted(set(classes) - set(devkit.val_classes))
    if unseen:
        raise UserError(f"{path}: no image of class {unseen[0]}; expected some of each class")
    places = {wnid: label for label, wnid in enumerate(classes)}
    labels = np.array([places[wnid] for wnid in devkit.val_classes])
    # Numbers of eight digits: their order is that of the names.
    order = np.argsort(labels, kind="stable")
    return _index(
        path, size, classes, labels[order], [by_number[number + 1] for number in order.tolist()]
    )


def _val_number(name: str) -> int:
    return int(PurePosixPath(name).stem[-8:])


@contextmanager
def _plain(path: Path) -> Iterator[tuple[int, int]]:
    """An open descriptor of an uncompressed archive, and its size in bytes."""
    kind = compression_of(path)
    if kind:
        raise UserError(
            f"{path}: compressed ({kind}); expected the plain .tar that image-net.org offers, "
            "since images are read right out of it; unpack this layer first"
        )
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{path}: cannot read this archive ({error.strerror})") from None
    try:
        yield descriptor, os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)


def _check_names(
    where: Path | str, members: Sequence[Member], pattern: re.Pattern[str], example: str
) -> None:
    """Check that all members' file names are of a kind, and none is there twice."""
    if not members:
        raise UserError(f"{where}: an empty archive; expected {example} and others")
    seen = set()
    for member in members:
        name = PurePosixPath(member.name).name
        if not pattern.fullmatch(name):
            raise UserError(
                f"{where}: member {member.name!r}, expected names such as {example}"
                f"{_looks_like(member.name)}"
            )
        if name in seen:
            raise UserError(f"{where}: member {member.name!r} is there twice")
        if not member.size:
            raise UserError(f"{where}: member {member.name!r} is empty; get the archive once more")
        seen.add(name)


def _looks_like(name: str | None) -> str:
    """What an archive seems to be, from the name of a member; empty if it is none of ImageNet's."""
    base = PurePosixPath(name or "").name
    kinds = [kind for pattern, kind in _TELLTALES if pattern.fullmatch(base)]
    return f"; this looks like {kinds[0]}" if kinds else ""


def _check_total(path: Path, images: int, expected: int, classes: Sequence[str]) -> None:
    """Check the number of images of the whole ImageNet, which the devkit may not know."""
    if len(classes) == CLASSES and images != expected:
        raise UserError(f"{path}: {images:,} images; ImageNet's archive has {expected:,}")


def _index(
    path: Path, size: int, classes: list[str], labels: Any, members: list[Member]
) -> ImageIndex:
    names = (
        f"{classes[label]}/{PurePosixPath(member.name).name}"
        for label, member in zip(labels.tolist(), members, strict=True)
    )
    return ImageIndex.of(
        path.parent,
        names,
        labels,
        classes,
        byte_sizes=np.array([member.size for member in members], np.int64),
        containers=[path.name],
        container=np.zeros(len(members), np.int32),
        offsets=np.array([member.offset for member in members], np.int64),
        marks=np.array([size], np.int64),
    )
