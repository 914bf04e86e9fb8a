"""Removing filters from a checkpoint, with everything beside the weights that belongs to them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tpp.channels.cuts import Cut, cut_tensors
from tpp.channels.removal import norm_share, not_at_zero, pruned_on_meta, shapes_of
from tpp.channels.trials import Trials
from tpp.checkpoints.model_file import (
    CheckpointInfo,
    Companions,
    architecture_of_own,
    load_dense_buffers,
    save_tensors,
)
from tpp.checkpoints.safetensors_files import PathLike
from tpp.checkpoints.sources import agreed, fit_names, name_optimizer_state, read_source
from tpp.common.errors import UserError
from tpp.common.own_code import is_own
from tpp.models.architecture import (
    Architecture,
    architecture_of,
    as_published,
    meta_copy,
    set_preprocessing,
)
from tpp.models.fitting import assign_tensors, fitted
from tpp.models.own import is_known
from tpp.models.preparation import Preparation, find_preparation
from tpp.models.recalibration import RECALIBRATED, statistics_of, with_statistics
from tpp.plan import PruningPlan


def prune_checkpoint(
    path_in: PathLike,
    plan: PruningPlan,
    path_out: PathLike,
    *,
    architecture: Architecture | None = None,
    network: nn.Module | None = None,
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
        network: a dense network in memory, of a class of your own, in place of building one; left
            alone.

    Returns:
        What there is to know of the result.

    Raises:
        UserError: a file cannot be read or written, or the plan does not fit the network. The
            input, and an older output, are left as they were.
    """
    dense = read_dense(path_in, architecture, network=network)
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
class Dense:
    """A checkpoint to prune: its tensors, and the network they belong to on the meta device."""

    path: PathLike
    tensors: dict[str, Tensor]
    companions: Companions
    info: CheckpointInfo | None
    model: nn.Module
    preparation: Preparation | None
    notes: tuple[str, ...] = ()


def read_dense(
    path: PathLike,
    architecture: Architecture | None,
    otherwise: Architecture | None = None,
    *,
    images: Mapping[str, Any] | None = None,
    image_size: int | None = None,
    network: nn.Module | None = None,
) -> Dense:
    """Read a checkpoint.

    Args:
        path: what to read.
        architecture: the network; by default what the file says.
        otherwise: the network where neither of them says it.
        images: how images are prepared where the file does not say; by default as the network's
            public weights want it, see :mod:`tpp.models.preparation`.
        image_size: in pixels, in place of what that says.
        network: see :func:`prune_checkpoint`.

    Raises:
        UserError: nobody says which network it is, or it is not that one.
    """
    source = read_source(path)
    if network is None:
        architecture = agreed(path, source.architecture, architecture) or otherwise
    else:
        architecture = architecture or source.architecture or architecture_of(network)
        architecture = architecture or architecture_of_own(network)
    if architecture is None:
        raise UserError(f"{path}: does not say which network it holds; name it (--model)")
    assumed: list[str] = []
    if source.foreign:
        architecture, assumed = as_published(architecture)
    try:
        source = fit_names(source, architecture, network)
        tried = (source.info and source.info.preprocessing) or images
        if image_size is not None:
            tried = {**(tried or {}), "image_size": image_size}
        shapes = shapes_of(source.tensors)
        model = fitted(architecture, shapes, network=network, images=tried)
    except UserError as error:
        unknown = network is None and is_own(architecture.name) and not is_known(architecture.name)
        not_one = "" if unknown else f"not a {architecture.name}: "
        raise UserError(f"{path}: {not_one}{error}") from None
    companions, notes = dict(source.companions), [*source.notes, *assumed]
    if source.optimizer is not None:
        states = name_optimizer_state(source.optimizer, model, source.others)
        if states is None:
            notes.append("the optimiser's state is left out: whose it is cannot be told")
        companions |= states or {}
    kinds = {t.dtype for t in source.tensors.values() if t.is_floating_point()}
    if kinds != {torch.float32}:
        named = " and ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
        notes.append(f"the weights are {named}, and so are those that come out")
    said = (source.info.preprocessing if source.info else None) or images
    if not is_own(architecture.name) and (source.foreign or source.architecture is None):
        preparation = _preparation(said, model, path, image_size)
    else:
        # Not made from public weights, whose way would be no guess for it.
        told = said is not None or image_size is not None
        preparation = Preparation(dict(said or {})).changed(image_size=image_size) if told else None
    if preparation is not None:
        set_preprocessing(model, preparation.values)
    return Dense(path, source.tensors, companions, source.info, model, preparation, tuple(notes))


def _preparation(
    said: Mapping[str, Any] | None, model: nn.Module, path: PathLike, image_size: int | None
) -> Preparation | None:
    architecture = architecture_of(model)
    assert architecture is not None
    try:
        found = find_preparation(said, architecture, str(path))
    except UserError:  # nothing is known of such a network
        if image_size is not None:
            raise
        return None
    return found.changed(image_size=image_size)


def write_pruned(
    dense: Dense,
    plan: PruningPlan,
    path_out: PathLike,
    *,
    trials: Trials | None = None,
    recalibrate: Callable[[nn.Module], int] | None = None,
) -> tuple[nn.Module, Dense]:
    """Write the pruned checkpoint; the network in it, on the meta device, and what to note.

    Args:
        dense: what to prune.
        plan: which filters go.
        path_out: where to.
        trials: of the dense network, where it may have been traced already.
        recalibrate: estimates BatchNorm's running statistics anew, in place, in float32; returns
            over how many batches, which the file then says.
    """
    cuts, pruned, inexact = pruned_on_meta(dense.model, plan, dense.tensors, trials=trials)
    companions, left_out = _cut_companions(dense, cuts)
    tensors, extra = cut_tensors(dense.tensors, cuts), extra_after(dense)
    if recalibrate is not None:
        network = meta_copy(pruned)
        assign_tensors(network, {name: tensor.clone() for name, tensor in tensors.items()})
        load_dense_buffers(dense.path, network)
        extra[RECALIBRATED] = recalibrate(network.float())
        tensors = with_statistics(tensors, statistics_of(network))
    save_tensors(
        path_out,
        tensors,
        pruned,
        preprocessing=dense.preparation.values if dense.preparation else None,
        extra=extra,
        companions=companions,
    )
    said = (not_at_zero(dense.tensors, plan), inexact)
    notes = [*dense.notes, *left_out, *(line for line in said if line)]
    return pruned, replace(dense, companions=companions, notes=tuple(notes))


def _cut_companions(
    dense: Dense, cuts: Mapping[str, list[Cut]]
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


def extra_after(dense: Dense, stage: str = "prune", key: str = "pruned_from") -> dict[str, Any]:
    """What a changed checkpoint says: figures of the one before are no longer its own."""
    before = dict(dense.info.extra) if dense.info else {}
    classes = {"classes": before.pop("classes")} if "classes" in before else {}
    return {"stage": stage, key: {"file": Path(dense.path).name, **before}, **classes}
