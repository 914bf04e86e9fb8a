"""What is found out on a few batches of training images without training.

The images are those that training begins with, in its order and batches, prepared as for
evaluation: a function of the seed and of sample numbers alone.
"""

import functools
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import replace

import torch
from torch import Tensor, nn

from data_pipelines.images.batch import Batch
from tpp.common.errors import UserError
from tpp.models.architecture import plain_copy
from tpp.models.recalibration import recalibrate, statistics_of
from tpp.selection.criteria import Along, differentiable_twice, loss_gradients
from tpp.selection.selection import Selection
from train.distributed.collectives import EveryRankError, mean_over_ranks
from train.distributed.sync_batchnorm import convert_sync_batchnorm
from train.run import Run
from train.run_folder.networks import place


def selection_of(run: Run, name: str) -> Selection:
    """How a stage's filters are chosen, with this run's images for a criterion that needs them."""
    selection = run.config.selection(name)
    if run.images is None:
        return selection
    return replace(selection, gradients=functools.partial(gradients, run, name))


def gradients(
    run: Run,
    name: str,
    model: nn.Module,
    parameters: Sequence[str],
    batches: int,
    along: Along | None = None,
) -> Iterator[list[Tensor]]:
    """See :class:`tpp.selection.criteria.Gradients`; all ranks have to go through it.

    In float32, of the task's loss as it is evaluated; a batch is an optimiser step's, of all ranks
    and micro-batches.
    """
    task, accumulation = run.config.make_task(), run.config.training.accumulation
    network = _copy(run, model)
    tensors = [network.get_parameter(parameter).requires_grad_(True) for parameter in parameters]
    with closing(_images(run, name, batches)) as stream:
        for number in range(batches):
            directions = along and along(number, tensors)
            sums = [torch.zeros_like(tensor) for tensor in tensors]
            for _ in range(accumulation):
                with differentiable_twice(asked=along is not None):
                    loss = task.loss(lambda x: network(x.float()).float(), next(stream))[0]
                    found = loss_gradients(loss / accumulation, tensors, directions)
                for total, gradient in zip(sums, found, strict=True):
                    total += gradient
            yield [mean_over_ranks(total) for total in sums]


def recalibrate_network(run: Run, name: str, model: nn.Module, batches: int) -> dict[str, Tensor]:
    """BatchNorm's running statistics over so many optimiser steps' images; the model is left alone.

    Each micro-batch counts as a batch, over all ranks: any number of ranks finds the same.

    Returns:
        The statistics by their names in the ``state_dict``, on the CPU, the same on all ranks.

    Raises:
        EveryRankError: they cannot be estimated.
    """
    task = run.config.make_task()
    try:
        network = convert_sync_batchnorm(_copy(run, model))
        with closing(_images(run, name, batches)) as stream:
            recalibrate(network, (task.inputs(images).float() for images, _ in stream))
    except UserError as error:
        raise EveryRankError(f"stages.{name}.recalibrate: {error}") from None
    return {
        key: mean_over_ranks(value).cpu().to(value.dtype)
        for key, value in statistics_of(network).items()
    }


def _copy(run: Run, model: nn.Module) -> nn.Module:
    return place(run, plain_copy(model).float()).eval().requires_grad_(False)


def _images(run: Run, name: str, steps: int) -> Generator[Batch, None, None]:
    """This rank's micro-batches of some steps, with a sign of life for each."""
    with closing(run.data.calibration_batches(steps)) as batches:
        for number, batch in enumerate(batches):
            run.at(f"stage {name}, batch {number + 1} of the images it goes by")
            yield batch
