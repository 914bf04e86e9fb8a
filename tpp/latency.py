"""How fast networks run: ``tpp latency CHECKPOINT [CHECKPOINT ...]``.

Counted multiply-accumulates say how much less there is to do; this says how much less time it
takes. Every pruned network is measured beside the dense one that it came from, and if asked beside
that one fed smaller images, which needs no pruning.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tpp.common.command_line import Parser
from tpp.common.errors import UserError, printable, run_command
from tpp.common.files import write_json_option
from tpp.common.options import add_checkpoint, add_model, checkpoint_of, share
from tpp.common.outputs import check_output
from tpp.describe import make_console
from tpp.measure.curves import place_of_cost

if TYPE_CHECKING:
    from torch import nn

    from tpp.measure.counts import Counts
    from tpp.measure.timing import LatencySettings
    from tpp.models.architecture import Architecture


def arriving_share(counted: float, real: float) -> float | None:
    """How much of a counted speedup arrives as a real one: (real - 1) / (counted - 1).

    1 where all of it does, negative where the smaller network is slower; None where nothing was
    to be expected, at a counted speedup of 1.
    """
    return None if counted == 1 else (real - 1) / (counted - 1)


@dataclass(frozen=True)
class _Network:
    """A network to measure, and the name of the dense one that it came from.

    Attributes:
        smaller: whether it is the dense one with other images than the checkpoints are for.
    """

    model: "nn.Module"
    counts: "Counts"
    dense: str
    smaller: bool = False


def _read_networks(
    paths: list[str],
    image_size: int | None = None,
    dense_sizes: Sequence[int] = (),
    network: "Architecture | None" = None,
) -> dict[str, _Network]:
    """The networks of the checkpoints by row name, the dense ones that they came from before them.

    There is a dense one for each architecture and size of the images, which is one of the
    checkpoints where that has lost no filter, and for each of ``dense_sizes``, sides in pixels.
    ``network`` is what a checkpoint holds that does not say it.

    Raises:
        UserError: a dense network does not take images of such a size.
    """
    from tpp.checkpoints.any_file import open_network
    from tpp.measure.counts import count
    from tpp.measure.timing import in_words
    from tpp.models.architecture import (
        architecture_of,
        build_model,
        image_shape_for,
        set_preprocessing,
    )
    from tpp.models.preparation import take_image_size

    models = {path: open_network(path, network, image_size=image_size).model for path in paths}
    architectures: dict[str, Architecture] = {}
    of_path: dict[str, list[str]] = {}
    for path, model in models.items():
        architecture = architecture_of(model)
        assert architecture is not None
        said = {**architecture.to_dict(), "image": image_shape_for(model)}
        key = json.dumps(said, sort_keys=True)
        architectures[key] = architecture
        of_path.setdefault(key, []).append(path)
    kinds = [*map(str, architectures.values())]
    networks = {}
    for key, architecture in architectures.items():
        first = models[of_path[key][0]]
        called = f"dense {in_words(architecture) if len({*kinds}) > 1 else architecture.name}"
        if kinds.count(str(architecture)) > 1:
            called += f", {'x'.join(map(str, image_shape_for(first)))}"
        model = build_model(architecture.name, architecture.num_classes, **architecture.args)
        set_preprocessing(model, getattr(first, "preprocessing", None))
        given = next((path for path in of_path[key] if _as_wide(models[path], model)), None)
        dense = called if given is None else _row_name(given, paths)
        networks[dense] = _Network(model if given is None else models[given], count(model), dense)
        for size in dense_sizes:
            if size == image_shape_for(first)[-1]:
                continue
            smaller = build_model(architecture.name, architecture.num_classes, **architecture.args)
            smaller.load_state_dict(model.state_dict())
            set_preprocessing(smaller, getattr(first, "preprocessing", None))
            try:
                take_image_size(smaller, size)
                counts = count(smaller)
            except UserError as error:
                raise UserError(f"--dense-sizes {size}: {called}: {error}") from None
            networks[f"{called} at {size} px"] = _Network(smaller, counts, dense, smaller=True)
        for path in (path for path in of_path[key] if path != given):
            networks[_row_name(path, paths)] = _Network(models[path], count(models[path]), dense)
    return networks


def _as_wide(one: "nn.Module", other: "nn.Module") -> bool:
    """Whether all layers of two networks have the same shapes."""
    shapes = [[(n, p.shape) for n, p in network.named_parameters()] for network in (one, other)]
    return shapes[0] == shapes[1]


def _row_name(path: str, paths: list[str]) -> str:
    """A checkpoint's file name; its whole path where another has the same name."""
    name = Path(path).name
    taken = [Path(other).name for other in paths if other != path]
    return path if name in taken else name


def _measure_rows(
    networks: Mapping[str, _Network], settings: "LatencySettings"
) -> list[dict[str, Any]]:
    """One row per network at one batch size, as it is written to JSON."""
    from tpp.measure.timing import measure

    timings = measure({name: network.model for name, network in networks.items()}, settings)
    curves: dict[str, list[tuple[int, float]]] = {}
    for name, network in networks.items():
        if network.smaller or name == network.dense:
            point = network.counts.image[-1], timings[name].median
            curves.setdefault(network.dense, []).append(point)
    rows = []
    for name, network in networks.items():
        timing, dense = timings[name], networks[network.dense].counts
        counted = dense.macs / network.counts.macs
        real = timings[network.dense].median / timing.median
        curve = curves[network.dense]
        pruned = not network.smaller and name != network.dense
        equal = size_at_time(curve, timing.median) if pruned else None
        rows.append(
            {
                "network": name,
                "dense": network.dense,
                "batch": settings.batch,
                "image": list(network.counts.image),
                **({"smaller": True} if network.smaller else {}),
                "parameters": network.counts.parameters,
                "macs": network.counts.macs,
                "counted_speedup": counted,
                "median_ms": 1e3 * timing.median,
                "low_ms": 1e3 * timing.low,
                "high_ms": 1e3 * timing.high,
                "images_per_second": settings.batch / timing.median,
                "real_speedup": real,
                "arrives": arriving_share(counted, real),
                **({"dense_size": equal} if len(curve) > 1 else {}),
                "seconds": timing.seconds,
            }
        )
    return rows


def size_at_time(curve: Sequence[tuple[int, float]], seconds: float) -> float | None:
    """The side of the images at which the dense network takes a time, in pixels.

    Interpolated linearly, see :func:`tpp.measure.curves.place_of_cost`; None beyond what was
    measured.

    Args:
        curve: sides in pixels, and seconds.
        seconds: the time.
    """
    place = place_of_cost(curve, seconds)
    if place is None:
        return None
    smaller, larger, share = place
    return smaller + share * (larger - smaller)


_HEADINGS = (
    "parameters",
    "MACs",
    "counted",
    "ms/batch",
    "quartiles",
    "images/s",
    "real",
    "arrives",
)
_DENSE_AT = "as dense at"  # the side of the images at which the dense network takes as long
_GAP = 2


def _table(rows: list[dict[str, Any]], settings: "LatencySettings", width: int) -> RenderableType:
    """A row for each network; on a narrow screen numbers stand for names, which come before."""
    shapes = ["x".join(map(str, row["image"])) for row in rows if not row.get("smaller")]
    images = f", images {shapes[0]}" if len({*shapes}) == 1 else ""
    conditions = f"{_conditions(settings)}, median of {settings.repeats}"
    title = Text(f"batch {settings.batch}{images}, {conditions}", style="bold")
    figures = [_figures(row) for row in rows]
    names = [printable(row["network"]) for row in rows]
    of_dense = [row["network"] == row["dense"] or row.get("smaller", False) for row in rows]
    styles = ["" if dense else "cyan" for dense in of_dense]
    sizes = any("dense_size" in row for row in rows)
    headings = (*_HEADINGS, _DENSE_AT) if sizes else _HEADINGS
    if sizes:
        for cells, row, dense in zip(figures, rows, of_dense, strict=True):
            cells.append("" if dense else _size(row.get("dense_size")))
    columns = zip(headings, *figures, strict=True)
    room = width - sum(_GAP + max(map(len, column)) for column in columns)
    # A name is broken up into no pieces that nobody can read.
    narrow = room < min(24, max(map(len, names)))
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0))
    table.add_column("" if narrow else "network", overflow="fold")
    for heading in headings[2:] if narrow else headings:
        table.add_column(heading, justify="right", no_wrap=True)
    legend = []
    for number, (name, cells, style) in enumerate(zip(names, figures, styles, strict=True), 1):
        if narrow:
            legend.append(Text(f"{number}  {name}: {cells[0]} parameters, {cells[1]} MACs", style))
            name, cells = str(number), cells[2:]
        table.add_row(Text(name), *cells, style=style)
    return Group(title, *legend, table)


def _figures(row: dict[str, Any]) -> list[str]:
    return [
        f"{row['parameters']:,}",
        f"{row['macs'] / 1e6:,.1f} M",
        f"{row['counted_speedup']:.2f}x",
        _short(row["median_ms"]),
        f"{_short(row['low_ms'])} - {_short(row['high_ms'])}",
        _short(row["images_per_second"]),
        f"{row['real_speedup']:.2f}x",
        "" if row["arrives"] is None else f"{row['arrives']:.0%}",
    ]


def _size(pixels: float | None) -> str:
    return "not measured" if pixels is None else f"{pixels:.0f} px"


def _short(number: float) -> str:
    return f"{number:.3f}" if number < 10 else f"{number:,.1f}"


def _conditions(settings: "LatencySettings") -> str:
    import torch

    threads = settings.threads or torch.get_num_threads()
    where = f"{threads} thread{'s' if threads > 1 else ''}"
    if settings.device == "cuda":
        where = torch.cuda.get_device_name()
    if settings.backend != "torch":
        return ", ".join([settings.dtype, settings.backend, where])
    order = "channels last" if settings.channels_last else "contiguous"
    return ", ".join([settings.dtype, order, "compiled" if settings.compile else "eager", where])


def _batches(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(
            f"--batch-size {text}: must be numbers of images, such as 1 or 1,16"
        ) from None


def _dense_sizes(text: str) -> list[int]:
    try:
        return [*dict.fromkeys(int(part) for part in text.split(",") if text)]
    except ValueError:
        raise UserError(
            f"--dense-sizes {text}: must be sides in pixels, such as 160,176,192"
        ) from None


def make_parser(prog: str = "python -m tpp.latency") -> Parser:
    """What the command takes."""
    # What is not given is not in the result: LatencySettings knows the defaults.
    left = argparse.SUPPRESS
    parser = Parser(
        prog,
        "Time pruned networks beside the dense ones that they came from.",
        more="""
            They are timed in turn, so that noise of the machine hits all alike. 'arrives' is how
            much of the speedup in multiply-accumulates is one in time: (real - 1) / (counted - 1).
            A cyan row is of a pruned network.
        """,
        examples=[
            "half.safetensors",
            "half.safetensors --batch-size 1,16 --precision bf16 --channels-last",
            "half.safetensors --dense-sizes 160,176,192 --json latency.json",
        ],
    )
    add_checkpoint(parser, several=True)
    add_model(parser)
    share(parser, "--image-size", " (default: what each checkpoint says)")
    parser.add_argument(
        "--dense-sizes",
        default="",
        metavar="SIZE,SIZE",
        help="time the dense networks with images of these sides in pixels too, such as "
        "160,176,192, and say at which one the dense network takes as long as a pruned one "
        "('as dense at', interpolated)",
    )
    share(parser, "--batch-size", ", as 1 or 1,16", metavar="N[,N]", type=str, default="1")
    share(
        parser,
        "--threads",
        ", of PyTorch; where other work keeps a core busy, threads wait for each other, and one "
        "fewer than there are cores says more",
        default=left,
    )
    share(
        parser,
        "--precision",
        ": weights and images are converted, there is no autocast (default: fp32)",
        default=left,
    )
    add = parser.add_argument
    add(
        "--channels-last",
        action="store_true",
        default=left,
        help="channels-last memory order, else contiguous",
    )
    add(
        "--compile",
        action="store_true",
        default=left,
        help="run through torch.compile; compiling can take minutes for each network and batch",
    )
    share(parser, "--device", " (default: cpu)", default=left)
    add(
        "--backend",
        choices=("torch", "onnxruntime", "tensorrt"),
        default=left,
        help="what runs the networks; tensorrt with --device cuda, by onnxruntime-gpu "
        "(default: torch)",
    )
    add("--repeats", type=int, default=left, metavar="N", help="timed passes of each")
    add("--warmup", type=int, default=left, metavar="N", help="untimed rounds before them")
    share(parser, "--json")
    share(parser, "--overwrite")
    parser.renamed("--batch", "--batch-size")
    parser.renamed("--dtype", "--precision")
    return parser


def main(arguments: Sequence[str] | None = None, prog: str = "python -m tpp.latency") -> None:
    """Command-line entry point; ``prog`` is how it was called, for ``--help``."""
    parser = make_parser(prog)
    found = parser.parse_args(arguments)
    checkpoint_of(parser, found)
    options = dict(vars(found))
    from tpp.measure.timing import LatencySettings

    paths, file = options.pop("checkpoint"), options.pop("json")
    batches = options.pop("batch_size")
    if "precision" in options:
        options["dtype"] = options.pop("precision")
    image_size, overwrite = options.pop("image_size"), options.pop("overwrite")
    dense_sizes = _dense_sizes(options.pop("dense_sizes"))
    from tpp.selection.configured import network_named

    network = network_named(options.pop("model"), image_size, options.pop("model_args"))
    each = [LatencySettings(**options, batch=batch) for batch in _batches(batches)]
    if file:
        check_output("--json", file, kind="JSON", ending=".json", overwrite=overwrite, inputs=paths)
    each[0].check_here()
    networks = _read_networks([str(path) for path in paths], image_size, dense_sizes, network)
    console = make_console()
    rows = []
    for settings in each:
        print(f"timing {len(networks)} networks at batch {settings.batch} ...", file=sys.stderr)
        of_batch = _measure_rows(networks, settings)
        console.print(_table(of_batch, settings, console.width), highlight=False)
        console.print()
        rows += of_batch
    if file:
        _write_json(file, rows, each[0])


def _write_json(path: Path, rows: list[dict[str, Any]], settings: "LatencySettings") -> None:
    from tpp.measure.timing import machine_of

    conditions = asdict(settings)
    del conditions["batch"]  # each row has its own
    content = {"settings": conditions, "on": machine_of(settings), "results": rows}
    write_json_option(path, content)


if __name__ == "__main__":
    run_command(main)
