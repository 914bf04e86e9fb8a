"""What to type to make a run's networks again, to load, evaluate and measure them."""

import ast
import json
import keyword
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tpp.checkpoints.model_file import read_metadata
from tpp.common.errors import UserError, printable
from tpp.common.object_storage import is_url
from tpp.common.own_code import anchored, is_own
from tpp.common.yaml_files import parse_yaml
from train.config.sections import MODEL_FILE
from train.config.stage_kinds import stage_kind
from train.reporting.rows import RunRecord, network_rows, stage_folder
from train.tasks.classification import Classification

_LARGEST_SOURCE = 2**20  # bytes, of a file with a network


class Command(NamedTuple):
    """A command, or lines of Python, and what it is for."""

    purpose: str
    text: str


def commands_of(run: RunRecord) -> Iterator[Command]:
    """The commands for one run; they can be typed in any folder, in the project's environment."""
    folder = run.folder.absolute()
    begin = started_in(run)
    if (folder / "config.yaml").exists():
        go_on, anew = _runs(run, begin)
        yield Command("Go on with the run, where it is not done", go_on)
        yield Command("Run it again, in another folder", anew)
    networks = dict(_networks(run))
    own = _own_network(run, begin)
    named = f" --model {shlex.quote(own)}" if own else ""
    for network, path in networks.items():
        network = printable(network)
        yield Command(f"Load the {network} network, in Python", _loading(path, network, own))
        if images := _validation(run, begin):
            text = f"tpp evaluate {quoted(path)} --data {shlex.quote(images)}{named}"
            yield Command(f"Evaluate the {network} network", text)
    if pruned := [path for network, path in networks.items() if network != "dense"]:
        measured = folder / "latency.json"
        time = f"tpp latency {' '.join(map(quoted, pruned))}{named} --json {quoted(measured)}"
        shown = f"tpp report {quoted(folder)} --latency {quoted(measured)}"
        yield Command("Measure latency, and show it in this report", f"{time}\n{shown}")
        describe = f"tpp describe {quoted(pruned[0])}{named}"
        yield Command("Describe a network layer by layer", describe)
    yield Command("Curves and histograms of all stages", f"tensorboard --logdir {quoted(folder)}")
    yield Command("Make this report again", f"tpp report {quoted(folder)}")


def started_in(run: RunRecord) -> Path | None:
    """The folder where relative paths of a run's settings begin; None where nothing tells it.

    It is what results.json says, if the run is still where it was; of one that was moved with all
    that is around it, what is left of its place without ``output``.
    """
    folder, output = run.folder.absolute(), run.settings.get("output")
    if ".." in folder.parts:
        folder = folder.resolve()
    said = run.results.started_in
    begin = Path(said) if said and Path(said).is_absolute() and Path(said).is_dir() else None
    if not isinstance(output, str) or (begin and _is_same(begin / output, folder)):
        return begin
    parts = Path(output).parts
    if parts and ".." not in parts and folder.parts[-len(parts) :] == parts:
        if Path(output).is_absolute():
            return begin
        return Path(*folder.parts[: -len(parts)])
    return begin


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False


def _runs(run: RunRecord, begin: Path | None) -> tuple[str, str]:
    """Going on with a run, and running it in another folder.

    Both begin where it was started. Whole paths in place of the relative ones of its settings
    would not do: what a checkpoint to start from is called decides whether a run may go on.
    """
    folder, ranks = run.folder.absolute(), run.results.ranks or 1
    start = "tpp train"
    if ranks != 1:
        main = Path(__file__).absolute().parents[1] / "main.py"
        start = f"accelerate launch --num_processes {ranks} {quoted(main)}"
    again = f"{start} --config {quoted(folder / 'config.yaml')}"
    if begin is not None:
        again = f"cd {quoted(begin)} && {again}"
    output = run.settings.get("output")
    fits = isinstance(output, str) and (
        begin is not None or Path(output).is_absolute()  # else it depends on where one is
    )
    if fits and _is_same((begin or Path()) / str(output), folder):
        go_on = again
    else:  # it was moved, and must not go on with what is there by now
        go_on = f"{again} {_setting('output', folder)}"
    return go_on, f"{again} {_setting('output', folder.with_name(f'{folder.name}-again'))}"


def _setting(key: str, path: Path) -> str:
    """``key=value`` for a command line: the value is YAML, to which a path may mean other things"""
    text = str(path)
    try:
        plain = parse_yaml(text, key) == text
    except UserError:
        plain = False
    return shlex.quote(f"{key}={text if plain else json.dumps(text)}")


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


def _own_network(run: RunRecord, begin: Path | None) -> str | None:
    """``FILE.py:CLASS`` by its whole path, where the network is of a class of the user's own."""
    name = run.settings.get("model.name")
    if not is_own(name):
        return None
    try:
        return str(anchored(name, begin or Path()))
    except UserError:  # nobody's home folder: the settings were edited
        return str(name)


def _loading(path: Path, network: str, own: str | None) -> str:
    """Lines of Python that load a network; one of the user's own needs its class too."""
    said = f"# {network}, an nn.Module"
    file, _, name = (own or "").rpartition(":")
    if not name.isidentifier() or keyword.iskeyword(name):
        return f"import tpp\n\nmodel = tpp.load_model({str(path)!r})  {said}"
    source = Path(file)
    brought, modules = f"from {source.stem} import {name}", "import sys"
    if not source.stem.isidentifier() or keyword.iskeyword(source.stem):
        brought = f"{name} = importlib.import_module({source.stem!r}).{name}"
        modules = "import importlib\nimport sys"
    return (
        f"{modules}\n\nimport tpp\n\n"
        f"sys.path.insert(0, {str(source.parent)!r})\n{brought}\n\n"
        f"network = {name}({_arguments(path, source, name)})\n"
        f"model = tpp.load_model({str(path)!r}, network=network)  {said}"
    )


def _arguments(path: Path, source: Path, name: str) -> str:
    """What a class of the user's own was called with, as its checkpoint says it."""
    try:
        architecture = read_metadata(path).architecture
    except UserError:
        return "..."  # of a file that cannot be loaded either
    given: dict[str, Any] = dict(architecture.args)
    if architecture.num_classes is not None and _takes_classes(source, name):
        given = {"num_classes": architecture.num_classes, **given}
    if all(key.isidentifier() and not keyword.iskeyword(key) for key in given):
        return ", ".join(f"{key}={value!r}" for key, value in given.items())
    return f"**{given!r}"


def _takes_classes(source: Path, name: str) -> bool:
    """Whether a class or function is told how many classes there are.

    Its file is only read: a run folder, whose word it is, never makes anything run.
    """
    try:
        if source.stat().st_size > _LARGEST_SOURCE:
            return True
        tree = ast.parse(source.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return True  # as most do
    for found in tree.body:
        if isinstance(found, ast.ClassDef) and found.name == name:
            makers = [of for of in found.body if isinstance(of, ast.FunctionDef)]
            found = next((of for of in makers if of.name == "__init__"), found)
        elif not (isinstance(found, ast.FunctionDef) and found.name == name):
            continue
        if isinstance(found, ast.FunctionDef):
            taken = found.args
            names = [of.arg for of in (*taken.posonlyargs, *taken.args, *taken.kwonlyargs)]
            return "num_classes" in names or taken.kwarg is not None
    return True


def _validation(run: RunRecord, begin: Path | None) -> str | None:
    """The folder of the images that the run was evaluated on, where a command takes it."""
    root, folder = run.settings.get("data.root"), run.settings.get("data.val", "val")
    if run.results.task != Classification.kind or not isinstance(root, str) or is_url(root):
        return None
    return str((begin or Path()) / root / str(folder))


def quoted(path: Path) -> str:
    """A path, whole, as a shell takes it for one word."""
    return shlex.quote(str(path.absolute()))
