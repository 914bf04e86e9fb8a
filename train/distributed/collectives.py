"""Devices and ranks: what Accelerate offers, as the training stages need it."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch.distributed as dist
from torch import Tensor, nn

from tpp.common.errors import UserError

if TYPE_CHECKING:
    from accelerate import Accelerator

K = TypeVar("K")
T = TypeVar("T")


class EveryRankError(UserError):
    """A mistake that every rank raises alike, for one of them to tell."""


def on_every_rank(accelerator: "Accelerator", do: Callable[[], T]) -> T:
    """Do something on this rank that may be a mistake on any; all ranks have to call it.

    Raises:
        EveryRankError: whichever of them met it.
    """
    found, error = _attempt(do)
    errors: list[str | None] = [error]
    if accelerator.num_processes > 1:
        errors = [None] * accelerator.num_processes
        dist.all_gather_object(errors, error)
    for rank, message in enumerate(errors):
        if message is not None:
            raise EveryRankError(f"rank {rank}: {message}" if rank else message)
    return cast(T, found)


def from_main_rank(accelerator: "Accelerator", do: Callable[[], T]) -> T:
    """Do something on the main rank and give the others what it returns.

    Raises:
        EveryRankError: the main rank met it.
    """
    told: list[Any] = [_attempt(do)] if accelerator.is_main_process else [None]
    if accelerator.num_processes > 1:
        dist.broadcast_object_list(told, src=0)
    found, error = told[0]
    if error is not None:
        raise EveryRankError(error)
    return cast(T, found)


def led_by_main_rank(
    accelerator: "Accelerator", lead: Callable[[], tuple[K, T]], follow: Callable[[K], T]
) -> tuple[K, T]:
    """Let the main rank find something, and the others find the same for themselves.

    Args:
        accelerator: the ranks.
        lead: on the main rank; returns what the others are told, and what was found.
        follow: on the others, given what they were told; returns what they found.

    Raises:
        EveryRankError: any rank met it.
    """
    mine: list[T] = []

    def find() -> K:
        told, found = lead()
        mine.append(found)
        return told

    told = from_main_rank(accelerator, find)
    return told, on_every_rank(accelerator, lambda: mine[0] if mine else follow(told))


def _attempt(do: Callable[[], T]) -> tuple[T | None, str | None]:
    try:
        return do(), None
    except UserError as error:
        return None, str(error)


def world_size() -> int:
    """How many ranks there are; one where there is no process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum of a tensor over all ranks, in place where there are several."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def mean_over_ranks(values: Tensor) -> Tensor:
    """Mean of a tensor over all ranks, a tensor of its own; the same bits on all of them.

    Each element is added up in one place and sent to all, as gradients under
    DistributedDataParallel are.
    """
    return sum_over_ranks(values.detach().clone()) / world_size()


def broadcast_buffers(model: nn.Module) -> None:
    """Give every rank the main rank's buffers: the BatchNorm statistics that are saved."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)
