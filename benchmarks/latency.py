"""How much of the counted speedup arrives in time.

published  ResNet-50 at its four published speedups and ResNet-34 at its one, each beside its dense
           network: batch 1 and 16, fp32 and bf16, contiguous and channels last
round_to   the same ratios where every layer keeps a multiple of 8, 16 or 32 filters: channels last,
           batch 1 and 16, fp32 and bf16
compiled   ResNet-50 at 2.31x through torch.compile and without it: batch 1 and 16, fp32, channels
           last; not run unless asked for, since compiling takes minutes on a CPU

A network's cost depends on its widths alone, so the weights are random. All networks of a part take
turns, pass by pass; times are medians. "arrives" is (real - 1) / (counted - 1), see tpp/latency.py.
Results go to benchmarks/results/latency.json.
"""

import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.penalty import CONFIGS, RUNS
from tpp.channels.removal import prune_model
from tpp.common.command_line import Parser
from tpp.common.errors import UserError, run_command
from tpp.common.options import share
from tpp.latency import arriving_share
from tpp.measure.counts import count
from tpp.measure.timing import LatencySettings, machine_of, measure
from tpp.models.architecture import build_model
from tpp.selection.selection import select_filters
from train.config.config import load_config

RESULTS = Path(__file__).parent / "results" / "latency.json"
MULTIPLES = (1, 8, 16, 32)
PARTS = ("published", "round_to", "compiled")

Result = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """How much is measured: the runs, timed passes by batch size, and the images' side."""

    runs: tuple[str, ...]
    repeats: dict[int, int]
    warmup: int
    side: int
    threads: int

    def settings(self, batch: int) -> LatencySettings:
        """The settings of one batch size; fp32, contiguous, uncompiled."""
        return LatencySettings(
            batch=batch, repeats=self.repeats[batch], warmup=self.warmup, threads=self.threads
        )


@dataclass(frozen=True)
class Entry:
    """A network to measure, and the name of its dense one."""

    network: nn.Module
    dense: str


def networks_of(runs: tuple[str, ...], multiples: tuple[int, ...]) -> dict[str, Entry]:
    """The pruned networks of the configurations, each architecture's dense one before them."""
    entries: dict[str, Entry] = {}
    for run in runs:
        config = load_config(CONFIGS / f"{RUNS[run]}.yaml", ["model.checkpoint=null"])
        dense = run.split()[0]
        if dense not in entries:
            entries[dense] = Entry(build_model(config.model.name, 1000), dense)
        network, ratios = entries[dense].network, config.pruning.ratios
        for multiple in multiples:
            plan = select_filters(network, ratios, round_to=multiple)
            name = f"{run}, multiples of {multiple}" if len(multiples) > 1 else run
            entries[name] = Entry(prune_model(network, plan), dense)
    return entries


def _measured(entries: dict[str, Entry], each: dict[str, LatencySettings], side: int) -> Result:
    """Measure all networks under each of the named settings; a row per network."""
    images = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    networks = {name: entry.network for name, entry in entries.items()}
    macs = {name: count(network, example_input=images).macs for name, network in networks.items()}
    rows: Result = {
        name: {"counted_speedup": macs[entry.dense] / macs[name], "times": {}}
        for name, entry in entries.items()
    }
    for conditions, settings in each.items():
        print(f"timing {len(networks)} networks: {conditions} ...", file=sys.stderr)
        timings = measure(networks, settings, example_input=images)
        for name, entry in entries.items():
            real = timings[entry.dense].median / timings[name].median
            rows[name]["times"][conditions] = {
                "median_ms": 1e3 * timings[name].median,
                "low_ms": 1e3 * timings[name].low,
                "high_ms": 1e3 * timings[name].high,
                "real_speedup": real,
                "arrives": arriving_share(rows[name]["counted_speedup"], real),
            }
    return rows


def published(size: Size) -> Result:
    """The published rows in every dtype and memory order."""
    each = {
        f"batch {batch} {dtype} {'channels last' if last else 'contiguous'}": replace(
            size.settings(batch), dtype=dtype, channels_last=last
        )
        for batch, dtype, last in itertools.product(size.repeats, ("fp32", "bf16"), (False, True))
    }
    return _measured(networks_of(size.runs, (1,)), each, size.side)


def round_to(size: Size, multiples: tuple[int, ...]) -> Result:
    """The published ratios with kept filters in multiples of a number."""
    each = {
        f"batch {batch} {dtype}": replace(size.settings(batch), dtype=dtype, channels_last=True)
        for batch, dtype in itertools.product(size.repeats, ("fp32", "bf16"))
    }
    return _measured(networks_of(size.runs, multiples), each, size.side)


def compiled(size: Size) -> Result:
    """One published row through torch.compile and without it."""
    each = {
        f"batch {batch} {'compiled' if compiling else 'eager'}": replace(
            size.settings(batch), channels_last=True, compile=compiling
        )
        for batch, compiling in itertools.product(size.repeats, (False, True))
    }
    return _measured(networks_of(size.runs[:1], (1,)), each, size.side)


def _show(results: dict[str, Result]) -> None:
    """A table per part: milliseconds, real speedup, and how much arrives."""
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    for part, rows in results.items():
        conditions = list(next(iter(rows.values()))["times"])
        table = Table(title=part, title_justify="left", box=None, pad_edge=False)
        table.add_column("")
        table.add_column("counted", justify="right", vertical="bottom")
        for condition in conditions:
            table.add_column(condition, justify="right", min_width=11)
        for name, row in rows.items():
            cells = [_cell(row["times"][condition]) for condition in conditions]
            table.add_row(name, f"{row['counted_speedup']:.2f}x", *cells)
        console.print(table)
        console.print()


def _cell(time: Result) -> str:
    if time["arrives"] is None:
        return f"{time['median_ms']:.1f} ms"
    return f"{time['real_speedup']:.2f}x {time['arrives']:4.0%}"


def main() -> None:
    """Run the parts and write what they measured."""
    parser = Parser.of_script(
        "python -m benchmarks.latency", __doc__, ["--tiny --output /tmp/latency.json"]
    )
    share(parser, "--parts", f", of {', '.join(PARTS)}", default="published,round_to")
    share(parser, "--threads", ", of PyTorch", default=torch.get_num_threads())
    share(parser, "--tiny")
    share(parser, "--output", default=RESULTS)
    parser.renamed("--quick", "--tiny")
    arguments = parser.parse_args()
    chosen = arguments.parts.split(",")
    unknown = [part for part in chosen if part not in PARTS]
    if unknown:
        raise UserError(f"--parts: no part {unknown[0]!r}; there are: {', '.join(PARTS)}")
    quick, threads = arguments.tiny, arguments.threads
    size = (
        Size(("ResNet-34 1.32x",), {1: 2, 2: 1}, 0, 32, threads)
        if quick
        else Size(tuple(RUNS), {1: 25, 16: 7}, 1, 224, threads)
    )
    todo: dict[str, Callable[[], Result]] = {
        "published": lambda: published(size),
        "round_to": lambda: round_to(size, MULTIPLES[:2] if quick else MULTIPLES),
        "compiled": lambda: compiled(size if quick else replace(size, runs=("ResNet-50 2.31x",))),
    }
    output = arguments.output
    results = json.loads(output.read_text()) if output.exists() else {}
    for part in chosen:
        results[part] = todo[part]()
        results["on"] = machine_of(size.settings(1))
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(results, indent=1) + "\n")
    _show({part: results[part] for part in chosen})


if __name__ == "__main__":
    run_command(main)
