"""What ``python -m train.report`` does for a sweep: its table and its picture."""

from pathlib import Path

from rich.console import Console

from tpp.common.errors import UserError
from tpp.common.files import write_whole
from train.grid import load_sweep
from train.reporting.paper_table import collect, to_csv, to_markdown, to_rich
from train.reporting.picture import to_png
from train.reporting.sweep_picture import draw_sweep


def report_table(config: Path, output: Path | None, console: Console) -> None:
    """Print a sweep's table; write it, and the picture, into the sweep's folder.

    Args:
        config: the sweep's file.
        output: the folder of its runs, where it is not the file's.
        console: where to print.

    Raises:
        UserError: the sweep's file, a configuration of it, or a run's results.json is not valid,
            or the folder cannot be written.
    """
    sweep = load_sweep(config, output)
    table = collect(sweep)
    figure = draw_sweep(table)
    console.print(to_rich(table, console.width))
    folder = Path(sweep.output)
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        contents: dict[str, str | bytes] = {".md": to_markdown(table), ".csv": to_csv(table)}
        if figure is not None:
            contents[".png"] = to_png(figure)
        for suffix, content in contents.items():
            path = folder / f"{sweep.name}{suffix}"
            write_whole(path, content)
            written.append(str(path))
    except OSError as error:
        raise UserError(f"{folder}: cannot write the table ({error.strerror})") from None
    console.print(f"written: {', '.join(written)}", soft_wrap=True, highlight=False)
