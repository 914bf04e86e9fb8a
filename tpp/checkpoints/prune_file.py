"""Removing filters from a checkpoint, with everything beside the weights that belongs to them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tpp.channels.cuts import Cut, cut_tensors
from tpp.channels.removal import pruned_on_meta, shapes_of
from tpp.checkpoints.model_file import CheckpointInfo, Companions, save_model
from tpp.checkpoints.safetensors_files import PathLike
from tpp.checkpoints.sources import name_optimizer_state, read_source
from tpp.common.errors import UserError
from tpp.models.architecture import Architecture, architecture_of, set_preprocessing
from tpp.models.fitting import fitted
from tpp.models.preparation import Preparation, find_preparation
from tpp.plan import PruningPlan


def prune_checkpoint(
    path_in: PathLike,
    plan: PruningPlan,
    path_out: PathLike,
    *,
    architecture: Architecture | None = None,
) -> None:
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

    Raises:
        UserError: a file cannot be read or written, or the plan does not fit the network. The
            input, and an older output, are left as they were.
    """
    write_pruned(read_dense(path_in, architecture), plan, path_out)


@dataclass(frozen=True)
class _Dense:
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
) -> _Dense:
    """Read a checkpoint.

    Args:
        path: what to read.
        architecture: the network; by default what the file says.
        otherwise: the network where neither of them says it.
        images: how images are prepared where the file does not say; by default as the network's
            public weights want it, see :mod:`tpp.models.preparation`.
        image_size: in pixels, in place of what that says.
    """
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
    said = (source.info.preprocessing if source.info else None) or images
    if source.architecture is None:
        preparation = _preparation(said, model, path, image_size)
    else:
        # A file of ours was not made from public weights, whose way would be no guess for it.
        told = said is not None or image_size is not None
        preparation = Preparation(dict(said or {})).changed(image_size=image_size) if told else None
    if preparation is not None:
        set_preprocessing(model, preparation.values)
    return _Dense(path, source.tensors, companions, source.info, model, preparation, tuple(notes))


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


def write_pruned(dense: _Dense, plan: PruningPlan, path_out: PathLike) -> tuple[nn.Module, _Dense]:
    """Write the pruned checkpoint; the network in it, on the meta device, and what to note."""
    cuts, pruned, channels = pruned_on_meta(dense.model, plan, dense.tensors)
    companions, left_out = _cut_companions(dense, cuts)
    save_model(
        path_out,
        cut_tensors(dense.tensors, cuts),
        architecture=architecture_of(dense.model),
        preprocessing=dense.preparation.values if dense.preparation else None,
        extra=_extra_after(dense),
        companions=companions,
    )
    inexact = [c for c in channels.values() if c.inexact]
    notes = [*dense.notes, *left_out]
    if inexact:
        first = inexact[0]
        also = f", and of {len(inexact) - 1} more layers" if len(inexact) > 1 else ""
        notes.append(
            f"the filters of {first.layer}{also} {first.inexact}: what is left is not the dense "
            "network with these filters at zero; finetune it"
        )
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
