"""What strangers may hand over: archives, images and folders that are made to do harm."""

import contextlib
import gzip
import io
import json
import os
import shutil
import signal
import socket
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipelines.demo import SETTINGS_FILE as DEMO_SETTINGS
from data_pipelines.demo import generate_demo
from data_pipelines.images import header
from data_pipelines.images.batch import LoaderSettings, decode_with_pil
from data_pipelines.images.header import MOST_PIXELS, find_damage
from data_pipelines.images.image_index import (
    INDEX_FILE,
    ImageIndex,
    Location,
    check_fits,
    load_index,
    open_images,
    save_index,
    scan_class_folders,
)
from data_pipelines.images.plain_file import NOT_PLAIN
from data_pipelines.images.source import BadImages, read_bytes
from data_pipelines.index import _look
from data_pipelines.loaders import LOADERS, eval_batches
from data_pipelines.loading.augment import ImageTransform
from data_pipelines.prepare import prepare_small
from data_pipelines.sets import archives
from data_pipelines.sets.archives import archive_files
from data_pipelines.sets.imagenet import read_devkit
from data_pipelines.sets.preparation import STATE_FILE
from data_pipelines.sets.shard_check import verify_shards
from data_pipelines.sets.shard_format import SETTINGS_FILE
from data_pipelines.sets.shard_writer import write_shards
from data_pipelines.sets.small_sets import images_in
from data_pipelines.settings import DemoData
from tests.data_pipelines.archives_for_tests import member, write_tar, write_zip
from tpp.common.errors import UserError

MOST = 10**12


def _refusal(work: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        work()
    message = str(caught.value)
    assert "\n" not in message
    return message


def _read(path: Path) -> list[tuple[str, bytes]]:
    return list(archive_files(path, MOST))


# Archives


def _element(kind: int, data: bytes) -> bytes:
    """A data element of a MATLAB file, level 5."""
    return struct.pack("<II", kind, len(data)) + data + bytes(-len(data) % 8)


def _matlab_of_cells(depth: int) -> bytes:
    """A MATLAB file with a cell in a cell in a cell, and so on."""
    start = _element(6, struct.pack("<II", 1, 0)) + _element(5, struct.pack("<ii", 1, 1))
    start += _element(1, b"")
    last = _element(6, struct.pack("<II", 6, 0)) + _element(5, bytes(8)) + _element(1, b"")
    last += _element(9, b"")
    length, tags = len(last), []
    for _ in range(depth):
        tags.append(struct.pack("<II", 14, length))
        length += len(start) + 8
    cells = b"".join(start + tag for tag in reversed(tags)) + last
    head = b"MATLAB 5.0".ljust(124) + struct.pack("<HH", 0x100, 0x4D49)
    return head + struct.pack("<II", 14, length) + cells


@pytest.mark.processes
def test_a_matlab_file_that_crashes_its_reader_is_refused(tmp_path: Path) -> None:
    files = [
        ("data/meta.mat", _matlab_of_cells(100_000)),
        ("data/ILSVRC2012_validation_ground_truth.txt", b"1\n"),
    ]
    path = write_tar(tmp_path / "devkit.tar.gz", files)
    assert path.stat().st_size < 300_000
    assert _refusal(lambda: read_devkit(path)) == (
        f"{path}: data/meta.mat: cannot read its synsets (the reader crashed); "
        "get the devkit once more"
    )


def test_a_header_without_end_is_not_read(tmp_path: Path) -> None:
    head = bytearray(member("a.png", kind=tarfile.GNUTYPE_SPARSE))
    head[482] = 1  # more of this file's map follows
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    more = (b"%011o\0" % 1) * 42 + b"\1" + bytes(7)
    path = tmp_path / "sparse.tar.gz"
    path.write_bytes(gzip.compress(bytes(head) + more * 10_000, 1))
    assert "a header of" in _refusal(lambda: _read(path))


def _pax(key: str, value: str) -> bytes:
    length = len(key) + len(value) + 3
    while len(f"{length} {key}={value}\n") != length:
        length += 1
    text = f"{length} {key}={value}\n".encode()
    return member("pax", len(text), tarfile.XHDTYPE) + text + bytes(-len(text) % 512)


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        (_pax("size", "-512") + member("a/b.png"), "is said to have -512 bytes"),
        (_pax("size", "9" * 30) + member("a/b.png"), "is said to have 999,999,999"),
        (_pax("path", "../../x") + member("a/b.png"), "would lie outside"),
        (_pax("path", "a/\x1b[31m") + member("a/b.png"), "is no file name"),
        (_pax("path", "a/" + "b" * 300) + member("a/b.png"), "is no file name"),
        (_pax("path", "a/" * 2100 + "b") + member("a/b.png"), "is no file name"),
        (_pax("a", "b") * 3000, "maximum recursion depth"),
    ],
    ids=["negative", "endless", "above", "escape", "long", "deep", "chain"],
)
def test_extended_headers_that_lie(tmp_path: Path, headers: bytes, said: str) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(headers + bytes(1024))
    message = _refusal(lambda: _read(path))
    assert message.startswith(f"{path}: ")
    assert said in message
    assert message.isprintable()


def _write_deflated(path: Path, files: list[tuple[str, bytes]]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files:
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize("write", [write_tar, write_zip])
def test_too_many_files(tmp_path: Path, write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "many", [(f"a/{number}.png", b"") for number in range(10)])
    monkeypatch.setattr(archives, "_MOST_FILES", 10)
    assert len(_read(path)) == 10
    monkeypatch.setattr(archives, "_MOST_FILES", 9)
    assert f"{path}: more than 9 files" in _refusal(lambda: _read(path))


@pytest.mark.parametrize(
    ("write", "name"), [(write_tar, "a.tar.gz"), (_write_deflated, "a.zip")], ids=["tar", "zip"]
)
def test_an_archive_that_blows_up(
    tmp_path: Path, write: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / name, [(f"a/{number}.png", bytes(2**20)) for number in range(8)])
    assert len(_read(path)) == 8  # so little may come of any archive
    monkeypatch.setattr(archives, "_ALWAYS", 2**20)
    assert f"come out of its {path.stat().st_size:,}" in _refusal(lambda: _read(path))
    # What cannot be compressed is let through.
    noise = np.random.default_rng(0).bytes(2**22)
    assert _read(write(tmp_path / name, [("a/b.png", noise)])) == [("a/b.png", noise)]


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_that_is_compressed_without_bounds(tmp_path: Path, method: int) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("train/a/b.png", bytes(1000))
    assert "'train/a/b.png' is compressed in an unusual way" in _refusal(lambda: _read(path))


def test_an_archive_that_is_a_pipe_or_a_device(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.tar")
    for path in (tmp_path / "pipe.tar", Path("/dev/zero")):
        with _soon():
            message = _refusal(lambda path=path: _read(path))
        assert message == f"{path}: cannot read this archive ({NOT_PLAIN})"


def test_a_data_file_that_is_there_twice(tmp_path: Path) -> None:
    files = [("one/test_batch.bin", b"1"), ("two/test_batch.bin", b"2")]
    path = write_tar(tmp_path / "cifar.tar", files)
    message = _refusal(lambda: list(images_in("cifar10", [path], MOST)))
    assert message == f"{path}: test_batch.bin is in it twice"


# Images


def _encoded(format: str = "JPEG", size: int = 16, mode: str = "RGB", **options: Any) -> bytes:
    made = io.BytesIO()
    Image.new(mode, (size, size), 200 if mode == "L" else (200, 100, 50)).save(
        made, format, **options
    )
    return made.getvalue()


def _huge_jpeg(extra: int = 0) -> bytes:
    """A JPEG of some hundred bytes, and more after its end, that claims 13000 x 13000 pixels."""
    data = bytearray(_encoded())
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", 13_000, 13_000)
    return bytes(data) + bytes(extra)


def _huge_png(side: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(10**7), 9))
    return b"\x89PNG\r\n\x1a\n" + head + pixels + chunk(b"IEND", b"")


def _many_scans(count: int) -> bytes:
    """A progressive JPEG whose last scan comes so many times more."""
    data = _encoded(size=64, mode="L", progressive=True)
    last, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    return data[:end] + data[last:end] * count + data[end:]


BOMBS = {
    "small JPEG": (_huge_jpeg(), "169,000,000 pixels cannot be in "),
    # Large enough that the index looks at its first and last bytes only.
    "longer JPEG": (_huge_jpeg(40_000) + b"\xff\xd9", "169,000,000 pixels cannot be in "),
    "PNG": (_huge_png(60_000), f"3,600,000,000 pixels, more than {MOST_PIXELS:,}"),
    "scans": (_many_scans(200), "206 scans, more than 100"),
    "longer scans": (_many_scans(200) + bytes(40_000) + b"\xff\xd9", "206 scans, more than 100"),
    "segments": (b"\xff\xd8" + b"\xff\xe0\0\2" * 20_000, "damaged JPEG header"),
    "fill bytes": (b"\xff\xd8" + b"\xff" * 40_000, "damaged JPEG header"),
}


@pytest.mark.parametrize("case", BOMBS)
def test_what_would_take_all_memory_or_time_is_not_decoded(tmp_path: Path, case: str) -> None:
    data, said = BOMBS[case]
    assert len(data) < 100_000
    path = tmp_path / "a.jpg"
    path.write_bytes(data)
    damage = find_damage(data)
    assert damage is not None
    assert said in damage
    assert find_damage(data, decode=True) == damage
    assert _look(str(path)).damage == damage


def test_as_many_scans_and_pixels_as_may_be() -> None:
    assert find_damage(_many_scans(94)) is None
    assert "101 scans" in str(find_damage(_many_scans(95)))
    # A video after a photo's end may hold any bytes.
    assert find_damage(_encoded(size=64, progressive=True) + b"\xff\xda" * 500) is None
    assert find_damage(_encoded(size=4000, quality=1)) is None


def test_large_images_are_decoded_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    entered = []

    class Lock:
        def __enter__(self) -> None:
            entered.append(True)

        def __exit__(self, *error: object) -> None:
            pass

    monkeypatch.setattr(header, "_one_large_image", Lock())
    small, large = (_encoded("BMP", size) for size in (100, 4100))
    assert find_damage(small) is None
    decode_with_pil(np.frombuffer(small, np.uint8), 3)
    assert not entered
    assert find_damage(large) is None
    assert len(entered) == 1
    decode_with_pil(np.frombuffer(large, np.uint8), 3)
    assert len(entered) == 2


def _ghostscript(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program that PIL takes for Ghostscript, and the file that it leaves behind."""
    program, trace = folder / "gs", folder / "ran"
    program.write_text(f"#!/bin/sh\ntouch {trace}\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    return trace


@pytest.mark.processes
def test_no_image_is_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = _encoded("EPS")
    trace = _ghostscript(tmp_path, monkeypatch)
    with Image.open(io.BytesIO(data)) as image, contextlib.suppress(Exception):
        image.load()
    assert trace.exists()  # so PIL does run it
    trace.unlink()
    path = tmp_path / "a.jpg"
    path.write_bytes(data)
    assert find_damage(data) == find_damage(data, decode=True) == "not an image"
    assert _look(str(path)).damage == "not an image"
    with pytest.raises(ValueError, match="cannot be decoded"):
        decode_with_pil(np.frombuffer(data, np.uint8), 3)
    assert not trace.exists()


# Folders


@contextlib.contextmanager
def _soon() -> Iterator[None]:
    """Fail where something waits for ever."""

    def stop(*_: object) -> None:
        raise TimeoutError("it waits")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(30)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _strange_folder(root: Path) -> dict[str, str]:
    """Class folders with what is no image among images; why each one is bad."""
    for name in ("a/1.jpg", "a/2.jpg", "b/1.jpg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(_encoded())
    os.mkfifo(root / "a" / "pipe.jpg")
    (root / "a" / "zero.jpg").symlink_to("/dev/zero")
    (root / "a" / "circle.jpg").symlink_to(root / "a" / "circle.jpg")
    (root / "a" / "nothing.jpg").symlink_to(root / "nowhere")
    with (root / "a" / "sparse.jpg").open("wb") as file:
        file.truncate(2**40)
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as listener:
        # A socket's whole path may have 107 bytes.
        here = Path.cwd()
        os.chdir(root / "a")
        try:
            listener.bind("socket.jpg")
        finally:
            os.chdir(here)
    (root / "a" / "folder.jpg").mkdir()
    return {
        "pipe": NOT_PLAIN,
        "zero": NOT_PLAIN,
        "circle": "Too many levels of symbolic links",
        "nothing": "No such file or directory",
        "sparse": "1,099,511,627,776 bytes; no image has more than 268,435,456",
        "socket": "No such device or address",
    }


def test_what_is_no_file_is_never_read(tmp_path: Path) -> None:
    for name, reason in _strange_folder(tmp_path).items():
        path = f"{tmp_path}/a/{name}.jpg"
        with _soon(), pytest.raises((OSError, ValueError)) as caught:
            read_bytes(Location(path, 0, -1))
        assert reason in str(caught.value)
        with _soon():
            look = _look(path)
        assert look.damage in (reason, f"unreadable: {reason}")


@pytest.mark.timeout(120)
@pytest.mark.parametrize("loader", LOADERS[1:])
def test_loaders_pass_over_what_is_no_file(tmp_path: Path, loader: str) -> None:
    expected = _strange_folder(tmp_path)
    index = scan_class_folders(tmp_path)
    bad = BadImages(index, on_error="skip", limit=0.9)
    batches = eval_batches(
        index,
        ImageTransform(16, None, "none", (0.0,) * 3, (1.0,) * 3),
        2,
        LoaderSettings(loader, threads=int(loader == "dali"), device=torch.device("cpu")),
        bad=bad,
    )
    labels = [label for _, batch in batches for label in batch.tolist()]
    assert labels == [0, 0, 1]
    assert {Path(path).stem: reason for path, reason in bad.take_new()} == expected


@pytest.mark.timeout(120)
def test_shards_name_what_is_no_file(tmp_path: Path) -> None:
    _strange_folder(tmp_path / "images")
    for name in ("circle", "nothing", "sparse", "socket", "zero"):
        (tmp_path / "images" / "a" / f"{name}.jpg").unlink()
    index = scan_class_folders(tmp_path / "images")
    with _soon():
        message = _refusal(lambda: write_shards(index, tmp_path / "out", resize=8, threads=1))
    assert message == (f"{tmp_path}/images/a/pipe.jpg: cannot read this image ({NOT_PLAIN})")


@pytest.mark.parametrize("to", ["nowhere", "c", "1.jpg/c"], ids=["nothing", "itself", "a file"])
def test_a_class_that_is_a_link_to_nothing_is_named(tmp_path: Path, to: str) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1.jpg").write_bytes(_encoded())
    (tmp_path / "1.jpg").write_bytes(_encoded())
    (tmp_path / "c").symlink_to(tmp_path / to)
    message = _refusal(lambda: scan_class_folders(tmp_path))
    assert message.startswith(f"{tmp_path}/c: a link that leads nowhere (")
    # A link out of the data set is what a cluster's users want.
    (tmp_path / "c").unlink()
    (tmp_path / "a").symlink_to(tmp_path / "b")
    assert list(scan_class_folders(tmp_path).files) == ["a/1.jpg", "b/1.jpg"]
    # One to the data set itself is a class without images, not a circle.
    (tmp_path / "d").symlink_to(tmp_path)
    (tmp_path / "1.jpg").unlink()
    message = _refusal(lambda: scan_class_folders(tmp_path))
    assert message.startswith(f"{tmp_path}/d: class folder without images")


# Indexes


def _indexed(root: Path, **changes: Any) -> Path:
    """An index of three images, as another program might have written it."""
    said: dict[str, Any] = {"files": ["a/1.jpg", "a/2.jpg", "b/1.jpg"], "classes": ["a", "b"]}
    said |= changes
    index = ImageIndex.of(root, said["files"], [0, 0, 1], said["classes"])
    if "fingerprint" in said:
        index.__dict__["fingerprint"] = said["fingerprint"]
    path = root / INDEX_FILE
    save_index(index, path)
    return path


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"files": ["a/1.jpg", "a/../../x.jpg", "b/1.jpg"]}, "a name outside of the folder"),
        ({"files": ["../x.jpg", "a/2.jpg", "b/1.jpg"]}, "a name outside of the folder"),
        ({"files": ["a/1.jpg", "a/2.jpg", "b/.."]}, "a name outside of the folder"),
        ({"classes": ["../x", "b"]}, "a class that is no folder in this one"),
        ({"classes": ["..", "b"]}, "a class that is no folder in this one"),
        ({"classes": ["", "b"]}, "a class that is no folder in this one"),
        ({"classes": ["/etc", "b"]}, "a class that is no folder in this one"),
        ({"classes": ["a", "a"]}, "classes that are not sorted, or one twice"),
        ({"classes": ["b", "a"]}, "classes that are not sorted, or one twice"),
        ({"fingerprint": "\x1b[31m"}, "a fingerprint"),
    ],
)
def test_an_index_that_leads_out_of_its_folder(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    path = _indexed(tmp_path, **changes)
    message = _refusal(lambda: load_index(path, tmp_path))
    assert message.startswith(f"{path}: a damaged index ({said}")
    assert message.isprintable()


def test_two_dots_in_a_name_are_no_way_out(tmp_path: Path) -> None:
    path = _indexed(tmp_path, files=["a/1..jpg", "a/..2.jpg", "b/...jpg"], classes=["..a", "b.."])
    assert len(load_index(path, tmp_path)) == 3


def test_an_index_that_is_a_pipe_or_of_another_data_set(tmp_path: Path) -> None:
    for name in ("a/1.jpg", "a/2.jpg", "b/1.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(_encoded())
    index = load_index(_indexed(tmp_path), tmp_path)
    check_fits(index)
    other = load_index(_indexed(tmp_path, files=["a/1.jpg", "a/3.jpg", "b/1.jpg"]), tmp_path)
    assert "a/3.jpg is gone" in _refusal(lambda: check_fits(other))
    other = load_index(_indexed(tmp_path, classes=["a", "c"]), tmp_path)
    assert "it has no class folder 'c'" in _refusal(lambda: check_fits(other))
    (tmp_path / INDEX_FILE).unlink()
    os.mkfifo(tmp_path / INDEX_FILE)
    with _soon():
        message = _refusal(lambda: open_images(tmp_path))
    assert f"cannot read the index ({NOT_PLAIN})" in message


# Shards and settings


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders, and shards of them."""
    home = tmp_path_factory.mktemp("packed")
    for number in range(4):
        path = home / "images" / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_encoded(size=16 + number))
    write_shards(scan_class_folders(home / "images"), home / "shards", threads=1)
    return home


LISTINGS: dict[str, Callable[[list[str]], list[str]]] = {
    "offset": lambda line: [line[0], str(int(line[1]) + 1), *line[2:]],
    "negative offset": lambda line: [line[0], "-1", *line[2:]],
    "negative length": lambda line: [*line[:2], "-1", *line[3:]],
    "huge length": lambda line: [*line[:2], str(10**15), *line[3:]],
    "overflow": lambda line: [line[0], str(10**30), str(10**30), *line[3:]],
    "shorter": lambda line: [*line[:2], str(int(line[2]) - 1), *line[3:]],
    "ending": lambda line: ["png", *line[1:3], line[3].replace("jpg", "png"), *line[4:]],
    "unknown image": lambda line: [*line[:3], "00000099.jpg", *line[4:]],
    "label's place": lambda line: [*line[:5], "7", *line[6:]],
    "cut": lambda line: line[:3],
}


@pytest.mark.parametrize("case", LISTINGS)
def test_a_listing_that_lies_is_written_anew(packed: Path, tmp_path: Path, case: str) -> None:
    shutil.copytree(packed / "shards", tmp_path / "shards")
    listing = tmp_path / "shards" / "shard-000000.idx"
    before = listing.read_bytes()
    first, second, *rest = listing.read_text().splitlines()
    lied = [first, " ".join(LISTINGS[case](second.split())), *rest]
    listing.write_text("\n".join(lied) + "\n")
    index = scan_class_folders(packed / "images")
    assert write_shards(index, tmp_path / "shards", threads=1).reused == 0
    assert listing.read_bytes() == before
    assert verify_shards(index, tmp_path / "shards", threads=1).kept == 4


def test_a_shard_with_hostile_headers_is_refused(packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    shutil.copytree(packed / "shards", out)
    tar = out / "shard-000000.tar"
    size = tar.stat().st_size
    chain = (_pax("a", "b") * (size // 1024))[:size]
    tar.write_bytes(chain + bytes(size - len(chain)))
    index = scan_class_folders(packed / "images")
    assert f"{tar}: " in _refusal(lambda: verify_shards(index, out, threads=1))
    tar.write_bytes(_pax("a", "b") * 3000)
    made = load_index(out / INDEX_FILE, out)
    made.marks[:] = tar.stat().st_size
    (out / INDEX_FILE).unlink()
    save_index(made, out / INDEX_FILE)
    message = _refusal(lambda: verify_shards(index, out, threads=1))
    assert message.startswith(f"{tar}: cannot be read (maximum recursion depth")


DEEP = b"[" * 100_000 + b"]" * 100_000


@pytest.mark.parametrize(
    "content",
    [DEEP, b"[]", b"\xff", b'{"version": ' + b"9" * 5000 + b"}", b" " * 2**25],
    ids=["deep", "list", "no text", "number", "long"],
)
def test_settings_that_cannot_be_read_are_named(
    packed: Path, tmp_path: Path, content: bytes
) -> None:
    shutil.copytree(packed / "shards", tmp_path / "shards")
    path = tmp_path / "shards" / SETTINGS_FILE
    path.write_bytes(content)
    index = scan_class_folders(packed / "images")
    message = _refusal(lambda: write_shards(index, tmp_path / "shards", threads=1))
    assert message.startswith(f"{path}: ")
    assert "empty the folder" in message
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / DEMO_SETTINGS).write_bytes(content)
    small = DemoData(classes=2, train_per_class=1, val_per_class=1)
    message = _refusal(lambda: generate_demo(tmp_path / "demo", small, image_size=8))
    assert message.startswith(f"{tmp_path / 'demo'}: ")


def _state(**changes: Any) -> bytes:
    split = {"archives": [], "classes": 1, "images": 1, "bytes": 1, "finished": False}
    state = {"version": 1, "set": "imagenette", "form": "class folders", "splits": {"train": split}}
    split |= changes.pop("train", {})
    return json.dumps(state | changes).encode()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (DEEP, "nested too deep"),
        (_state(splits={"../../x": {}}), "splits"),
        (_state(splits=[]), "splits"),
        (_state(set=["x"]), "set"),
        (_state(form=[1]), "form"),
        (_state(train={"archives": "x"}), "splits.train.archives"),
        (_state(train={"archives": [{"name": "x", "bytes": "many"}]}), "bytes"),
        (_state(train={"finished": "no"}), "splits.train.finished"),
    ],
)
def test_a_state_file_that_lies(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "out" / STATE_FILE
    path.parent.mkdir()
    path.write_bytes(content)
    archive = write_tar(tmp_path / "a.tar", [("train/a/1.png", b"x"), ("val/a/1.png", b"x")])
    message = _refusal(lambda: prepare_small("imagenette", path.parent, archives=[archive]))
    assert message.startswith(f"{path}: cannot be read (")
    assert said in message
    assert path.read_bytes() == content
