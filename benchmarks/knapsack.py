"""Score kept, and time that arrives: a knapsack over layers' times beside a budget of MACs.

    python -m benchmarks.knapsack [CHECKPOINT] [--model NAME]
        [--backend torch|onnxruntime] [--speedup X] [--table FILE]
        [--threads N] [--repeats N] [--tries N] [--output FILE]

equal MACs  both choose for dense MACs / X: the budget of MACs by the lowest scores of all layers;
            the knapsack, of all times that its table allows, for the first that has as few MACs.
            How much of the time arrives.
equal time  the knapsack chooses anew, so that its network takes no longer, as measured here, than
            that of the budget of MACs. How much more score it keeps.

Scores are L1 over the mean of the layer, as both add them up. All networks of a comparison take
turns, pass by pass; times are medians, and differ with the machine and with what else it does.
Results go to benchmarks/results/knapsack.json.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tpp.channels.removal import prune_model
from tpp.checkpoints.any_file import open_network
from tpp.common.command_line import Parser
from tpp.common.errors import run_command
from tpp.common.files import write_json_option
from tpp.common.options import add_checkpoint, checkpoint_of, share
from tpp.common.paths import user_path
from tpp.measure.counts import count
from tpp.measure.layer_times import LayerTimes
from tpp.measure.timing import BACKENDS, LatencySettings, machine_of, measure
from tpp.models.architecture import build_model, example_input_for
from tpp.selection.budget import Budget, Widths
from tpp.selection.configured import network_named
from tpp.selection.knapsack import Knapsack
from tpp.selection.selection import Selection, ranked

RESULTS = Path(__file__).parent / "results" / "knapsack.json"


def _options() -> argparse.Namespace:
    parser = Parser.of_script(
        "python -m benchmarks.knapsack", __doc__, ["--model resnet50 --table times.json"]
    )
    add_checkpoint(parser, " (default: random weights)", needed=False)
    share(parser, "--model", default="resnet50")
    add = parser.add_argument
    add(
        "--backend",
        choices=BACKENDS,
        default="onnxruntime",
        help="what runs the networks (default: onnxruntime)",
    )
    add(
        "--speedup",
        type=float,
        default=2.0,
        metavar="X",
        help="in MACs, of both (default: 2.0)",
    )
    add(
        "--table",
        type=user_path,
        metavar="FILE",
        help="the layers' times, made where it is not there",
    )
    share(parser, "--threads", default=1)
    add("--repeats", type=int, default=15, metavar="N", help="timed passes (default: 15)")
    add("--tries", type=int, default=5, metavar="N", help="for an equal time (default: 5)")
    add("--coupled", action="store_true", help="the residual stream goes too")
    share(parser, "--output", default=RESULTS)
    options = parser.parse_args()
    checkpoint_of(parser, options)
    return options


class Bench:
    """A dense network, what can go in it, and both ways to choose."""

    def __init__(self, dense: nn.Module, settings: LatencySettings, options: Any) -> None:
        self.dense, self.settings = dense, settings
        self.macs = count(dense).macs
        budget = Budget("speedup", options.speedup)
        self.selection = Selection(budget=budget, coupled=options.coupled)
        self.candidates = self.selection._candidates(dense, None)
        totals = self.selection._totals(dense, self.candidates, None)
        self.orders, self.worth = ranked(self.candidates.units, totals)
        units = self.candidates.units
        print("timing layers ...", file=sys.stderr)
        self.knapsack = Knapsack(
            dense,
            units,
            Widths(units),
            self.worth,
            LayerTimes(settings, options.table),
            example_input_for(dense),
        )

    def network(self, removed: Tensor) -> nn.Module:
        """What is left."""
        return prune_model(self.dense, self.candidates.plan(self.orders, removed))

    def by_macs(self) -> Tensor:
        """What the budget of MACs takes, (units,)."""
        plan = self.selection.select(self.dense)
        units = self.candidates.units
        return torch.tensor([len(plan.pruned[u.layers[0]]) // u.groups for u in units])

    def score(self, removed: Tensor) -> float:
        """What is kept of all scores, a share."""
        kept = sum(w[gone:].sum() for w, gone in zip(self.worth, removed.tolist(), strict=True))
        return float(kept / sum(w.sum() for w in self.worth))

    def first_that(self, fits: Callable[[Tensor], bool], steps: int) -> Tensor:
        """The knapsack's network of the longest time for which it fits, by bisection."""
        fast, slow = self.knapsack.least, self.knapsack.dense
        found = self.knapsack.within(fast)
        for _ in range(steps):
            middle = (fast + slow) // 2
            removed = self.knapsack.within(middle)
            if fits(removed):
                found, fast = removed, middle
            else:
                slow = middle
        return found

    def row(self, removed: Tensor, ratio: float) -> dict[str, float]:
        """A network beside the dense one, of whose time it takes a share."""
        return {
            "counted_speedup": self.macs / count(self.network(removed)).macs,
            "real_speedup": 1 / ratio,
            "score": self.score(removed),
        }


def main() -> None:
    """Measure, print and write."""
    options = _options()
    settings = LatencySettings(
        backend=options.backend, threads=options.threads, repeats=options.repeats, warmup=2
    )
    if options.checkpoint is not None:
        dense = open_network(options.checkpoint, network_named(options.model)).model.float()
    else:
        torch.manual_seed(0)
        dense = build_model(options.model, 10 if "cifar" in options.model else 1000).eval()
    bench = Bench(dense, settings, options)
    counted = bench.by_macs()
    same_macs = bench.first_that(
        lambda removed: count(bench.network(removed)).macs * options.speedup <= bench.macs, 12
    )
    network = bench.network(counted)

    def as_fast(removed: Tensor) -> bool:
        tried = measure({"counted": network, "tried": bench.network(removed)}, settings)
        return tried["tried"].median <= tried["counted"].median

    same_time = bench.first_that(as_fast, options.tries)
    networks = {
        "dense": dense,
        "budget of MACs": network,
        "knapsack, equal MACs": bench.network(same_macs),
        "knapsack, equal time": bench.network(same_time),
    }
    timings = measure(networks, replace(settings, repeats=2 * settings.repeats))
    ratio = {name: timing.median / timings["dense"].median for name, timing in timings.items()}
    chosen = dict(zip(networks, (counted * 0, counted, same_macs, same_time), strict=True))
    rows = {name: bench.row(removed, ratio[name]) for name, removed in chosen.items()}
    for name, row in rows.items():
        print(
            f"{name:22} MACs {row['counted_speedup']:.2f}x fewer, {row['real_speedup']:.2f}x as "
            f"fast, score kept {100 * row['score']:.1f}%"
        )
    more = rows["knapsack, equal time"]["score"] / rows["budget of MACs"]["score"] - 1
    print(f"at an equal time the knapsack keeps {100 * more:+.1f}% of the score")
    content = {
        "settings": {"model": options.model, "speedup": options.speedup, **vars(settings)},
        "on": machine_of(settings),
        "dense_ms": 1000 * timings["dense"].median,
        "results": rows,
        "more_score_at_equal_time": more,
    }
    write_json_option(options.output, content)


if __name__ == "__main__":
    run_command(main)
