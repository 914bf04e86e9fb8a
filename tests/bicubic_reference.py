"""Images made smaller and larger as MATLAB does it, value by value; and those published so."""

import io
import math
import tarfile

import numpy as np
import torch
from PIL import Image

SET5 = ("baby", "bird", "butterfly", "head", "woman")


def read_set5(archive: tarfile.TarFile, name: str) -> torch.Tensor:
    """An image of Set5, (3, h, w) in 0..1."""
    member = archive.extractfile(f"Set5/{name}.png")
    assert member is not None
    pixels = np.array(Image.open(io.BytesIO(member.read())).convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def imresize(image: np.ndarray, size: tuple[int, int], factor: float) -> np.ndarray:
    """MATLAB's imresize of levels (h, w) value by value, as its source explains it."""
    for axis, length in enumerate(size):
        rows = np.moveaxis(image, axis, 0)
        count, new = len(rows), []
        # Its list of mirrored places: 1 to n, then n down to 1, again and again.
        mirrored = [*range(count), *reversed(range(count))]
        wide = 4 / min(factor, 1)
        for place in range(1, length + 1):
            centre = place / factor + 0.5 * (1 - 1 / factor)
            first = math.floor(centre - wide / 2)
            weights, values = [], []
            for tap in range(first, first + math.ceil(wide) + 2):
                x = abs(min(factor, 1) * (centre - tap))
                near = 1.5 * x**3 - 2.5 * x**2 + 1
                far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
                weights.append(near if x <= 1 else far if x <= 2 else 0)
                values.append(rows[mirrored[(tap - 1) % (2 * count)]])
            mean = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
            new.append(np.clip(np.floor(mean + 0.5), 0, 255))
        image = np.moveaxis(np.stack(new), 0, axis)
    return image
