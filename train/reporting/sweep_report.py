"""What ``tpp report`` does for a sweep: its tables, its pictures and its page."""

from pathlib import Path

from rich.console import Console

from tpp.common.errors import UserError
from tpp.common.files import write_whole
from train.grid import expand, load_sweep, state_of
from train.reporting.latency import Latency
from train.reporting.paper_table import collect, to_csv, to_markdown, to_rich
from train.reporting.rows import load_run
from train.reporting.style import to_inline_svg, to_png, to_svg
from train.reporting.sweep_page import sweep_page_of
from train.reporting.sweep_picture import draw_sweep, sweep_panels


def report_table(
    config: Path,
    folder: Path | None,
    output: Path | None,
    console: Console,
    latency: Latency | None = None,
) -> None:
    """Print a sweep's table; write it, the pictures and the page.

    Args:
        config: the sweep's file.
        folder: of the sweep's runs, where it is not the file's.
        output: the folder to write into; None for that of the runs.
        console: where to print.
        latency: measured times of the networks, if there are any.

    Raises:
        UserError: the sweep's file, a configuration of it, or a run's results.json is not valid,
            no run has come to anything yet, or the folder cannot be written.
    """
    sweep = load_sweep(config, folder)
    table = collect(sweep)
    runs = expand(sweep)
    if table.is_empty:
        going = sum(state_of(run).text != "waiting" for run in runs)
        raise UserError(
            f"{sweep.output}: none of the {len(runs)} runs of the sweep {sweep.name} has a result "
            f"there yet ({going} under way); tpp sweep --config {config} runs them; "
            "--runs DIR reports those of another folder"
        )
    if latency is not None:
        sizes = [size for cell in table.cells.values() for size in cell.sizes]
        latency.expect_some((size.parameters, size.macs) for size in sizes)
    console.print(to_rich(table, console.width))
    output = output or Path(sweep.output)
    figure = draw_sweep(table, latency)
    panels = sweep_panels(table, latency)
    pictures = [to_inline_svg(of.figure, of.name, of.text) for of in panels]
    there = [run.folder for run in runs if (run.folder / "results.json").exists()]
    records = [load_run(folder) for folder in there]
    page = sweep_page_of(table, runs, records, config, output, pictures, latency)
    contents: dict[str, str | bytes] = {
        ".html": page,
        ".md": to_markdown(table),
        ".csv": to_csv(table, latency),
    }
    if figure is not None:
        contents |= {".svg": to_svg(figure), ".png": to_png(figure)}
    written = []
    try:
        output.mkdir(parents=True, exist_ok=True)
        for suffix, content in contents.items():
            path = output / f"{sweep.name}{suffix}"
            write_whole(path, content)
            written.append(str(path))
    except OSError as error:
        raise UserError(f"{output}: cannot write the report ({error.strerror})") from None
    console.print(f"written: {', '.join(written)}", soft_wrap=True, highlight=False)
