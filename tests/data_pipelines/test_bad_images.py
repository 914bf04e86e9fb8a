"""Images that cannot be read: named, or skipped by both loaders in the same way on any ranks."""

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipelines.images import source
from data_pipelines.images.batch import LoaderSettings, Request
from data_pipelines.images.image_index import ImageIndex, Location, load_index, save_index
from data_pipelines.images.image_index import scan_class_folders as scan
from data_pipelines.images.order import Steps, permutation
from data_pipelines.images.source import BadImages, ImageSource, read_bytes
from data_pipelines.loaders import eval_batches, train_batches, training_order
from data_pipelines.loading.augment import ImageTransform
from tests.data_pipelines.image_formats import lossless_jpeg
from tpp.common.errors import UserError

# The torchvision loader's workers.
pytestmark = pytest.mark.processes

CPU = torch.device("cpu")
LOADERS = ["dali", "torchvision"]
SEED, FILES = 11, 400
PLAIN = ImageTransform(16, None, "none", (0.0,) * 3, (1 / 255,) * 3)


def _write_images(root: Path, count: int) -> None:
    """Small JPEGs whose grey level tells them apart, in two classes."""
    for number in range(count):
        path = root / ("a" if number < count // 2 else "b") / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        level = (number // 256 * 60 + 20, number % 256, 99)
        Image.new("RGB", (16, 16), level).save(path, quality=100, subsampling=0)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def _without_scan(path: Path) -> None:
    """Leave the header and the end marker whole, and no pixels between them."""
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"\xff\xda")] + b"\xff\xd9")


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "truncated": _truncate,
    "emptied": lambda path: path.write_bytes(b""),
    "deleted": lambda path: path.unlink(),
    "text": lambda path: path.write_text("<html>404 not found</html>\n" * 20),
    "without pixels": _without_scan,
}


@pytest.fixture
def damaged(tmp_path: Path) -> tuple[ImageIndex, set[int]]:
    """400 files of which more than 1% are bad, each kind of damage once; two lie side by side."""
    _write_images(tmp_path, FILES)
    index = scan(tmp_path)
    order = permutation(SEED, 0, FILES)
    bad = [int(order[place]) for place in (3, 4, 70, 171, 399)]
    for image, damage in zip(bad, DAMAGE.values(), strict=True):
        damage(tmp_path / index.files[image])
    return index, set(bad)


def _colours(index: ImageIndex, images: np.ndarray) -> list[list[int]]:
    numbers = [int(Path(index.files[image]).stem) for image in images.tolist()]
    return [[number // 256 * 60 + 20, number % 256] for number in numbers]


def _assert_shows(images: torch.Tensor, index: ImageIndex, expected: np.ndarray) -> None:
    """JPEG stores these colours to within 2 levels; the images of a class differ in 1 of them."""
    seen = images[:, :2].mean((2, 3)).numpy()
    np.testing.assert_allclose(seen, _colours(index, expected), atol=2.5)


def _train(
    index: ImageIndex,
    bad: BadImages,
    loader: str,
    *,
    start: int = 0,
    steps: int = 18,
    threads: int = 1,
    rank: int = 0,
    world_size: int = 1,
) -> list[Any]:
    order = training_order(index, SEED)
    settings = LoaderSettings(loader, threads, CPU, rank, world_size)
    return list(train_batches(index, PLAIN, order, Steps(24, 1, start, steps), settings, bad=bad))


def _threads(loader: str, *, worker: bool) -> int:
    """No worker process of torchvision's loader where one would prove nothing: it takes seconds."""
    return int(loader == "dali" or worker)


def _evaluate(
    index: ImageIndex,
    bad: BadImages,
    loader: str,
    batch_size: int,
    *,
    threads: int = 1,
    rank: int = 0,
    world_size: int = 1,
) -> Any:
    settings = LoaderSettings(loader, threads, CPU, rank, world_size)
    return eval_batches(index, PLAIN, batch_size, settings, bad=bad)


def _stream(count: int, bad: set[int]) -> np.ndarray:
    """The images of the first samples, by plain search: a bad one gives way to the next good."""
    whole = np.concatenate([permutation(SEED, epoch, FILES) for epoch in range(3)]).tolist()
    images = []
    for sample in range(count):
        place = sample
        while whole[place] in bad:
            place += 1
        images.append(whole[place])
    return np.array(images)


@pytest.mark.parametrize("loader", LOADERS)
def test_bad_images_give_way_to_the_next_of_the_order(
    damaged: tuple[ImageIndex, set[int]], loader: str
) -> None:
    index, bad = damaged
    known = BadImages(index, on_error="skip", limit=0.02)
    batches = _train(index, known, loader)  # 432 samples: the last bad image ends an epoch
    images = torch.cat([images for images, _ in batches])
    labels = torch.cat([labels for _, labels in batches])
    expected = _stream(432, bad)
    assert labels.tolist() == index.labels[expected].tolist()
    _assert_shows(images, index, expected)
    found = known.take_new()
    assert sorted(path for path, _ in found) == sorted(
        f"{index.root}/{index.files[i]}" for i in bad
    )
    assert all(reason and "\n" not in reason for _, reason in found)
    # Each one is told once: not again in the second epoch, nor when asked again.
    _train(index, known, loader, start=18, steps=17)
    assert known.take_new() == []


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_what_replaces_them_does_not_depend_on_the_ranks(
    damaged: tuple[ImageIndex, set[int]], loader: str, world_size: int
) -> None:
    index, bad = damaged
    ranks = [
        _train(
            index,
            BadImages(index, on_error="skip", limit=0.05, world_size=world_size),
            loader,
            steps=9,
            start=2,
            threads=_threads(loader, worker=False),
            rank=rank,
            world_size=world_size,
        )
        for rank in range(world_size)
    ]
    expected = _stream(11 * 24, bad)[48:].reshape(9, 24)
    for step in range(9):
        together = torch.empty(24, dtype=torch.int64)
        for rank in range(world_size):
            images, together[rank::world_size] = ranks[rank][step]
            _assert_shows(images, index, expected[step, rank::world_size])
        assert together.tolist() == index.labels[expected[step]].tolist()


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_leaves_them_out(
    damaged: tuple[ImageIndex, set[int]], loader: str, world_size: int
) -> None:
    index, bad = damaged
    seen: dict[int, list[Any]] = {}
    for rank in range(world_size):
        known = BadImages(index, on_error="skip", limit=0.05, world_size=world_size)
        batches = _evaluate(
            index,
            known,
            loader,
            batch_size=7,
            threads=_threads(loader, worker=world_size == 1),
            rank=rank,
            world_size=world_size,
        )
        images, labels = (torch.cat(part) for part in zip(*batches, strict=True))
        mine = np.array([i for i in range(rank, FILES, world_size) if i not in bad])
        _assert_shows(images, index, mine)
        seen |= dict(zip(mine.tolist(), labels.tolist(), strict=True))
    assert seen == {i: int(index.labels[i]) for i in range(FILES) if i not in bad}


@pytest.mark.parametrize("loader", LOADERS)
def test_a_batch_of_nothing_but_bad_images_is_left_out(tmp_path: Path, loader: str) -> None:
    _write_images(tmp_path, 12)
    index = scan(tmp_path)
    for image in (4, 5, 6, 7):
        (tmp_path / index.files[image]).write_bytes(b"")
    known = BadImages(index, on_error="skip", limit=0.5)
    batches = _evaluate(index, known, loader, batch_size=4)
    assert [len(labels) for _, labels in batches] == [4, 4]


@pytest.mark.parametrize("loader", LOADERS)
def test_what_only_the_decoder_notices_comes_after_a_batch_left_out(
    tmp_path: Path, loader: str
) -> None:
    _write_images(tmp_path, 40)
    index = scan(tmp_path)
    for image in (0, 1, 2, 3):
        (tmp_path / index.files[image]).write_bytes(b"")
    _without_scan(tmp_path / index.files[37])
    known = BadImages(index, on_error="skip", limit=0.5)
    batches = _evaluate(index, known, loader, batch_size=4)
    images = torch.cat([images for images, _ in batches])
    _assert_shows(images, index, np.array([*range(4, 37), 38, 39]))


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("damage", DAMAGE)
def test_without_leave_to_skip_the_file_is_named(tmp_path: Path, loader: str, damage: str) -> None:
    _write_images(tmp_path, 48)
    index = scan(tmp_path)
    image = int(permutation(SEED, 0, 48)[30])
    DAMAGE[damage](tmp_path / index.files[image])
    settings = LoaderSettings(loader, _threads(loader, worker=damage == "deleted"), CPU)
    batches = train_batches(index, PLAIN, training_order(index, SEED), Steps(8, 1, 0, 6), settings)
    came = 0
    with pytest.raises(UserError) as caught:
        for _ in batches:
            came += 1
    assert str(caught.value).startswith(
        f"{tmp_path}/{index.files[image]}: cannot read this image ("
    )
    assert "\n" not in str(caught.value)
    # The batches before it come first. (DALI makes some ahead: those are lost if it is DALI itself
    # that cannot decode it.)
    assert came == 3 or (loader == "dali" and damage == "without pixels" and came <= 3)


@pytest.mark.parametrize("loader", LOADERS)
def test_too_many_bad_images_end_the_run(damaged: tuple[ImageIndex, set[int]], loader: str) -> None:
    index, _ = damaged  # five of 400
    known = BadImages(index, on_error="skip", limit=0.0101)
    with pytest.raises(UserError) as caught:
        _train(index, known, loader)
    message = str(caught.value)
    assert "cannot read this image" in message and "4 others of the 400" in message
    assert "data.max_skipped allows a share of 0.0101, which would now be 0.0125" in message


@pytest.mark.parametrize("loader", LOADERS)
def test_a_folder_that_is_gone_ends_the_run_at_once(tmp_path: Path, loader: str) -> None:
    _write_images(tmp_path / "here", 60)
    index = scan(tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    known = BadImages(index, on_error="skip", limit=0.1)
    with pytest.raises(UserError, match=r"No such file or directory.*data\.max_skipped"):
        _train(index, known, loader)
    assert len(known.take_new()) < 30  # of 60: one too many, and what DALI's 16 readers were at


def test_each_rank_judges_by_its_own_share() -> None:
    index = ImageIndex.of("/data", [f"a/{i}.jpg" for i in range(1000)], [0] * 1000, ["a"])
    known = BadImages(index, on_error="skip", limit=0.01, world_size=10)  # 100 each
    known.add(3, "why")
    with pytest.raises(UserError, match="of the 100 that this rank reads"):
        known.add(4, "why")
    later = BadImages(index, on_error="skip", limit=0.01, world_size=10)
    later.ask(10_000)  # many epochs: by now it may have met all of them
    for image in range(10):
        later.add(image, "why")
        later.add(image, "again")  # the same one does not count twice
    with pytest.raises(UserError, match=r"of the 1,000 that this rank reads.*0\.011"):
        later.add(10, "why")


@pytest.mark.parametrize("loader", LOADERS)
def test_what_a_rank_has_asked_for_counts_as_its_share(tmp_path: Path, loader: str) -> None:
    _write_images(tmp_path, 48)
    index = scan(tmp_path)
    # Rank 0 of 4 reads a quarter of every epoch: one that it meets in the third epoch only.
    quarters = [set(permutation(SEED, epoch, 48)[::4].tolist()) for epoch in range(3)]
    (tmp_path / index.files[min(quarters[2] - quarters[0] - quarters[1])]).unlink()
    known = BadImages(index, on_error="skip", limit=0.0, world_size=4)
    with pytest.raises(UserError) as caught:
        _train(index, known, loader, world_size=4, steps=6)
    share = re.search(r"of the (\d+) that this rank reads", str(caught.value))
    assert share is not None and 24 < int(share[1]) <= 36


def test_what_the_index_knows_is_broken_is_never_read(tmp_path: Path) -> None:
    _write_images(tmp_path, 40)
    broken = np.zeros(40, dtype=np.bool_)
    broken[[5, 6]] = True
    listed = scan(tmp_path)
    index = ImageIndex.of(tmp_path, listed.files, listed.labels, listed.classes, broken=broken)
    save_index(index, tmp_path / ".index.safetensors")
    index = load_index(tmp_path / ".index.safetensors", tmp_path)
    with pytest.raises(
        UserError, match=r"says that 2 of 40 images are broken.*data\.on_error=skip"
    ):
        BadImages(index)
    with pytest.raises(UserError, match=r"2 of 40 images are broken.*max_skipped allows 0\.01"):
        BadImages(index, on_error="skip", limit=0.01)
    known = BadImages(index, on_error="skip", limit=0.06)
    for image in (5, 6):  # readable, but the index says otherwise
        assert image in known
    batches = _evaluate(index, known, "dali", batch_size=40)
    assert len(next(batches)[1]) == 38
    assert [reason for _, reason in known.take_new()] == ["broken, says the index"] * 2
    with pytest.raises(UserError, match=r"which would now be 0\.075"):
        known.add(7, "why")  # 1 of 40 beside the 2 of 40


def test_a_file_system_that_comes_back_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    monkeypatch.setattr(source, "_PAUSES", (0.0, 0.0, 0.0))
    real, failures = os.preadv, [errno.ESTALE, errno.EIO, errno.ETIMEDOUT]

    def shaky(descriptor: int, buffers: Any, offset: int) -> int:
        if failures:
            raise OSError(failures.pop(), "away")
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", shaky)
    assert read_bytes(Location(str(path), 0, -1)).tobytes() == b"content"
    failures += [errno.EIO] * 4
    with pytest.raises(OSError, match="away"):
        read_bytes(Location(str(path), 0, -1))
    failures[:] = [errno.EACCES]
    with pytest.raises(PermissionError):  # said for good: not asked again
        read_bytes(Location(str(path), 0, -1))
    assert not failures


def test_a_stretch_of_a_file_is_read_exactly(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    path.write_bytes(bytes(range(200)))
    assert read_bytes(Location(str(path), 20, 30)).tolist() == list(range(20, 50))
    with pytest.raises(ValueError, match="ends 10 bytes too early"):
        read_bytes(Location(str(path), 190, 20))


def _scan_of(data: bytes) -> int:
    """Where the pixels of a JPEG begin."""
    start = data.index(b"\xff\xda")
    return start + 2 + (data[start + 2] << 8 | data[start + 3])


def _with_stray_marker(path: Path) -> None:
    """A marker that does not belong among the pixels: Pillow gives up, DALI takes no notice."""
    data = path.read_bytes()
    place = _scan_of(data) + 60
    path.write_bytes(data[:place] + b"\xff\xc0\x00\x03" + data[place + 4 :])


def _with_wrong_check(path: Path) -> None:
    """A PNG one of whose chunks does not fit its CRC."""
    Image.open(path).save(path, "PNG")
    data = path.read_bytes()
    place = data.index(b"IEND") - 6
    path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])


def _with_words_between(path: Path) -> None:
    """Bytes that are no segment before the pixels: Pillow passes over them, DALI gives up."""
    data = path.read_bytes()
    start = data.index(b"\xff\xda")
    path.write_bytes(data[:start] + b"abc" + data[start:])


def _noisy(path: Path, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, "JPEG", quality=95)


@pytest.mark.parametrize("trusting", [False, True])
def test_both_loaders_leave_out_the_same_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trusting: bool
) -> None:
    """Whether the header tells that an image is an odd one, or DALI alone finds it out."""
    from data_pipelines.loading import dali

    if trusting:
        monkeypatch.setattr(dali, "is_common", lambda data: True)
    (tmp_path / "a").mkdir()
    files = [tmp_path / "a" / f"{number}.jpg" for number in range(8)]
    for number, path in enumerate(files):
        _noisy(path, number)
    _with_words_between(files[1])
    Image.open(files[2]).save(files[2], "GIF")
    _without_scan(files[5])
    files[6].write_bytes(lossless_jpeg(np.asarray(Image.open(files[6]))))
    _with_wrong_check(files[4])
    if not trusting:
        _with_stray_marker(files[3])
    index = scan(tmp_path)
    for channels, augmentation in ((3, "none"), (1, "none"), (1, "imagenet")):
        transform = ImageTransform(
            24, None, augmentation, (0.0,) * channels, (1 / 255,) * channels, channels
        )
        made, left_out = {}, {}
        for loader in LOADERS:
            bad = BadImages(index, on_error="skip", limit=1)
            settings = LoaderSettings(loader, int(loader == "dali"), CPU)
            if augmentation == "none":
                batches = list(eval_batches(index, transform, 4, settings, bad=bad))
            else:
                order, steps = training_order(index, SEED), Steps(4, 1, 0, 4)
                batches = list(train_batches(index, transform, order, steps, settings, bad=bad))
            made[loader] = torch.cat([images for images, _ in batches])
            left_out[loader] = {path for path, _ in bad.take_new()}
        expected = {str(files[5])} if trusting else {str(files[3]), str(files[5])}
        assert left_out["dali"] == left_out["torchvision"] == expected
        torch.testing.assert_close(made["dali"], made["torchvision"], rtol=0, atol=1.01)


def test_of_a_batch_that_fails_only_the_images_behind_it_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A colour lossless JPEG on a grey network, which DALI decodes in its own colours only."""
    from data_pipelines.loading import dali

    monkeypatch.setattr(dali, "is_common", lambda data: True)
    _write_images(tmp_path, 4)
    index = scan(tmp_path)
    path = tmp_path / index.files[2]
    path.write_bytes(lossless_jpeg(np.asarray(Image.open(path))))
    images, bad, error = np.arange(4), BadImages(index), RuntimeError("critical")
    source = ImageSource(index, None, bad)
    for channels, refused in ((1, {2}), (3, set())):
        requests = iter([Request(images, images, np.empty((4, 0)), 16)])
        transform = ImageTransform(
            16, None, "none", (0.0,) * channels, (1 / 255,) * channels, channels
        )
        feed = dali._Feed(source, requests, transform, set())
        next(feed)
        if refused:
            dali._settle(source, feed, transform, CPU, error)
        else:  # no image's fault
            with pytest.raises(RuntimeError, match="critical") as caught:
                dali._settle(source, feed, transform, CPU, error)
            (note,) = caught.value.__notes__
            assert all(f"{tmp_path}/{name}" in note for name in index.files)
        feed.close()
        assert feed.refused == refused
