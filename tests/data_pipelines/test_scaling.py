"""Scaling by torch's kernel against Pillow's own, whatever the order of its two passes."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from data_pipelines.loading.scaling import scale

MODES = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def _apart(
    before: tuple[int, int], after: tuple[int, int], mode: str, channels: int = 3
) -> NDArray[np.int64]:
    pixels = np.random.default_rng(0).integers(0, 256, (*before, channels), dtype=np.uint8)
    image = Image.fromarray(pixels if channels == 3 else pixels[..., 0])
    theirs = np.asarray(image.resize(after[::-1], MODES[mode])).reshape(*after, channels)
    ours = scale(pixels, after, mode)
    assert ours.dtype == np.uint8 and ours.flags.c_contiguous
    return np.abs(ours.astype(np.int64) - theirs)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((300, 200), (224, 224)),  # shorter and wider
        ((200, 300), (224, 224)),
        ((120, 100), (224, 224)),  # larger both ways
        ((500, 400), (224, 224)),
        ((430, 330), (224, 224)),  # 206 rows and 106 columns go
        ((437, 330), (224, 224)),  # 213 rows and 106 columns: one more than twice as many
        ((436, 330), (224, 224)),  # 212: just twice as many
    ],
)
def test_scaled_pixels_are_pillows(before, after, mode, channels):
    apart = _apart(before, after, mode, channels)
    assert apart.max() <= 2 and (apart > 0).mean() < 0.02


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(8, 160), st.integers(8, 160)),
    st.tuples(st.integers(8, 96), st.integers(8, 96)),
    st.sampled_from(sorted(MODES)),
)
def test_at_any_size(before, after, mode):
    assume(min(after) * max(after) >= 500)
    apart = _apart(before, after, mode)
    assert apart.max() <= 2 and (apart > 0).mean() < 0.05
