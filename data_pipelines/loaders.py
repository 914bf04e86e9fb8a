"""Batches for training and evaluation, from DALI or torchvision: the public face of this package.

Python decides which images a rank gets, in what order and with which random numbers, and hands
the loader requests; the loader reads, decodes, crops and normalises. So both loaders give the same
samples in the same order with the same crops and flips, and their pixels differ by rounding only.
"""

import contextlib
from collections.abc import Callable, Generator, Iterator
from typing import get_args

import numpy as np
import torch

from data_pipelines.images.batch import Batch, LoaderSettings, Request
from data_pipelines.images.episodes import EpisodeOrder
from data_pipelines.images.image_index import ImageIndex
from data_pipelines.images.order import (
    Int64s,
    Order,
    SampleOrder,
    Steps,
    mixing_uniforms,
    uniforms,
)
from data_pipelines.images.source import BadImages, ImageSource
from data_pipelines.loading.augment import ImageTransform, training_size
from data_pipelines.loading.draws import UNIFORMS
from data_pipelines.loading.mixing import MIXING_UNIFORMS, mix
from data_pipelines.loading.recipes import quarter_turns
from data_pipelines.settings import AugmentSection, EpisodesSection, Loader
from tpp.common.errors import UserError

LOADERS = get_args(Loader)


def train_batches(
    index: ImageIndex,
    transform: ImageTransform,
    order: Order,
    steps: Steps,
    settings: LoaderSettings,
    *,
    bad: BadImages | None = None,
) -> Generator[Batch, None, None]:
    """One rank's training batches of some steps.

    Args:
        index: the images.
        transform: how they are augmented and normalised; with mixup or CutMix each batch is mixed
            with itself on this rank.
        order: which image each sample is, see :func:`training_order` and
            :class:`data_pipelines.images.episodes.EpisodeOrder`; its seed is that of the
            augmentation too.
        steps: which samples, and how many to a batch.
        settings: how the batches are made, and on which rank.
        bad: what to do about images that cannot be read; by default the first one is an error.

    Returns:
        An iterator over the batches, steps.accumulation for each step. Close it, or drop it, to
        free the loader's threads or processes.

    Raises:
        UserError: the batch does not divide evenly; the loader is unknown or not installed; or,
            while iterating, an image cannot be read and may not be skipped.
    """
    rank, world_size, augment = settings.rank, settings.world_size, transform.augment
    size = steps.local_batch(world_size)
    bad = bad or BadImages(index)
    side = _image_side(transform, steps.global_batch / len(index))
    requests = _train_requests(steps.batches(rank, world_size), order, bad, side)
    batches = _batches(ImageSource(index, order, bad), requests, transform, size, settings)
    if transform.recipe.turns:
        batches = _turned(batches, steps.batches(rank, world_size), order.seed)
    if not augment.mixup and not augment.cutmix:
        return batches
    parts = steps.batches(rank, world_size)
    return _mixed(batches, parts, augment, len(index.classes), order.seed)


def eval_batches(
    index: ImageIndex,
    transform: ImageTransform,
    batch_size: int,
    settings: LoaderSettings,
    *,
    bad: BadImages | None = None,
) -> Generator[Batch, None, None]:
    """One rank's share of the images, each exactly once, in index order, without augmentation.

    The rank takes images rank, rank + world_size, ... in batches of ``batch_size``, of which the
    last may be smaller; where images are taken whole, in batches of one. With fewer images than
    ranks, some ranks get no batch at all. Images that ``bad`` lets be skipped are left
    out. The other arguments, and the errors, are those of :func:`train_batches`.
    """
    plain = transform.plain()
    batch_size = 1 if plain.recipe.one_by_one else batch_size
    bad = bad or BadImages(index)
    mine = np.arange(settings.rank, len(index), settings.world_size, dtype=np.int64)
    requests = _eval_requests(mine, batch_size, bad, plain.image_size)
    return _batches(ImageSource(index, None, bad), requests, plain, batch_size, settings)


def training_order(
    index: ImageIndex,
    seed: int,
    *,
    repeats: int = 1,
    window: int | None = None,
    episodes: EpisodesSection | None = None,
    batch: int = 1,
) -> SampleOrder | EpisodeOrder:
    """The order in which training goes through an index.

    Args:
        index: the images.
        seed: the run's.
        repeats: how often an image comes in a row, see :class:`SampleOrder`.
        window: images that are shuffled among each other, shards being read one after the other;
            None for a whole shuffle.
        episodes: for training on a few classes at a time, in whole shuffles of their images.
        batch: images of an optimiser step, over all ranks; of episodes only.

    Raises:
        UserError: a window for images that are not in shards, or fewer classes than an episode has.
    """
    if episodes is not None:
        number = len(index.classes)
        if episodes.classes > number:
            raise UserError(
                f"episodes.classes: {episodes.classes}, and {index.place} has {number} classes"
            )
        if not np.bincount(index.labels, minlength=number).all():
            empty = index.classes[int(np.bincount(index.labels, minlength=number).argmin())]
            raise UserError(f"episodes: {index.place} has no images of class {empty!r}")
        length = episodes.steps * batch
        return EpisodeOrder(seed, index.labels, number, episodes.classes, length, repeats)
    if window is not None and not index.containers:
        raise UserError(
            f"data.shuffle_window: the images in {index.place} are files of their own, not shards; "
            "leave it out, or make shards with: tpp shards"
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
    source: ImageSource,
    requests: Iterator[Request],
    transform: ImageTransform,
    batch_size: int,
    settings: LoaderSettings,
) -> Generator[Batch, None, None]:
    # Only the loader that is asked for is imported: DALI is not installed everywhere.
    if resolve_loader(settings.loader) == "dali":
        from data_pipelines.loading.dali import dali_batches

        return dali_batches(source, requests, transform, batch_size, settings)
    from data_pipelines.loading.torch_loader import torch_batches

    return torch_batches(source, requests, transform, settings)


def _image_side(transform: ImageTransform, epochs_per_step: float) -> Callable[[int], int]:
    """The side of the images of a 0-based step, in pixels."""
    side, progressive = transform.image_size, transform.augment.progressive
    if progressive is None:
        return lambda step: side
    return lambda step: training_size(step * epochs_per_step, side, progressive)


def _train_requests(
    parts: Iterator[tuple[int, Int64s]],
    order: Order,
    bad: BadImages,
    image_side: Callable[[int], int],
) -> Iterator[Request]:
    for step, samples in parts:
        draws, asked = uniforms(order.seed, samples, UNIFORMS), bad.ask(len(samples))
        yield Request(samples, order.images(samples), draws, image_side(step), asked)


def _eval_requests(images: Int64s, batch_size: int, bad: BadImages, side: int) -> Iterator[Request]:
    for start in range(0, len(images), batch_size):
        part = images[start : start + batch_size]
        yield Request(part, part, np.empty((len(part), 0)), side, bad.ask(len(part)))


def _turned(
    batches: Generator[Batch, None, None], parts: Iterator[tuple[int, Int64s]], seed: int
) -> Generator[Batch, None, None]:
    with contextlib.closing(batches):
        for (_, samples), (images, labels) in zip(parts, batches, strict=False):
            turns = quarter_turns(uniforms(seed, samples, UNIFORMS))
            for quarters in (1, 2, 3):
                rows = torch.from_numpy(np.flatnonzero(turns == quarters)).to(images.device)
                images[rows] = images[rows].rot90(quarters, (2, 3))
            yield images, labels


def _mixed(
    batches: Generator[Batch, None, None],
    parts: Iterator[tuple[int, Int64s]],
    augment: AugmentSection,
    classes: int,
    seed: int,
) -> Generator[Batch, None, None]:
    with contextlib.closing(batches):
        for (_, samples), (images, labels) in zip(parts, batches, strict=False):
            draws = mixing_uniforms(seed, int(samples[0]), MIXING_UNIFORMS)
            yield mix(images, labels, classes, augment, draws)
