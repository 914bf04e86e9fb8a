"""The augmentations of both loaders on real photos: against each other, PIL and plain loops."""

import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from nvidia import dali
from nvidia.dali import fn
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode, TrivialAugmentWide
from torchvision.transforms.v2 import functional as F

from data_pipelines.images.order import uniforms
from data_pipelines.loading import dali_augment, torch_augment
from data_pipelines.loading.augment import (
    AUGMENT_OPERATIONS,
    TRIVIAL_STRENGTHS,
    color_jitter_factors,
    erasing_boxes,
    rand_augment_choices,
)
from data_pipelines.loading.draws import UNIFORMS
from data_pipelines.settings import ColorJitter, RandAugment

PHOTOS, SIDE = 24, 96
Samples = list[NDArray[Any]]


@pytest.fixture(scope="module")
def photos(shared_data: Callable[[str], Path]) -> Tensor:
    """ImageNet photos, their middles scaled down; uint8, shape (PHOTOS, 3, SIDE, SIDE)."""
    images: list[Tensor] = []
    with tarfile.open(shared_data("imagenet-sample-500.tar")) as archive:
        members = [member for member in archive if member.isfile()]
        for member in members[:: len(members) // PHOTOS][:PHOTOS]:
            photo = Image.open(archive.extractfile(member)).convert("RGB")  # type: ignore[arg-type]
            images.append(F.pil_to_tensor(ImageOps.fit(photo, (SIDE, SIDE))))
    return torch.stack(images)


def _rows(numbers: NDArray[Any], dtype: type) -> Samples:
    return [*np.ascontiguousarray(numbers, dtype)]


def _in_dali(
    part: Callable[..., Any], images: Samples, *numbers: Samples, layout: str = "HWC"
) -> NDArray[Any]:
    """What a graph with only ``part`` in it makes of a batch."""

    @dali.pipeline_def(enable_conditionals=True)
    def graph() -> Any:
        inputs = [fn.external_source([images], layout=layout, cycle=True)]
        for rows in numbers:
            inputs.append(fn.external_source([rows], cycle=True))
        return part(*inputs)

    pipeline = graph(batch_size=len(images), num_threads=1, device_id=None, exec_dynamic=True)
    (made,) = pipeline.run()
    return np.stack([np.array(made.at(place)) for place in range(len(images))])


def _color_in_dali(photos: Tensor, factors: NDArray[np.float64]) -> Tensor:
    images = [*photos.permute(0, 2, 3, 1).contiguous().numpy()]
    made = _in_dali(dali_augment.color_jitter, images, _rows(factors, np.float32))
    return torch.from_numpy(made).permute(0, 3, 1, 2)


def _rand_in_dali(
    photos: Tensor, operations: NDArray[np.int64], turned: NDArray[np.int64], rand: RandAugment
) -> Tensor:
    images = [*photos.permute(0, 2, 3, 1).contiguous().numpy()]
    part = partial(dali_augment.rand_augment, rand=rand)
    made = _in_dali(part, images, _rows(operations, np.int32), _rows(turned, np.int32))
    return torch.from_numpy(made).permute(0, 3, 1, 2)


def _difference(ours: Tensor, theirs: Tensor) -> Tensor:
    assert ours.dtype == theirs.dtype == torch.uint8
    assert ours.shape == theirs.shape
    return (ours.int() - theirs.int()).abs()


def _factors(**changes: float) -> NDArray[np.float64]:
    neutral = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0}
    return np.array([[*{**neutral, **changes}.values()]])


def test_colours_of_both_loaders_are_the_same(photos: Tensor) -> None:
    jitter = ColorJitter(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.5)
    factors = color_jitter_factors(uniforms(1, np.arange(PHOTOS), UNIFORMS), jitter)
    ours = torch_augment.color_jitter(photos, factors)
    difference = _difference(_color_in_dali(photos, factors), ours)
    assert difference.max() <= 1
    assert difference.float().mean() < 0.001
    assert _difference(ours, photos).float().mean((1, 2, 3)).min() > 1


def test_each_colour_factor_does_what_it_says(photos: Tensor) -> None:
    pixels = photos.double()

    def jittered(**changes: float) -> Tensor:
        return torch_augment.color_jitter(photos[:1], _factors(**changes)).double()[0]

    def rounded(values: Tensor) -> Tensor:
        return values.round().clamp(0, 255)

    assert torch.equal(jittered(), pixels[0])
    assert (jittered(brightness=1.3) - rounded(1.3 * pixels[0])).abs().max() <= 1
    contrasted = rounded((pixels[0] - 128) * 0.6 + 128)
    assert (jittered(contrast=0.6) - contrasted).abs().max() <= 1
    # Brightness comes after contrast: the grey in the middle changes with it.
    both = rounded(((pixels[0] - 128) * 0.6 + 128) * 1.3)
    assert (jittered(brightness=1.3, contrast=0.6) - both).abs().max() <= 1
    # torchvision rounds its grey down.
    grey = F.rgb_to_grayscale(photos[0], 3).double()
    assert (jittered(saturation=0.0) - grey).abs().max() <= 2
    assert (jittered(hue=0.5) - jittered(hue=-0.5)).abs().max() <= 1


def test_hue_turns_the_way_torchvision_s_does() -> None:
    muted = torch.tensor([[170, 100, 100], [100, 170, 100], [100, 100, 170]], dtype=torch.uint8)
    images = muted.T[None, :, :, None].contiguous()
    for turn in (-0.2, -0.1, 0.1, 0.2):
        ours = torch_augment.color_jitter(images, _factors(hue=turn)).double()
        same, opposite = (F.adjust_hue(images, way).double() for way in (turn, -turn))
        # Different colour spaces, so only the direction is the same.
        assert ((ours - same).norm(dim=1) < (ours - opposite).norm(dim=1)).all()


@pytest.mark.parametrize("magnitude", [0, 9, 30])
def test_operations_of_both_loaders_are_the_same(photos: Tensor, magnitude: int) -> None:
    kinds = [(number, turn) for number in range(len(AUGMENT_OPERATIONS)) for turn in (0, 1)]
    choices = np.repeat(np.array(kinds), PHOTOS, axis=0)
    images, rand = (
        photos.repeat(len(kinds), 1, 1, 1),
        RandAugment(operations=1, magnitude=magnitude),
    )
    theirs = _rand_in_dali(images, choices[:, :1], choices[:, 1:], rand)
    ours = torch_augment.rand_augment(images, choices[:, :1], choices[:, 1:], rand)
    difference = _difference(theirs, ours).reshape(len(AUGMENT_OPERATIONS), -1)
    for name, found in zip(AUGMENT_OPERATIONS, difference, strict=True):
        # Measured: no value differs by more than one level, and at most 3.5% do, after a shear.
        assert found.max() <= 1, name
        assert found.float().mean() < 0.04, name


def test_operations_one_after_the_other_are_the_same_in_both_loaders(photos: Tensor) -> None:
    rand = RandAugment(operations=3, magnitude=5, bins=11)
    operations, turned = rand_augment_choices(uniforms(2, np.arange(4 * PHOTOS), UNIFORMS), rand)
    images = photos.repeat(4, 1, 1, 1)
    theirs = _rand_in_dali(images, operations, turned, rand)
    ours = torch_augment.rand_augment(images, operations, turned, rand)
    # A level of difference grows under what comes after it: equalising, posterising.
    difference = _difference(theirs, ours)
    assert difference.float().mean() < 0.1
    assert (difference > 2).float().mean() < 0.003
    # Nothing depends on what else is in the batch.
    backwards = _rand_in_dali(images.flip(0), operations[::-1], turned[::-1], rand)
    assert torch.equal(backwards.flip(0), theirs)


def _trivial_in_dali(photos: Tensor, choices: NDArray[np.int64]) -> Tensor:
    images = [*photos.permute(0, 2, 3, 1).contiguous().numpy()]
    made = _in_dali(dali_augment.trivial_augment, images, _rows(choices, np.int32))
    return torch.from_numpy(made).permute(0, 3, 1, 2)


# 8: a move by a part of a pixel, if it were not cut off.
@pytest.mark.parametrize("place", [0, 8, 30])
def test_trivial_operations_of_both_loaders_are_the_same(photos: Tensor, place: int) -> None:
    few, kinds = photos[::2], len(AUGMENT_OPERATIONS)
    choices = np.array([(number, turn, place) for number in range(kinds) for turn in (0, 1)])
    choices = np.repeat(choices, len(few), axis=0)
    images = few.repeat(2 * kinds, 1, 1, 1)
    theirs = _trivial_in_dali(images, choices)
    ours = torch_augment.trivial_augment(images, choices)
    difference = _difference(theirs, ours).reshape(kinds, -1)
    for name, found in zip(AUGMENT_OPERATIONS, difference, strict=True):
        assert found.max() <= 1, name
        assert found.float().mean() < 0.04, name
    assert place == 0 or (_difference(ours, images).reshape(2 * kinds, -1).max(1)[0] > 0).sum() > 22


# torchvision equalises by PIL's formula, leaves the border unsharpened and rounds its grey down.
@pytest.mark.parametrize(("turned", "place"), [(0, 8), (1, 8), (0, 30), (1, 30)])
def test_trivial_operations_are_torchvision_s(photos: Tensor, turned: int, place: int) -> None:
    wide, few = TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR), photos[::4]
    for number, name in enumerate(AUGMENT_OPERATIONS):
        if name == "equalize":
            continue
        choices = np.tile([number, turned, place], (len(few), 1))
        ours = torch_augment.trivial_augment(few, choices)
        strength = float(TRIVIAL_STRENGTHS[name][place]) if name in TRIVIAL_STRENGTHS else 0.0
        if name == "solarize":
            strength = 1 - place / 30
        elif name != "posterize":
            # It turns its shears the other way round, which half of the images are anyway.
            strength *= -1 if bool(turned) != name.startswith("shear") else 1
        theirs = torch.stack(
            [
                wide._apply_image_or_video_transform(
                    photo, name.title().replace("_", ""), strength, wide.interpolation, {}
                )
                for photo in few
            ]
        )
        apart = _difference(ours, theirs)
        assert apart[..., 1:-1, 1:-1].max() <= (3 if name in ("color", "sharpness") else 2), name


def _operated(photos: Tensor, name: str, rand: RandAugment, *, turned: bool = False) -> Tensor:
    choice = np.full((len(photos), 1), AUGMENT_OPERATIONS.index(name))
    turns = np.full_like(choice, turned)
    return torch_augment.rand_augment(photos, choice, turns, rand)


def _by_pil(photos: Tensor, operation: Callable[[Image.Image], Image.Image]) -> Tensor:
    return torch.stack([F.pil_to_tensor(operation(F.to_pil_image(photo))) for photo in photos])


# The middle bin of 3: half of the range.
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name", ["brightness", "contrast", "color", "sharpness"])
def test_enhancements_are_pil_s(photos: Tensor, name: str, turned: bool) -> None:
    enhance = getattr(ImageEnhance, name.capitalize())
    factor = 0.55 if turned else 1.45
    ours = _operated(photos, name, RandAugment(operations=1, magnitude=1, bins=3), turned=turned)
    theirs = _by_pil(photos, lambda image: enhance(image).enhance(factor))
    # PIL rounds its grey and its smoothed image to whole levels, and leaves the border unsharpened.
    assert _difference(ours, theirs)[..., 1:-1, 1:-1].max() <= 2


@pytest.mark.parametrize(
    ("name", "operation"),
    [
        ("posterize", lambda image: ImageOps.posterize(image, 6)),
        ("solarize", lambda image: ImageOps.solarize(image, 128)),
        ("auto_contrast", ImageOps.autocontrast),
        ("identity", lambda image: image),
    ],
)
def test_operations_on_levels_are_pil_s(
    photos: Tensor, name: str, operation: Callable[[Image.Image], Image.Image]
) -> None:
    ours = _operated(photos, name, RandAugment(operations=1, magnitude=1, bins=3))
    # PIL cuts off what comes after the point where the contrast is stretched.
    assert _difference(ours, _by_pil(photos, operation)).max() <= (name == "auto_contrast")


def test_equalising_makes_every_level_equally_frequent(photos: Tensor) -> None:
    made = _operated(photos, "equalize", RandAugment(operations=1))
    for before, after in zip(photos.flatten(0, 1), made.flatten(0, 1), strict=True):
        values = before.flatten().tolist()
        lowest = values.count(min(values))
        for level in {min(values), max(values), values[0], values[500]}:
            below = sum(value <= level for value in values)
            expected = (below - lowest) / (len(values) - lowest) * 255
            assert (after[before == level] - expected).abs().max() <= 0.501


def test_an_image_of_one_level_stays_as_it_is() -> None:
    flat = torch.full((1, 3, 8, 8), 70, dtype=torch.uint8)
    for name in ("contrast", "color", "sharpness", "equalize", "auto_contrast"):
        assert torch.equal(_operated(flat, name, RandAugment(operations=1)), flat), name
        number = np.array([[AUGMENT_OPERATIONS.index(name)]])
        theirs = _rand_in_dali(flat, number, np.zeros_like(number), RandAugment(operations=1))
        assert torch.equal(theirs, flat), name


# PIL's coefficients lead from the place in the new image back to that in the old one. Bin 7 of 0 to
# 30 is 10 pixels of 96 (7/30 of 100/224 of them), and 0.07.
@pytest.mark.parametrize(
    ("name", "coefficients"),
    [
        ("translate_x", (1, 0, -10, 0, 1, 0)),
        ("translate_y", (1, 0, 0, 0, 1, -10)),
        ("shear_x", (1, -0.07, 0, 0, 1, 0)),
        ("shear_y", (1, 0, 0, -0.07, 1, 0)),
    ],
)
def test_moves_are_pil_s(
    photos: Tensor, name: str, coefficients: tuple[float, float, float, float, float, float]
) -> None:
    rand = RandAugment(operations=1, magnitude=7, bins=31)
    ours = _operated(photos, name, rand)
    theirs = _by_pil(
        photos,
        lambda image: image.transform(
            image.size,
            Image.Transform.AFFINE,
            coefficients,
            Image.Resampling.BILINEAR,
            fillcolor=(128,) * 3,
        ),
    )
    # At the edge that comes into view PIL does not interpolate.
    same = _difference(ours, theirs) <= 2
    assert same.float().mean() > 0.97
    assert (_operated(photos, name, rand, turned=True) != ours).float().mean() > 0.5


def test_rotation_is_pil_s(photos: Tensor) -> None:
    def rotated(angle: int) -> Tensor:
        return _by_pil(
            photos,
            lambda image: image.rotate(angle, Image.Resampling.BILINEAR, fillcolor=(128,) * 3),
        )

    for turned in (False, True):
        ours = _operated(
            photos, "rotate", RandAugment(operations=1, magnitude=1, bins=3), turned=turned
        )
        assert (_difference(ours, rotated(-15 if turned else 15)) <= 2).float().mean() > 0.97


@pytest.mark.parametrize("layout", ["HWC", "CHW"])
@pytest.mark.parametrize("half", [False, True])
def test_erased_boxes_are_zero_in_both_loaders(layout: str, half: bool) -> None:
    boxes = erasing_boxes(uniforms(4, np.arange(16), UNIFORMS), 20, 0.7)
    assert 0 < (boxes[:, 2] == 0).sum() < len(boxes)
    values = np.random.default_rng(0).normal(size=(16, 3, 20, 20)).astype(np.float32)
    values = values.astype(np.float16) if half else values
    expected = values.copy()
    for image, (top, left, height, width) in zip(expected, boxes.tolist(), strict=True):
        for row in range(top, top + height):
            for column in range(left, left + width):
                image[:, row, column] = 0
    there, back = ((0, 2, 3, 1), (0, 3, 1, 2)) if layout == "HWC" else ((0, 1, 2, 3),) * 2
    images = [*np.ascontiguousarray(values.transpose(there))]
    theirs = _in_dali(dali_augment.erase, images, _rows(boxes, np.float32), layout=layout)
    np.testing.assert_array_equal(theirs.transpose(back), expected)
    ours = torch.from_numpy(values.copy()).contiguous(
        memory_format=torch.channels_last if layout == "HWC" else torch.contiguous_format
    )
    assert torch_augment.erase(ours, torch.from_numpy(boxes)) is ours
    np.testing.assert_array_equal(ours.numpy(), expected)


def test_torch_augmentations_leave_what_they_are_given(photos: Tensor) -> None:
    before = photos.clone()
    rand = RandAugment(operations=4, magnitude=30)
    draws = uniforms(5, np.arange(PHOTOS), UNIFORMS)
    torch_augment.rand_augment(photos, *rand_augment_choices(draws, rand), rand)
    torch_augment.color_jitter(
        photos,
        color_jitter_factors(draws, ColorJitter(brightness=1, contrast=1, saturation=1, hue=0.5)),
    )
    assert torch.equal(photos, before)
