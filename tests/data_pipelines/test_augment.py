import math
import pickle
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from data_pipelines.images.order import uniforms
from data_pipelines.loading.augment import (
    AUGMENT_OPERATIONS,
    TRIVIAL_STRENGTHS,
    ImageTransform,
    color_jitter_factors,
    erasing_boxes,
    rand_augment_choices,
    training_size,
    trivial_augment_choices,
)
from data_pipelines.loading.draws import UNIFORMS
from data_pipelines.loading.recipes import RECIPES, flips, quarter_turns, random_resized_windows
from data_pipelines.settings import (
    AugmentSection,
    ColorJitter,
    DataSection,
    ProgressiveResizing,
    RandAugment,
)
from tpp.common.errors import UserError
from tpp.common.settings import Section, mistakes

SIDES = st.integers(1, 900)
SIZES = st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=8).map(
    lambda sizes: np.array(sizes, dtype=np.int64)
)
SEEDS = st.integers(0, 2**32)


def _transform(
    image_size: int = 32, resize: int | None = None, augmentation: str = "cifar"
) -> ImageTransform:
    return ImageTransform(image_size, resize, augmentation, (0.5,) * 3, (0.5,) * 3)


def _frames(
    sizes: np.ndarray, draws: np.ndarray, side: int, resize: int | None, recipe: str
) -> np.ndarray:
    """Height and width after scaling, top and left of the square; shape (n, 4)."""
    cuts = RECIPES[recipe].cuts(sizes, draws, side, resize)
    assert cuts.window is None and cuts.corner is not None
    assert (cuts.size is None) == (resize is None)
    return np.concatenate([sizes if cuts.size is None else cuts.size, cuts.corner], axis=1)


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
    none = np.empty((len(sizes), 0))
    for (height, width), frame in zip(
        sizes.tolist(), _frames(sizes, none, image_size, resize, "none").tolist(), strict=True
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
    sizes = np.array([[height, width]])
    (frame,) = _frames(sizes, np.empty((1, 0)), 8, resize, "none").tolist()
    assert frame[:2] == list(F.resize(torch.empty(1, height, width), [resize]).shape[1:])


@given(st.integers(0, 2**20), st.sampled_from([8, 28, 32, 64]))
def test_cifar_frames_stay_within_the_border(sample: int, side: int) -> None:
    draws = uniforms(0, np.array([sample]), UNIFORMS)
    (frame,) = _frames(np.array([[side, side]]), draws, side, None, "cifar").tolist()
    border = side // 8
    assert frame[:2] == [side, side]
    assert all(-border <= corner <= border for corner in frame[2:])


def test_cifar_frames_reach_every_corner_equally_often() -> None:
    count = 9 * 9 * 500
    sizes = np.full((count, 2), 32)
    draws = uniforms(5, np.arange(count), UNIFORMS)
    corners = _frames(sizes, draws, 32, None, "cifar")[:, 2:]
    counts = np.zeros((9, 9))
    np.add.at(counts, (corners[:, 0] + 4, corners[:, 1] + 4), 1)
    assert np.abs(counts - 500).max() < 6 * math.sqrt(500)


def test_cifar_frames_of_a_small_image_centre_it() -> None:
    draws = np.full((1, UNIFORMS), 0.99)
    frame = _frames(np.array([[10, 20]]), draws, 32, None, "cifar")
    assert frame.tolist() == [[10, 20, -11, -6]]


@pytest.mark.parametrize("recipe", RECIPES)
def test_half_of_the_samples_are_mirrored(recipe: str) -> None:
    draws = uniforms(0, np.arange(10_000), UNIFORMS)
    mirrored = RECIPES[recipe].cuts(np.full((10_000, 2), 40), draws, 32, None).mirrored
    assert abs(mirrored.mean() - (0.5 if RECIPES[recipe].random else 0)) < 0.03


def test_every_recipe_has_a_name_in_the_configuration() -> None:
    assert get_args(DataSection.model_fields["augmentation"].annotation) == tuple(RECIPES)


def _assert_uniform(values: np.ndarray, low: float, high: float) -> None:
    """Even over the range, by a Kolmogorov-Smirnov bound at one in a million, and never outside."""
    assert values.min() >= low and values.max() <= high
    places = (np.sort(values) - low) / (high - low)
    even = np.arange(1, len(values) + 1) / len(values)
    assert np.abs(places - even).max() < 2.7 / math.sqrt(len(values))


@pytest.mark.parametrize(
    "jitter",
    [
        ColorJitter(brightness=0.4, contrast=0.3, saturation=0.2, hue=0.1),
        ColorJitter(brightness=1.5, contrast=1.0, saturation=2.0, hue=0.5),
    ],
)
def test_colour_factors_have_torchvision_s_ranges(jitter: ColorJitter) -> None:
    factors = color_jitter_factors(uniforms(2, np.arange(10**5), UNIFORMS), jitter)
    theirs = v2.ColorJitter(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    ranges = (theirs.brightness, theirs.contrast, theirs.saturation, theirs.hue)
    for values, (low, high) in zip(factors.T, ranges, strict=True):
        _assert_uniform(values, low, high)
    correlations = np.corrcoef(factors.T) - np.eye(4)
    assert np.abs(correlations).max() < 0.02


def test_colours_stay_without_jitter() -> None:
    factors = color_jitter_factors(uniforms(2, np.arange(5), UNIFORMS), ColorJitter())
    assert factors.tolist() == [[1, 1, 1, 0]] * 5


def test_every_operation_is_drawn_equally_often_in_every_place() -> None:
    count, kinds = 10**5, len(AUGMENT_OPERATIONS)
    assert kinds == 14
    draws = uniforms(3, np.arange(count), UNIFORMS)
    numbers, turned = rand_augment_choices(draws, RandAugment(operations=4))
    assert numbers.shape == turned.shape == (count, 4)
    for place in range(4):
        counts = np.bincount(numbers[:, place], minlength=kinds)
        assert len(counts) == kinds
        assert np.abs(counts - count / kinds).max() < 6 * math.sqrt(count / kinds)
        assert abs(turned[:, place].mean() - 0.5) < 0.01
    pairs = np.bincount(numbers[:, 0] * kinds + numbers[:, 1], minlength=kinds**2)
    assert np.abs(pairs - count / kinds**2).max() < 6 * math.sqrt(count / kinds**2)
    for place in range(4):
        assert abs(np.corrcoef(numbers[:, place], turned[:, place])[0, 1]) < 0.02
    fewer = rand_augment_choices(draws, RandAugment(operations=2))
    assert (fewer[0] == numbers[:, :2]).all() and (fewer[1] == turned[:, :2]).all()


def test_every_strength_is_drawn_equally_often() -> None:
    count = 10**5
    draws = uniforms(3, np.arange(count), UNIFORMS)
    choices = trivial_augment_choices(draws)
    numbers, turned = rand_augment_choices(draws, RandAugment())
    assert (choices[:, :2] == np.stack([numbers[:, 0], turned[:, 0]], axis=1)).all()
    pairs = np.bincount(choices[:, 0] * 31 + choices[:, 2], minlength=14 * 31)
    assert len(pairs) == 14 * 31
    assert np.abs(pairs - count / len(pairs)).max() < 6 * math.sqrt(count / len(pairs))
    assert abs(np.corrcoef(choices[:, 1], choices[:, 2])[0, 1]) < 0.02


def test_strengths_are_torchvision_s() -> None:
    for name, (magnitudes, _) in v2.TrivialAugmentWide._AUGMENTATION_SPACE.items():
        ours = TRIVIAL_STRENGTHS.get(re.sub("(?<!^)(?=[A-Z])", "_", name).lower())
        theirs = magnitudes(31, 224, 224)
        assert (ours is None) == (theirs is None), name
        if ours is None:
            continue
        assert len(ours) == 31
        if name.startswith("Translate"):
            theirs = (theirs + 1e-4).int()  # as it is applied; its 16.0 is a little less
        if name == "Solarize":
            levels = np.arange(256)
            inverted = levels >= 255 * theirs.double().numpy()[:, None] - 1e-4
            assert ((levels >= ours[:, None]) == inverted).all()
        else:
            np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6, err_msg=name)


def _reference_box(side: int, u: list[float], probability: float) -> list[int]:
    """Zhong et al., algorithm 1, with its corner drawn where the box fits, as torchvision does."""
    if u[35] >= probability:
        return [0, 0, 0, 0]
    for area_draw, ratio_draw in zip(u[38:48], u[48:58], strict=True):
        area = side * side * (0.02 + (1 / 3 - 0.02) * area_draw)
        # The logarithm of height over width, from 3.3 down to 0.3.
        ratio = math.exp(math.log(3.3) + (math.log(0.3) - math.log(3.3)) * ratio_draw)
        height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < height <= side and 0 < width <= side:
            top, left = int(u[36] * (side - height + 1)), int(u[37] * (side - width + 1))
            return [top, left, height, width]
    return [0, 0, 0, 0]


@given(st.integers(1, 300), st.floats(0, 1), SEEDS)
def test_erased_boxes_follow_the_recipe(side: int, probability: float, seed: int) -> None:
    draws = uniforms(seed, np.arange(8), UNIFORMS)
    boxes = erasing_boxes(draws, side, probability)
    for draw, box in zip(draws.tolist(), boxes.tolist(), strict=True):
        assert box == _reference_box(side, draw, probability)
        top, left, height, width = box
        assert top >= 0 and left >= 0 and top + height <= side and left + width <= side
        if side >= 32 and height:
            # Rounding moves either side by at most half a pixel.
            assert (height - 0.5) * (width - 0.5) <= side**2 / 3
            assert (height + 0.5) * (width + 0.5) >= side**2 * 0.02
            assert (height - 0.5) / (width + 0.5) <= 3.3 and (height + 0.5) / (width - 0.5) >= 0.3


def test_erased_boxes_are_distributed_as_they_should() -> None:
    count, side = 10**5, 224
    boxes = erasing_boxes(uniforms(6, np.arange(count), UNIFORMS), side, 0.25)
    erased = boxes[:, 2] > 0
    assert abs(erased.mean() - 0.25) < 0.01
    top, left, height, width = boxes[erased].T
    share = height * width / side**2
    assert abs(share.mean() - (0.02 + 1 / 3) / 2) < 0.01
    assert abs(np.log(height / width).mean() - math.log(0.3 * 3.3) / 2) < 0.02
    for corner, extent in ((top, height), (left, width)):
        # Of every place at which the box lies within the image, evenly.
        assert abs((corner / np.maximum(side - extent, 1)).mean() - 0.5) < 0.02
    assert not erasing_boxes(uniforms(6, np.arange(1000), UNIFORMS), side, 0.0).any()
    assert erasing_boxes(uniforms(6, np.arange(1000), UNIFORMS), side, 1.0)[:, 2].all()


def test_no_box_that_does_not_fit_is_erased() -> None:
    draws = np.full((1, UNIFORMS), 0.0)
    # Areas of a third of the image, and heights of 3.3 widths: taller than the image.
    draws[:, 38:48] = 1 - 2.0**-53
    assert erasing_boxes(draws, 224, 1.0).tolist() == [[0, 0, 0, 0]]


def test_every_random_number_decides_one_thing() -> None:
    """And always the same one: a run begun with older code goes on as it was."""
    base = uniforms(9, np.arange(2000), UNIFORMS)
    sizes, rand = np.full((2000, 2), 500), RandAugment(operations=4)
    jitter = ColorJitter(brightness=1, contrast=1, saturation=1, hue=0.5)
    decisions: list[tuple[Sequence[int], Callable[[np.ndarray], np.ndarray]]] = [
        (range(0, 1), flips),
        (range(1, 23), lambda draws: random_resized_windows(sizes, draws)),
        (range(23, 27), lambda draws: color_jitter_factors(draws, jitter)),
        (range(27, 31), lambda draws: rand_augment_choices(draws, rand)[0]),
        (range(31, 35), lambda draws: rand_augment_choices(draws, rand)[1]),
        (range(35, 58), lambda draws: erasing_boxes(draws, 64, 0.5)),
        ((27, 31, 58), trivial_augment_choices),
        (range(59, 60), quarter_turns),
    ]
    assert UNIFORMS == 60
    for column in range(UNIFORMS):
        draws = base.copy()
        draws[:, column] = (draws[:, column] + 0.5) % 1
        for columns, decide in decisions:
            changed = (decide(draws) != decide(base)).any()
            # So many tries never fail in a row that the last would matter.
            late = column in range(7, 13) or column in range(17, 23) or column in range(39, 58)
            assert changed == (column in columns) or (late and not changed)


EPOCHS = st.floats(0, 100)


@given(
    st.integers(1, 512),
    st.integers(0, 512),
    st.floats(0, 50),
    st.floats(0.1, 50),
    st.lists(EPOCHS, min_size=2, max_size=8).map(sorted),
)
def test_training_size_grows_from_start_to_end(
    start: int, growth: int, first: float, length: float, epochs: list[float]
) -> None:
    progressive = ProgressiveResizing(start_size=start, start_epoch=first, end_epoch=first + length)
    image_size = start + growth
    sizes = [training_size(epoch, image_size, progressive) for epoch in epochs]
    assert sizes == sorted(sizes)
    for epoch, size in zip(epochs, sizes, strict=True):
        assert start <= size <= image_size
        assert size in (start, image_size) or size % 32 == 0
        if epoch <= first:
            assert size == start
        elif epoch >= first + length:
            assert size == image_size
        else:
            line = start + (epoch - first) / length * growth
            assert abs(size - line) <= 32 / 2 + 1e-6 * image_size


def test_training_size_of_a_recipe_by_hand() -> None:
    # 160 to 224 over ten epochs: on the line at 176 and 208 a half is rounded up.
    progressive = ProgressiveResizing(start_size=160, start_epoch=5, end_epoch=15)
    sizes = [training_size(epoch, 224, progressive) for epoch in (0, 5, 7.4, 7.5, 12, 12.5, 15, 90)]
    assert sizes == [160, 160, 160, 192, 192, 224, 224, 224]


def test_a_plain_transform_changes_nothing_at_random() -> None:
    transform = replace(
        _transform(32, 40),
        augment=AugmentSection(
            color_jitter=ColorJitter(brightness=0.4),
            rand_augment=RandAugment(),
            random_erasing=0.25,
            mixup=0.2,
        ),
    )
    assert transform.plain() == _transform(32, 40, "none")


GROWING = ProgressiveResizing(start_size=33, end_epoch=1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        *(
            (
                {"augment": AugmentSection.model_validate({name: value}), "augmentation": "none"},
                "augment: with augmentation: none there is no augmentation to add to",
            )
            for name, value in {
                "random_erasing": 0.1,
                "color_jitter": {},
                "rand_augment": {},
                "trivial_augment": True,
                "mixup": 0.1,
                "cutmix": 0.1,
                "progressive": {"start_size": 8, "end_epoch": 1},
            }.items()
        ),
        *(
            (
                {
                    "augment": AugmentSection.model_validate({name: value}),
                    "channels": 1,
                    "mean": (0.5,),
                    "std": (0.5,),
                },
                "augment: color_jitter, rand_augment, trivial_augment need 3 channels",
            )
            for name, value in {
                "color_jitter": {},
                "rand_augment": {},
                "trivial_augment": True,
            }.items()
        ),
        (
            {"augment": AugmentSection(progressive=GROWING)},
            "augment.progressive: goes with augmentation: imagenet only",
        ),
        (
            {"augment": AugmentSection(progressive=GROWING), "augmentation": "imagenet"},
            "augment.progressive.start_size (33) must not be larger than image_size (32)",
        ),
        ({"image_size": 0}, "image_size must be at least 1, not 0"),
        ({"resize": 16}, "resize 16 is smaller than image_size 32"),
        ({"augmentation": "mixup"}, "one of imagenet, cifar, patch, none, not 'mixup'"),
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
    with pytest.raises(UserError, match=re.escape(said)):
        ImageTransform(**{**settings, **changes})  # type: ignore[arg-type]


def test_grey_images_may_be_erased() -> None:
    erasing = AugmentSection(random_erasing=0.5)
    grey = ImageTransform(28, None, "cifar", (0.5,), (0.5,), channels=1, augment=erasing)
    assert grey.augment.random_erasing == 0.5


@pytest.mark.parametrize(
    ("section", "values", "said"),
    [
        (ColorJitter, {"brightness": -0.1}, "brightness: input should be greater than or equal to"),
        (ColorJitter, {"contrast": math.inf}, "contrast: input should be a finite number, not inf"),
        (ColorJitter, {"saturation": math.nan}, "saturation: input should be a finite number"),
        (ColorJitter, {"hue": 0.6}, "hue: input should be less than or equal to 0.5, not 0.6"),
        (RandAugment, {"operations": 0}, "operations: input should be greater than or equal to 1"),
        (RandAugment, {"operations": 5}, "operations: input should be less than or equal to 4"),
        (RandAugment, {"magnitude": 31}, "magnitude (31) must be below bins (31)"),
        (RandAugment, {"magnitude": -1}, "magnitude: input should be greater than or equal to 0"),
        (RandAugment, {"magnitude": 0, "bins": 1}, "bins: input should be greater than or equal"),
        (
            ProgressiveResizing,
            {"start_size": 0, "end_epoch": 1},
            "start_size: input should be greater than or equal to 1, not 0",
        ),
        (
            ProgressiveResizing,
            {"start_size": 8, "start_epoch": 5, "end_epoch": 5},
            "end_epoch (5.0) must come after start_epoch (5.0)",
        ),
        (
            ProgressiveResizing,
            {"start_size": 8, "start_epoch": -1, "end_epoch": 5},
            "start_epoch: input should be greater than or equal to 0, not -1",
        ),
        (
            AugmentSection,
            {"rand_augment": RandAugment(), "trivial_augment": True},
            "rand_augment and trivial_augment: one takes the place of the other",
        ),
        (AugmentSection, {"random_erasing": 1.1}, "random_erasing: input should be less than or"),
        (AugmentSection, {"random_erasing": math.nan}, "random_erasing: input should be a finite"),
        (AugmentSection, {"mixup": -0.1}, "mixup: input should be greater than or equal to 0"),
        (AugmentSection, {"mixup": math.inf}, "mixup: input should be a finite number, not inf"),
        (AugmentSection, {"cutmix": -0.1}, "cutmix: input should be greater than or equal to 0"),
        (AugmentSection, {"cutmix": math.nan}, "cutmix: input should be a finite number, not nan"),
    ],
)
def test_mistakes_in_an_augmentation_are_named(
    section: type[Section], values: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        section(**values)
    (line,) = mistakes(caught.value, section)
    assert line.startswith(said)


def test_augmentations_are_compared_by_what_they_say_and_reach_a_worker_whole() -> None:
    one, other = (
        AugmentSection(color_jitter=ColorJitter(hue=0.1), rand_augment=RandAugment(), mixup=mixup)
        for mixup in (0.1, 0.2)
    )
    transform = replace(_transform(), augment=one)
    assert transform == replace(_transform(), augment=AugmentSection(**dict(one)))
    assert transform != replace(_transform(), augment=other)
    assert len({transform, replace(transform), replace(transform, augment=other)}) == 2
    assert pickle.loads(pickle.dumps(transform)) == transform
    with pytest.raises(ValidationError, match="frozen"):
        one.mixup = 0.3
