"""Report runs beside each other and beside the published row: text, HTML and one picture.

    tpp report RUN [RUN ...] [--output DIR]
    tpp report --table 1
    tpp report --config SWEEP [--runs DIR] [--output DIR]

RUN is a run folder; what is drawn and tabled comes from its results.json, log.jsonl and
config.yaml. A run that is still going is reported as far as it has come.
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tpp.common.command_line import Parser
from tpp.common.errors import UserError, run_command
from tpp.common.files import write_whole
from tpp.common.options import share
from tpp.common.paths import user_path

if TYPE_CHECKING:
    from train.reporting.latency import Latency
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
    report = f"{shlex.quote(str(python.with_name('tpp')))} report {place}"
    if not python.with_name("tpp").is_file():  # a checkout that was not installed
        report = (
            f"cd {shlex.quote(str(ROOT))} && {shlex.quote(str(python))} -m train.report {place}"
        )
    for what, command in (
        ("run folder", place),
        ("TensorBoard", f"{tensorboard} --logdir {place}"),
        ("report", report),
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
    from train.reporting.page import Pictures, page_of
    from train.reporting.picture import draw, panels  # Matplotlib, which takes half a second
    from train.reporting.style import to_inline_svg, to_png

    picture = to_png(draw(runs))
    together = [to_inline_svg(of.figure, of.name, of.text) for of in panels(runs)]
    each = [
        # What the others say of a run, the pictures of all runs show already.
        [
            to_inline_svg(of.figure, f"run{number}-{of.name}", of.text)
            for of in panels([run], only=("scores", "filters"))
        ]
        for number, run in enumerate(runs if len(runs) > 1 else (), start=1)
    ]
    page = page_of(runs, Pictures(together, each), latency, output).encode()
    try:
        output.mkdir(parents=True, exist_ok=True)
        paths = output / "report.html", output / "report.png"
        for path, content in zip(paths, (page, picture), strict=True):
            write_whole(path, content)
        return paths
    except OSError as error:
        raise UserError(f"{output}: cannot write the report ({error.strerror})") from None


def make_parser(prog: str = "python -m train.report") -> Parser:
    """What the command takes."""
    parser = Parser(
        prog,
        "Report runs beside each other and beside the published row.",
        more="RUN is a run folder; one that is still going is reported as far as it has come. "
        "Text is printed, and report.html and report.png are written.",
        examples=[
            "runs/resnet56_tpp_pr0.9 runs/resnet56_l1_pr0.9",
            "--config configs/cifar10/table1.yaml",
            "--table 1",
        ],
    )
    parser.add_argument("runs", nargs="*", type=user_path, metavar="RUN", help="run folder")
    share(
        parser,
        "--output",
        " report.html and report.png, or of a sweep its page, tables and pictures (default: the "
        "first RUN, or the folder of the sweep's runs)",
        metavar="DIR",
    )
    parser.add_argument(
        "--table",
        choices=sorted(TABLES),
        help="print a whole table of the paper, as far as its sweep has come",
    )
    share(parser, "--config", " of a sweep: its page, table and pictures")
    parser.add_argument(
        "--runs",
        dest="folder",
        type=user_path,
        metavar="DIR",
        help="with a sweep: the folder of its runs, where it is not what the sweep's file says "
        "(--output of tpp sweep)",
    )
    parser.add_argument(
        "--latency",
        type=user_path,
        metavar="FILE",
        help="what tpp latency --json FILE measured of these networks: dense beside pruned, and "
        "the dense one at fewer pixels at equal time",
    )
    return parser


def main(words: Sequence[str] | None = None, prog: str = "python -m train.report") -> None:
    """Report the runs named on the command line; ``prog`` is how it was called."""
    parser = make_parser(prog)
    arguments = parser.parse_args(words)
    sweep = arguments.config or TABLES.get(arguments.table)
    if bool(arguments.runs) == bool(sweep):
        parser.error("name run folders, or a sweep with --config or --table")
    if arguments.folder and not sweep:
        parser.error("--runs goes with a sweep: --config or --table")
    from train.reporting.latency import Latency

    latency = Latency.read(Path(arguments.latency)) if arguments.latency else None
    if sweep:
        from tpp.common.consoles import output_console
        from train.reporting.sweep_report import report_table

        report_table(
            sweep,
            arguments.folder,
            arguments.output,
            output_console(100),
            latency,
        )
        return
    from train.reporting.grids import console_for, grids_of, to_rich
    from train.reporting.rows import listed, load_run

    runs = [load_run(folder) for folder in arguments.runs]
    if latency is not None:
        latency.expect_some((of.row.parameters, of.row.macs) for of in listed(runs))
    console = console_for()
    for grid in grids_of(runs, latency):
        console.print(to_rich(grid, console.width))
    page, picture = write_report(runs, arguments.output or arguments.runs[0], latency)
    console.print(f"written: {page} and {picture}", soft_wrap=True)


if __name__ == "__main__":
    run_command(main)
