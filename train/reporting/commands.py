"""What to type to make a run's networks again, to load, evaluate and measure them."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tpp.common.errors import printable
from tpp.common.object_storage import is_url
from train.config.sections import MODEL_FILE
from train.config.stage_kinds import stage_kind
from train.reporting.rows import RunRecord, network_rows, stage_folder
from train.tasks.classification import Classification


class Command(NamedTuple):
    """A command, or lines of Python, and what it is for."""

    purpose: str
    text: str


def commands_of(run: RunRecord) -> Iterator[Command]:
    """The commands for one run; all are for the project's folder and its environment."""
    folder = run.folder.absolute()
    config, ranks = folder / "config.yaml", run.results.ranks or 1
    if config.exists():
        start = "python" if ranks == 1 else f"accelerate launch --num_processes {ranks}"
        again = f"{start} train/main.py --config {quoted(config)}"
        yield Command("Go on with the run, where it is not done", again)
        yield Command("Run it again, in another folder", f"{again} output=runs/again")
    networks = dict(_networks(run))
    for network, path in networks.items():
        network = printable(network)
        load = f"import tpp\n\nmodel = tpp.load_model({str(path)!r})  # {network}, an nn.Module"
        yield Command(f"Load the {network} network, in Python", load)
        if images := _validation(run):
            text = f"tpp evaluate {quoted(path)} --data {shlex.quote(images)}"
            yield Command(f"Evaluate the {network} network", text)
    if pruned := [path for network, path in networks.items() if network != "dense"]:
        measured = folder / "latency.json"
        time = f"tpp latency {' '.join(map(quoted, pruned))} --json {quoted(measured)}"
        shown = f"tpp report {quoted(folder)} --latency {quoted(measured)}"
        yield Command("Measure latency, and show it in this report", f"{time}\n{shown}")
        yield Command("Describe a network layer by layer", f"tpp describe {quoted(pruned[0])}")
    yield Command("Curves and histograms of all stages", f"tensorboard --logdir {quoted(folder)}")
    yield Command("Make this report again", f"tpp report {quoted(folder)}")


def _networks(run: RunRecord) -> Iterator[tuple[str, Path]]:
    """The model files that are there, of the networks that a reader knows by name."""
    for name, stage in run.results.stages.items():
        if stage_kind(stage.kind).is_dense and (path := _model_of(run, name)):
            yield "dense", path
            break
    for row in network_rows(run.results):
        if row.stage is None or row.aside:
            continue
        stage = run.results.stages[row.stage]
        makes = stage_kind(stage.kind).makes_network
        maker = row.stage if makes else stage.input
        if path := _model_of(run, maker):
            yield row.network, path


def _model_of(run: RunRecord, stage: str | None) -> Path | None:
    folder = stage_folder(run.folder.absolute(), stage or "")
    return folder / MODEL_FILE if folder and (folder / MODEL_FILE).exists() else None


def _validation(run: RunRecord) -> str | None:
    """The folder of the images that the run was evaluated on, where a command takes it."""
    root, folder = run.settings.get("data.root"), run.settings.get("data.val", "val")
    if run.results.task != Classification.kind or not isinstance(root, str) or is_url(root):
        return None
    return str(Path(root) / str(folder))


def quoted(path: Path) -> str:
    """A path, whole, as a shell takes it for one word."""
    return shlex.quote(str(path.absolute()))
