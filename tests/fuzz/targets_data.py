"""The parsers of data_pipelines/: archives, images, indexes, shards, settings of commands."""

import atexit
import contextlib
import functools
import gzip
import io
import json
import shutil
import struct
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch
from zlib import crc32

import numpy as np
from PIL import Image

from data_pipelines.demo import generate_demo
from data_pipelines.images.batch import decode_with_pil
from data_pipelines.images.header import find_damage, is_turned, read_header
from data_pipelines.images.image_index import (
    INDEX_FILE,
    ImageIndex,
    check_fits,
    load_index,
    save_index,
    scan_class_folders,
)
from data_pipelines.images.source import _container, read_bytes
from data_pipelines.index import _look
from data_pipelines.prepare import prepare_small, unpack
from data_pipelines.sets.imagenet import Devkit, read_devkit, train_index, val_index
from data_pipelines.sets.preparation import STATE_FILE
from data_pipelines.sets.shard_check import verify_shards
from data_pipelines.sets.shard_format import SETTINGS_FILE
from data_pipelines.sets.shard_writer import write_shards
from data_pipelines.sets.small_sets import _CIFARS, _MNIST_FILES, SETS, images_in
from data_pipelines.settings import DemoData
from tests.data_pipelines.archives_for_tests import (
    cifar_records,
    idx_bytes,
    tar_bytes,
    write_devkit,
    write_zip,
)
from tests.fuzz.harness import Target, whole
from tpp.common.errors import UserError

_MOST = 2**30
_CLASSES = {"n01440764": 2, "n01443537": 1}
_TAR_TOKENS = (b"ustar", b"../", b"/", b"\0", b"0", b"1", b"2", b"5", b"L", b"S", b"g", b"x")
_TAR_TOKENS += (b"n01440764/", b"train/", b"12 size=-512\n", b"22 path=../../escaped\n", bytes(512))


def image(format: str = "PNG", mode: str = "RGB", **options: Any) -> bytes:
    """A small image of noise."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 4), np.uint8)
    made = io.BytesIO()
    Image.fromarray(pixels, "RGBA").convert(mode).save(made, format, **options)
    return made.getvalue()


# Archives


def repair_tar(data: bytes) -> bytes:
    """Say the true checksum in whatever looks like a tar header."""
    fixed = bytearray(data)
    for start in range(0, len(data) - 511, 512):
        if fixed[start + 257 : start + 262] == b"ustar":
            fixed[start + 148 : start + 156] = b" " * 8
            fixed[start + 148 : start + 156] = b"%06o\0 " % sum(fixed[start : start + 512])
    return bytes(fixed)


def _ignore(images: int) -> None:
    pass


def _train_seeds(folder: Path) -> list[bytes]:
    tars = {
        f"{wnid}.tar": tar_bytes((f"{wnid}_{k}.JPEG", b"image") for k in range(count))
        for wnid, count in _CLASSES.items()
    }
    return [tar_bytes(tars.items())]


def _parse_train(folder: Path, data: bytes) -> None:
    path = folder / "train.tar"
    path.write_bytes(data)
    _use_images(train_index(path, 1, _ignore))


def _val_seeds(folder: Path) -> list[bytes]:
    return [tar_bytes((f"ILSVRC2012_val_{k:08d}.JPEG", b"image") for k in (1, 2, 3))]


def _parse_val(folder: Path, data: bytes) -> None:
    path = folder / "val.tar"
    path.write_bytes(data)
    wnids = list(_CLASSES)
    _use_images(val_index(path, Devkit(_CLASSES, [wnids[0], wnids[1], wnids[0]])))


def _use_images(index: ImageIndex) -> None:
    # Open files are kept, by their names; here another file has the name by now.
    _container.cache_clear()
    for place in range(len(index)):
        where = index.location(place)
        assert Path(where.path).resolve().is_relative_to(index.root.resolve()), where
        assert len(read_bytes(where)) == where.length


def _class_folders() -> list[tuple[str, bytes]]:
    names = ("train/cat/1.png", "train/dog/1.png", "val/cat/2.png", "val/dog/README", "LICENSE")
    return [(f"pets/{name}", f"image {name}".encode()) for name in names]


def _tar_seeds(folder: Path) -> list[bytes]:
    return [tar_bytes(_class_folders())]


def _gzip_seeds(folder: Path) -> list[bytes]:
    return [gzip.compress(tar_bytes(_class_folders()), 6, mtime=0)]


def _zip_seeds(folder: Path) -> list[bytes]:
    stored = io.BytesIO()
    with zipfile.ZipFile(stored, "w") as archive:
        archive.writestr(zipfile.ZipInfo("train/a/b.png"), b"image")
    return [write_zip(folder / "a.zip", _class_folders()).read_bytes(), stored.getvalue()]


def _parse_folders(folder: Path, data: bytes) -> None:
    path = folder / "pets"
    path.write_bytes(data)
    _unpacked("imagenette", [path], folder / "work")


def _parse_gzipped(folder: Path, data: bytes) -> None:
    _parse_folders(folder, gzip.compress(data, 1, mtime=0))


def _unpacked(name: str, archives: list[Path], work: Path) -> None:
    work.mkdir()
    for index in unpack(images_in(name, archives, _MOST), str(archives[0]), work, _ignore).values():
        _use_images(index)


def _counted(name: str, images: Mapping[str, int]) -> Any:
    """The set as if its official archive had so many images."""
    return patch.dict(SETS, {name: replace(SETS[name], images=images)})


def _tiny_seeds(folder: Path) -> list[bytes]:
    lines = "".join(f"val_{k}.JPEG\tn0000000{k}\t0\t0\t9\t9\n" for k in (0, 1))
    files = [(f"tiny/train/n0000000{k}/images/n_{k}.JPEG", b"image") for k in (0, 1)]
    files += [(f"tiny/val/images/val_{k}.JPEG", b"image") for k in (0, 1)]
    files.append(("tiny/val/val_annotations.txt", lines.encode()))
    return [write_zip(folder / "tiny.zip", files).read_bytes(), tar_bytes(files)]


def _parse_tiny(folder: Path, data: bytes) -> None:
    path = folder / "tiny.zip"
    path.write_bytes(data)
    with _counted("tiny-imagenet", {"train": 2, "val": 2}):
        _unpacked("tiny-imagenet", [path], folder / "work")


def _cifar_seeds(folder: Path) -> list[bytes]:
    pixels = np.zeros((1, 32, 32, 3), np.uint8)
    cifar = _CIFARS["cifar10"]
    files = [
        (f"cifar/{name}", cifar_records(np.array([[k]], np.uint8), pixels))
        for names in cifar.files.values()
        for k, name in enumerate(names)
    ]
    names = "".join(f"class{k}\n" for k in range(10)).encode()
    return [tar_bytes([*files, (f"cifar/{cifar.names_file}", names)])]


def _parse_cifar(folder: Path, data: bytes) -> None:
    path = folder / "cifar.tar.gz"
    path.write_bytes(gzip.compress(data, 1, mtime=0))
    with _counted("cifar10", {"train": 5, "val": 1}):
        _unpacked("cifar10", [path], folder / "work")


def _mnist_seeds(folder: Path) -> list[bytes]:
    return [idx_bytes(np.zeros((2, 28, 28), np.uint8)), idx_bytes(np.arange(2, dtype=np.uint8))]


def _parse_mnist(folder: Path, data: bytes) -> None:
    """An input takes the place of the pixels or the labels, whichever it is more like."""
    pixels, labels = _mnist_seeds(folder)
    if len(data) < (len(pixels) + len(labels)) // 2:
        labels = data
    else:
        pixels = data
    for name, content in zip(_MNIST_FILES, (pixels, labels) * 2, strict=True):
        (folder / f"{name}.gz").write_bytes(content)
    with _counted("mnist", {"train": 2, "val": 2}):
        _unpacked("mnist", [folder / f"{name}.gz" for name in _MNIST_FILES], folder / "work")


# The devkit, as a tar that is compressed once it has been mutated: its MATLAB file is in it.


def _devkit_seeds(folder: Path) -> list[bytes]:
    path = write_devkit(folder / "devkit.tar.gz", _CLASSES, list(_CLASSES))
    return [gzip.decompress(path.read_bytes())]


def _parse_devkit(folder: Path, data: bytes) -> None:
    path = folder / "devkit.tar.gz"
    path.write_bytes(gzip.compress(data, 1, mtime=0))
    devkit = read_devkit(path)
    assert set(devkit.val_classes) <= set(devkit.train_counts)


# Images


def _image_seeds(folder: Path) -> list[bytes]:
    exif = Image.Exif()
    exif[0x0112] = 6
    return [
        image("JPEG"),
        image("JPEG", progressive=True, exif=exif),
        image("JPEG", "L", restart_marker_rows=1),
        image("JPEG", "CMYK"),
        image("PNG"),
        image("PNG", "P"),
        image("PNG", "LA", icc_profile=bytes(100)),
        image("GIF", "P", save_all=True, append_images=[Image.new("P", (16, 12))]),
        *(image(format) for format in ("WEBP", "BMP", "TIFF", "PPM", "JPEG2000")),
    ]


def _parse_image(folder: Path, data: bytes) -> None:
    path = folder / "image.jpg"
    path.write_bytes(data)
    # As the commands have it.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    is_turned(data)
    found = _look(str(path))
    damage = find_damage(data)
    assert found.damage == damage, "the index and the loaders disagree"
    if damage is not None:
        raise UserError(f"{path}: {damage}")
    header = read_header(data)
    assert (found.height, found.width) == (header.height, header.width)
    try:
        decoded = decode_with_pil(np.frombuffer(data, np.uint8), 3)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    assert (decoded.height, decoded.width) == (header.height, header.width)


# Indexes


def _header_span(data: bytes) -> tuple[int, int] | None:
    with contextlib.suppress(ValueError, RecursionError):
        _, stop = json.JSONDecoder().raw_decode(data[8:].decode("latin-1"))
        return 8, 8 + stop
    return None


_NAMES = ("names", "name_ends", "labels", "byte_sizes", "sizes", "broken", "container", "offsets")
_NAMES += ("marks",)


def repair_index(data: bytes) -> bytes:
    """Say an index's true checksum and its header's true length."""
    span = _header_span(data)
    if span is None:
        return data
    text, body = data[slice(*span)], data[span[1] :]
    body = body.lstrip(b" ") if data[span[1] : span[1] + 1] == b" " else body
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
        header = json.loads(text)
        said, check = header["__metadata__"], 0
        for name in _NAMES:
            start, stop = header[name]["data_offsets"]
            check = crc32(body[start:stop], check)
        for name in ("classes", "containers", "fingerprint"):
            check = crc32(said[name].encode(), check)
        text = text.replace(str(said["crc32"]).encode(), b"%08x" % check)
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


def _plain_folder(folder: Path) -> ImageIndex:
    for name in ("a/1.png", "a/2.png", "b/3.png"):
        path = folder / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(image())
    return scan_class_folders(folder)


@functools.cache
def _shards() -> Path:
    """Class folders and finished shards of them, made once."""
    home = Path(tempfile.mkdtemp(prefix="fuzz-shards-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    write_shards(_plain_folder(home / "images"), home / "shards", shard_bytes=3000, threads=1)
    return home


def _index_seeds(folder: Path) -> list[bytes]:
    save_index(_plain_folder(folder), folder / INDEX_FILE)
    shards = _shards() / "shards" / INDEX_FILE
    return [(folder / INDEX_FILE).read_bytes(), shards.read_bytes()]


def _parse_index(folder: Path, data: bytes) -> None:
    _plain_folder(folder)
    for shard in (_shards() / "shards").glob("*.tar"):
        shutil.copy(shard, folder)
    path = folder / INDEX_FILE
    path.write_bytes(data)
    index = load_index(path, folder)
    _container.cache_clear()
    assert len(index.fingerprint) == 12
    names = [index.classes[label] for label in index.labels.tolist()]
    assert len(names) == len(list(index.files)) == len(index)
    for place in range(len(index)):
        where = index.location(place)
        assert Path(where.path).resolve().is_relative_to(folder.resolve()), where
        with contextlib.suppress(OSError, ValueError):
            read_bytes(where)
    check_fits(index)


# Shards


def _among_shards(name: str) -> Callable[[Path], list[bytes]]:
    return lambda folder: [(_shards() / "shards" / name).read_bytes()]


def _shards_with(folder: Path, name: str, data: bytes) -> Path:
    """A copy of the shards in which a file is replaced."""
    out = folder / "shards"
    shutil.copytree(_shards() / "shards", out)
    (out / name).write_bytes(data)
    return out


def _write_again(folder: Path, name: str, data: bytes) -> None:
    """Go on with shards of which a file was replaced: what comes of it must be what was."""
    out = _shards_with(folder, name, data)
    write_shards(scan_class_folders(_shards() / "images"), out, shard_bytes=3000, threads=1)
    for path in (_shards() / "shards").iterdir():
        if path.name != INDEX_FILE:
            assert (out / path.name).read_bytes() == path.read_bytes(), path.name
    made, before = (load_index(home / INDEX_FILE, home) for home in (out, _shards() / "shards"))
    for place in range(len(before)):
        assert made.location(place)[1:] == before.location(place)[1:]
    assert (made.sizes == before.sizes).all()


def _parse_listing(folder: Path, data: bytes) -> None:
    _write_again(folder, "shard-000000.idx", data)


def _parse_settings(folder: Path, data: bytes) -> None:
    _write_again(folder, SETTINGS_FILE, data)


def _parse_shard(folder: Path, data: bytes) -> None:
    out = _shards_with(folder, "shard-000000.tar", data)
    verify_shards(scan_class_folders(_shards() / "images"), out, threads=1)


# What commands keep of their settings


def _archive(folder: Path) -> Path:
    path = folder / "pets.tar"
    path.write_bytes(tar_bytes(_class_folders()))
    return path


def _state_seeds(folder: Path) -> list[bytes]:
    prepare_small("imagenette", folder / "out", archives=[_archive(folder)])
    finished = (folder / "out" / STATE_FILE).read_text()
    return [finished.encode(), finished.replace("true", "false").encode()]


def _parse_state(folder: Path, data: bytes) -> None:
    out = folder / "out"
    out.mkdir()
    (out / STATE_FILE).write_bytes(data)
    prepare_small("imagenette", out, archives=[_archive(folder)])
    assert {path.name for path in folder.iterdir()} == {"out", "pets.tar"}


_DEMO = DemoData(classes=2, train_per_class=1, val_per_class=1)


def _demo_seeds(folder: Path) -> list[bytes]:
    generate_demo(folder / "demo", _DEMO, image_size=8)
    return [(folder / "demo" / "demo.json").read_bytes()]


def _parse_demo(folder: Path, data: bytes) -> None:
    (folder / "demo").mkdir()
    (folder / "demo" / "demo.json").write_bytes(data)
    generate_demo(folder / "demo", _DEMO, image_size=8)


def _tar_target(name: str, seeds: Any, parse: Any) -> Target:
    return Target(name, seeds, parse, repair=repair_tar, tokens=_TAR_TOKENS)


_MARKERS = tuple(bytes([0xFF, code]) for code in (0xC0, 0xC2, 0xC4, 0xD8, 0xD9, 0xDA, 0xDB, 0xE1))
_CHUNKS = (b"IHDR", b"IDAT", b"IEND", b"PLTE", b"tRNS", b"zTXt", b"iCCP", b"acTL", b"fdAT")

TARGETS = [
    _tar_target("tar_train", _train_seeds, _parse_train),
    _tar_target("tar_val", _val_seeds, _parse_val),
    _tar_target("tar_folders", _tar_seeds, _parse_folders),
    _tar_target("tar_gz", _tar_seeds, _parse_gzipped),
    _tar_target("cifar", _cifar_seeds, _parse_cifar),
    _tar_target("devkit", _devkit_seeds, _parse_devkit),
    Target("gzip", _gzip_seeds, _parse_folders),
    Target("zip", _zip_seeds, _parse_folders, tokens=(b"PK\1\2", b"PK\3\4", b"PK\5\6", b"../")),
    Target("tiny_imagenet", _tiny_seeds, _parse_tiny, tokens=(b"\t", b"\n", b"../", b"/")),
    Target("mnist", _mnist_seeds, _parse_mnist),
    Target("image", _image_seeds, _parse_image, tokens=_MARKERS + _CHUNKS),
    Target("index", _index_seeds, _parse_index, json_inside=_header_span, repair=repair_index),
    Target(
        "shard_listing",
        _among_shards("shard-000000.idx"),
        _parse_listing,
        tokens=(b" ", b"\n", b"-1", b"0", b"512", b"9" * 20, b"png", b"00000000"),
    ),
    _tar_target("shard", _among_shards("shard-000000.tar"), _parse_shard),
    Target("shard_settings", _among_shards(SETTINGS_FILE), _parse_settings, json_inside=whole),
    Target("prepared", _state_seeds, _parse_state, json_inside=whole),
    Target("demo", _demo_seeds, _parse_demo, json_inside=whole),
]
