"""Trainability of the network while it trains: measured at the same images in every stage."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from data_pipelines.images.batch import LoaderSettings
from data_pipelines.images.image_index import ImageIndex
from data_pipelines.images.order import Int64s
from data_pipelines.loaders import eval_batches
from data_pipelines.loading.augment import ImageTransform
from tpp.measure.trainability import Trainability, measure_trainability
from train.distributed.arithmetic import eagerly


class TrainabilityProbe:
    """Measures networks at fixed validation images, on one rank and without the others' help.

    Args:
        index: the validation images.
        transform: how they are prepared for the network.
        inputs: what the network takes of a batch of them.
        count: how many of them to measure at; all, where there are fewer.
        loader: 'dali' or 'torchvision'.
        device: where the networks are.

    Raises:
        UserError: an image cannot be read.
    """

    def __init__(
        self,
        index: ImageIndex,
        transform: ImageTransform,
        inputs: Callable[[Tensor], Tensor],
        *,
        count: int,
        loader: str,
        device: torch.device,
    ) -> None:
        chosen = probe_images(index, count)
        batches = eval_batches(
            index.subset(chosen),
            transform,
            len(chosen),
            LoaderSettings(loader=loader, threads=1, device=device),
        )
        # A copy: the loader may use its buffer again.
        self._images: Tensor = inputs(next(batches)[0].clone())
        batches.close()

    def __call__(self, network: nn.Module) -> Trainability:
        """Measure ``network``, the module inside whatever wraps it; it is left as it was."""
        with eagerly(network):
            return measure_trainability(network, self._images)


def probe_images(index: ImageIndex, count: int) -> Int64s:
    """Numbers of up to ``count`` images, spread evenly over the classes, whatever the seed.

    The first image of every class in turn, then the second of every class, and so on; with fewer
    images than classes, the first images of classes evenly far apart.
    """
    classes = len(index.classes)
    # Images are in the order of their classes.
    within_class = np.arange(len(index)) - np.searchsorted(index.labels, index.labels)
    order = np.lexsort((index.labels, within_class))
    if count < classes:
        return order[np.arange(count) * classes // count]
    return order[:count]
