"""Images made smaller and larger as MATLAB does it, to the last bit."""

import tarfile

import numpy as np
import pytest
import torch
from bicubic_reference import SET5, imresize, read_set5

from data_pipelines.images.bicubic import enlarge, shrink


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_the_published_small_images_come_out_to_the_bit(shared_data, scale, dtype):
    with tarfile.open(shared_data("set5.tar.gz")) as archive:
        for name in SET5:
            large = read_set5(archive, f"HR/{name}")
            published = read_set5(archive, f"LR_bicubic/X{scale}/{name}x{scale}")
            height, width = (scale * (side // scale) for side in large.shape[1:])
            assert shrink(large[:, :height, :width].to(dtype), scale).equal(published), name


@pytest.mark.parametrize("shape", [(12, 24), (11, 7), (2, 3), (1, 1)])
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_as_written_down(shape, scale):
    levels = np.random.default_rng(scale).integers(0, 256, (2, *shape)).astype(float)
    images = torch.from_numpy(levels / 255).float()
    small = tuple(-(-side // scale) for side in shape)
    large = tuple(side * scale for side in shape)
    for found, size, factor in (
        (shrink(images, scale), small, 1 / scale),
        (enlarge(images, scale), large, scale),
    ):
        truth = np.stack([imresize(image, size, factor) for image in levels])
        assert found.dtype == torch.float32
        assert np.abs(found.numpy() * 255 - truth).max() < 1e-3
