"""Batches read by torch's DataLoader with PIL and torchvision, where DALI is not installed."""

import multiprocessing
import os
import select
import signal
import threading
from collections.abc import Generator, Iterator
from functools import partial
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import BaseContext
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from data_pipelines.images.batch import (
    Batch,
    LoaderSettings,
    Request,
    check_image,
    decode_with_pil,
)
from data_pipelines.images.source import Bytes, ImageSource
from data_pipelines.loading.augment import (
    ImageTransform,
    color_jitter_factors,
    erasing_boxes,
    rand_augment_choices,
    trivial_augment_choices,
)
from data_pipelines.loading.recipes import Cuts
from data_pipelines.loading.torch_augment import (
    color_jitter,
    erase,
    rand_augment,
    trivial_augment,
)
from tpp.common.errors import UserError

# What SLURM and torchrun send to every process of a rank: the rank ends at its next step.
_NOT_FOR_WORKERS = (signal.SIGUSR1, signal.SIGTERM)


class _Made(NamedTuple):
    """A batch from a worker.

    Attributes:
        images: shape (b, c, h, w); finished if they are for the CPU, else still uint8.
        labels: int64, shape (b,).
        boxes: to erase once the images are normalised, int64, shape (b, 4); or None.
        bad: images that could not be read, and why.
    """

    images: Tensor
    labels: Tensor
    boxes: Tensor | None
    bad: list[tuple[int, str]]


def torch_batches(
    source: ImageSource,
    requests: Iterator[Request],
    transform: ImageTransform,
    settings: LoaderSettings,
) -> Generator[Batch, None, None]:
    """Make the batches of ``requests``, in order, in as many worker processes as there are threads.

    Raises:
        UserError: an image cannot be read and may not be skipped; raised when the batch's turn
            comes.
    """
    device, threads = settings.device, settings.threads
    loader = DataLoader(
        _Images(source, transform, settings),
        # A request is a whole batch, made here in order: how the work is split among the workers
        # decides nothing.
        sampler=requests,
        batch_size=None,
        num_workers=threads,
        collate_fn=_as_is,
        prefetch_factor=settings.prefetch if threads else None,
        pin_memory=device.type == "cuda",
        multiprocessing_context=_worker_context() if threads else None,
        worker_init_fn=partial(_end_with, os.getpid()) if threads else None,
    )
    for made in loader:
        if isinstance(made, UserError):
            raise made
        for image, reason in made.bad:
            source.bad.add(image, reason)
        if not len(made.labels):
            continue
        if device.type == "cpu":
            yield made.images, made.labels
        else:
            yield _finished(made, transform, settings), made.labels.to(device, non_blocking=True)


def _finished(made: _Made, transform: ImageTransform, settings: LoaderSettings) -> Tensor:
    """Images normalised, erased, and in the form asked for; on a GPU, where bytes travel faster."""
    form = torch.channels_last if settings.channels_last else torch.contiguous_format
    device = settings.device
    scale = 255 * torch.tensor([transform.mean, transform.std], device=device)
    mean, std = scale[:, None, :, None, None]
    images = made.images.to(device, non_blocking=True, memory_format=form)
    images = images.float().sub_(mean).div_(std)
    if made.boxes is not None:
        erase(images, made.boxes.to(device, non_blocking=True))
    return images.to(settings.dtype)


class _Images(Dataset[_Made | UserError]):
    """From a request to its images."""

    def __init__(
        self, source: ImageSource, transform: ImageTransform, settings: LoaderSettings
    ) -> None:
        self._source, self._transform, self._settings = source, transform, settings

    def __getitem__(self, request: Request) -> _Made | UserError:
        transform = self._transform
        # An error is handed over, not raised: DataLoader would wrap it in the worker's traceback.
        try:
            fetched = self._source.fetch(
                request,
                range(len(request.images)),
                lambda _, data: _decoded(data, transform),
            )
        except UserError as error:
            return error
        images = fetched.items
        labels = torch.from_numpy(self._source.index.labels[fetched.images])
        if not images:
            return _Made(torch.empty(0), labels, None, fetched.bad)
        sizes = np.array([(image.height, image.width) for image in images], dtype=np.int64)
        uniforms = request.uniforms[fetched.rows]
        cuts = transform.recipe.cuts(sizes, uniforms, request.side, transform.resize)
        squares = [
            _square(image, cuts, place, request.side, transform.interpolation)
            for place, image in enumerate(images)
        ]
        batch = torch.stack([F.pil_to_tensor(square) for square in squares])
        if transform.augment.rand_augment is not None:
            choices = rand_augment_choices(uniforms, transform.augment.rand_augment)
            batch = rand_augment(batch, *choices, transform.augment.rand_augment)
        if transform.augment.trivial_augment:
            batch = trivial_augment(batch, trivial_augment_choices(uniforms))
        if transform.augment.color_jitter is not None:
            batch = color_jitter(
                batch, color_jitter_factors(uniforms, transform.augment.color_jitter)
            )
        boxes = None
        if transform.augment.random_erasing:
            boxes = torch.from_numpy(
                erasing_boxes(uniforms, request.side, transform.augment.random_erasing)
            )
        mirrored = torch.from_numpy(cuts.mirrored)
        batch[mirrored] = batch[mirrored].flip(-1)
        made = _Made(batch, labels, boxes, fetched.bad)
        if self._settings.device.type != "cpu":
            return made
        return made._replace(images=_finished(made, transform, self._settings))


def _square(
    image: Image.Image, cuts: Cuts, place: int, side: int, interpolation: str
) -> Image.Image:
    """What a recipe cuts from the image at a place of its batch; not mirrored yet."""
    if cuts.window is not None:
        image = F.crop(image, *cuts.window[place].tolist())
    if cuts.size is not None:
        image = F.resize(image, cuts.size[place].tolist(), InterpolationMode(interpolation))
    if cuts.corner is not None:
        image = F.crop(image, *cuts.corner[place].tolist(), side, side)
    return image


def _decoded(data: Bytes, transform: ImageTransform) -> Image.Image:
    """An image of a file's bytes, if the other loader would take them too."""
    check_image(data)
    image = decode_with_pil(data, transform.channels)
    transform.check_size(image.height, image.width)
    return image


def _as_is(made: Any) -> Any:
    return made


def _end_with(owner: int, worker: int) -> None:
    """Let this worker process end when ``owner`` does, however it does.

    DataLoader's own watchdog looks at the parent, which is the server process, and that one waits
    for its workers: without this, a killed run would leave both behind for good.
    """
    # Inherited, unless the server process was there before `_worker_context` was called.
    signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_FOR_WORKERS)
    descriptor = os.pidfd_open(owner)

    def wait() -> None:
        select.select([descriptor], [], [])
        os._exit(1)

    threading.Thread(target=wait, name="end-with-owner", daemon=True).start()

    # SLURM and torchrun send SIGTERM to every process, once or several times, while the rank needs
    # its workers for a last step. It is blocked here; only the owner's own, DataLoader's, counts.
    def obey_owner() -> None:
        while signal.sigwaitinfo((signal.SIGTERM,)).si_pid != owner:
            pass
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=obey_owner, name="obey-owner", daemon=True).start()


def _worker_context() -> BaseContext:
    """How worker processes are started: from a clean server process that has imported this module.

    A plain fork would copy the locks of DALI's, CUDA's and the optimiser's threads in whatever
    state they are; a spawn would import torch anew in every worker, seconds each time.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    # SLURM sends its signals to every process of a step. A rank stops at its next step, which it
    # still needs its workers for; what is blocked here is blocked in all that is started here.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_FOR_WORKERS)
    try:
        resource_tracker.ensure_running()  # which lets SIGTERM through again
        signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_FOR_WORKERS)
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context
