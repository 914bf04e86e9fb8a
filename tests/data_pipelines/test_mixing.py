import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from data_pipelines.images.order import uniforms
from data_pipelines.loading.mixing import MIXING_UNIFORMS, mix
from data_pipelines.settings import AugmentSection

# What order.uniforms can draw.
UNIT = st.integers(0, 2**53 - 1).map(lambda bits: bits * 2.0**-53)
CLASSES = 7


def _batch(size: int = 5, height: int = 12, width: int = 9) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    images = torch.randn(size, 3, height, width, generator=generator)
    # No two neighbours, and no two partners of an even batch, of one class.
    return images, torch.arange(size) % CLASSES


def _draws(count: int, seed: int = 0) -> np.ndarray:
    return uniforms(seed, np.arange(count), MIXING_UNIFORMS)


def _shares(targets: Tensor, labels: Tensor) -> Tensor:
    """Each image's share of itself, read off its target; NaN where its partner is of its class."""
    own = targets[torch.arange(len(labels)), labels].double()
    return torch.where(labels == labels.flip(0), math.nan, own)


@given(st.integers(1, 6), st.floats(0.1, 4), st.lists(UNIT, min_size=4, max_size=4))
def test_mixup_averages_each_image_with_its_partner(
    size: int, alpha: float, draws: list[float]
) -> None:
    images, labels = _batch(size)
    before = images.clone()
    mixed, targets = mix(images, labels, CLASSES, AugmentSection(mixup=alpha), np.array(draws))
    share = float(stats.beta(alpha, alpha).ppf(draws[1]))
    for place in range(size):
        partner = size - 1 - place
        expected = share * images[place].double() + (1 - share) * images[partner].double()
        assert (mixed[place] - expected).abs().max() < 1e-5
        target = torch.zeros(CLASSES, dtype=torch.float64)
        target[labels[place]] += share
        target[labels[partner]] += 1 - share
        assert targets[place].tolist() == pytest.approx(target.tolist(), abs=1e-6)
    assert torch.equal(images, before)


@given(
    st.integers(1, 6),
    st.integers(1, 20),
    st.integers(1, 20),
    st.floats(0.1, 4),
    st.lists(UNIT, min_size=4, max_size=4),
)
def test_cutmix_lays_a_box_of_the_partner_over_each_image(
    size: int, height: int, width: int, alpha: float, draws: list[float]
) -> None:
    # The pixel's place and image are its value, so equal pixels come from the same place.
    images = torch.arange(1.0, 1 + size * 3 * height * width).view(size, 3, height, width)
    before, labels = images.clone(), torch.arange(size)
    mixed, targets = mix(images, labels, size, AugmentSection(cutmix=alpha), np.array(draws))
    drawn = float(stats.beta(alpha, alpha).ppf(draws[1]))
    extents = [int(length * math.sqrt(1 - drawn)) for length in (height, width)]
    starts = [
        int(length * draw) - extent // 2
        for length, draw, extent in zip((height, width), draws[2:], extents, strict=True)
    ]
    pasted = 0
    for row in range(height):
        for column in range(width):
            inside = all(
                start <= at < start + extent
                for start, at, extent in zip(starts, (row, column), extents, strict=True)
            )
            pasted += inside
            source = images.flip(0) if inside else images
            assert torch.equal(mixed[:, :, row, column], source[:, :, row, column])
    for place in range(size):
        target = [0.0] * size
        target[place] += 1 - pasted / (height * width)
        target[size - 1 - place] += pasted / (height * width)
        assert targets[place].tolist() == pytest.approx(target, abs=1e-6)
    assert torch.equal(images, before)


@given(
    st.integers(1, 9),
    st.sampled_from([(0.2, 1.0), (0.8, 0.0), (0.0, 0.5), (0.0, 0.0)]),
    st.integers(0, 1000),
)
def test_targets_are_shares_of_one_image(size: int, alphas: tuple[float, float], seed: int) -> None:
    images, labels = _batch(size)
    mixing = AugmentSection(mixup=alphas[0], cutmix=alphas[1])
    _, targets = mix(images, labels, CLASSES, mixing, _draws(1, seed)[0])
    assert targets.dtype == torch.float32
    assert targets.shape == (size, CLASSES)
    assert targets.min() >= 0
    assert (targets.sum(1) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_shares_of_mixup_are_beta_distributed(alpha: float) -> None:
    images, labels = _batch(2, 1, 1)
    shares = [
        _shares(mix(images, labels, CLASSES, AugmentSection(mixup=alpha), draws)[1], labels)[
            0
        ].item()
        for draws in _draws(4000)
    ]
    assert stats.kstest(shares, stats.beta(alpha, alpha).cdf).pvalue > 1e-3


def test_drawn_areas_of_cutmix_are_uniform_and_cut_off_at_the_border() -> None:
    images, labels = _batch(2, 200, 200)
    images = images[:, :1].contiguous()
    shares = np.array(
        [
            _shares(mix(images, labels, CLASSES, AugmentSection(cutmix=1.0), draws)[1], labels)[
                0
            ].item()
            for draws in _draws(3000)
        ]
    )
    # Drawn evenly, and a square of side s keeps 1 - s / 4 of its length on either axis.
    sides = (np.arange(10**5) + 0.5) / 10**5
    kept = (sides - sides**2 / 4) ** 2 * 2 * sides
    assert abs(shares.mean() - (1 - kept.mean())) < 0.02


def test_both_methods_take_turns() -> None:
    images, labels = _batch(4)
    averaged = 0
    for draws in _draws(600):
        mixed, _ = mix(images, labels, CLASSES, AugmentSection(mixup=1.0, cutmix=1.0), draws)
        whole = ((mixed == images) | (mixed == images.flip(0))).all()
        averaged += not whole
    assert abs(averaged - 300) < 75


@given(st.floats(1e-3, 100), UNIT)
@example(1e-3, 1 - 2.0**-53)
@example(3.0, 2.0**-53)
@example(1.0, 0.0)
def test_shares_are_numbers_whatever_is_drawn(alpha: float, draw: float) -> None:
    images, labels = _batch(2, 3, 3)
    for mixing in (AugmentSection(mixup=alpha), AugmentSection(cutmix=alpha)):
        mixed, targets = mix(images, labels, CLASSES, mixing, np.full(MIXING_UNIFORMS, draw))
        assert mixed.isfinite().all()
        assert (targets.sum(1) - 1).abs().max() < 1e-6


def test_without_a_method_nothing_is_mixed() -> None:
    images, labels = _batch()
    mixed, targets = mix(images, labels, CLASSES, AugmentSection(), _draws(1)[0])
    assert mixed is images
    assert torch.equal(targets, F.one_hot(labels, CLASSES).float())


@pytest.mark.parametrize("mixing", [AugmentSection(mixup=1.0), AugmentSection(cutmix=1.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_type_and_memory_format_stay(mixing: AugmentSection, dtype: torch.dtype) -> None:
    images, labels = _batch(6)
    lasting = images.to(dtype).contiguous(memory_format=torch.channels_last)
    mixed, targets = mix(lasting, labels, CLASSES, mixing, _draws(1)[0])
    assert mixed.dtype == dtype
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    exact, same = mix(images, labels, CLASSES, mixing, _draws(1)[0])
    assert torch.equal(targets, same)
    assert (mixed.float() - exact).abs().max() < 5 * 2.0 ** {2: -8, 4: -22}[dtype.itemsize]


@settings(max_examples=30)
@given(st.floats(0, 0.5), st.integers(0, 1000))
def test_loss_is_the_shares_of_both_classes_losses(smoothing: float, seed: int) -> None:
    images, labels = _batch(6)
    draws = _draws(1, seed)[0]
    _, targets = mix(images, labels, CLASSES, AugmentSection(mixup=1.0), draws)
    logits = torch.randn(6, CLASSES, generator=torch.Generator().manual_seed(seed))
    share = float(stats.beta(1, 1).ppf(draws[1]))
    ours = F.cross_entropy(logits, targets, label_smoothing=smoothing)
    parts = [
        F.cross_entropy(logits, which, label_smoothing=smoothing)
        for which in (labels, labels.flip(0))
    ]
    assert ours.item() == pytest.approx(
        (share * parts[0] + (1 - share) * parts[1]).item(), abs=1e-5
    )
