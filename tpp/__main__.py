"""One command for all: ``tpp prune``, or ``python -m tpp prune`` where it is not installed.

The package tpp is the lowest of the project, and knows nothing of the others. This module is its
one exception, and stands above all packages in tests/test_layers.py: Python looks for the command
``tpp`` here, nothing imports this module, and it imports a command by its name when it is asked
for. Where tpp is installed alone, without the clone that it came from, the others are not there.
"""

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import tpp
from tpp.common.command_line import nearest
from tpp.common.errors import UserError, run_command

ROOT = Path(tpp.__file__).resolve().parents[1]


class Command(NamedTuple):
    """One of the commands.

    Attributes:
        module: whose ``main(arguments, prog)`` it is, and ``make_parser(prog)`` its options.
        what: it does.
    """

    module: str
    what: str


GROUPS = {
    "a checkpoint": {
        "prune": Command("tpp.prune", "remove filters"),
        "sparsify": Command("tpp.sparsify", "set weights to zero, and keep a mask"),
        "describe": Command("tpp.describe", "show what is in it, layer by layer"),
        "survey": Command("tpp.survey", "say which layers can lose filters, and why others cannot"),
        "latency": Command("tpp.latency", "time pruned networks beside dense ones"),
        "export": Command("tpp.export", "write it as ONNX or as an exported program of PyTorch"),
        "push": Command("tpp.push", "write it to the Hugging Face Hub, with a model card"),
        "pull": Command("tpp.pull", "fetch it from there"),
        "evaluate": Command("train.evaluate", "top-1, top-5 and loss over a folder of images"),
    },
    "a run": {
        "train": Command("train.main", "run a configuration, from the dense network to the pruned"),
        "sweep": Command("train.sweep", "run many: methods, ratios and seeds"),
        "report": Command("train.report", "runs beside each other, as text, page and picture"),
        "track": Command("train.track", "send a run's curves to wandb, MLflow or Trackio"),
        "settings": Command("train.settings", "say what the keys of a configuration mean"),
        "check": Command("launch.check", "what can go wrong with a job before it is queued"),
        "cards": Command("train.cards", "which GPUs are here, and what to install for them"),
        "graphs": Command("train.graphs.__main__", "rewire a graph for its resilience"),
    },
    "images": {
        "prepare": Command("data_pipelines.prepare", "make a data set ready from its archives"),
        "index": Command("data_pipelines.index", "sizes of images, and which files are broken"),
        "shards": Command("data_pipelines.shards", "pack images into tar shards"),
        "demo-data": Command("data_pipelines.demo", "write a small made-up data set"),
    },
}
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}


def in_clone() -> bool:
    """Whether the rest of the project lies beside this package."""
    return (ROOT / "train" / "main.py").is_file()


def there(command: Command) -> bool:
    """Whether a command's package is there."""
    return command.module.startswith("tpp.") or in_clone()


def _help(prog: str) -> str:
    lines = [
        f"usage: {prog} COMMAND ...",
        "",
        "Trainability Preserving Pruning: smaller image networks.",
    ]
    for title, group in GROUPS.items():
        shown = {name: one for name, one in group.items() if there(one)}
        if shown:
            lines += ["", f"{title}:"]
            lines += [f"  {name:11}{one.what}" for name, one in shown.items()]
    if not in_clone():
        lines += ["", "In a clone of the project there are those that train, too."]
    lines += [
        "",
        f"{prog} COMMAND --help says more of each,",
        f"{prog} --version names this version.",
        "",
        "example:",
        f"  {prog} survey --model resnet50",
    ]
    return "\n".join(lines)


def load(name: str) -> Command:
    """Make a command's module ready to be imported.

    Raises:
        UserError: there is no such command, or not here.
    """
    command = COMMANDS[name]
    if not there(command):
        raise UserError(
            f"tpp {name}: is not part of the package tpp alone; run it in a clone of the project: "
            f"python -m tpp {name}"
        )
    package = command.module.partition(".")[0]
    # Before anything of that name in the user's working directory.
    if package != "tpp" and sys.path[:1] != [str(ROOT)]:
        sys.path.insert(0, str(ROOT))
    return command


def _main() -> None:
    prog = "tpp" if Path(sys.argv[0]).stem == "tpp" else "python -m tpp"
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(_help(prog))
    elif name == "--version":
        print(f"tpp {tpp.__version__}")
    elif name in COMMANDS:
        # Only the one that is wanted, and it in turn reads its options before it imports PyTorch.
        _start(name, arguments, f"{prog} {name}")
    elif name.startswith("-"):
        raise UserError(f"{prog}: there is no option {name}; {prog} --help lists all commands")
    else:
        meant = nearest(name, [*COMMANDS]) or f"; {prog} --help lists all"
        raise UserError(f"{prog}: there is no command {name}{meant}")


def _start(name: str, arguments: Sequence[str], prog: str) -> None:
    importlib.import_module(load(name).module).main(arguments, prog)


def command() -> None:
    """The installed command ``tpp``."""
    run_command(_main)


if __name__ == "__main__":
    command()
