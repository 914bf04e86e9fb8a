"""Batches for training and evaluation, from DALI or torchvision: the public face of this package.

Python decides which images a rank gets, in what order and with which random numbers, and hands
the loader requests; the loader reads, decodes, crops and normalises. So both loaders give the same
samples in the same order with the same crops and flips, and their pixels differ by rounding only.
"""

from collections.abc import Generator, Iterator
from dataclasses import replace

import numpy as np
import torch

from data_pipelines.augment import UNIFORMS, ImageTransform
from data_pipelines.batch import Batch, Request
from data_pipelines.index import ImageIndex
from data_pipelines.order import Float64s, Int64s, rank_samples, sample_images, uniforms
from tpp.errors import UserError

LOADERS = ("auto", "dali", "torchvision")


def train_batches(
    index: ImageIndex,
    transform: ImageTransform,
    *,
    loader: str,
    global_batch: int,
    accumulation: int,
    seed: int,
    start_step: int,
    steps: int,
    rank: int,
    world_size: int,
    threads: int,
    device: torch.device,
) -> Generator[Batch, None, None]:
    """One rank's training batches of steps start_step to start_step + steps - 1.

    Args:
        index: the images.
        transform: how they are augmented and normalised.
        loader: 'dali', 'torchvision' or 'auto', see :func:`resolve_loader`.
        global_batch: images per step over all ranks.
        accumulation: batches that one step is made of on each rank.
        seed: of the order and the augmentation.
        start_step: the first step, from 0; any step can be the first.
        steps: number of steps.
        rank: this process, 0 to world_size - 1.
        world_size: number of processes that share a step.
        threads: decoding threads (DALI) or worker processes (torchvision; 0: in this process).
        device: where the batches go; DALI decodes on it, if it is a GPU.

    Returns:
        An iterator over steps * accumulation batches of global_batch / (world_size * accumulation)
        images each. Close it, or drop it, to free the loader's threads or processes.

    Raises:
        UserError: the batch does not divide evenly; the loader is unknown or not installed; or,
            while iterating, an image cannot be read.
    """
    if global_batch < 1 or global_batch % (world_size * accumulation):
        raise UserError(
            f"a global batch of {global_batch} images cannot be shared evenly by "
            f"{world_size} ranks x {accumulation} accumulation steps"
        )
    requests = _train_requests(
        index,
        global_batch,
        accumulation,
        seed,
        range(start_step, start_step + steps),
        rank,
        world_size,
    )
    size = global_batch // (world_size * accumulation)
    return _batches(loader, requests, transform, size, threads, device)


def eval_batches(
    index: ImageIndex,
    transform: ImageTransform,
    *,
    loader: str,
    batch_size: int,
    rank: int,
    world_size: int,
    threads: int,
    device: torch.device,
) -> Generator[Batch, None, None]:
    """One rank's share of the images, each exactly once, in index order, without augmentation.

    The rank takes images rank, rank + world_size, ... in batches of ``batch_size``, of which the
    last may be smaller. With fewer images than ranks, some ranks get no batch at all. The other
    arguments, and the errors, are those of :func:`train_batches`.
    """
    requests = _eval_requests(index, batch_size, rank, world_size)
    plain = replace(transform, augmentation="none")
    return _batches(loader, requests, plain, batch_size, threads, device)


def resolve_loader(name: str) -> str:
    """The loader that a setting stands for, 'dali' or 'torchvision'; 'auto' prefers DALI.

    Raises:
        UserError: the name is unknown, or is 'dali' where DALI is not installed.
    """
    if name not in LOADERS:
        raise UserError(f"data.loader must be one of {', '.join(LOADERS)}, not {name!r}")
    if name == "torchvision":
        return name
    try:
        import nvidia.dali  # noqa: F401
    except ImportError as error:
        if name == "auto":
            return "torchvision"
        raise UserError(
            f"data.loader is 'dali', but DALI does not import ({error}); install the pip package "
            "nvidia-dali-cuda130 (or the one for your CUDA), or set data.loader=torchvision"
        ) from None
    return "dali"


def _batches(
    loader: str,
    requests: Iterator[Request],
    transform: ImageTransform,
    batch_size: int,
    threads: int,
    device: torch.device,
) -> Generator[Batch, None, None]:
    # Only the loader that is asked for is imported: DALI is not installed everywhere.
    if resolve_loader(loader) == "dali":
        from data_pipelines.dali import dali_batches

        return dali_batches(requests, transform, batch_size, threads, device)
    from data_pipelines.torch_loader import torch_batches

    return torch_batches(requests, transform, threads, device)


def _train_requests(
    index: ImageIndex,
    global_batch: int,
    accumulation: int,
    seed: int,
    steps: range,
    rank: int,
    world_size: int,
) -> Iterator[Request]:
    for step in steps:
        samples = rank_samples(step, global_batch, rank, world_size)
        for part in np.split(samples, accumulation):
            images = sample_images(seed, part, len(index))
            yield _request(index, images, uniforms(seed, part, UNIFORMS))


def _eval_requests(
    index: ImageIndex, batch_size: int, rank: int, world_size: int
) -> Iterator[Request]:
    mine = np.arange(rank, len(index), world_size, dtype=np.int64)
    for start in range(0, len(mine), batch_size):
        images = mine[start : start + batch_size]
        yield _request(index, images, np.empty((len(images), 0)))


def _request(index: ImageIndex, images: Int64s, uniforms: Float64s) -> Request:
    paths = [f"{index.root}/{index.files[image]}" for image in images]
    return Request(paths, index.labels[images], uniforms)
