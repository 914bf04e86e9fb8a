import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from data_pipelines.augment import (
    UNIFORMS,
    ImageTransform,
    flips,
    frames,
    random_resized_windows,
)
from data_pipelines.order import uniforms
from tpp.errors import UserError

SIDES = st.integers(1, 900)
SIZES = st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=8).map(
    lambda sizes: np.array(sizes, dtype=np.int64)
)
SEEDS = st.integers(0, 2**32)


def _transform(
    image_size: int = 32, resize: int | None = None, augmentation: str = "cifar"
) -> ImageTransform:
    return ImageTransform(image_size, resize, augmentation, (0.5,) * 3, (0.5,) * 3)


def _reference_window(height: int, width: int, u: list[float]) -> tuple[int, int, int, int]:
    """The recipe in words of one image: ten tries in a loop, Python's rounding."""
    for area_draw, ratio_draw in zip(u[3:13], u[13:23], strict=True):
        area = height * width * (0.08 + 0.92 * area_draw)
        low, high = math.log(3 / 4), math.log(4 / 3)
        ratio = math.exp(low + (high - low) * ratio_draw)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(u[1] * (height - h + 1)), int(u[2] * (width - w + 1)), h, w
    h, w = height, width
    if width / height < 3 / 4:
        h = round(width / (3 / 4))
    elif width / height > 4 / 3:
        w = round(height * (4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


@given(SIZES, SEEDS)
def test_windows_follow_the_recipe(sizes: np.ndarray, seed: int) -> None:
    draws = uniforms(seed, np.arange(len(sizes)), UNIFORMS)
    windows = random_resized_windows(sizes, draws)
    for (height, width), draw, window in zip(
        sizes.tolist(), draws.tolist(), windows.tolist(), strict=True
    ):
        assert tuple(window) == _reference_window(height, width, draw)
        top, left, h, w = window
        assert h > 0 and w > 0 and top >= 0 and left >= 0
        assert top + h <= height and left + w <= width


def test_windows_fall_back_to_the_centre() -> None:
    # No window of ratio 3/4 or more and half the area fits in a strip of 10 x 1000.
    draws = np.full((2, UNIFORMS), 0.5)
    windows = random_resized_windows(np.array([[1000, 10], [10, 1000]]), draws)
    assert windows.tolist() == [[493, 0, 13, 10], [0, 493, 10, 13]]


def test_windows_are_distributed_as_torchvision_s() -> None:
    count, height, width = 4000, 375, 500
    image = torch.empty(3, height, width)
    torch.manual_seed(0)
    theirs = np.array(
        [
            v2.RandomResizedCrop.make_params(v2.RandomResizedCrop(224), [image])[key]
            for _ in range(count)
            for key in ("top", "left", "height", "width")
        ]
    ).reshape(count, 4)
    sizes = np.tile([[height, width]], (count, 1))
    ours = random_resized_windows(sizes, uniforms(1, np.arange(count), UNIFORMS))
    for column in range(4):
        values = np.arange(501)
        cdfs = [
            np.searchsorted(np.sort(windows[:, column]), values, side="right") / count
            for windows in (ours, theirs)
        ]
        # Two-sample Kolmogorov-Smirnov bound at one in a million.
        assert np.abs(cdfs[0] - cdfs[1]).max() < 2.7 * math.sqrt(2 / count)


@given(SIZES, st.integers(1, 64), st.integers(0, 40) | st.none())
def test_evaluation_frames_are_torchvision_s(
    sizes: np.ndarray, image_size: int, extra: int | None
) -> None:
    resize = None if extra is None else image_size + extra
    transform = _transform(image_size, resize, "none")
    for (height, width), frame in zip(
        sizes.tolist(), frames(sizes, np.empty((len(sizes), 0)), transform).tolist(), strict=True
    ):
        scaled_height, scaled_width, top, left = frame
        # The pixel's own position is its value, so equal pixels mean equal windows.
        if resize is None:
            assert (scaled_height, scaled_width) == (height, width)
        else:
            image = Image.new("L", (min(width, 60), min(height, 60)))
            if (image.height, image.width) == (height, width):
                assert list(F.resize(image, [resize]).size) == [scaled_width, scaled_height]
        ramp = 1 + torch.arange(scaled_height * scaled_width, dtype=torch.int32)
        ramp = ramp.reshape(1, scaled_height, scaled_width)
        ours = F.crop(ramp, top, left, image_size, image_size)
        assert torch.equal(ours, F.center_crop(ramp, [image_size, image_size]))


@given(st.integers(2, 500), st.integers(2, 500), st.integers(8, 300))
def test_scaled_size_is_torchvision_s(height: int, width: int, resize: int) -> None:
    transform = _transform(8, resize, "none")
    (frame,) = frames(np.array([[height, width]]), np.empty((1, 0)), transform).tolist()
    assert frame[:2] == list(F.resize(torch.empty(1, height, width), [resize]).shape[1:])


@given(st.integers(0, 2**20), st.sampled_from([8, 28, 32, 64]))
def test_cifar_frames_stay_within_the_border(sample: int, side: int) -> None:
    draws = uniforms(0, np.array([sample]), UNIFORMS)
    (frame,) = frames(np.array([[side, side]]), draws, _transform(side)).tolist()
    border = side // 8
    assert frame[:2] == [side, side]
    assert all(-border <= corner <= border for corner in frame[2:])


def test_cifar_frames_reach_every_corner_equally_often() -> None:
    count = 9 * 9 * 500
    sizes = np.full((count, 2), 32)
    corners = frames(sizes, uniforms(5, np.arange(count), UNIFORMS), _transform())[:, 2:]
    counts = np.zeros((9, 9))
    np.add.at(counts, (corners[:, 0] + 4, corners[:, 1] + 4), 1)
    assert np.abs(counts - 500).max() < 6 * math.sqrt(500)


def test_cifar_frames_of_a_small_image_centre_it() -> None:
    draws = np.full((1, UNIFORMS), 0.99)
    assert frames(np.array([[10, 20]]), draws, _transform()).tolist() == [[10, 20, -11, -6]]


def test_half_of_the_samples_are_mirrored() -> None:
    mirrored = flips(uniforms(0, np.arange(10_000), UNIFORMS))
    assert abs(mirrored.mean() - 0.5) < 0.03


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"image_size": 0}, "image_size must be at least 1, not 0"),
        ({"resize": 16}, "resize 16 is smaller than image_size 32"),
        ({"augmentation": "mixup"}, "one of imagenet, cifar, none, not 'mixup'"),
        ({"channels": 4}, "channels must be 3"),
        ({"channels": 1}, "mean must have 1 values, not 3"),
        ({"std": (0.5, 0.5)}, "std must have 3 values, not 2"),
        ({"std": (0.5, 0.5, 0.0)}, "std must be positive"),
    ],
)
def test_mistakes_in_a_transform_are_named(changes: dict[str, object], said: str) -> None:
    settings: dict[str, object] = {
        "image_size": 32,
        "resize": None,
        "augmentation": "cifar",
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
    }
    with pytest.raises(UserError, match=said.replace("(", r"\(").replace(")", r"\)")):
        ImageTransform(**{**settings, **changes})  # type: ignore[arg-type]
