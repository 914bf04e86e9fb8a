"""Batches read and decoded by NVIDIA DALI, on the GPU where there is one, else on the CPU.

Python hands DALI paths, labels and each sample's random numbers; DALI reads the files in C++
threads. The windows are computed from the image sizes, which DALI finds in the files' headers,
by the same function that the torchvision loader uses, once per batch.
"""

import os
from collections import deque
from collections.abc import Generator, Iterator
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn
from nvidia.dali.data_node import DataNode
from nvidia.dali.fn.io.file import read
from nvidia.dali.plugin.pytorch import DALIGenericIterator
from nvidia.dali.types import DALIDataType, DALIImageType

from data_pipelines.augment import ImageTransform, flips, frames, random_resized_windows
from data_pipelines.batch import Batch, Request, open_image
from data_pipelines.order import Float64s, Int64s
from tpp.errors import UserError

_PREFETCH = 2
_Arrays = list[NDArray[Any]]


def dali_batches(
    requests: Iterator[Request],
    transform: ImageTransform,
    batch_size: int,
    threads: int,
    device: torch.device,
) -> Generator[Batch, None, None]:
    """Make the batches of ``requests``, in order; none may be larger than ``batch_size``.

    On a GPU, JPEGs are decoded by nvJPEG, whose pixels may differ by rounding from the CPU's.

    Raises:
        UserError: an image cannot be read; raised when the batch's turn comes.
    """
    pending: deque[Request] = deque()
    pipeline = _pipeline(_inputs(requests, pending), transform, batch_size, threads, device)
    iterator = DALIGenericIterator(
        [pipeline], ["images", "labels"], auto_reset=False, prepare_first_batch=False
    )
    try:
        while True:
            try:
                (made,) = next(iterator)
            except StopIteration:
                return
            except RuntimeError as error:
                raise _reading_error(pending, transform.channels, error) from None
            pending.popleft()
            yield made["images"], made["labels"]
    finally:
        # DALI's graph refers to itself in circles: without this, its threads and buffers would
        # stay until Python's garbage collector comes round.
        pipeline._shutdown()


def _pipeline(
    inputs: Iterator[tuple[_Arrays, Int64s, Float64s]],
    transform: ImageTransform,
    batch_size: int,
    threads: int,
    device: torch.device,
) -> Pipeline:
    on_gpu = device.type == "cuda"
    pipeline = Pipeline(
        batch_size=batch_size,
        num_threads=max(threads, 1),
        device_id=_device_number(device) if on_gpu else None,
        prefetch_queue_depth=_PREFETCH,
        # The dynamic executor's outputs become torch tensors without a copy, and stay valid.
        exec_dynamic=True,
    )
    side = transform.image_size
    decoding: dict[str, Any] = {
        "device": "mixed" if on_gpu else "cpu",
        "output_type": DALIImageType.GRAY if transform.channels == 1 else DALIImageType.RGB,
        "adjust_orientation": False,
        "jpeg_fancy_upsampling": True,
    }
    with pipeline:
        sources = fn.external_source(
            inputs,
            num_outputs=3,
            dtype=[DALIDataType.UINT8, DALIDataType.INT64, DALIDataType.FLOAT64],
            ndim=[1, 0, 1],
        )
        paths, labels, uniforms = cast(list[DataNode], sources)
        # Mapping files into memory gains nothing, and on network file systems is slower.
        encoded = read(paths, dont_use_mmap=True)
        sizes = fn.peek_image_shape(encoded, adjust_orientation=False)
        geometry = fn.python_function(
            sizes,
            uniforms,
            function=partial(_geometry, transform=transform),
            num_outputs=3,
            batch_processing=True,
        )
        corner, size, mirror = cast(list[DataNode], geometry)
        if transform.augmentation == "imagenet":
            images = fn.decoders.image_slice(
                encoded, start=corner, shape=size, axes=(0, 1), **decoding
            )
            images = fn.resize(images, size=(side, side), antialias=True)
        else:
            images = fn.decoders.image(encoded, **decoding)
            if transform.resize is not None:
                images = fn.resize(
                    images, size=fn.cast(size, dtype=DALIDataType.FLOAT), antialias=True
                )
            images = fn.slice(
                images,
                start=corner,
                shape=(side, side),
                axes=(0, 1),
                out_of_bounds_policy="pad",
                fill_values=0,
            )
        images = fn.crop_mirror_normalize(
            images,
            dtype=DALIDataType.FLOAT,
            output_layout="CHW",
            mean=[255 * mean for mean in transform.mean],
            std=[255 * std for std in transform.std],
            mirror=mirror,
        )
        pipeline.set_outputs(images, labels.gpu() if on_gpu else labels)
    return pipeline


def _geometry(
    sizes: _Arrays, uniforms: _Arrays, *, transform: ImageTransform
) -> tuple[_Arrays, _Arrays, _Arrays]:
    """Corner (2,) and size (2,) of each image's window or frame, and whether it is mirrored (1,).

    The window is cut before scaling in the 'imagenet' recipe; in the others the size is the whole
    image's after scaling.
    """
    shapes, draws = np.stack(sizes)[:, :2], np.stack(uniforms)
    if transform.augmentation == "imagenet":
        corner, size = np.split(random_resized_windows(shapes, draws), 2, axis=1)
    else:
        size, corner = np.split(frames(shapes, draws, transform), 2, axis=1)
    mirror = flips(draws) if transform.augmentation != "none" else np.zeros(len(shapes))
    columns = (corner, size, mirror[:, None])
    corners, extents, mirrors = ([*column.astype(np.int32)] for column in columns)
    return corners, extents, mirrors


def _inputs(
    requests: Iterator[Request], pending: deque[Request]
) -> Iterator[tuple[_Arrays, Int64s, Float64s]]:
    """What DALI reads: encoded paths, labels, uniforms. Notes in ``pending`` what it has taken."""
    for request in requests:
        pending.append(request)
        paths = [np.frombuffer(os.fsencode(path), dtype=np.uint8) for path in request.paths]
        yield paths, request.labels, request.uniforms


def _reading_error(pending: deque[Request], channels: int, error: RuntimeError) -> Exception:
    """The user's mistake behind DALI's error, which does not name the file; or else the error."""
    for request in pending:
        for path in request.paths:
            try:
                open_image(path, channels)
            except UserError as mistake:
                return mistake
        error.add_note(f"while reading {request.paths[0]} to {request.paths[-1]}")
    return error


def _device_number(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
