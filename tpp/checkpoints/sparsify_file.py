"""Masking weights of a checkpoint, with what an optimiser and averages keep of them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tpp.checkpoints.model_file import save_tensors
from tpp.checkpoints.prune_file import extra_after, read_dense
from tpp.checkpoints.safetensors_files import PathLike
from tpp.common.errors import UserError
from tpp.masks import (
    COMPANION,
    Mask,
    SparsifySection,
    Sparsity,
    apply_mask,
    norm_of,
    select_mask,
    sparsity_of,
)
from tpp.measure.counts import Counts, count
from tpp.models.architecture import Architecture, architecture_of
from tpp.models.layers import prunable_layers


@dataclass(frozen=True)
class Sparsified:
    """What there is to know of a sparsified checkpoint.

    Attributes:
        network: its name.
        counts: of the network, masked weights counted in.
        sparsity: what the mask leaves.
        removed: share of the weights not masked before that this masked.
        norm_before, norm_after: L2 norm of all parameters and buffers that are trained (weights,
            biases, BatchNorm's scales and shifts) before and after.
        notes: one line each, as the command prints them.
    """

    network: str
    counts: Counts
    sparsity: Sparsity
    removed: float
    norm_before: float
    norm_after: float
    notes: tuple[str, ...]


def sparsify_checkpoint(
    path_in: PathLike,
    settings: SparsifySection,
    path_out: PathLike,
    *,
    architecture: Architecture | None = None,
) -> Sparsified:
    """Mask weights of a file into a file: zeros in place of them, and the companion ``mask``.

    Args:
        path_in: one of our checkpoints, or, if ``architecture`` is given, anything else that
            :func:`tpp.checkpoints.sources.read_source` reads. A mask that it has is kept to.
        settings: which weights stay.
        path_out: the checkpoint to write. An optimiser's state and moving averages are masked alike
            and carried over as companions.
        architecture: the network of a file that does not say which one it holds.

    Raises:
        UserError: a file cannot be read or written, or the settings do not fit the network. The
            input, and an older output, are left as they were.
    """
    found = read_dense(path_in, architecture)
    before = found.companions.get(COMPANION)
    model, tensors = found.model, found.tensors
    try:
        mask = select_mask(tensors, [*prunable_layers(model)], settings, before)
        masked = apply_mask(tensors, mask)
    except UserError as error:
        raise UserError(f"{path_in}: {error}") from None
    earlier = {n: (before or {}).get(n, torch.ones_like(stays)).bool() for n, stays in mask.items()}
    companions: dict[str, Mapping[str, Tensor]] = {
        name: _masked_along(members, mask)
        for name, members in found.companions.items()
        if name != COMPANION
    }
    save_tensors(
        path_out,
        masked,
        model,
        preprocessing=found.preparation.values if found.preparation else None,
        extra=extra_after(found, "sparsify", "sparsified_from"),
        companions={**companions, COMPANION: mask},
    )
    counts = count(model)
    kept, kept_before = (sum(int(stays.sum()) for stays in of.values()) for of in (mask, earlier))
    trained = [name for name, _ in model.named_parameters()]
    network = architecture_of(model)
    assert network is not None
    return Sparsified(
        network=network.name,
        counts=counts,
        sparsity=sparsity_of(counts, mask),
        removed=1 - kept / kept_before if kept_before else 0.0,
        norm_before=norm_of(tensors[name] for name in trained),
        norm_after=norm_of(masked[name] for name in trained),
        notes=(*found.notes, *_left_dense(tensors, mask, settings), *_left_empty(mask)),
    )


def _left_dense(
    tensors: Mapping[str, Tensor], mask: Mask, settings: SparsifySection
) -> Iterator[str]:
    if settings.pattern is None:
        return
    of = int(settings.pattern.partition(":")[2])
    odd = [name for name in mask if tensors[name].shape[1] % of]
    if odd:
        more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
        yield f"{odd[0]}{more} stays as it is: its input channels are no multiple of {of}"


def _left_empty(mask: Mask) -> Iterator[str]:
    empty = [name.removesuffix(".weight") for name, stays in mask.items() if not stays.any()]
    if empty:
        more = f" and {len(empty) - 1} more" if len(empty) > 1 else ""
        yield (
            f"no weight of {empty[0]}{more} is left: what goes through there is the same for every "
            "image; less sparsity, scope layer or skip keeps some"
        )


def _masked_along(members: Mapping[str, Tensor], mask: Mask) -> Mapping[str, Tensor]:
    """An average or an optimiser's tensors with the weights' zeros; counts of steps as they are."""
    own = {name: m for name, m in mask.items() if name in members and members[name].dim()}
    return apply_mask(members, own)
