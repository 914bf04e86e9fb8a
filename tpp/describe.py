"""How big a network is, layer by layer: ``tpp describe CHECKPOINT``."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tpp.common.command_line import Parser
from tpp.common.consoles import output_console
from tpp.common.errors import UserError, printable, run_command
from tpp.common.numbers import in_short
from tpp.common.options import add_checkpoint, add_model, checkpoint_of, share
from tpp.common.outputs import check_output
from tpp.common.paths import user_path

if TYPE_CHECKING:
    from tpp.measure.counts import Counts, LayerCount
    from tpp.models.architecture import Architecture

_HEADINGS = ("layer", "filters", "inputs", "parameters", "MACs", "share")
# From here on a table is broken up into the network's stages.
_MANY_LAYERS = 20


@dataclass(frozen=True)
class Described:
    """What is in a checkpoint, and the size of its network.

    Attributes:
        dense: before pruning.
        counts: now.
        preprocessing: how images are prepared, if the file says it.
        companions: names of what the file holds beside the network.
        extra: what its writer added.
        notes: of a file of others, what a user should know.
    """

    architecture: "Architecture"
    dense: "Counts"
    counts: "Counts"
    preprocessing: Mapping[str, Any] | None
    companions: Sequence[str]
    extra: Mapping[str, Any]
    notes: Sequence[str] = ()


def print_description(
    path: str,
    console: Console,
    image_size: int | None = None,
    network: "Architecture | None" = None,
) -> None:
    """Print what is in a checkpoint: a table of its layers, totals, and where it came from.

    Args:
        path: a checkpoint, see ``docs/checkpoints.md``.
        console: where to.
        image_size: side of the image that is counted, in pixels; by default what the checkpoint
            says, or else its architecture.
        network: which it is, where the checkpoint does not say that.

    Raises:
        UserError: the file is no checkpoint, does not say which network it holds, or the network
            takes no such images.
    """
    found = _read(path, image_size, network)
    console.print(_layer_table(found.dense, found.counts, console), highlight=False)
    console.print(_facts(path, found), highlight=False)
    for note in found.notes:
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)


def plot_description(
    path: str,
    picture: Path,
    image_size: int | None = None,
    network: "Architecture | None" = None,
) -> None:
    """Draw what is in a checkpoint: filters and multiply-accumulates, layer by layer.

    Args:
        path, image_size, network: see :func:`print_description`.
        picture: the file to write, ``.png``, ``.svg`` or ``.pdf``.

    Raises:
        UserError: as there, or the picture cannot be written.
    """
    from tpp.measure.counts import summary

    plot = _plot()
    found = _read(path, image_size, network)
    title = f"{found.architecture.name}, {found.architecture.output}"
    headline = summary(found.dense, found.counts).replace("->", "→")
    figure = plot.draw_layers(found.dense, found.counts, title=title, headline=headline)
    plot.write_figure(figure, picture)


def _plot() -> ModuleType:
    """What draws; Matplotlib takes a while to import, and only a picture needs it."""
    try:
        from tpp import plot
    except ImportError:
        raise UserError("--plot needs Matplotlib: pip install matplotlib") from None
    return plot


def _read(path: str, image_size: int | None, network: "Architecture | None") -> Described:
    from tpp.checkpoints.any_file import outline
    from tpp.measure.counts import count
    from tpp.models.architecture import architecture_of, build_on_meta, set_preprocessing

    found = outline(path, network, image_size=image_size)
    now = found.model
    architecture, preprocessing = architecture_of(now), getattr(now, "preprocessing", None)
    assert architecture is not None
    dense = build_on_meta(architecture)
    set_preprocessing(dense, preprocessing)
    return Described(
        architecture,
        count(dense),
        count(now),
        preprocessing,
        found.companions,
        found.extra,
        found.notes,
    )


def _layer_table(dense: "Counts", counts: "Counts", console: Console) -> Table:
    """A row for every layer; bars get the width that the figures leave, names what there is."""
    pairs = list(zip(counts.layers, dense.layers, strict=True))
    rows = [_layer_cells(now, before, counts.macs) for now, before in pairs]
    last = [*_other_cells(counts), _total_cells(dense, counts)]
    widths = [max(map(len, column)) for column in zip(_HEADINGS, *rows, *last, strict=True)]
    gap = 2 if console.width >= 100 else 1
    room = console.width - sum(widths) - gap * (len(widths) - 1)
    kept_width, share_width = _bar_widths(room)
    name_width = max(12, widths[0] + min(0, room))
    most = max((layer.macs for layer in counts.layers), default=1)
    table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style="bold")
    for heading in _HEADINGS:
        figures = heading in ("inputs", "parameters", "MACs")
        table.add_column(heading, justify="right" if figures else "left", no_wrap=True)
    if share_width > 5:
        table.columns[-1].header = "share of MACs"
    for (now, before), previous, cells in zip(pairs, [None, *pairs], rows, strict=False):
        if len(pairs) > _MANY_LAYERS and previous and _stage(previous[0]) != _stage(now):
            table.add_row()
        kept = _kept_bar(now.outputs, before.outputs, kept_width, console) if kept_width else ""
        share = _bar(now.macs / most, share_width, console)
        style = "cyan" if now.outputs < before.outputs else None
        table.add_row(*_with_bars(cells, name_width, kept, share), style=style)
    table.add_row()
    for cells in last:
        table.add_row(*_with_bars(cells, name_width, "", ""), style="bold")
    return table


def _bar_widths(room: int) -> tuple[int, int]:
    """Widths of two bars, each with a space before it; 0 where they would be unreadable."""
    if room < 8:
        return 0, 0
    kept = min(10, (room - 2) // 2)
    return kept, min(20, room - 2 - kept)


def _layer_cells(now: "LayerCount", before: "LayerCount", total_macs: int) -> tuple[str, ...]:
    return (
        now.name,
        f"{now.outputs:4} / {before.outputs:<4}",
        str(now.inputs),
        f"{now.parameters:,}",
        in_short(now.macs),
        f"{now.macs / total_macs:7.2%}",
    )


def _other_cells(counts: "Counts") -> list[tuple[str, ...]]:
    """A row for what is in no Conv2d or Linear layer (BatchNorm, attention), if there is any."""
    parameters = counts.parameters - sum(layer.parameters for layer in counts.layers)
    macs = counts.macs - sum(layer.macs for layer in counts.layers)
    if parameters <= 0:
        return []
    return [("others", "", "", f"{parameters:,}", in_short(macs), f"{macs / counts.macs:7.2%}")]


def _total_cells(dense: "Counts", counts: "Counts") -> tuple[str, ...]:
    kept, total = (sum(layer.outputs for layer in size.layers) for size in (counts, dense))
    filters = f"{kept:4} / {total:<4}"
    return "total", filters, "", f"{counts.parameters:,}", in_short(counts.macs), f"{1:7.2%}"


def _with_bars(cells: tuple[str, ...], name_width: int, kept: str, share: str) -> list[str]:
    name, filters, *middle, percent = cells
    if len(name) > name_width:
        # The end of a layer's name tells it from its neighbours.
        name = f"..{name[2 - name_width :]}"
    return [escape(name), f"{filters} {kept}".rstrip(), *middle, f"{percent} {share}".rstrip()]


def _stage(layer: "LayerCount") -> str:
    """The part of the network that a layer belongs to: its name up to the first dot."""
    return layer.name.partition(".")[0]


def _facts(path: str, found: Described) -> Table:
    architecture, dense, counts = found.architecture, found.dense, found.counts
    network = f"{architecture.name}, {architecture.output}"
    if architecture.args:
        network += f", {_plain(architecture.args)}"
    facts = {
        "checkpoint": str(path),
        "network": network,
        "parameters": f"{counts.parameters:,} of {dense.parameters:,} "
        f"({1 - counts.parameters / dense.parameters:.2%} removed)",
        "MACs": f"{in_short(counts.macs)} of {in_short(dense.macs)} for {counts.of_image}",
        "speedup": f"{dense.macs / counts.macs:.4f}x",
    }
    if "mask" in found.companions:
        facts["masked"] = _masked(path, counts)
    if found.companions:
        facts["companions"] = ", ".join(found.companions)
    if found.preprocessing:
        facts["images"] = _plain(found.preprocessing)
    facts |= {key: _plain(value) for key, value in found.extra.items()}
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("")
    for key, value in facts.items():
        table.add_row(escape(printable(key)), escape(printable(value)))
    return table


def _masked(path: str, counts: "Counts") -> str:
    """What a checkpoint's mask leaves."""
    from tpp.checkpoints.model_file import read_companion
    from tpp.masks import COMPANION, sparsity_of

    left = sparsity_of(counts, read_companion(path, COMPANION))
    return (
        f"{left.sparsity:.2%} of the weights of masked layers; {left.parameters:,} parameters and "
        f"{in_short(left.macs)} MACs are not"
    )


def _plain(value: Any, limit: int = 300) -> str:
    """A JSON value without quotes and outer brackets, long ones cut short."""
    if isinstance(value, dict):
        text = ", ".join(f"{key}={_plain(item)}" for key, item in value.items())
    else:
        text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= limit else f"{text[:limit]} ..."


def _kept_bar(kept: int, total: int, width: int, console: Console) -> str:
    """What is kept of a layer's filters before what is gone; neither vanishes by rounding."""
    full = min(max(round(width * kept / total), 1), width - (kept < total))
    mark, gone = ("#", ".") if console.options.ascii_only else ("█", "░")
    return mark * full + gone * (width - full)


def _bar(share: float, width: int, console: Console) -> str:
    """A bar for a share in [0, 1]; eighths of a character where the terminal can show them."""
    if console.options.ascii_only:
        return "#" * round(share * width)
    whole, eighths = divmod(round(share * width * 8), 8)
    return "█" * whole + " ▏▎▍▌▋▊▉"[eighths].strip()


def make_console() -> Console:
    """A console that colours terminals only, and is wide enough for a table when piped."""
    return output_console(120)


def make_parser(prog: str = "python -m tpp.describe") -> Parser:
    """What the command takes."""
    parser = Parser(
        prog,
        "Show what is in a checkpoint, layer by layer.",
        more="A row for each layer, with its share of the multiply-accumulates (MACs), and what "
        "is left of the network in all. A cyan row has lost filters.",
        examples=[
            "half.safetensors",
            "resnet50.pth --model resnet50 --plot layers.svg",
        ],
    )
    add_checkpoint(parser)
    add_model(parser)
    parser.add_argument(
        "--plot", type=user_path, metavar="FILE", help="draw it too, as .png, .svg or .pdf"
    )
    share(parser, "--image-size", " (default: what the checkpoint says)")
    share(parser, "--overwrite")
    return parser


def main(arguments: Sequence[str] | None = None, prog: str = "python -m tpp.describe") -> None:
    """Command-line entry point; ``prog`` is how it was called, for ``--help``."""
    parser = make_parser(prog)
    options = parser.parse_args(arguments)
    checkpoint_of(parser, options)
    if options.plot:
        _plot().check_ending(options.plot)
        check_output(
            "--plot",
            options.plot,
            kind="a picture",
            ending=".png",
            overwrite=options.overwrite,
            inputs=[options.checkpoint],
        )
    from tpp.selection.configured import network_named

    network = network_named(options.model, options.image_size, options.model_args)
    print_description(options.checkpoint, make_console(), options.image_size, network)
    if options.plot:
        plot_description(options.checkpoint, options.plot, options.image_size, network)
        print(f"\nwrote {options.plot}")


if __name__ == "__main__":
    run_command(main)
