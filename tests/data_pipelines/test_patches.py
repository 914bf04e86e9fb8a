"""Training on squares of images as they are, and images seen whole, by both loaders."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipelines.images.batch import LoaderSettings
from data_pipelines.images.image_index import ImageIndex, scan_class_folders
from data_pipelines.images.order import Steps, uniforms
from data_pipelines.loaders import eval_batches, train_batches, training_order
from data_pipelines.loading.augment import ImageTransform
from data_pipelines.loading.draws import FLIP, LEFT, TOP, TURN, UNIFORMS
from tpp.common.errors import UserError

# The torchvision loader's workers.
pytestmark = pytest.mark.processes

LOADERS = ["dali", "torchvision"]
SEED, SIDE = 3, 24
SIZES = [(24, 24), (31, 70), (64, 25), (90, 90)]
PATCHES = ImageTransform(SIDE, None, "patch", (0.0,) * 3, (1.0,) * 3, crop_mode="whole")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> ImageIndex:
    """Noise of several sizes, as PNG."""
    root = tmp_path_factory.mktemp("pictures")
    numbers = np.random.default_rng(0)
    for place, size in enumerate(SIZES):
        write(root / "all" / f"{place}.png", numbers.integers(0, 256, (*size, 3)))
    return scan_class_folders(root)


def write(path: Path, levels: np.ndarray) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(levels.astype(np.uint8)).save(path)


def settings(loader: str, rank: int = 0, ranks: int = 1, threads: int = 1) -> LoaderSettings:
    return LoaderSettings(loader, threads, torch.device("cpu"), rank, ranks)


def levels_of(index: ImageIndex, place: int) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(index.root / index.files[place]))).permute(2, 0, 1)


@pytest.mark.parametrize("loader", LOADERS)
def test_patches_are_cut_flipped_and_turned_as_the_numbers_say(
    pictures: ImageIndex, loader: str
) -> None:
    order, steps, samples = training_order(pictures, SEED), 40, np.arange(80)
    draws = uniforms(SEED, samples, UNIFORMS)
    seen = [
        list(train_batches(pictures, PATCHES, order, Steps(2, 1, 0, steps), s))
        for s in (settings(loader, rank, 2) for rank in range(2))
    ]
    found = torch.stack([seen[k % 2][k // 2][0][0] for k in samples])
    kinds = set()
    for sample, image in zip(samples, order.images(samples), strict=True):
        whole = levels_of(pictures, image)
        top, left = (
            int(draws[sample, number] * (side - SIDE + 1))
            for number, side in ((TOP, whole.shape[1]), (LEFT, whole.shape[2]))
        )
        truth = whole[:, top : top + SIDE, left : left + SIDE]
        flipped, turns = draws[sample, FLIP] < 0.5, int(4 * draws[sample, TURN])
        truth = torch.rot90(truth.flip(2) if flipped else truth, turns, (1, 2))
        assert torch.equal((found[sample] * 255).round().byte(), truth), sample
        kinds.add((bool(flipped), turns))
    assert len(kinds) == 8


@pytest.mark.parametrize("loader", LOADERS)
def test_whole_images_come_one_by_one(pictures: ImageIndex, loader: str) -> None:
    shares = [
        list(eval_batches(pictures, PATCHES, 16, settings(loader, rank, 3))) for rank in range(3)
    ]
    assert [len(share) for share in shares] == [2, 1, 1]
    for place in range(len(pictures)):
        (image,), _ = shares[place % 3][place // 3]
        assert torch.equal((image * 255).round().byte(), levels_of(pictures, place)), place


@pytest.mark.parametrize("loader", LOADERS)
def test_an_image_smaller_than_the_patch_is_a_bad_one(pictures: ImageIndex, loader: str) -> None:
    large = replace(PATCHES, image_size=25)
    order = training_order(pictures, SEED)
    batches = train_batches(pictures, large, order, Steps(4, 1, 0, 1), settings(loader, threads=0))
    message = r"0.png: cannot read this image \(24x24 pixels, of which no patch of 25x25 can be cut"
    with pytest.raises(UserError, match=message):
        list(batches)
