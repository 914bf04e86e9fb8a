"""How fast networks run: ``python -m tpp.latency CHECKPOINT [CHECKPOINT ...]``.

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

from tpp.common.errors import UserError, printable, run_command
from tpp.common.files import write_whole
from tpp.common.outputs import check_output
from tpp.common.paths import user_path
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
    paths: list[str], image_size: int | None = None, dense_sizes: Sequence[int] = ()
) -> dict[str, _Network]:
    """The networks of the checkpoints by row name, the dense ones that they came from before them.

    There is a dense one for each architecture and size of the images, and for each of
    ``dense_sizes``, sides in pixels.

    Raises:
        UserError: a dense network does not take images of such a size.
    """
    from tpp.checkpoints.model_file import load_model
    from tpp.measure.counts import count
    from tpp.measure.timing import in_words
    from tpp.models.architecture import (
        architecture_of,
        build_model,
        image_shape_for,
        set_preprocessing,
    )
    from tpp.models.preparation import take_image_size

    models = {path: load_model(path) for path in paths}
    architectures: dict[str, Architecture] = {}
    of_path: dict[str, list[str]] = {}
    for path, model in models.items():
        take_image_size(model, image_size)
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
        dense = f"dense {in_words(architecture) if len({*kinds}) > 1 else architecture.name}"
        if kinds.count(str(architecture)) > 1:
            dense += f", {'x'.join(map(str, image_shape_for(first)))}"
        model = build_model(architecture.name, architecture.num_classes, **architecture.args)
        set_preprocessing(model, getattr(first, "preprocessing", None))
        networks[dense] = _Network(model, count(model), dense)
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
                raise UserError(f"--dense-sizes {size}: {dense}: {error}") from None
            networks[f"{dense} at {size} px"] = _Network(smaller, counts, dense, smaller=True)
        for path in of_path[key]:
            networks[_row_name(path, paths)] = _Network(models[path], count(models[path]), dense)
    return networks


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
    order = "channels last" if settings.channels_last else "contiguous"
    return ", ".join([settings.dtype, order, "compiled" if settings.compile else "eager", where])


def _batches(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--batch {text}: must be numbers of images, such as 1 or 1,16") from None


def _dense_sizes(text: str) -> list[int]:
    try:
        return [*dict.fromkeys(int(part) for part in text.split(",") if text)]
    except ValueError:
        raise UserError(
            f"--dense-sizes {text}: must be sides in pixels, such as 160,176,192"
        ) from None


def _parse_arguments(arguments: Sequence[str] | None, prog: str) -> argparse.Namespace:
    # What is not given is not in the result: LatencySettings knows the defaults.
    parser = argparse.ArgumentParser(
        prog=prog,
        argument_default=argparse.SUPPRESS,
        description="Time pruned networks beside the dense ones that they came from, in turn, so "
        "that noise of the machine hits all alike. 'arrives' is how much of the speedup in "
        "multiply-accumulates is one in time: (real - 1) / (counted - 1).",
    )
    parser.add_argument(
        "checkpoints",
        nargs="+",
        type=user_path,
        metavar="CHECKPOINT",
        help="a file that tpp wrote",
    )
    parser.add_argument(
        "--image-size",
        type=int,
        default=None,
        metavar="N",
        help="side of the images, in pixels (default: what each checkpoint says)",
    )
    parser.add_argument(
        "--dense-sizes",
        default="",
        metavar="N,N",
        help="time the dense networks with images of these sides in pixels too, such as "
        "160,176,192, and say at which one the dense network takes as long as a pruned one "
        "('as dense at', interpolated)",
    )
    parser.add_argument("--batch", default="1", metavar="N[,N]", help="images per pass (default 1)")
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="threads of PyTorch on the CPU; where other work keeps a core busy, threads wait for "
        "each other, and one fewer than there are cores says more",
    )
    parser.add_argument(
        "--dtype",
        choices=("fp32", "bf16", "fp16"),
        help="what weights and images are converted to (no autocast; default fp32)",
    )
    parser.add_argument(
        "--channels-last", action="store_true", help="channels-last memory order, else contiguous"
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="run through torch.compile; compiling can take minutes for each network and batch",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default cpu")
    parser.add_argument("--repeats", type=int, metavar="N", help="timed passes of each")
    parser.add_argument("--warmup", type=int, metavar="N", help="untimed rounds before them")
    parser.add_argument(
        "--json",
        type=user_path,
        default=None,
        metavar="FILE",
        help="write the results here as well",
    )
    parser.add_argument(
        "--overwrite", action="store_true", default=False, help="replace the file of --json"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None, prog: str = "python -m tpp.latency") -> None:
    """Command-line entry point; ``prog`` is how it was called, for ``--help``."""
    options = dict(vars(_parse_arguments(arguments, prog)))
    from tpp.measure.timing import LatencySettings

    paths, file, batches = options.pop("checkpoints"), options.pop("json"), options.pop("batch")
    image_size, overwrite = options.pop("image_size"), options.pop("overwrite")
    dense_sizes = _dense_sizes(options.pop("dense_sizes"))
    each = [LatencySettings(**options, batch=batch) for batch in _batches(batches)]
    if file:
        check_output("--json", file, kind="JSON", ending=".json", overwrite=overwrite, inputs=paths)
    networks = _read_networks([str(path) for path in paths], image_size, dense_sizes)
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
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--json {path}: cannot write it: {error.strerror}") from None


if __name__ == "__main__":
    run_command(main)
