"""Batches for training and evaluation, from DALI or torchvision: the public face of this package.

Python decides which images a rank gets, in what order and with which random numbers, and hands
the loader requests; the loader reads, decodes, crops and normalises. So both loaders give the same
samples in the same order with the same crops and flips, and their pixels differ by rounding only.
"""

import contextlib
from collections.abc import Callable, Generator, Iterator

import numpy as np
import torch

from data_pipelines.images.batch import Batch, Output, Request
from data_pipelines.images.image_index import ImageIndex
from data_pipelines.images.order import (
    Int64s,
    SampleOrder,
    mixing_uniforms,
    rank_samples,
    uniforms,
)
from data_pipelines.images.source import BadImages, ImageSource
from data_pipelines.loading.augment import UNIFORMS, ImageTransform
from data_pipelines.loading.mixing import MIXING_UNIFORMS, Mixing, mix
from tpp.common.errors import UserError

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
    order: SampleOrder | None = None,
    mixing: Mixing | None = None,
    image_side: Callable[[int], int] | None = None,
    bad: BadImages | None = None,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    prefetch: int = 2,
) -> Generator[Batch, None, None]:
    """One rank's training batches of steps start_step to start_step + steps - 1.

    Args:
        index: the images.
        transform: how they are augmented and normalised.
        loader: 'dali', 'torchvision' or 'auto', see :func:`resolve_loader`.
        global_batch: images per step over all ranks.
        accumulation: batches that one step is made of on each rank.
        seed: of the augmentation, and of the order unless that is given.
        start_step: the first step, from 0; any step can be the first.
        steps: number of steps.
        rank: this process, 0 to world_size - 1.
        world_size: number of processes that share a step.
        threads: decoding threads (DALI) or worker processes (torchvision; 0: in this process).
        device: where the batches go; DALI decodes on it, if it is a GPU.
        order: see :func:`training_order`; by default a whole shuffle of every epoch.
        mixing: mixup and cutmix; each batch is mixed with itself on this rank.
        image_side: of the images of a 0-based step, in pixels, for progressive resizing with the
            'imagenet' recipe; by default transform.image_size.
        bad: what to do about images that cannot be read; by default the first one is an error.
        dtype: of the images, float32 or float16.
        channels_last: memory format of the images.
        prefetch: batches made ahead (per worker process, with torchvision).

    Returns:
        An iterator over steps * accumulation batches of global_batch / (world_size * accumulation)
        images each. Close it, or drop it, to free the loader's threads or processes.

    Raises:
        UserError: the batch does not divide evenly; the loader is unknown or not installed; or,
            while iterating, an image cannot be read and may not be skipped.
    """
    if global_batch < 1 or global_batch % (world_size * accumulation):
        raise UserError(
            f"a global batch of {global_batch} images cannot be shared evenly by "
            f"{world_size} ranks x {accumulation} accumulation steps"
        )
    order = order or training_order(index, seed)
    bad = bad or BadImages(index)
    size = global_batch // (world_size * accumulation)

    def parts() -> Iterator[tuple[int, Int64s]]:
        covered = range(start_step, start_step + steps)
        return _train_parts(covered, global_batch, accumulation, rank, world_size)

    side = image_side or (lambda step: transform.image_size)
    requests = _train_requests(parts(), order, seed, bad, side)
    output = Output(device, dtype, channels_last)
    source = ImageSource(index, order, bad)
    batches = _batches(loader, source, requests, transform, size, threads, output, prefetch)
    if mixing is None:
        return batches
    return _mixed(batches, parts(), mixing, len(index.classes), seed)


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
    bad: BadImages | None = None,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    prefetch: int = 2,
) -> Generator[Batch, None, None]:
    """One rank's share of the images, each exactly once, in index order, without augmentation.

    The rank takes images rank, rank + world_size, ... in batches of ``batch_size``, of which the
    last may be smaller. With fewer images than ranks, some ranks get no batch at all. Images that
    ``bad`` lets be skipped are left out. The other arguments, and the errors, are those of
    :func:`train_batches`.
    """
    plain = transform.plain()
    bad = bad or BadImages(index)
    requests = _eval_requests(len(index), batch_size, rank, world_size, bad, plain.image_size)
    output = Output(device, dtype, channels_last)
    source = ImageSource(index, None, bad)
    return _batches(loader, source, requests, plain, batch_size, threads, output, prefetch)


def training_order(
    index: ImageIndex, seed: int, *, repeats: int = 1, window: int | None = None
) -> SampleOrder:
    """The order in which training goes through an index.

    Args:
        index: the images.
        seed: the run's.
        repeats: how often an image comes in a row, see :class:`SampleOrder`.
        window: images that are shuffled among each other, shards being read one after the other;
            None for a whole shuffle.

    Raises:
        UserError: a window for images that are not in shards.
    """
    if window is not None and not index.containers:
        raise UserError(
            f"data.shuffle_window: the images in {index.root} are files of their own, not shards; "
            "leave it out, or make shards with: python -m data_pipelines.shards"
        )
    shards = index.container if window is not None else None
    return SampleOrder(seed, len(index), repeats, window, shards)


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
    source: ImageSource,
    requests: Iterator[Request],
    transform: ImageTransform,
    batch_size: int,
    threads: int,
    output: Output,
    prefetch: int,
) -> Generator[Batch, None, None]:
    # Only the loader that is asked for is imported: DALI is not installed everywhere.
    if resolve_loader(loader) == "dali":
        from data_pipelines.loading.dali import dali_batches

        return dali_batches(source, requests, transform, batch_size, threads, output, prefetch)
    from data_pipelines.loading.torch_loader import torch_batches

    return torch_batches(source, requests, transform, threads, output, prefetch)


def _train_parts(
    steps: range, global_batch: int, accumulation: int, rank: int, world_size: int
) -> Iterator[tuple[int, Int64s]]:
    """Step and sample numbers of each of a rank's batches."""
    for step in steps:
        samples = rank_samples(step, global_batch, rank, world_size)
        for part in np.split(samples, accumulation):
            yield step, part


def _train_requests(
    parts: Iterator[tuple[int, Int64s]],
    order: SampleOrder,
    seed: int,
    bad: BadImages,
    image_side: Callable[[int], int],
) -> Iterator[Request]:
    for step, samples in parts:
        draws, asked = uniforms(seed, samples, UNIFORMS), bad.ask(len(samples))
        yield Request(samples, order.images(samples), draws, image_side(step), asked)


def _eval_requests(
    images: int, batch_size: int, rank: int, world_size: int, bad: BadImages, side: int
) -> Iterator[Request]:
    mine = np.arange(rank, images, world_size, dtype=np.int64)
    for start in range(0, len(mine), batch_size):
        part = mine[start : start + batch_size]
        yield Request(part, part, np.empty((len(part), 0)), side, bad.ask(len(part)))


def _mixed(
    batches: Generator[Batch, None, None],
    parts: Iterator[tuple[int, Int64s]],
    mixing: Mixing,
    classes: int,
    seed: int,
) -> Generator[Batch, None, None]:
    with contextlib.closing(batches):
        for (_, samples), (images, labels) in zip(parts, batches, strict=False):
            draws = mixing_uniforms(seed, int(samples[0]), MIXING_UNIFORMS)
            yield mix(images, labels, classes, mixing, draws)
