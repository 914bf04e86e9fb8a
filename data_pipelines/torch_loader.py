"""Batches read by torch's DataLoader with PIL and torchvision, where DALI is not installed."""

import multiprocessing
import os
import select
import threading
from collections.abc import Generator, Iterator
from functools import partial
from multiprocessing.context import BaseContext
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as F

from data_pipelines.augment import ImageTransform, flips, frames, random_resized_windows
from data_pipelines.batch import Batch, Request, open_image
from tpp.errors import UserError


def torch_batches(
    requests: Iterator[Request], transform: ImageTransform, threads: int, device: torch.device
) -> Generator[Batch, None, None]:
    """Make the batches of ``requests``, in order, in ``threads`` worker processes (0: in this one).

    Raises:
        UserError: an image cannot be read; raised when the batch's turn comes.
    """
    loader = DataLoader(
        _Images(transform),
        # A request is a whole batch, made here in order. Workers get just what they need of the
        # index, and know neither the order nor a seed.
        sampler=requests,
        batch_size=None,
        num_workers=threads,
        collate_fn=_as_is,
        pin_memory=device.type == "cuda",
        multiprocessing_context=_worker_context() if threads else None,
        worker_init_fn=partial(_end_with, os.getpid()) if threads else None,
    )
    scale = 255 * torch.tensor([transform.mean, transform.std], device=device)
    mean, std = scale[:, None, :, None, None]
    for made in loader:
        if isinstance(made, UserError):
            raise made
        pixels, labels = made
        images = pixels.to(device, non_blocking=True).float().sub_(mean).div_(std)
        yield images, labels.to(device, non_blocking=True)


class _Images(Dataset[Batch | UserError]):
    """From a request to its images, uint8 (b, c, h, w), and labels."""

    def __init__(self, transform: ImageTransform) -> None:
        self.transform = transform

    def __getitem__(self, request: Request) -> Batch | UserError:
        # An error is handed over, not raised: DataLoader would wrap it in the worker's traceback.
        try:
            images = [open_image(path, self.transform.channels) for path in request.paths]
        except UserError as error:
            return error
        sizes = np.array([(image.height, image.width) for image in images], dtype=np.int64)
        transform, side = self.transform, [self.transform.image_size] * 2
        if transform.augmentation == "imagenet":
            windows = random_resized_windows(sizes, request.uniforms).tolist()
            cut = [
                F.resized_crop(image, *w, side) for image, w in zip(images, windows, strict=True)
            ]
        else:
            cut = [
                F.crop(F.resize(image, [height, width]), top, left, *side)
                for image, (height, width, top, left) in zip(
                    images, frames(sizes, request.uniforms, transform).tolist(), strict=True
                )
            ]
        batch = torch.stack([F.pil_to_tensor(image) for image in cut])
        if transform.augmentation != "none":
            mirrored = torch.from_numpy(flips(request.uniforms))
            batch[mirrored] = batch[mirrored].flip(-1)
        return batch, torch.from_numpy(request.labels)


def _as_is(made: Any) -> Any:
    return made


def _end_with(owner: int, worker: int) -> None:
    """Let this worker process end when ``owner`` does, however it does.

    DataLoader's own watchdog looks at the parent, which is the server process, and that one waits
    for its workers: without this, a killed run would leave both behind for good.
    """
    descriptor = os.pidfd_open(owner)

    def wait() -> None:
        select.select([descriptor], [], [])
        os._exit(1)

    threading.Thread(target=wait, name="end-with-owner", daemon=True).start()


def _worker_context() -> BaseContext:
    """How worker processes are started: from a clean server process that has imported this module.

    A plain fork would copy the locks of DALI's, CUDA's and the optimiser's threads in whatever
    state they are; a spawn would import torch anew in every worker, seconds each time.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context
