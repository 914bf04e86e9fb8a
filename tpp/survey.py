"""What can be pruned in a network: ``tpp survey CHECKPOINT`` or ``--model NAME``."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from tpp.common.command_line import Parser, at_least_one
from tpp.common.errors import UserError, printable, run_command
from tpp.common.files import write_json_option
from tpp.common.imports import quick_imports
from tpp.common.options import add_checkpoint, add_model, checkpoint_of, share
from tpp.common.outputs import check_output
from tpp.describe import make_console

if TYPE_CHECKING:
    from torch import nn

    from tpp.selection.what_can_go import Patterns, Removable, WhatCanGo


def make_parser(prog: str = "python -m tpp.survey") -> Parser:
    """What the command takes."""
    parser = Parser(
        prog,
        "Say which layers of a network can lose filters, and which cannot and why.",
        more="""
            Of every Conv2d and Linear layer: whether it can lose filters alone, coupled with
            others, or not. Nothing is pruned. MACs and parameters are what all filters of a layer,
            or of a coupled set, take part in: in the layers themselves and in those that read
            them. A cyan row can lose filters.
        """,
        examples=["--model resnet50", "dense.safetensors --json survey.json"],
    )
    add_checkpoint(parser, "; or --model alone", needed=False)
    add_model(parser)
    parser.add_argument(
        "--classes",
        type=at_least_one,
        default=1000,
        metavar="N",
        help="outputs of the network, without CHECKPOINT (default: 1000)",
    )
    share(parser, "--image-size", " (default: what the checkpoint or the network says)")
    share(parser, "--json")
    share(parser, "--overwrite")
    return parser


def _network(options: argparse.Namespace) -> "nn.Module":
    """The network, on the meta device."""
    from dataclasses import replace

    from tpp.checkpoints.any_file import outline
    from tpp.models.architecture import build_on_meta
    from tpp.models.preparation import take_image_size
    from tpp.selection.configured import network_named

    named = network_named(options.model, options.image_size, options.model_args)
    if options.checkpoint is not None:
        return outline(options.checkpoint, named, image_size=options.image_size).model
    if named is None:
        raise UserError("name a checkpoint, or a network with --model NAME")
    if named.num_classes is not None:
        named = replace(named, num_classes=options.classes)
    model = build_on_meta(named)
    take_image_size(model, options.image_size)
    return model


def main(arguments: Sequence[str] | None = None, prog: str = "python -m tpp.survey") -> None:
    """Command-line entry point; ``prog`` is how it was called, for ``--help``."""
    parser = make_parser(prog)
    options = parser.parse_args(arguments)
    checkpoint_of(parser, options)
    if options.json:
        inputs = [options.checkpoint] if options.checkpoint else []
        check_output(
            "--json",
            options.json,
            kind="JSON",
            ending=".json",
            overwrite=options.overwrite,
            inputs=inputs,
        )
    with quick_imports():
        from tpp.models.architecture import architecture_of
        from tpp.selection.what_can_go import what_can_go

        model = _network(options)
    found = what_can_go(model)
    architecture = architecture_of(model)
    assert architecture is not None
    console = make_console()
    console.print(_table(found), highlight=False)
    for line in _lines(architecture.name, found):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if options.json:
        write_json_option(options.json, {"network": architecture.to_dict(), **_plain(found)})
        print(f"wrote {options.json}")


def _table(found: "WhatCanGo") -> Table:
    """A row for each layer, in network order."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("layer", overflow="fold")
    for heading in ("filters", "MACs", "parameters"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("can lose filters", overflow="fold")
    first = {one.layers[0]: one for one in (*found.alone, *found.coupled)}
    sets = {
        layer: (letter, one)
        for letter, one in zip(_letters(found.coupled), found.coupled, strict=True)
        for layer in one.layers
    }
    for layer, filters in found.layers.items():
        style = "cyan"
        if layer in sets:
            letter, one = sets[layer]
            said = f"coupled: {letter}{_also(one)}"
        elif layer in first:
            said = f"alone{_also(first[layer])}"
        elif layer in found.along:
            said = f"goes along with {', '.join(found.along[layer])}"
        else:
            said, style = f"no: {found.refused[layer]}", ""
        shares = ["", ""]
        if layer in first:
            one, counts = first[layer], found.counts
            shares = [f"{one.macs / counts.macs:.1%}", f"{one.parameters / counts.parameters:.1%}"]
        cells = (layer, str(filters), *shares, said)
        table.add_row(*(escape(printable(cell)) for cell in cells), style=style)
    return table


def _also(one: "Removable") -> str:
    groups = f", as many of each of {one.groups} groups" if one.groups > 1 else ""
    return groups + (f", not as zeroing: they {one.inexact}" if one.inexact else "")


def _letters(sets: Sequence[Any]) -> list[str]:
    """A, B, ..., Z, A2, B2, ..."""
    return [f"{chr(65 + n % 26)}{n // 26 + 1 if n >= 26 else ''}" for n in range(len(sets))]


def _lines(name: str, found: "WhatCanGo") -> list[str]:
    """What follows from the table."""
    counts = found.counts
    layers, sets = sum(len(one.layers) for one in found.coupled), len(found.coupled)
    lines = [
        "",
        f"{name}: {counts.parameters:,} parameters, {counts.macs:,} MACs for {counts.of_image}",
        f"of {len(found.layers)} layers {len(found.alone)} can lose filters alone, {layers} only "
        f"coupled, in {sets} set{'' if sets == 1 else 's'}; {len(found.along)} go along with "
        f"others, {len(found.refused)} cannot",
    ]
    for letter, one in zip(_letters(found.coupled), found.coupled, strict=True):
        lines.append(f"{letter}: {', '.join(one.layers)} lose the same filters")
    if found.patterns.chosen:
        lines += ["", "what can go alone, in a configuration (ratios are yours to choose):"]
        lines += ["pruning:", *_ratios(found.patterns)]
    more = [one for one in found.coupled if one.inexact is None]
    if more:
        lines += ["", "and coupled too:", "pruning:", "  coupled: true"]
        lines += _ratios(found.coupled_patterns)
    return lines


def _ratios(patterns: "Patterns") -> list[str]:
    ratios = patterns.ratios(0.5)
    return ["  ratios:", *(f'    "{pattern}": {ratio:g}' for pattern, ratio in ratios.items())]


def _plain(found: "WhatCanGo") -> dict[str, Any]:
    """As JSON has it."""

    def of(one: "Removable") -> dict[str, Any]:
        return {
            "layers": list(one.layers),
            "filters": one.filters,
            "groups": one.groups,
            "macs": one.macs,
            "parameters": one.parameters,
            "inexact": one.inexact,
        }

    return {
        "image": list(found.counts.image),
        "macs": found.counts.macs,
        "parameters": found.counts.parameters,
        "filters": dict(found.layers),
        "alone": [of(one) for one in found.alone],
        "coupled": [of(one) for one in found.coupled],
        "along": {layer: list(others) for layer, others in found.along.items()},
        "refused": dict(found.refused),
        "ratios": found.patterns.ratios(0.5),
        "coupled_ratios": found.coupled_patterns.ratios(0.5),
    }


if __name__ == "__main__":
    run_command(main)
