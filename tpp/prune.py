"""Removing filters: from tensors, from a model, from a checkpoint (Wang & Fu 2023, sec. 3.1).

``python -m tpp.prune`` needs neither data nor a GPU.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tpp.channels import LayerChannels, check_plan, find_channels
from tpp.checkpoint import (
    CheckpointInfo,
    PathLike,
    assign_tensors,
    fill_buffers,
    fit_to_shapes,
    load_tensors,
    save_model,
)
from tpp.describe import count, summary
from tpp.errors import UserError, run_command
from tpp.models import Architecture, build_on_meta, meta_copy
from tpp.plan import PruningPlan
from tpp.selection import select_filters


def prune_tensors(
    tensors: Mapping[str, Tensor], plan: PruningPlan, channels: Mapping[str, LayerChannels]
) -> dict[str, Tensor]:
    """Take the pruned filters, and all that goes with them, out of a ``state_dict``.

    Args:
        tensors: the dense network's tensors, any dtype and device.
        plan: which filters go.
        channels: what goes with them, for every layer that loses any, see
            :func:`tpp.channels.find_channels`.

    Returns:
        All tensors: new ones where something was taken out, the given ones elsewhere.

    Raises:
        UserError: the plan does not fit the tensors, see also :func:`tpp.channels.check_plan`.
    """
    gone: dict[str, dict[int, list[Tensor]]] = {}
    for layer in plan.active_layers:
        if layer not in channels:
            raise UserError(f"plan: {layer}: nothing is known about this layer's channels")
        weight = tensors.get(channels[layer].weight)
        filters = "none" if weight is None else weight.shape[0]
        if plan.filters[layer] != filters:
            raise UserError(
                f"plan: {layer}: is for {plan.filters[layer]} filters, the network has {filters}"
            )
        pruned = torch.tensor(plan.pruned[layer])
        for entry in channels[layer].slices:
            dims = gone.setdefault(entry.tensor, {})
            dims.setdefault(entry.dim, []).append(entry.positions[pruned].flatten())
    check_plan(plan, channels)
    result = dict(tensors)
    for name, dims in gone.items():
        for dim, positions in dims.items():
            result[name] = _without(result[name], dim, torch.cat(positions))
    return result


def prune_model(
    model: nn.Module, plan: PruningPlan, *, example_input: Tensor | None = None
) -> nn.Module:
    """Make the smaller network that is left when the filters of ``plan`` are removed.

    Args:
        model: the dense network, any dtype and device; left alone.
        plan: which filters go.
        example_input: a batch to trace with, see :func:`tpp.channels.find_channels`.

    Returns:
        A new network that shares no memory with ``model``: same class, dtype, device, training
        flags and ``architecture``, narrower layers. Parameters have no gradients.

    Raises:
        UserError: the plan does not fit the model, or a layer's filters cannot go alone.
    """
    channels = find_channels(model, plan.active_layers, example_input=example_input)
    pruned, tensors = _prune(model, model.state_dict(), plan, channels)
    assign_tensors(pruned, {name: tensor.clone() for name, tensor in tensors.items()})
    fill_buffers(pruned, model)
    return pruned


def prune_checkpoint(
    path_in: PathLike,
    plan: PruningPlan,
    path_out: PathLike,
    *,
    architecture: Architecture | None = None,
) -> None:
    """Prune a file into a file; no more than the weights is held in memory.

    Args:
        path_in: one of our checkpoints, or any file of weights if ``architecture`` is given.
        plan: which filters go.
        path_out: the smaller checkpoint; preprocessing and class names are carried over, and
            ``extra`` says under ``pruned_from`` what the input said about itself.
        architecture: the network of a file that does not say which one it holds.

    Raises:
        UserError: a file cannot be read or written, or the plan does not fit the network.
    """
    _write_pruned(_read_dense(path_in, architecture), plan, path_out)


@dataclass(frozen=True)
class _Dense:
    """A file to prune: its tensors, and the network they belong to on the meta device."""

    path: PathLike
    tensors: dict[str, Tensor]
    architecture: Architecture
    info: CheckpointInfo | None
    model: nn.Module


def _read_dense(path: PathLike, architecture: Architecture | None) -> _Dense:
    tensors, info = load_tensors(path)
    if architecture is None:
        if info is None:
            raise UserError(f"{path}: does not say which network it holds; give the model's name")
        architecture = info.architecture
    model = build_on_meta(architecture)
    try:
        fit_to_shapes(model, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    except UserError as error:
        raise UserError(f"{path}: not a {architecture.name}: {error}") from None
    return _Dense(path, tensors, architecture, info, model)


def _write_pruned(dense: _Dense, plan: PruningPlan, path_out: PathLike) -> nn.Module:
    """Write the pruned checkpoint; the network that is in it, on the meta device."""
    channels = find_channels(dense.model, plan.active_layers)
    pruned, tensors = _prune(dense.model, dense.tensors, plan, channels)
    save_model(
        path_out,
        tensors,
        architecture=dense.architecture,
        preprocessing=dense.info.preprocessing if dense.info else None,
        extra=_extra_after(dense),
    )
    return pruned


def _prune(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    plan: PruningPlan,
    channels: Mapping[str, LayerChannels],
) -> tuple[nn.Module, dict[str, Tensor]]:
    """The pruned network on the meta device, and its tensors."""
    smaller = prune_tensors(tensors, plan, channels)
    pruned = meta_copy(model)
    fit_to_shapes(pruned, {name: tuple(tensor.shape) for name, tensor in smaller.items()})
    return pruned, smaller


def _extra_after(dense: _Dense) -> dict[str, Any]:
    """What a pruned checkpoint says: figures of the dense one are no longer its own."""
    before = dict(dense.info.extra) if dense.info else {}
    classes = {"classes": before.pop("classes")} if "classes" in before else {}
    return {"stage": "prune", "pruned_from": {"file": Path(dense.path).name, **before}, **classes}


def _without(tensor: Tensor, dim: int, positions: Tensor) -> Tensor:
    kept = torch.ones(tensor.shape[dim], dtype=torch.bool)
    kept[positions] = False
    return tensor.index_select(dim, kept.nonzero().flatten().to(tensor.device))


def _parse_ratios(texts: list[str]) -> dict[str, float]:
    ratios = {}
    for text in texts:
        pattern, equals, ratio = text.rpartition("=")
        try:
            ratios[pattern] = float(ratio)
        except ValueError:
            equals = ""
        if not equals or not pattern:
            raise UserError(f"--ratio {text}: must be PATTERN=R, such as 'layer*.conv1=0.5'")
    return ratios


def _make_plan(arguments: argparse.Namespace, model: nn.Module) -> PruningPlan:
    if arguments.plan:
        return PruningPlan.load(arguments.plan)
    if arguments.ratio:
        return select_filters(model, _parse_ratios(arguments.ratio))
    from train.config import load_config

    return select_filters(model, load_config(arguments.config, overrides=[]).pruning.ratios)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tpp.prune",
        description="Remove filters from a checkpoint. Needs neither data nor a GPU.",
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="IN",
        help="a checkpoint that tpp wrote; with --model also any .pth or .safetensors weights",
    )
    parser.add_argument("--output", required=True, metavar="OUT", help="the pruned checkpoint")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", metavar="FILE", help="prune with this configuration's ratios")
    what.add_argument("--plan", metavar="FILE", help="prune the filters of a saved plan (JSON)")
    what.add_argument(
        "--ratio",
        action="append",
        metavar="PATTERN=R",
        help="prune the share R, of lowest L1 norm, of the filters of every layer that the "
        "pattern matches; may be repeated, the last match wins",
    )
    parser.add_argument("--model", metavar="NAME", help="the network, where IN does not say it")
    parser.add_argument("--num-classes", type=int, default=1000, metavar="N", help="its outputs")
    return parser.parse_args()


def main() -> None:
    """Command-line entry point."""
    arguments = _parse_arguments()
    architecture = None
    if arguments.model:
        architecture = Architecture(arguments.model, arguments.num_classes)
    dense = _read_dense(arguments.checkpoint, architecture)
    model = meta_copy(dense.model)
    assign_tensors(model, dense.tensors)
    pruned = _write_pruned(dense, _make_plan(arguments, model), arguments.output)
    print(f"{dense.architecture.name}: {summary(count(dense.model), count(pruned))}")
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    run_command(main)
