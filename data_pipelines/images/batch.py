"""What a loader is asked for and what it makes; and how one image is decoded with PIL."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from data_pipelines.images.header import (
    Header,
    alone_if_large,
    find_damage,
    is_common,
    open_with_pil,
    read_header,
    what_pil_says,
)
from data_pipelines.images.order import Float64s, Int64s

Batch = tuple[Tensor, Tensor]
"""Images (b, c, h, w), normalised; labels, int64 (b,), or where images were mixed the share of each
class, float32 (b, classes). Both on the device asked for."""


@dataclass(frozen=True, eq=False)
class Request:
    """One batch for a loader to make.

    Attributes:
        samples: their global numbers in training, their places in evaluation; int64, shape (b,).
        images: which image of the index each one is; int64, shape (b,).
        uniforms: random numbers of each sample's augmentation, shape (b, UNIFORMS), or (b, 0)
            for evaluation.
        side: of the square images to make, in pixels.
        asked: images that this rank has asked for since the run began, these included.
    """

    samples: Int64s
    images: Int64s
    uniforms: Float64s
    side: int
    asked: int = 0


@dataclass(frozen=True)
class LoaderSettings:
    """How a rank's batches are made, whatever is in them.

    Attributes:
        loader: 'dali', 'torchvision' or 'auto', see
            :func:`data_pipelines.loaders.resolve_loader`.
        threads: decoding threads (DALI) or worker processes (torchvision; 0: in this process).
        device: where the batches go; DALI decodes on it, if it is a GPU.
        rank: this process, 0 to world_size - 1.
        world_size: number of processes that share the images.
        dtype: of the images, float32, or float16 for networks that compute in half precision
            anyway.
        channels_last: whether the channels of a pixel lie side by side in memory.
        prefetch: batches made ahead (per worker process, with torchvision).
    """

    loader: str
    threads: int
    device: torch.device
    rank: int = 0
    world_size: int = 1
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    prefetch: int = 2


def decode_with_pil(data: NDArray[np.uint8], channels: int) -> Image.Image:
    """Decode an image file's bytes as RGB (3 channels) or grey (1); EXIF rotation is ignored.

    Of a colour JPEG, grey is the luma that the file holds, and 16 bits are scaled to 8. Everything
    else is as PIL has it: of several pictures the first, or the still one; alpha is left out; a
    TIFF is turned as its orientation says.

    Raises:
        ValueError: the bytes cannot be decoded; says why in a few words. Of a JPEG or PNG,
            :func:`data_pipelines.images.header.find_damage` has to be asked before, since PIL
            decodes a few bytes that say they are a huge image.
    """
    try:
        with open_with_pil(data) as image, alone_if_large(image.height, image.width):
            # Not of lossless ones: there PIL's decoder fails on it.
            if channels == 1 and is_common(data):
                image.draft("L", None)
            grey16 = image.mode.startswith("I")
            # PIL's own conversion clips 16-bit grey at 255.
            decoded = image.point(lambda value: value / 257) if grey16 else image
            return decoded.convert("L" if channels == 1 else "RGB")
    # PIL's readers raise whatever comes, depending on the format and the damage.
    except Exception as error:
        raise ValueError(what_pil_says(error)) from None


def check_image(data: NDArray[np.uint8]) -> Header:
    """The header of an image that may be decoded, for both loaders alike.

    What is neither JPEG nor PNG is not looked through: decoding it tells.

    Raises:
        ValueError: it is damaged; says how in a few words.
    """
    header = read_header(data)
    damage = None if header.format == "other" else find_damage(data)
    if damage:
        raise ValueError(damage)
    return header
