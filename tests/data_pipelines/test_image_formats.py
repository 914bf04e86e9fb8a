"""Every format of docs/formats.md: both loaders see the same picture, or both leave it out."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipelines.images.batch import LoaderSettings
from data_pipelines.images.header import find_damage, is_common
from data_pipelines.images.image_index import scan_class_folders
from data_pipelines.images.order import Steps
from data_pipelines.images.source import BadImages
from data_pipelines.loaders import eval_batches, train_batches, training_order
from data_pipelines.loading.augment import ImageTransform
from tests.data_pipelines.image_formats import KINDS, Kind

PAGE = Path(__file__).parents[2] / "docs" / "formats.md"
CPU = torch.device("cpu")
LOADERS = ("dali", "torchvision")
SIDE = 32
Seen = dict[tuple[str, str, int], dict[str, np.ndarray]]
GOOD = [name for name, kind in KINDS.items() if not kind.broken]


def _transform(augmentation: str, channels: int) -> ImageTransform:
    return ImageTransform(
        SIDE, None, augmentation, (0.0,) * channels, (1 / 255,) * channels, channels
    )


def _settings(loader: str) -> LoaderSettings:
    return LoaderSettings(loader, int(loader == "dali"), CPU)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of each kind, all of them named .jpg: only the content tells."""
    root = tmp_path_factory.mktemp("formats")
    (root / "class").mkdir()
    for number, kind in enumerate(KINDS.values()):
        (root / "class" / f"{number:03d}.jpg").write_bytes(kind.make())
    return root


@pytest.fixture(scope="module")
def seen(folder: Path) -> Seen:
    """What each loader makes of each file, by recipe, loader and channels; (c, h, w) levels."""
    index = scan_class_folders(folder)
    found: Seen = {}
    for channels in (3, 1):
        for loader in LOADERS:
            bad = BadImages(index, on_error="skip", limit=1)
            # A batch of one, where an image may be left out, says which one it was.
            batches = eval_batches(
                index, _transform("none", channels), len(index), _settings(loader), bad=bad
            )
            images = np.concatenate([images.numpy() for images, _ in batches])
            left_out = {Path(path).stem for path, _ in bad.take_new()}
            names = [name for n, name in enumerate(KINDS) if f"{n:03d}" not in left_out]
            found["none", loader, channels] = dict(zip(names, images, strict=True))
            good = index.subset(np.array([n for n, name in enumerate(KINDS) if name in GOOD]))
            order = training_order(good, 5)
            steps = Steps(len(good), 1, 0, 1)
            ((images, _),) = train_batches(
                good, _transform("imagenet", channels), order, steps, _settings(loader)
            )
            places = order.images(np.arange(len(good))).tolist()
            found["imagenet", loader, channels] = {
                GOOD[place]: image.numpy() for place, image in zip(places, images, strict=True)
            }
    return found


@pytest.mark.parametrize("name", GOOD)
def test_both_loaders_show_the_same_picture(seen: Seen, name: str) -> None:
    data = KINDS[name].make()
    assert find_damage(data) is None
    assert find_damage(data, decode=True) is None
    for channels in (3, 1):
        for recipe in ("none", "imagenet"):
            ours, theirs = (seen[recipe, loader, channels][name] for loader in LOADERS)
            difference = np.abs(ours - theirs)
            # Decoded alike to the bit; scaling rounds.
            assert difference.max() < (2.01 if recipe == "imagenet" else 1e-3)
            assert difference.mean() < 0.3


@pytest.mark.parametrize("name", GOOD)
def test_it_is_the_picture_that_was_written(seen: Seen, name: str) -> None:
    kind = KINDS[name]
    for channels in (3, 1):
        expected = _cut(_shown(kind, channels))
        for loader in LOADERS:
            image = seen["none", loader, channels][name].transpose(1, 2, 0)
            assert np.abs(image - expected).mean() < kind.within + 0.5, loader


@pytest.mark.parametrize("name", [name for name in KINDS if name not in GOOD])
def test_what_no_loader_reads_is_named_and_left_out(seen: Seen, name: str) -> None:
    assert find_damage(KINDS[name].make()) is not None
    for loader in LOADERS:
        assert name not in seen["none", loader, 3]


def _shown(kind: Kind, channels: int) -> np.ndarray:
    """What a file is to show, (h, w, c); where that is not given, what Pillow sees."""
    if kind.shows is None:
        from io import BytesIO

        image = Image.open(BytesIO(kind.make())).convert("RGB")
    else:
        image = Image.fromarray(np.ascontiguousarray(kind.shows)).convert("RGB")
    pixels = np.asarray(image if channels == 3 else image.convert("L"))
    return pixels.reshape(*pixels.shape[:2], channels)


def _cut(pixels: np.ndarray) -> np.ndarray:
    height, width = pixels.shape[:2]
    top, left = (round((length - SIDE) / 2) for length in (height, width))
    return pixels[max(top, 0) :, max(left, 0) :][:SIDE, :SIDE].astype(np.float64)


def _rows() -> Iterator[list[str]]:
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and not re.fullmatch(r"[|\s:-]+", line) and cells[0] != "format":
            yield cells


@pytest.mark.parametrize("name", KINDS)
def test_the_page_says_what_becomes_of_it(name: str) -> None:
    rows: dict[str, list[str]] = {cells[0]: cells for cells in _rows()}
    kind: Any = KINDS[name]
    who = "named as broken" if kind.broken else "DALI" if is_common(kind.make()) else "Pillow"
    assert rows[name][1] == who


def test_the_page_has_no_row_without_a_test() -> None:
    assert [cells[0] for cells in _rows()] == list(KINDS)
