"""Report runs beside each other and beside the published row: text, HTML and one picture.

    python -m train.report RUN [RUN ...] [--output DIR]
    python -m train.report --table 1
    python -m train.report --config SWEEP

RUN is a run folder; what is drawn and tabled comes from its results.json, log.jsonl and
config.yaml. A run that is still going is reported as far as it has come.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tpp.common.errors import UserError, run_command
from tpp.common.files import write_whole
from tpp.common.paths import user_path

if TYPE_CHECKING:
    from train.reporting.rival import Latency
    from train.reporting.rows import RunRecord

ROOT = Path(__file__).resolve().parents[1]
TABLES = {"1": ROOT / "configs" / "cifar10" / "table1.yaml"}


def show_end(folder: Path) -> None:
    """Print what a run came to, and write its report into the run folder."""
    from rich.text import Text

    from train.reporting.grids import comparison, console_for, rivals, summary_table, to_rich
    from train.reporting.rows import load_run

    run = load_run(folder)
    console = console_for()
    console.print(summary_table(run.results))
    if run.results.published is not None:
        console.print(to_rich(comparison([run]), console.width))
    if (beside := rivals([run])).rows:
        console.print(to_rich(beside, console.width))
    page, _ = write_report([run], folder)
    # Whole paths: the lines are pasted into another terminal, or read in a job's log.
    place, python = shlex.quote(str(folder.absolute())), Path(sys.executable)
    tensorboard = shlex.quote(str(python.with_name("tensorboard")))
    report = f"{shlex.quote(str(python))} -m train.report {place}"
    for what, command in (
        ("run folder", place),
        ("TensorBoard", f"{tensorboard} --logdir {place}"),
        ("report", f"cd {shlex.quote(str(ROOT))} && {report}"),
        ("report page", shlex.quote(str(page.absolute()))),
    ):
        text = Text(f"{what + ':':13}{command}")
        console.print(text, soft_wrap=True)


def write_report(
    runs: "Sequence[RunRecord]", output: Path, latency: "Latency | None" = None
) -> tuple[Path, Path]:
    """Write report.html and report.png into the folder ``output``; returns both paths.

    Raises:
        UserError: the folder cannot be written, or the runs are not all for one task.
    """
    from train.reporting.page import page_of
    from train.reporting.picture import draw, to_png  # Matplotlib, which takes half a second

    pictures = [to_png(draw(runs))]
    if len(runs) > 1:
        pictures += [to_png(draw([run])) for run in runs]
    page = page_of(runs, pictures, latency).encode()
    try:
        output.mkdir(parents=True, exist_ok=True)
        paths = output / "report.html", output / "report.png"
        for path, content in zip(paths, (page, pictures[0]), strict=True):
            write_whole(path, content)
        return paths
    except OSError as error:
        raise UserError(f"{output}: cannot write the report ({error.strerror})") from None


def main() -> None:
    """Report the runs named on the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m train.report",
        description="Report runs beside each other and beside the published row.",
        epilog="example: python -m train.report runs/resnet56_tpp_pr0.9 runs/resnet56_l1_pr0.9",
    )
    parser.add_argument("runs", nargs="*", type=user_path, metavar="RUN", help="run folder")
    parser.add_argument(
        "--output",
        type=user_path,
        metavar="DIR",
        help="where report.html and report.png go; default: the first RUN (of a sweep: the "
        "folder of the sweep's runs; default: what the sweep's file says)",
    )
    parser.add_argument(
        "--table",
        choices=sorted(TABLES),
        help="print a whole table of the paper, as far as its sweep has come",
    )
    parser.add_argument(
        "--config", type=user_path, metavar="FILE", help="table and picture of a sweep"
    )
    parser.add_argument(
        "--latency",
        type=user_path,
        metavar="FILE",
        help="what tpp.latency --json FILE measured of these networks: the dense one at fewer "
        "pixels is compared at equal time, too",
    )
    arguments = parser.parse_args()
    sweep = arguments.config or TABLES.get(arguments.table)
    if bool(arguments.runs) == bool(sweep):
        parser.error("name run folders, or a sweep with --config or --table")
    if arguments.latency and sweep:
        parser.error("--latency goes with run folders")
    if sweep:
        from rich.console import Console

        from train.reporting.paper_table import report_table

        report_table(
            sweep,
            arguments.output,
            Console(width=None if sys.stdout.isatty() else 100),
        )
        return
    from train.reporting.grids import console_for, grids_of, to_rich
    from train.reporting.rival import Latency
    from train.reporting.rows import load_run

    latency = Latency.read(Path(arguments.latency)) if arguments.latency else None
    runs = [load_run(folder) for folder in arguments.runs]
    console = console_for()
    for grid in grids_of(runs, latency):
        console.print(to_rich(grid, console.width))
    page, picture = write_report(runs, arguments.output or arguments.runs[0], latency)
    console.print(f"written: {page} and {picture}", soft_wrap=True)


if __name__ == "__main__":
    run_command(main)
