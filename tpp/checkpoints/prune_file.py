"""Removing filters from a checkpoint, with everything beside the weights that belongs to them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tpp.channels.cuts import Cut, cut_tensors
from tpp.channels.removal import norm_share, not_at_zero, pruned_on_meta, shapes_of
from tpp.checkpoints.model_file import CheckpointInfo, Companions, save_model
from tpp.checkpoints.safetensors_files import PathLike
from tpp.checkpoints.sources import name_optimizer_state, read_source
from tpp.common.errors import UserError
from tpp.models.architecture import Architecture, architecture_of
from tpp.models.fitting import fitted
from tpp.plan import PruningPlan


def prune_checkpoint(
    path_in: PathLike,
    plan: PruningPlan,
    path_out: PathLike,
    *,
    architecture: Architecture | None = None,
) -> "Report":
    """Prune a file into a file; no more than what stays is held in memory.

    Args:
        path_in: one of our checkpoints, or, if ``architecture`` is given, anything else that
            :func:`tpp.checkpoints.sources.read_source` reads.
        plan: which filters go.
        path_out: the smaller checkpoint; preprocessing and class names are carried over, and
            ``extra`` says under ``pruned_from`` what the input said about itself. An optimiser's
            state and moving averages are pruned alike and carried over as companions, see
            :mod:`tpp.checkpoints.model_file`.
        architecture: the network of a file that does not say which one it holds.

    Returns:
        What there is to know of the result.

    Raises:
        UserError: a file cannot be read or written, or the plan does not fit the network. The
            input, and an older output, are left as they were.
    """
    dense = read_dense(path_in, architecture)
    _, done = write_pruned(dense, plan, path_out)
    return Report(norm_share(dense.tensors, plan) or 0.0, done.notes)


@dataclass(frozen=True)
class Report:
    """What there is to know of a pruned checkpoint.

    Attributes:
        norm_share: of the L2 norm of the weights of all layers that lose filters, the share that
            was in these filters; 0 if they were at zero.
        notes: one line each, as the command prints them: filters that were not at zero, what was
            left out, and why removal is not the same as zeroing, where it is not.
    """

    norm_share: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Dense:
    """A checkpoint to prune: its tensors, and the network they belong to on the meta device."""

    path: PathLike
    tensors: dict[str, Tensor]
    companions: Companions
    info: CheckpointInfo | None
    model: nn.Module
    notes: tuple[str, ...] = ()


def read_dense(
    path: PathLike, architecture: Architecture | None, otherwise: Architecture | None = None
) -> _Dense:
    """Read a checkpoint; ``otherwise`` is the network where neither file nor caller says it."""
    source = read_source(path)
    architecture = architecture or source.architecture or otherwise
    if architecture is None:
        raise UserError(f"{path}: does not say which network it holds; name it (--model)")
    try:
        model = fitted(architecture, shapes_of(source.tensors))
    except UserError as error:
        raise UserError(f"{path}: not a {architecture.name}: {error}") from None
    companions, notes = dict(source.companions), []
    if source.not_read:
        notes.append(f"not read from {path}: {source.not_read}")
    if source.optimizer is not None:
        states = name_optimizer_state(source.optimizer, model)
        if states is None:
            notes.append("the optimiser's state is left out: whose it is cannot be told")
        companions |= states or {}
    return _Dense(path, source.tensors, companions, source.info, model, tuple(notes))


def write_pruned(dense: _Dense, plan: PruningPlan, path_out: PathLike) -> tuple[nn.Module, _Dense]:
    """Write the pruned checkpoint; the network in it, on the meta device, and what to note."""
    cuts, pruned, inexact = pruned_on_meta(dense.model, plan, dense.tensors)
    companions, left_out = _cut_companions(dense, cuts)
    save_model(
        path_out,
        cut_tensors(dense.tensors, cuts),
        architecture=architecture_of(dense.model),
        preprocessing=dense.info.preprocessing if dense.info else None,
        extra=_extra_after(dense),
        companions=companions,
    )
    said = (not_at_zero(dense.tensors, plan), inexact)
    notes = [*dense.notes, *left_out, *(line for line in said if line)]
    return pruned, replace(dense, companions=companions, notes=tuple(notes))


def _cut_companions(
    dense: _Dense, cuts: Mapping[str, list[Cut]]
) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """The companions of what stays, and notes on what had to be left out."""
    result: dict[str, dict[str, Tensor]] = {}
    notes = []
    for companion, tensors in dense.companions.items():
        odd = [
            name
            for name, tensor in tensors.items()
            if name not in dense.tensors or tensor.shape not in ((), dense.tensors[name].shape)
        ]
        if odd:
            notes.append(f"{companion} is left out: {odd[0]} is not of the network's shape")
            continue
        shaped = {
            name: own for name, own in cuts.items() if name in tensors and tensors[name].dim()
        }
        result[companion] = cut_tensors(tensors, shaped)
    return result, notes


def _extra_after(dense: _Dense) -> dict[str, Any]:
    """What a pruned checkpoint says: figures of the dense one are no longer its own."""
    before = dict(dense.info.extra) if dense.info else {}
    classes = {"classes": before.pop("classes")} if "classes" in before else {}
    return {"stage": "prune", "pruned_from": {"file": Path(dense.path).name, **before}, **classes}
