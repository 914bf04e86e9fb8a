"""Imagenette, CIFAR, MNIST and Tiny ImageNet: where they are, and the images in their archives.

Only formats that hold data and nothing else are read; CIFAR's and MNIST's arrays become PNG, which
loses nothing.
"""

import contextlib
import gzip
import io
import socket
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import URLError

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torchvision.datasets import MNIST, Imagenette
from torchvision.datasets.utils import download_url

from data_pipelines.images.folders import IMAGE_SUFFIXES
from data_pipelines.images.plain_file import LARGEST_MEMBER
from data_pipelines.sets.archives import archive_files, damage_named, safe_parts
from tpp.common.errors import UserError

SPLITS = ("train", "val", "test")
IMAGENETTE_SIZES = {"full": "full", "320": "320px", "160": "160px"}
# How long a server may say nothing, in seconds; torchvision would wait for ever.
_PATIENCE = 60
_CIFAR_HOME = "https://www.cs.toronto.edu/~kriz/"
_CIFAR_PIXELS = 3 * 32 * 32
_IMAGENETTE_TOP = "imagenette2"
_ANNOTATIONS = "val_annotations.txt"
# What the version of CIFAR for Python holds: pickles, which run code when they are read.
_PICKLES = {*(f"data_batch_{number}" for number in range(1, 6)), "batches.meta", "meta"}


class FoundImage(NamedTuple):
    """An image of a data set: its part ('train', 'val' or 'test'), class, file name and bytes."""

    split: str
    label: str
    name: str
    content: bytes


class Download(NamedTuple):
    """A file at its home: addresses to try in turn, and its MD5 sum."""

    urls: tuple[str, ...]
    md5: str

    @property
    def name(self) -> str:
        """The file's name."""
        return self.urls[0].rsplit("/", 1)[1]


@dataclass(frozen=True)
class SmallSet:
    """A data set to be prepared.

    Attributes:
        downloads: its official archives.
        images: how many images they hold, by split.
    """

    downloads: tuple[Download, ...]
    images: Mapping[str, int]


@dataclass(frozen=True)
class _Cifar:
    """What the binary archive of a CIFAR holds.

    Attributes:
        files: data files of each split; records of labels and pixels.
        names_file: the classes' names, one a line.
        labels: label bytes of each record; the last of them is the class.
    """

    files: Mapping[str, tuple[str, ...]]
    names_file: str
    labels: int


_CIFARS = {
    "cifar10": _Cifar(
        {
            "train": tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
            "val": ("test_batch.bin",),
        },
        "batches.meta.txt",
        1,
    ),
    "cifar100": _Cifar({"train": ("train.bin",), "val": ("test.bin",)}, "fine_label_names.txt", 2),
}


def _imagenette(size: str) -> SmallSet:
    url, md5 = Imagenette._ARCHIVES[size]
    return SmallSet((Download((url,), md5),), {"train": 9_469, "val": 3_925})


SETS = {
    **{
        "imagenette" + (f"-{size}" if size != "full" else ""): _imagenette(theirs)
        for size, theirs in IMAGENETTE_SIZES.items()
    },
    "cifar10": SmallSet(
        (Download((_CIFAR_HOME + "cifar-10-binary.tar.gz",), "c32a1d4ab5d03f1284b67883e8d87530"),),
        {"train": 50_000, "val": 10_000},
    ),
    "cifar100": SmallSet(
        (Download((_CIFAR_HOME + "cifar-100-binary.tar.gz",), "03b5dce01913d631647c71ecec9e9cb8"),),
        {"train": 50_000, "val": 10_000},
    ),
    "mnist": SmallSet(
        tuple(
            Download(tuple(mirror + name for mirror in MNIST.mirrors), md5)
            for name, md5 in MNIST.resources
        ),
        {"train": 60_000, "val": 10_000},
    ),
    "tiny-imagenet": SmallSet(
        (
            Download(
                ("http://cs231n.stanford.edu/tiny-imagenet-200.zip",),
                "90528d7ca1a48142e341f4ef8d21d0de",
            ),
        ),
        {"train": 100_000, "val": 10_000},
    ),
}
_MNIST_FILES = [name.removesuffix(".gz") for name, _ in MNIST.resources]


def download(name: str, folder: Path) -> list[Path]:
    """Fetch the official archives of a data set, those that are not in ``folder`` yet.

    Raises:
        UserError: one cannot be had, or is not what it should be.
    """
    return [_download(name, wanted, folder) for wanted in SETS[name].downloads]


def _download(name: str, wanted: Download, folder: Path) -> Path:
    problems = []
    patience = socket.getdefaulttimeout()
    # torchvision's bar is for a terminal; in a log file it would be a line for each 32 KiB.
    quiet: Any = contextlib.redirect_stderr(io.StringIO())
    for url in wanted.urls:
        try:
            socket.setdefaulttimeout(patience or _PATIENCE)
            with contextlib.nullcontext() if sys.stderr.isatty() else quiet:
                download_url(url, folder, wanted.name, wanted.md5)
            return folder / wanted.name
        except (URLError, OSError, RuntimeError, ValueError) as error:
            reason = getattr(error, "reason", error)
            # What came of it is not what it should be.
            (folder / wanted.name).unlink(missing_ok=True)
            problems.append(f"{url} ({' '.join(str(reason).split())})")
        finally:
            socket.setdefaulttimeout(patience)
    raise UserError(
        f"{name}: cannot download {', nor '.join(problems)}; get {wanted.name} (MD5 {wanted.md5}) "
        "in another way and name it with --archive"
    )


def images_in(name: str, archives: list[Path], most: int) -> Iterator[FoundImage]:
    """The images in the archives of a data set: the official ones, or ones of class folders.

    Class folders are {train,val,test}/<class>/<image>, at any depth; hidden files and whatever is
    no image are passed over.

    Args:
        name: of the data set, a key of :data:`SETS`.
        archives: as many files as the data set has.
        most: how many bytes the files in each archive may have together.

    Raises:
        UserError: an archive is damaged or unsafe, or holds something else.
    """
    if name == "mnist" and any(_mnist_file(path) for path in archives):
        yield from _mnist_images(archives)
        return
    counts = dict.fromkeys(("train", "val"), 0)
    kept: dict[str, bytes] = {}
    later: list[FoundImage] = []
    official, unplaced = False, 0
    wanted = _data_files(name)
    for path in archives:
        for member, content in archive_files(path, most):
            parts = safe_parts(str(path), member)
            if any(part.startswith(".") for part in parts):
                continue
            if name in _CIFARS and parts[-1] in _PICKLES:
                raise UserError(
                    f"{path}: the version for Python, whose files can run code when they are "
                    f"read; take the binary version, {SETS[name].downloads[0].urls[0]}"
                )
            place = _class_folder(parts)
            if name == "tiny-imagenet" and place and place[:2] == ("val", "images"):
                later.append(FoundImage(*place, content))
                unplaced += len(content)
                if unplaced > LARGEST_MEMBER:
                    raise UserError(
                        f"{path}: val/images/ has more than {LARGEST_MEMBER:,} bytes; those of "
                        "Tiny ImageNet are a tenth of that"
                    )
            elif place:
                official |= name.startswith("imagenette") and parts[0].startswith(_IMAGENETTE_TOP)
                yield FoundImage(*place, content)
                counts[place[0]] = counts.get(place[0], 0) + 1
            elif parts[-1] in wanted:
                if parts[-1] in kept:
                    raise UserError(f"{path}: {parts[-1]} is in it twice")
                kept[parts[-1]] = content
    where = str(archives[0])
    if later:
        official = True
        rest = _annotated(later, kept, where)
    elif name in _CIFARS and any(file.endswith(".bin") for file in kept):
        official = True
        rest = _cifar_images(_CIFARS[name], kept, where)
    else:
        rest = iter(())
    for image in rest:
        counts[image.split] += 1
        yield image
    if not counts["train"]:
        raise UserError(
            f"{where}: no images of {name}; expected "
            f"{' and '.join(wanted.name for wanted in SETS[name].downloads)}, or class folders "
            "train/<class>/<image> and val/<class>/<image>"
        )
    if official:
        _check_counts(name, counts, where)


def _data_files(name: str) -> set[str]:
    """Names of the files that a data set's official archive has beside images."""
    if name not in _CIFARS:
        return {_ANNOTATIONS}
    cifar = _CIFARS[name]
    return {cifar.names_file}.union(*cifar.files.values())


def _check_counts(name: str, counts: Mapping[str, int], where: str) -> None:
    for split, expected in SETS[name].images.items():
        if counts[split] != expected:
            raise UserError(
                f"{where}: {counts[split]:,} {split} images; the official archive of {name} has "
                f"{expected:,}"
            )


def _class_folder(parts: list[str]) -> tuple[str, str, str] | None:
    """Split, class and file name, if a member is an image in a class folder."""
    # Tiny ImageNet has a folder images/ in each class folder.
    if len(parts) >= 4 and parts[-4] in SPLITS and parts[-2] == "images":
        parts = [*parts[:-2], parts[-1]]
    if len(parts) < 3 or parts[-3] not in SPLITS:
        return None
    split, label, name = parts[-3:]
    return (split, label, name) if name.lower().endswith(IMAGE_SUFFIXES) else None


def _annotated(
    images: list[FoundImage], kept: Mapping[str, bytes], where: str
) -> Iterator[FoundImage]:
    """The validation images of Tiny ImageNet with their classes."""
    if _ANNOTATIONS not in kept:
        raise UserError(f"{where}: no val/{_ANNOTATIONS}, which names the validation images' class")
    lines = [line.split("\t") for line in kept[_ANNOTATIONS].decode("utf-8", "replace").split("\n")]
    classes = {fields[0]: fields[1] for fields in lines if len(fields) > 1}
    for image in images:
        if image.name not in classes:
            raise UserError(f"{where}: val/{_ANNOTATIONS} says nothing of {image.name}")
        yield image._replace(label=_class_name(classes[image.name], where))


def _class_name(name: str, where: str) -> str:
    """A class name that is good as a folder's."""
    if len(safe_parts(where, name)) > 1 or name.startswith("."):
        raise UserError(f"{where}: class {name!r} is no folder name; expected such as airplane")
    return name


def _cifar_images(cifar: _Cifar, kept: Mapping[str, bytes], where: str) -> Iterator[FoundImage]:
    """Records of label bytes and pixels, (3, 32, 32) row by row, as PNG files."""
    files = [file for split in cifar.files.values() for file in split]
    for needed in (*files, cifar.names_file):
        if needed not in kept:
            raise UserError(f"{where}: no {needed} in this archive; expected {', '.join(files)}")
    lines = kept[cifar.names_file].decode("utf-8", "replace").splitlines()
    names = [_class_name(line.strip(), where) for line in lines if line.strip()]
    length = cifar.labels + _CIFAR_PIXELS
    for split, parts in cifar.files.items():
        content = b"".join(kept[part] for part in parts)
        if len(content) % length:
            raise UserError(f"{where}: {parts[0]}: no whole number of records of {length} bytes")
        records = np.frombuffer(content, np.uint8).reshape(-1, length)
        labels = records[:, cifar.labels - 1]
        pixels = records[:, cifar.labels :].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        yield from _png_images(split, pixels, labels, names, where)


def _mnist_file(path: Path) -> str | None:
    """Which of MNIST's four files this is by its name, or None."""
    name = path.name.removesuffix(".gz")
    return name if name in _MNIST_FILES else None


def _mnist_images(archives: list[Path]) -> Iterator[FoundImage]:
    """MNIST's idx files, two for each split, as PNG files."""
    paths = {_mnist_file(path): path for path in archives}
    for needed in _MNIST_FILES:
        if needed not in paths:
            raise UserError(f"mnist: {needed}.gz is not among the files given; all four are needed")
    names = [str(digit) for digit in range(10)]
    for split, (pixels_file, labels_file) in (
        ("train", _MNIST_FILES[:2]),
        ("val", _MNIST_FILES[2:]),
    ):
        count = SETS["mnist"].images[split]
        pixels = _idx(paths[pixels_file], (count, 28, 28))
        labels = _idx(paths[labels_file], (count,))
        yield from _png_images(split, pixels, labels, names, str(paths[labels_file]))


def _idx(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """An idx file of bytes: two zeros, 8 (uint8), the dimensions' number, the dimensions, data."""
    expected = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">u4").tobytes()
    length = len(expected) + int(np.prod(shape))
    with damage_named(str(path)), path.open("rb") as raw:
        file: Any = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
        content = file.read(length)
        # Reads the checksum too, which follows the last byte.
        rest = file.read(1)
    if not content.startswith(expected) or len(content) != length or rest:
        raise UserError(f"{path}: not MNIST's idx file of {' x '.join(map(str, shape))} bytes")
    return np.frombuffer(content, np.uint8, offset=len(expected)).reshape(shape)


def _png_images(
    split: str, pixels: NDArray[np.uint8], labels: NDArray[np.uint8], names: list[str], where: str
) -> Iterator[FoundImage]:
    """Images, uint8 (n, h, w, 3) or (n, h, w), as PNG files that are named by their number."""
    if len(labels) and labels.max() >= len(names):
        raise UserError(
            f"{where}: a label of {labels.max()}; there are {len(names)} classes, from 0 on"
        )
    for number, (image, label) in enumerate(zip(pixels, labels.tolist(), strict=True)):
        file = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(image)).save(file, "PNG")
        yield FoundImage(split, names[label], f"{number:05d}.png", file.getvalue())
