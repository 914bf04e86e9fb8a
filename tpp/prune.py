"""Removing filters: from tensors, from a model, from a checkpoint (Wang & Fu 2023, sec. 3.1).

``python -m tpp.prune`` needs neither data nor a GPU.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tpp.budget import Budget, parse_count
from tpp.channels import ChannelMap, LayerChannels, check_layers, check_pruned
from tpp.checkpoint import CheckpointInfo, Companions, PathLike, load_model, save_model
from tpp.cuts import Cut, cut_tensors, cuts_of
from tpp.describe import count, summary
from tpp.errors import UserError, run_command
from tpp.fitting import assign_tensors, fill_buffers, fit_to_shapes, fitted
from tpp.latency import LatencySettings, measure
from tpp.models import Architecture, architecture_of, meta_copy
from tpp.plan import PruningPlan
from tpp.selection import CRITERIA, Selection
from tpp.sources import name_optimizer_state, read_source


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
    return cut_tensors(tensors, cuts_of(plan, channels, _shapes(tensors)))


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
        UserError: the plan does not fit the model, a layer's filters cannot go alone, or the
            network's code does not allow for the smaller widths.
    """
    tensors = model.state_dict()
    cuts, pruned, _ = _pruned_on_meta(model, plan, tensors, example_input)
    smaller = cut_tensors(tensors, cuts)
    assign_tensors(pruned, {name: tensor.clone() for name, tensor in smaller.items()})
    fill_buffers(pruned, model)
    return pruned


def prune_checkpoint(
    path_in: PathLike,
    plan: PruningPlan,
    path_out: PathLike,
    *,
    architecture: Architecture | None = None,
) -> None:
    """Prune a file into a file; no more than what stays is held in memory.

    Args:
        path_in: one of our checkpoints, or anything else that :func:`tpp.sources.read_source`
            reads if ``architecture`` is given.
        plan: which filters go.
        path_out: the smaller checkpoint; preprocessing and class names are carried over, and
            ``extra`` says under ``pruned_from`` what the input said about itself. An optimiser's
            state and moving averages are pruned alike and carried over as companions, see
            :mod:`tpp.checkpoint`.
        architecture: the network of a file that does not say which one it holds.

    Raises:
        UserError: a file cannot be read or written, or the plan does not fit the network. The
            input, and an older output, are left as they were.
    """
    _write_pruned(_read_dense(path_in, architecture), plan, path_out)


@dataclass(frozen=True)
class _Dense:
    """A checkpoint to prune: its tensors, and the network they belong to on the meta device."""

    path: PathLike
    tensors: dict[str, Tensor]
    companions: Companions
    info: CheckpointInfo | None
    model: nn.Module
    notes: tuple[str, ...] = ()


def _read_dense(
    path: PathLike, architecture: Architecture | None, otherwise: Architecture | None = None
) -> _Dense:
    """Read a checkpoint; ``otherwise`` is the network where neither file nor caller says it."""
    source = read_source(path)
    architecture = architecture or source.architecture or otherwise
    if architecture is None:
        raise UserError(f"{path}: does not say which network it holds; name it (--model)")
    try:
        model = fitted(architecture, _shapes(source.tensors))
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


def _write_pruned(dense: _Dense, plan: PruningPlan, path_out: PathLike) -> tuple[nn.Module, _Dense]:
    """Write the pruned checkpoint; the network in it, on the meta device, and what to note."""
    cuts, pruned, channels = _pruned_on_meta(dense.model, plan, dense.tensors)
    companions, left_out = _cut_companions(dense, cuts)
    save_model(
        path_out,
        cut_tensors(dense.tensors, cuts),
        architecture=architecture_of(dense.model),
        preprocessing=dense.info.preprocessing if dense.info else None,
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


def _pruned_on_meta(
    model: nn.Module,
    plan: PruningPlan,
    tensors: Mapping[str, Tensor],
    example_input: Tensor | None = None,
) -> tuple[dict[str, list[Cut]], nn.Module, dict[str, LayerChannels]]:
    """The cuts, and the narrower network without its tensors' values, checked against the dense."""
    pruned = meta_copy(model)
    if not plan.active_layers:
        return {}, pruned, {}
    check_layers(model, plan.active_layers)
    channel_map = ChannelMap(model, example_input=example_input)
    channels = channel_map.find(plan.active_layers)
    cuts = cuts_of(plan, channels, _shapes(tensors))
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    for name, own in cuts.items():
        for cut in own:
            shapes[name][cut.dim] = len(cut.kept) // cut.groups
    fit_to_shapes(pruned, {name: tuple(shape) for name, shape in shapes.items()})
    kept = {(name, cut.dim): cut.kept for name, own in cuts.items() for cut in own}
    check_pruned(channel_map, pruned, kept)
    return cuts, pruned, channels


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


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _parse_pairs(option: str, texts: list[str], example: str) -> dict[str, str]:
    pairs = {}
    for text in texts:
        pattern, equals, value = text.rpartition("=")
        if not equals or not pattern:
            raise UserError(f"{option} {text}: must be {example}")
        pairs[pattern] = value
    return pairs


def _parse_ratios(texts: list[str]) -> dict[str, float]:
    example = "PATTERN=R, such as 'layer*.conv1=0.5'"
    ratios = {}
    for pattern, value in _parse_pairs("--ratio", texts, example).items():
        try:
            ratios[pattern] = float(value)
        except ValueError:
            raise UserError(f"--ratio {pattern}={value}: must be {example}") from None
    return ratios


def _parse_floors(texts: list[str]) -> dict[str, int | float]:
    example = "PATTERN=N or PATTERN=SHARE, such as '*=8' or 'layer4*=0.25'"
    floors: dict[str, int | float] = {}
    for pattern, value in _parse_pairs("--floor", texts, example).items():
        try:
            floors[pattern] = float(value) if "." in value else int(value)
        except ValueError:
            raise UserError(f"--floor {pattern}={value}: must be {example}") from None
    return floors


def _budget(arguments: argparse.Namespace) -> Budget | None:
    if arguments.speedup is not None:
        return Budget("speedup", arguments.speedup)
    if arguments.max_macs is not None:
        return Budget("macs", parse_count(arguments.max_macs))
    if arguments.max_parameters is not None:
        return Budget("parameters", parse_count(arguments.max_parameters))
    if arguments.max_latency_ms is not None:
        return Budget("latency_ms", arguments.max_latency_ms)
    return None


def _make_plan(arguments: argparse.Namespace, model: nn.Module) -> PruningPlan:
    budget = _budget(arguments)
    chosen = [arguments.plan, arguments.config, arguments.ratio or budget]
    if sum(map(bool, chosen)) != 1:
        raise UserError(
            "say what to prune: --plan FILE, or --config FILE, or --ratio 'PATTERN=R' and/or a "
            "budget (--speedup, --max-macs, --max-parameters, --max-latency-ms)"
        )
    if arguments.plan:
        return PruningPlan.load(arguments.plan)
    if arguments.config:
        from train.config import load_config

        return load_config(arguments.config, overrides=[]).selection().select(model)
    selection = Selection(
        ratios=_parse_ratios(arguments.ratio),
        criterion=arguments.criterion,
        round_to=arguments.round_to,
        floors=_parse_floors(arguments.floor),
        skip=tuple(arguments.skip),
        coupled=arguments.coupled,
        budget=budget,
        seed=arguments.seed,
    )
    return selection.select(model)


def _configured(path: str | None) -> Architecture | None:
    """The network of a configuration; how many outputs it has, its weights say."""
    if path is None:
        return None
    from train.config import load_config

    model = load_config(path, overrides=[]).model
    return Architecture(model.name, model.num_classes or 1000, model.args)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tpp.prune",
        description="Remove filters from a checkpoint. Needs neither data nor a GPU.",
    )
    add = parser.add_argument
    add(
        "--checkpoint",
        required=True,
        metavar="IN",
        help="a checkpoint that tpp wrote, .pth or .safetensors weights, or a DeepSpeed folder",
    )
    add("--output", required=True, metavar="OUT", help="the pruned checkpoint (safetensors)")
    add("--model", metavar="NAME", help="the network, where neither IN nor --config says it")
    add("--save-plan", metavar="FILE", help="write down which filters went (JSON)")

    what = parser.add_argument_group("what goes")
    add = what.add_argument
    add("--config", metavar="FILE", help="what the pruning section of this configuration says")
    add("--plan", metavar="FILE", help="the filters of a saved plan (JSON)")
    add(
        "--ratio",
        action="append",
        default=[],
        metavar="PATTERN=R",
        help="the share R of the filters of every layer that the pattern matches; may be "
        "repeated, the last match wins; with a budget: at most that share",
    )
    budget = what.add_mutually_exclusive_group()
    add = budget.add_argument
    add("--speedup", type=float, metavar="X", help="budget: X times fewer MACs, as 2.0")
    add("--max-macs", metavar="N", help="budget: at most N MACs for one image, as 2.0G")
    add("--max-parameters", metavar="N", help="budget: at most N parameters, as 10M")
    add("--max-latency-ms", type=float, metavar="MS", help="budget: at most MS for an image here")

    how = parser.add_argument_group("which, with --ratio or a budget")
    add = how.add_argument
    add("--criterion", default="l1", metavar="C", help=f"{', '.join(CRITERIA)} (default: l1)")
    add("--round-to", type=int, default=1, metavar="N", help="keep multiples of N filters")
    add(
        "--floor",
        action="append",
        default=[],
        metavar="PATTERN=N",
        help="keep at least N filters (or, as 0.25, that share) of these layers",
    )
    add("--skip", action="append", default=[], metavar="PATTERN", help="leave these layers alone")
    add(
        "--coupled",
        action="store_true",
        help="prune layers that are added to each other (the residual stream) together",
    )
    add("--seed", type=int, default=0, metavar="N", help="of the criterion random")
    return parser.parse_args()


def main() -> None:
    """Command-line entry point."""
    arguments = _parse_arguments()
    named = Architecture(arguments.model, 1000) if arguments.model else None
    dense = _read_dense(arguments.checkpoint, named, _configured(arguments.config))
    model = meta_copy(dense.model)
    assign_tensors(model, dense.tensors)
    plan = _make_plan(arguments, model)
    pruned, done = _write_pruned(dense, plan, arguments.output)
    if arguments.save_plan:
        plan.save(arguments.save_plan)
    network = architecture_of(dense.model)
    assert network is not None
    print(f"{network.name}: {summary(count(dense.model), count(pruned))}")
    if arguments.max_latency_ms is not None:
        timing = measure(
            {"dense": model, "pruned": load_model(arguments.output)}, LatencySettings()
        )
        dense_ms, pruned_ms = (1000 * timing[name].median for name in ("dense", "pruned"))
        print(f"latency here, one image: {dense_ms:.1f} ms -> {pruned_ms:.1f} ms (medians)")
    for note in done.notes:
        print(f"note: {note}")
    companions = ", ".join(done.companions)
    print(f"wrote {arguments.output}" + (f", with {companions}" if companions else ""))


if __name__ == "__main__":
    run_command(main)
