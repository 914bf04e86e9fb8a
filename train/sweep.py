"""Run a sweep: every method at every pruning ratio with every seed, from one dense network."""

import itertools
import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from tpp.common.command_line import Parser
from tpp.common.consoles import output_console
from tpp.common.errors import UserError, run_command
from tpp.common.options import add_settings, share

if TYPE_CHECKING:
    from train.grid import State, SweepRun
    from train.sharing import SharedStage, SweepConfigs
    from train.tasks.base import Metric


def _chosen(runs: "Sequence[SweepRun]", text: str | None) -> "list[SweepRun]":
    """The runs that --only names: ``3``, ``1-5,9``, or ``7-`` for all from 7 on."""
    if text is None:
        return list(runs)
    numbers = _named(text, runs[0].number, runs[-1].number, prefix="")
    return [run for run in runs if run.number in numbers]


def _chosen_shared(shared: "Sequence[SharedStage]", text: str | None) -> "list[SharedStage]":
    """The shared stages that --only names, with an s before numbers: ``s3``, ``s1-5``, ``s1-``."""
    if text is None or "s" not in text:
        return []
    numbers = _named(text, 1, len(shared), prefix="s")
    return [one for one in shared if one.number in numbers]


def _named(text: str, first: int, last: int, *, prefix: str) -> set[int]:
    """The numbers with such a prefix in what --only says."""
    numbers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"(s?)(\d+)(?:(-)(\d*))?", part.strip())
        if match and match[1] != prefix:
            continue
        start = int(match[2]) if match else -1
        end = int(match[4] or last) if match and match[3] else start
        open_end = match is not None and match[3] and not match[4]
        if open_end and start == last + 1:
            continue  # all from the first on, of none
        if not first <= start <= end <= last:
            what = " of the shared stages" if prefix and match else ""
            raise UserError(
                f"--only {text}: expected {prefix}N, {prefix}N-M or {prefix}N- within "
                f"{first}-{last}{what}"
            )
        numbers.update(range(start, end + 1))
    return numbers


def _as_ranges(numbers: Sequence[int], prefix: str = "") -> str:
    """Rising numbers as SLURM writes an array: ``1-5,9``."""
    parts = []
    for _, group in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        block = [number for _, number in group]
        end = f"-{block[-1]}" if len(block) > 1 else ""
        parts.append(f"{prefix}{block[0]}{end}")
    return ",".join(parts)


def _print_pending(
    runs: "Sequence[SweepRun]", asked: "Sequence[SharedStage]", jobs: int | None
) -> None:
    """What is not done: in one line, or with ``jobs`` a line for so many each."""
    from train.grid import state_of

    pending = {
        "s": [one.number for one in asked],
        "": [run.number for run in runs if not state_of(run).done],
    }
    if jobs is None:
        print(
            ",".join(_as_ranges(numbers, prefix) for prefix, numbers in pending.items() if numbers)
        )
        return
    for prefix, numbers in pending.items():
        for begin in range(0, len(numbers), jobs):
            print(_as_ranges(numbers[begin : begin + jobs], prefix))


def _launcher(text: str | None) -> list[str]:
    """What starts train/main.py; programs of this environment come first."""
    if text is None:
        return [sys.executable]
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"--launcher {text}: {error}") from None
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    program = shutil.which(words[0], path=path) if words else None
    if program is None:
        raise UserError(f"--launcher {text}: there is no such program")
    return [program, *words[1:]]


def _print_list(
    runs: "Sequence[SweepRun]",
    finetunings: Sequence[str],
    shared: "Sequence[SharedStage]",
    configs: "SweepConfigs",
    metric: "Metric",
) -> None:
    from train.grid import state_of
    from train.sharing import count_steps

    states = [state_of(run) for run in runs]
    table = Table()
    table.add_column("Run", justify="right")
    table.add_column("Method")
    table.add_column("Ratio")
    table.add_column("Seed", justify="right")
    for label in finetunings:
        table.add_column(f"{metric.column}\n{label}", justify="right")
    table.add_column("State")
    for run, state in zip(runs, states, strict=True):
        scores = _scores(run, state, finetunings, metric)
        place = ("dense", "", "") if run.method is None else (run.method, run.ratio, str(run.seed))
        table.add_row(str(run.number), *place, *scores, state.text)
    console = output_console(100)
    console.print(table)
    done = sum(state.done for state in states)
    begun = sum(state.text.startswith("under way") for state in states)
    print(f"{done} done, {begun} under way, {len(runs) - done - begun} waiting")
    steps = count_steps(runs, shared, configs, [state.results for state in states])
    apart = ", without those of images that are not there" if steps.without_images else ""
    print(
        f"{steps.alone:,} steps{apart}; {steps.alone - steps.saved:,} to train, as runs share "
        f"{len(shared)} stages or beginnings of stages"
    )


def _scores(
    run: "SweepRun", state: "State", finetunings: Sequence[str], metric: "Metric"
) -> list[str]:
    if state.results is None:
        return [""] * len(finetunings)
    if run.method is None:
        dense = state.results.dense
        found = [None if dense is None else dense.scores.get(metric.name)]
        found += [None] * (len(finetunings) - 1)
    else:
        stages = [state.results.stages.get(run.evaluations[label]) for label in finetunings]
        found = [None if stage is None else stage.scores.get(metric.name) for stage in stages]
    return ["" if score is None else metric.number(score) for score in found]


def make_parser(prog: str = "python -m train.sweep") -> Parser:
    """What the command takes."""
    parser = Parser(
        prog,
        "Run a sweep: every method at every ratio with every seed, from one dense network.",
        more="""
            Each run is a process of its own (train/main.py) with a folder of its own. What is done
            is skipped, what was broken off goes on where it was, and a run that fails costs nothing
            but itself. What several runs have in common is trained once. SIGTERM and Ctrl-C end all
            of it with checkpoints.
        """,
        examples=[
            "--config configs/cifar10/table1.yaml --list",
            "--config configs/cifar10/table1.yaml --jobs 8 data.root=/data/cifar10",
        ],
    )
    share(parser, "--config", " of the sweep", required=True)
    share(parser, "--output", " the runs (default: what the file says)", metavar="DIR")
    parser.add_argument("--list", action="store_true", help="show all runs and how far they are")
    parser.add_argument(
        "--pending",
        action="store_true",
        help="print the numbers of what is not done: 1-5,9; with --jobs N, a line for N runs each",
    )
    parser.add_argument(
        "--only",
        metavar="N[,N-M]",
        help="these runs; 7- means from 7 on, s1- all stages that several runs have in common",
    )
    share(
        parser,
        "--jobs",
        ", on each GPU or on the CPU, each with its share of the cores; what they say goes to "
        "OUTPUT/logs. Without it one run at a time has everything",
    )
    parser.add_argument(
        "--launcher",
        metavar="COMMAND",
        help='what starts train/main.py, such as "torchrun --nproc_per_node 4" (default: python)',
    )
    add_settings(parser, ", of every run; those of a stage go to the runs that train in it")
    return parser


def main(words: Sequence[str] | None = None, prog: str = "python -m train.sweep") -> None:
    """Run or list a sweep; ``prog`` is how it was called, for ``--help``."""
    arguments = make_parser(prog).parse_args(words)
    from train.grid import expand, load_sweep, metric_of, state_of
    from train.sharing import SweepConfigs, shared_stages, still_needed
    from train.side_by_side import end_on_signals, places
    from train.sweep_jobs import Way, run_sweep

    sweep = load_sweep(arguments.config, arguments.output)
    all_runs, configs = expand(sweep, arguments.overrides), SweepConfigs()
    runs = _chosen(all_runs, arguments.only)
    jobs = arguments.jobs
    # Table 1's take seconds to find: not for what runs alone are asked for.
    alone = arguments.pending and "s" not in (arguments.only or "")
    shared = [] if alone else shared_stages(all_runs, configs)
    asked = still_needed(_chosen_shared(shared, arguments.only), all_runs)
    if arguments.list:
        _print_list(runs, list(sweep.blocks), shared, configs, metric_of(all_runs))
    elif arguments.pending:
        _print_pending(runs, asked, jobs)
    else:
        launcher = _launcher(arguments.launcher)
        where = places(jobs, with_launcher=arguments.launcher is not None)
        logs = Path(sweep.output) / "logs" if jobs is not None else None
        end_on_signals()
        failed = run_sweep(runs, asked, shared, configs, Way(launcher, where, logs))
        done = sum(state_of(run).done for run in runs)
        trained = (
            f", {sum(one.done for one in asked)} of {len(asked)} shared stages" if asked else ""
        )
        print("\n".join((*failed, f"{sweep.name}: {done} of {len(runs)} runs are done{trained}")))
        sys.exit(1 if failed else 0)


if __name__ == "__main__":
    run_command(main)
