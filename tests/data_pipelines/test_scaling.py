"""Scaling on the CPU gives the pixels of the Pillow that is installed, 13 or later."""

from importlib.metadata import version

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipelines.loading.dali import _scale

SIDES = st.integers(40, 250)


@pytest.mark.parametrize("channels", [1, 3])
@settings(max_examples=40, deadline=None)
@given(before=st.tuples(SIDES, SIDES), after=st.tuples(SIDES, SIDES))
@example(before=(200, 149), after=(100, 100))  # the last width at which Pillow takes the height
@example(before=(200, 150), after=(100, 100))  # first, and the first at which it does not
@example(before=(99, 20), after=(100, 100))
@example(before=(101, 20), after=(100, 100))
@example(before=(201, 49), after=(200, 50))
@example(before=(120, 234), after=(50, 200))
def test_scaled_images_are_pillow_s(
    channels: int, before: tuple[int, int], after: tuple[int, int]
) -> None:
    # Noise: of scaling in the other order a fifth of the values would be others.
    pixels = np.random.default_rng(0).integers(0, 256, (*before, channels), dtype=np.uint8)
    image = Image.fromarray(pixels if channels == 3 else pixels[..., 0])
    expected = np.asarray(image.resize(after[::-1], Image.Resampling.BILINEAR))
    made = _scale(pixels, np.array(after, np.float32)).astype(int)
    difference = np.abs(made - expected.reshape(*after, channels))
    said = f"with Pillow {version('pillow')}"
    assert difference.max() <= 1, said
    # What is left: torch's weights have fewer bits than Pillow's.
    assert (difference == 0).mean() > 0.91, said
