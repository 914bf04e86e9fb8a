"""Shards of real images, read by other programs and compared with the files they came from."""

import fcntl
import io
import os
import re
import resource
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fork_server import BARE, Fork, Forks
from hypothesis import given
from hypothesis import strategies as st
from nvidia.dali import Pipeline, fn
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from wds2idx import IndexCreator

from data_pipelines.images.image_index import (
    INDEX_FILE,
    ImageIndex,
    open_images,
    save_index,
    scan_class_folders,
)
from data_pipelines.images.source import SHARDS_OPEN
from data_pipelines.sets.shard_check import verify_shards
from data_pipelines.sets.shard_format import SETTINGS_FILE, SHARD_BYTES, SKIPPED_FILE
from data_pipelines.sets.shard_writer import shard_starts, write_shards
from data_pipelines.shards import byte_count, main
from tpp.common.errors import UserError, run_command

ROOT = Path(__file__).resolve().parents[2]
PHOTOS = 60
# Of the photos some are larger than this, some smaller.
SIDE = 300


@pytest.fixture(scope="module")
def photos(unpack_photos: Callable[[int], ImageIndex]) -> ImageIndex:
    """Full-size ImageNet photos, grey ones among them."""
    return unpack_photos(PHOTOS)


@pytest.fixture(scope="module")
def cifar(
    shared_data: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> ImageIndex:
    """300 CIFAR-10 photos of each class."""
    root = tmp_path_factory.mktemp("cifar")
    counts: dict[str, int] = {}
    with tarfile.open(shared_data("cifar10-jpeg.tar.gz")) as archive:
        for member in archive:
            folder = str(Path(member.name).parent)
            counts[folder] = counts.get(folder, 0) + member.isfile()
            if member.isfile() and "/test/" in member.name and counts[folder] <= 300:
                path = root / member.name
                path.parent.mkdir(parents=True, exist_ok=True)
                # Extracting would set owners and times too.
                path.write_bytes(archive.extractfile(member).read())  # type: ignore[union-attr]
            elif "/test/" not in member.name and len(counts) > 12:
                break
    return scan_class_folders(root / "cifar10" / "test")


@pytest.fixture(scope="module")
def packed(photos: ImageIndex, tmp_path_factory: pytest.TempPathFactory) -> ImageIndex:
    """The photos in shards of a megabyte."""
    out = tmp_path_factory.mktemp("packed") / "train"
    write_shards(photos, out, shard_bytes=1_000_000)
    return open_images(out)


def _contents(folder: Path) -> dict[str, Any]:
    """Every file's bytes; but what the index says, since its keys have no order of their own."""
    found: dict[str, Any] = {path.name: path.read_bytes() for path in folder.iterdir()}
    if INDEX_FILE in found:
        found[INDEX_FILE] = _said(open_images(folder))
    return found


def _said(index: ImageIndex) -> dict[str, Any]:
    said = {key: value for key, value in vars(index).items() if key not in ("root", "file")}
    return {
        key: value.tolist() if isinstance(value, np.ndarray) else list(value)
        for key, value in said.items()
    }


def _bytes(index: ImageIndex, image: int) -> bytes:
    path, offset, length = index.location(image)
    data = Path(path).read_bytes()[offset:]
    return data if length < 0 else data[:length]


def _some(folder: Path, name: str = "1.jpg", **saving: Any) -> Path:
    """A folder of one class with a small picture in it."""
    path = folder / "class" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    image = Image.fromarray(pixels).resize((80, 60), Image.Resampling.BICUBIC)
    image.convert(saving.pop("mode", "RGB")).save(path, **saving)
    return path


def _start(forks: Forks, *arguments: object) -> Fork:
    """Start the command in a process of its own."""
    environment = {**os.environ, **BARE}
    return forks.start("data_pipelines.shards", [*map(str, arguments)], ROOT, environment)


def test_index_leads_to_the_bytes_of_every_file(photos: ImageIndex, packed: ImageIndex) -> None:
    assert packed.fingerprint == photos.fingerprint
    assert list(packed.files) == list(photos.files)
    assert packed.labels.tolist() == photos.labels.tolist()
    assert packed.classes == photos.classes
    assert len(packed.containers) > 3
    for image, name in enumerate(photos.files):
        assert _bytes(packed, image) == (photos.root / name).read_bytes()
        with Image.open(photos.root / name) as opened:
            assert tuple(packed.sizes[image]) == (opened.height, opened.width)


def test_tar_readers_find_images_and_labels(photos: ImageIndex, packed: ImageIndex) -> None:
    found = {}
    for name in packed.containers:
        with tarfile.open(packed.root / name, "r:") as archive:
            for member in archive:
                file = archive.extractfile(member)
                assert file is not None
                found[member.name] = file.read()
                assert (member.mtime, member.uid, member.gid) == (0, 0, 0)
    wanted = {}
    for image, name in enumerate(photos.files):
        wanted[f"{image:08d}.jpg"] = (photos.root / name).read_bytes()
        wanted[f"{image:08d}.cls"] = str(photos.labels[image]).encode()
    assert found == wanted
    listed = subprocess.run(
        ["tar", "tf", packed.root / packed.containers[0]],
        check=True,
        capture_output=True,
        text=True,
    )
    assert listed.stderr == ""
    # The end of an archive, without which some readers complain.
    assert (packed.root / packed.containers[0]).read_bytes().endswith(bytes(1024))
    assert set(listed.stdout.split()) <= set(wanted)


@pytest.mark.processes
def test_index_files_are_those_of_dalis_own_tool(packed: ImageIndex, tmp_path: Path) -> None:
    for name in packed.containers:
        tar = packed.root / name
        with IndexCreator(str(tar), str(tmp_path / "idx"), verbose=False) as creator:
            creator.create_index()
        assert tar.with_suffix(".idx").read_text() == (tmp_path / "idx").read_text()


def test_dali_reads_the_shards(photos: ImageIndex, tmp_path: Path) -> None:
    _some(tmp_path / "data", "2.png")
    with_png = tmp_path / "data" / "class"
    for image in range(5):
        shutil.copy(photos.location(image).path, with_png / f"{image}.jpg")
    source = scan_class_folders(tmp_path / "data")
    for index, number in ((photos, 1_000_000), (source, 50_000)):
        out = tmp_path / f"out-{number}"
        write_shards(index, out, shard_bytes=number)
        tars = [out / name for name in open_images(out).containers]
        pipeline = Pipeline(batch_size=len(index), num_threads=1, device_id=None)
        with pipeline:
            outputs: Any = fn.readers.webdataset(
                paths=[str(tar) for tar in tars],
                index_paths=[str(tar.with_suffix(".idx")) for tar in tars],
                ext=["jpg;png", "cls"],
                missing_component_behavior="error",
            )
            pipeline.set_outputs(*outputs)
        read: Any = pipeline.run()
        found = sorted(
            (read[0].at(row).tobytes(), int(read[1].at(row).tobytes())) for row in range(len(index))
        )
        assert found == sorted((_bytes(index, i), int(index.labels[i])) for i in range(len(index)))


def test_the_same_to_the_bit_every_time(cifar: ImageIndex, tmp_path: Path) -> None:
    for name, threads, seed in (("one", 1, 0), ("two", 3, 0), ("other", 1, 1)):
        write_shards(cifar, tmp_path / name, shard_bytes=500_000, threads=threads, seed=seed)
    one, two, other = (_contents(tmp_path / name) for name in ("one", "two", "other"))
    assert one == two
    assert all(one[name] != other[name] for name in one if name.endswith((".tar", ".idx")))
    assert open_images(tmp_path / "other").fingerprint == cifar.fingerprint


def test_each_shard_mixes_the_classes(cifar: ImageIndex, tmp_path: Path) -> None:
    written = write_shards(cifar, tmp_path, shard_bytes=500_000)
    index = open_images(tmp_path)
    assert written.shards == len(index.containers) > 10
    assert (index.marks <= 500_000).all()
    for number in range(written.shards - 1):
        counts = np.bincount(index.labels[index.container == number], minlength=10)
        # Of about 190 images; uneven to this degree once in 10^10.
        assert counts.min() > 0
        assert counts.max() < 60


@given(
    sizes=st.lists(st.integers(0, 5000) | st.sampled_from([0, 1, 511, 512, 513]), min_size=1),
    shard_bytes=st.integers(1, 30_000) | st.integers(1, 60).map(lambda blocks: 512 * blocks),
)
def test_shards_are_as_full_as_may_be(sizes: list[int], shard_bytes: int) -> None:
    starts = shard_starts(np.array(sizes, np.int64), shard_bytes)
    assert starts[0] == 0
    ends = [*starts[1:], len(sizes)]
    assert all(start < end for start, end in zip(starts, ends, strict=True))

    def tar_bytes(some: list[int]) -> int:
        return sum(3 * 512 + (size + 511) // 512 * 512 for size in some) + 1024

    for start, end in zip(starts, ends, strict=True):
        assert end - start == 1 or tar_bytes(sizes[start:end]) <= shard_bytes
        assert end == len(sizes) or tar_bytes(sizes[start : end + 1]) > shard_bytes


def test_shards_of_shards_are_the_same(packed: ImageIndex, tmp_path: Path) -> None:
    write_shards(packed, tmp_path / "again", shard_bytes=1_000_000)
    again, first = _contents(tmp_path / "again"), _contents(packed.root)
    assert {n: c for n, c in again.items() if "shard-" in n} == {
        n: c for n, c in first.items() if "shard-" in n
    }
    assert verify_shards(packed, tmp_path / "again").kept == PHOTOS


def test_a_killed_run_is_gone_on_with(cifar: ImageIndex, tmp_path: Path, forks: Forks) -> None:
    arguments = (cifar.root, "--shard-size", "20KB", "--threads", 2, "--output")
    process = _start(forks, *arguments, tmp_path / "out")
    while len(list((tmp_path / "out").glob("*.idx"))) < 5:
        assert process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.wait(60)
    whole = {path.name for path in (tmp_path / "out").glob("*.idx")}
    assert not (tmp_path / "out" / INDEX_FILE).exists()
    (tmp_path / "out" / ".shard-000001.tar.1.tmp").write_bytes(b"left by an earlier run")

    # What was whole is kept: the file itself, not only its bytes.
    kept = {name: (tmp_path / "out" / name).stat().st_ino for name in whole}
    written = write_shards(cifar, tmp_path / "out", shard_bytes=20_000)
    assert written.reused == len(whole) < written.shards
    assert {name: (tmp_path / "out" / name).stat().st_ino for name in whole} == kept
    write_shards(cifar, tmp_path / "undisturbed", shard_bytes=20_000)
    assert _contents(tmp_path / "out") == _contents(tmp_path / "undisturbed")


def test_an_interrupted_run_ends_at_once(photos: ImageIndex, tmp_path: Path, forks: Forks) -> None:
    # One shard of more images than can be scaled before the signal arrives.
    (tmp_path / "data" / "class").mkdir(parents=True)
    for copy in range(20):
        for image, name in enumerate(photos.files):
            (tmp_path / f"data/class/{copy}-{image}.jpg").hardlink_to(photos.root / name)
    arguments = (tmp_path / "data", "--output", tmp_path / "out", "--resize", 200, "--threads", 1)
    process = _start(forks, *arguments)
    while not list((tmp_path / "out").glob(".shard-*.tmp")):
        assert process.poll() is None
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(60) == 130
    assert process.output() == ("", "interrupted\n")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [SETTINGS_FILE]


@pytest.mark.parametrize("damage", ["cut", "gone", "idx", "pixels", "another"])
def test_what_is_not_whole_is_written_again(
    damage: str, packed: ImageIndex, photos: ImageIndex, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(packed.root, out)
    tar = out / packed.containers[1]
    if damage == "cut":
        os.truncate(tar, tar.stat().st_size - 512)
    elif damage == "gone":
        tar.unlink()
    elif damage == "idx":
        tar.with_suffix(".idx").write_text("v1.2 1\n")
    elif damage == "another":
        for ending in (".tar", ".idx"):
            shutil.copy(out / f"shard-000000{ending}", tar.with_suffix(ending))
    else:
        first = int(np.flatnonzero(packed.container == 1)[0])
        with tar.open("r+b") as file:
            file.seek(packed.offsets[first])
            file.write(b"\0\0")
    written = write_shards(photos, out, shard_bytes=1_000_000)
    assert written.reused == written.shards - 1
    assert _contents(out) == _contents(packed.root)


def test_scaled_images_are_those_of_pil(photos: ImageIndex, tmp_path: Path) -> None:
    written = write_shards(photos, tmp_path, shard_bytes=10**9, resize=SIDE, quality=80)
    index = open_images(tmp_path)
    saved = io.BytesIO()
    Image.new("RGB", (8, 8)).save(saved, "JPEG", quality=80)
    tables = JpegImageFile(io.BytesIO(saved.getvalue())).quantization
    errors: dict[Image.Resampling, list[float]] = {}
    sides = []
    for image, name in enumerate(photos.files):
        data = _bytes(index, image)
        with Image.open(photos.root / name) as before:
            sides.append(min(before.size))
            if min(before.size) <= SIDE:
                assert data == (photos.root / name).read_bytes()
                continue
            longer = int(SIDE * max(before.size) / min(before.size))
            size = (SIDE, longer) if before.width <= before.height else (longer, SIDE)
            with JpegImageFile(io.BytesIO(data)) as after:
                assert (after.size, after.mode) == (size, "L" if before.mode == "L" else "RGB")
                assert after.quantization[0] == tables[0]
                # Sampling factors of Y, Cb and Cr.
                factors = [layer[1:3] for layer in after.layer]
                assert factors == ([(1, 1)] if after.mode == "L" else [(2, 2), (1, 1), (1, 1)])
                brightness = np.asarray(after.convert("L"), float)
            assert tuple(index.sizes[image]) == size[::-1]
            for way in Image.Resampling:
                wanted = np.asarray(before.convert("RGB").resize(size, way).convert("L"), float)
                errors.setdefault(way, []).append(float(np.square(brightness - wanted).mean()))
    assert 0 < len(errors[Image.Resampling.LANCZOS]) < PHOTOS
    # About 30 dB: the JPEGs' own error. Each other filter would give a larger one.
    assert np.mean(errors[Image.Resampling.LANCZOS]) < 255**2 / 10**3
    assert min(errors, key=lambda way: np.mean(errors[way])) == Image.Resampling.LANCZOS
    assert written.scaled == sum(side > SIDE for side in sides)
    assert (written.side_before, written.side_after) == (
        pytest.approx(np.mean(sides)),
        pytest.approx(np.minimum(sides, SIDE).mean()),
    )
    before_bytes = sum((photos.root / name).stat().st_size for name in photos.files)
    assert written.bytes_before == before_bytes > written.bytes_after
    assert verify_shards(photos, tmp_path).kept == PHOTOS - written.scaled


def test_scaled_shards_are_about_as_large_as_asked(photos: ImageIndex, tmp_path: Path) -> None:
    for quality in (60, 90):
        out = tmp_path / str(quality)
        write_shards(photos, out, shard_bytes=500_000, resize=SIDE, quality=quality)
        sizes = open_images(out).marks[:-1]
        assert len(sizes) > 1
        assert 350_000 < sizes.mean() < 600_000


def test_sizes_of_an_index_give_the_same_shards(
    photos: ImageIndex, packed: ImageIndex, tmp_path: Path
) -> None:
    known = replace(photos, byte_sizes=packed.byte_sizes, sizes=packed.sizes)
    for index, name in ((photos, "looked up"), (known, "known")):
        write_shards(index, tmp_path / name, shard_bytes=500_000, resize=SIDE)
    assert _contents(tmp_path / "looked up") == _contents(tmp_path / "known")


def test_told_by_content_and_not_by_name(tmp_path: Path) -> None:
    originals = {
        name: _some(tmp_path / "data", name, format=kind, mode=mode)
        for name, kind, mode in (
            ("1.jpg", "PNG", "RGB"),
            ("2.png", "JPEG", "RGB"),
            ("3.jpg", "BMP", "RGB"),
            ("4.png", "WEBP", "RGB"),
            ("5.jpg", "GIF", "P"),
            ("6.jpg", "JPEG", "CMYK"),
            ("7.jpg", "BMP", "L"),
        )
    }
    source = scan_class_folders(tmp_path / "data")
    write_shards(source, tmp_path / "out")
    index = open_images(tmp_path / "out")
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as archive:
        endings = sorted(name for name in archive.getnames() if not name.endswith(".cls"))
    assert [name[-3:] for name in endings] == ["png", "jpg", "png", "png", "png", "jpg", "png"]
    for image, (name, path) in enumerate(originals.items()):
        data = _bytes(index, image)
        if name[0] in "126":
            assert data == path.read_bytes()
        with Image.open(path) as before, Image.open(io.BytesIO(data)) as after:
            assert after.format == {"png": "PNG", "jpg": "JPEG"}[endings[image][-3:]]
            assert before.convert("RGB").tobytes() == after.convert("RGB").tobytes()
    assert index.fingerprint == source.fingerprint
    verified = verify_shards(source, tmp_path / "out")
    assert (verified.kept, verified.converted) == (3, 4)


@pytest.mark.parametrize("mode", ["CMYK", "L", "RGB"])
def test_scaled_images_are_plain_and_not_turned(mode: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    more: dict[str, Any] = {"exif": exif, "icc_profile": b"profile", "comment": b"words"}
    path = _some(tmp_path / "data", mode=mode, quality=95, subsampling=0, **more)
    write_shards(scan_class_folders(tmp_path / "data"), tmp_path / "out", resize=30)
    data = _bytes(open_images(tmp_path / "out"), 0)
    with Image.open(path) as before, Image.open(io.BytesIO(data)) as after:
        assert not {"exif", "icc_profile", "comment"} & after.info.keys()
        assert after.size == (40, 30)
        assert after.mode == ("L" if mode == "L" else "RGB")
        wanted = before.convert(after.mode).resize((40, 30), Image.Resampling.BOX)
        assert abs(np.asarray(after, float) - np.asarray(wanted, float)).mean() < 8


@pytest.mark.parametrize("resize", [60, 61, 10_000])
def test_what_is_not_too_large_is_kept(resize: int, tmp_path: Path) -> None:
    path = _some(tmp_path / "data")
    written = write_shards(scan_class_folders(tmp_path / "data"), tmp_path / "out", resize=resize)
    assert written.scaled == 0
    assert _bytes(open_images(tmp_path / "out"), 0) == path.read_bytes()


def test_deep_colours_become_grey_of_the_same_brightness(tmp_path: Path) -> None:
    path = tmp_path / "data" / "class" / "1.png"
    path.parent.mkdir(parents=True)
    Image.fromarray(np.full((40, 40), 51_400, np.uint16)).save(path)
    write_shards(scan_class_folders(tmp_path / "data"), tmp_path / "out", resize=20)
    with Image.open(io.BytesIO(_bytes(open_images(tmp_path / "out"), 0))) as after:
        assert (after.mode, after.size) == ("L", (20, 20))
        assert abs(np.asarray(after).astype(int) - 200).max() <= 1


@pytest.fixture
def with_broken(photos: ImageIndex, tmp_path: Path) -> ImageIndex:
    """Eight photos, of which one has lost its second half and another is empty."""
    root = tmp_path / "data"
    for image in range(8):
        name = photos.files[image]
        (root / name).parent.mkdir(parents=True)
        shutil.copy(photos.root / name, root / name)
    os.truncate(root / photos.files[2], 20_000)
    os.truncate(root / photos.files[5], 0)
    return scan_class_folders(root)


def test_broken_images_are_a_mistake(with_broken: ImageIndex, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"a broken image \(.*--skip-broken") as caught:
        write_shards(with_broken, out)
    assert any(str(caught.value).startswith(f"{with_broken.location(i).path}: ") for i in (2, 5))
    assert not list(out.glob("*shard-*"))
    assert not (out / INDEX_FILE).exists()


def test_broken_images_can_be_left_out(with_broken: ImageIndex, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError):
        write_shards(with_broken, out)
    good = [0, 1, 3, 4, 6, 7]
    for reused in (0, 1):
        written = write_shards(with_broken, out, skip_broken=True)
        assert (written.images, written.skipped, written.reused) == (6, 2, reused)
        index = open_images(out)
        assert list(index.files) == [with_broken.files[i] for i in good]
        assert index.labels.tolist() == good
        assert [_bytes(index, i) for i in range(6)] == [_bytes(with_broken, i) for i in good]
        header, *rows = (out / SKIPPED_FILE).read_text().splitlines()
        assert header == "path\treason"
        assert [row.split("\t")[0] for row in rows] == [
            with_broken.location(i).path for i in (2, 5)
        ]
        assert all(row.split("\t")[1] for row in rows)
    assert verify_shards(with_broken, out).kept == 6
    with pytest.raises(UserError, match="a broken image"):
        write_shards(with_broken, out)


def test_a_mended_image_is_taken_in(with_broken: ImageIndex, tmp_path: Path) -> None:
    broken = Path(with_broken.location(5).path)
    shutil.copy(with_broken.location(4).path, broken)
    good = broken.read_bytes()
    broken.write_bytes(b"\0" * len(good))
    write_shards(with_broken, tmp_path / "out", skip_broken=True)
    assert len(open_images(tmp_path / "out")) == 6
    broken.write_bytes(good)
    written = write_shards(with_broken, tmp_path / "out", skip_broken=True)
    assert (written.images, written.reused) == (7, 0)
    assert _bytes(open_images(tmp_path / "out"), 4) == good


def test_known_broken_images_stop_before_anything_is_written(
    with_broken: ImageIndex, tmp_path: Path
) -> None:
    broken = np.isin(np.arange(8), [2, 5])
    lengths = np.array([Path(with_broken.location(i).path).stat().st_size for i in range(8)])
    known = replace(with_broken, broken=broken, byte_sizes=lengths, file=tmp_path / "index")
    with pytest.raises(UserError) as caught:
        write_shards(known, tmp_path / "out")
    said = str(caught.value)
    assert said.startswith(f"{tmp_path / 'index'}: says that 2 of 8 images are broken")
    assert known.location(2).path in said
    assert not (tmp_path / "out").exists()
    write_shards(known, tmp_path / "out", skip_broken=True)
    write_shards(with_broken, tmp_path / "unknown", skip_broken=True)
    out, unknown = _contents(tmp_path / "out"), _contents(tmp_path / "unknown")
    assert {**out, SKIPPED_FILE: b""} == {**unknown, SKIPPED_FILE: b""}
    assert out[SKIPPED_FILE].count(b"broken, says the index") == 2


def test_nothing_but_broken_images(tmp_path: Path) -> None:
    _some(tmp_path / "data").write_bytes(b"no image")
    with pytest.raises(UserError, match="none of its 1 images can be read"):
        write_shards(scan_class_folders(tmp_path / "data"), tmp_path / "out", skip_broken=True)
    assert not (tmp_path / "out" / INDEX_FILE).exists()


@pytest.mark.parametrize("length", [-1, 20_000])
def test_what_cannot_be_read_is_never_left_out(
    length: int, with_broken: ImageIndex, tmp_path: Path
) -> None:
    with_broken.byte_sizes[:] = length
    path = Path(with_broken.location(1).path)
    path.unlink()
    with pytest.raises(UserError, match=r"cannot read this image \(No such file") as caught:
        write_shards(with_broken.subset(np.array([1])), tmp_path / "out", skip_broken=True)
    assert str(caught.value).startswith(f"{path}: ")
    assert not list((tmp_path / "out").glob("*shard-*"))


@pytest.mark.parametrize("more", [-1, 1])
def test_a_file_that_has_changed_is_not_called_broken(more: int, tmp_path: Path) -> None:
    path = _some(tmp_path / "data")
    source = scan_class_folders(tmp_path / "data")
    source.byte_sizes[:] = path.stat().st_size + more
    with pytest.raises(UserError, match="is no longer as its index says") as caught:
        write_shards(source, tmp_path / "out", skip_broken=True)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_shard_that_ends_too_early_is_not_called_broken(
    packed: ImageIndex, tmp_path: Path
) -> None:
    shutil.copytree(packed.root, tmp_path / "cut")
    source = open_images(tmp_path / "cut")
    last = int(np.flatnonzero(source.container == 2)[-1])
    os.truncate(source.location(last).path, int(source.offsets[last]) + 100)
    with pytest.raises(UserError, match=r"is no longer as its index says \(.* too early") as caught:
        write_shards(source, tmp_path / "out", skip_broken=True)
    assert str(caught.value).startswith(source.location(last).path)


@pytest.mark.parametrize("place", ["", "class", "class/deeper", "shards"])
def test_not_into_the_data_itself(place: str, tmp_path: Path) -> None:
    _some(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="lies in the data that is read"):
        write_shards(scan_class_folders(tmp_path), tmp_path / place)
    assert sorted(tmp_path.rglob("*")) == before


def test_one_folder_is_for_one_source_and_its_settings(tmp_path: Path) -> None:
    path = _some(tmp_path / "data")
    source, out = scan_class_folders(tmp_path / "data"), tmp_path / "out"
    write_shards(source, out)
    before = _contents(out)
    others: list[tuple[dict[str, Any], str]] = [
        ({"seed": 1}, "seed is 0, now 1"),
        ({"shard_bytes": 5000}, "shard bytes is 1000000000, now 5000"),
        ({"resize": 50}, "resize is None, now 50"),
    ]
    for changes, said in others:
        with pytest.raises(UserError, match=f"another source or with other settings: {said}"):
            write_shards(source, out, **changes)
    content = path.read_bytes()
    path.write_bytes(content + b"\0")
    with pytest.raises(UserError, match="source bytes is "):
        write_shards(source, out)
    path.write_bytes(content)
    _some(tmp_path / "data", "2.jpg")
    other = scan_class_folders(tmp_path / "data")
    with pytest.raises(UserError, match=f"source is {source.fingerprint}, now {other.fingerprint}"):
        write_shards(other, out)
    assert _contents(out) == before


def test_what_others_wrote_is_left_alone(tmp_path: Path) -> None:
    _some(tmp_path / "data")
    for name in ("shard-000000.tar", INDEX_FILE):
        out = tmp_path / name / "out"
        out.mkdir(parents=True)
        (out / name).write_text("precious")
        with pytest.raises(UserError, match="not from this command"):
            write_shards(scan_class_folders(tmp_path / "data"), out)
        assert {path.name: path.read_text() for path in out.iterdir()} == {name: "precious"}


def test_two_runs_at_once_are_refused(tmp_path: Path) -> None:
    _some(tmp_path / "data")
    out = tmp_path / "out"
    out.mkdir()
    descriptor = os.open(out, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another process is making"):
        write_shards(scan_class_folders(tmp_path / "data"), out)
    os.close(descriptor)
    write_shards(scan_class_folders(tmp_path / "data"), out)


def test_too_little_room_is_found_beforehand(tmp_path: Path) -> None:
    # A hole, which takes no room itself.
    os.truncate(_some(tmp_path / "data"), 10**12)
    with pytest.raises(UserError, match=r"need about 1\.0 TB, and .* are free"):
        write_shards(scan_class_folders(tmp_path / "data"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_failed_write_is_one_line_and_leaves_whole_shards(
    photos: ImageIndex,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    arguments = [str(photos.root), "--output", str(out), "--shard-size", "300KB", "--threads", "1"]
    monkeypatch.setattr("sys.argv", ["shards", *arguments])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200 * 1024, before[1]))
    try:
        with pytest.raises(SystemExit) as ended:
            run_command(main)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    output, errors = capsys.readouterr()
    assert (ended.value.code, output) == (2, "")
    assert errors.startswith(f"error: {out}/shard-")
    assert "cannot write this shard (File too large)" in errors
    assert errors.count("\n") == 1
    assert {path.suffix for path in out.iterdir()} <= {".tar", ".idx", ".json"}
    write_shards(photos, out, shard_bytes=300_000)
    write_shards(photos, tmp_path / "undisturbed", shard_bytes=300_000)
    assert _contents(out) == _contents(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("image", "not the bytes of"),
        ("label", "not the label of"),
        ("idx", "does not fit its shard"),
        ("index", "not where the index says"),
    ],
)
def test_verify_finds_every_change(
    part: str, said: str, packed: ImageIndex, photos: ImageIndex, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(packed.root, out)
    assert verify_shards(photos, out).kept == PHOTOS
    path, offset, length = open_images(out).location(7)
    idx = Path(path).with_suffix(".idx")
    if part == "idx":
        idx.write_text(idx.read_text().replace("cls", "txt", 1))
    else:
        tar, places = bytearray(Path(path).read_bytes()), idx.read_text()
        if part == "image":
            tar[offset + length // 2] ^= 1
        elif part == "label":
            line = next(line for line in places.splitlines() if "00000007.jpg" in line)
            tar[int(line.split()[5])] ^= 1
        else:
            wrong = open_images(out)
            moved = wrong.offsets.copy()
            moved[7] += 1
            save_index(replace(wrong, offsets=moved), out / INDEX_FILE)
        Path(path).write_bytes(tar)
    with pytest.raises(UserError, match=said) as caught:
        verify_shards(photos, out)
    assert "\n" not in str(caught.value)


def _encoded(kind: str, size: tuple[int, int]) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", size).save(data, kind)
    return data.getvalue()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "a broken image (not an image)"),
        (_encoded("JPEG", (8, 8)), "2.jpg should have"),
        (_encoded("PNG", (40, 30)), "holds an image of format png"),
        (None, "not of the size that the index says"),
    ],
)
def test_verify_looks_at_scaled_images_too(data: bytes | None, said: str, tmp_path: Path) -> None:
    for name in ("1.jpg", "2.jpg"):
        _some(tmp_path / "data", name, quality=95)
    source, out = scan_class_folders(tmp_path / "data"), tmp_path / "out"
    write_shards(source, out, resize=30)
    assert verify_shards(source, out).converted == 2
    index = open_images(out)
    path, offset, length = index.location(1)
    if data is None:
        save_index(replace(index, sizes=index.sizes + 1), out / INDEX_FILE)
    else:
        assert len(data) <= length
        with Path(path).open("r+b") as file:
            file.seek(offset)
            file.write(data.ljust(length, b"\0"))
    with pytest.raises(UserError, match=re.escape(said)):
        verify_shards(source, out)


def test_verify_misses_no_sample(tmp_path: Path) -> None:
    for name in ("1.jpg", "2.jpg"):
        _some(tmp_path / "data", name)
    source, out = scan_class_folders(tmp_path / "data"), tmp_path / "out"
    write_shards(source, out)
    index = open_images(out)
    path, offset, _ = index.location(int(index.offsets.argmax()))
    with Path(path).open("r+b") as file:
        file.seek(offset - 512)
        file.write(bytes(512))
    with pytest.raises(UserError, match="holds 1 samples, the index says otherwise"):
        verify_shards(source, out)


def test_verify_wants_finished_shards_of_this_source(
    packed: ImageIndex, photos: ImageIndex, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(packed.root, out)
    fewer = photos.subset(np.arange(1, PHOTOS))
    with pytest.raises(UserError, match="another source"):
        verify_shards(fewer, out)
    (out / INDEX_FILE).unlink()
    with pytest.raises(UserError, match="no finished shards"):
        verify_shards(photos, out)


def test_all_shards_of_imagenet_stay_open() -> None:
    """In a shuffle of the whole each image would otherwise open its shard anew."""
    images, mean_bytes = 1_281_167, 110_000
    sizes = np.full(images, mean_bytes)
    assert 100 < len(shard_starts(sizes, SHARD_BYTES)) < SHARDS_OPEN


@pytest.mark.parametrize(
    ("text", "count"),
    [("256MB", 256_000_000), ("1 GiB", 2**30), ("1.5kb", 1500), ("2MiB", 2**21)],
)
def test_sizes_in_words(text: str, count: int) -> None:
    assert byte_count(text) == count


@pytest.mark.parametrize("text", ["256", "MB", "-1MB", "0MB", "1TB", "1MBB", "", "1e3MB", "nanMB"])
def test_sizes_need_a_number_and_a_unit(text: str) -> None:
    with pytest.raises(UserError, match="must be such as 256MB"):
        byte_count(text)


def test_command_packs_the_parts_of_a_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for part, count in (("train", 3), ("test", 2)):
        for number in range(count):
            _some(tmp_path / "data" / part, f"{number}.jpg")
    arguments = ["shards", str(tmp_path / "data"), "--output", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", [*arguments, "--resize", "30"])
    run_command(main)
    said = capsys.readouterr().out
    train, val = (
        {line[:12].strip(): line[13:] for line in block.splitlines()}
        for block in said.split("\n\n")
    )
    assert (train["images"], val["images"]) == ("3", "2")
    assert train["scaled"] == "3 to a shorter side of 30 pixels"
    assert train["shorter side"] == "30 pixels on average, 60 before"
    assert train["written to"] == str(tmp_path / "out" / "train")
    assert len(open_images(tmp_path / "out" / "val")) == 2
    monkeypatch.setattr("sys.argv", [*arguments, "--verify"])
    run_command(main)
    assert "3, all as they should be" in capsys.readouterr().out


def test_a_class_named_train_is_a_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("test", "train"):
        path = _some(tmp_path / "data", f"{name}.jpg")
        (tmp_path / "data" / name).mkdir()
        path.rename(tmp_path / "data" / name / "1.jpg")
    (tmp_path / "data" / "class").rmdir()
    monkeypatch.setattr("sys.argv", ["shards", f"{tmp_path}/data", "--output", f"{tmp_path}/out"])
    run_command(main)
    assert open_images(tmp_path / "out").classes == ["test", "train"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--shard-size", "lots"], "--shard-size must be such as 256MB"),
        (
            ["--threads", "0"],
            "python -m data_pipelines.shards: --threads: must be at least 1, not 0",
        ),
        (["--resize", "0"], "resize must be 1 or more, not 0"),
        (["--quality", "101"], "quality must be 1 to 100, not 101"),
        (["--verify"], "holds no finished shards"),
    ],
)
def test_command_ends_a_mistake_in_one_line(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _some(tmp_path / "data")
    out = tmp_path / "out"
    monkeypatch.setattr(
        "sys.argv", ["shards", f"{tmp_path}/data", "--output", str(out), *arguments]
    )
    with pytest.raises(SystemExit) as caught:
        run_command(main)
    assert caught.value.code == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith("error: ")
    assert said in errors
    assert errors.count("\n") == 1
    assert not out.exists()
