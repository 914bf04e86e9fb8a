"""One command for all: ``tpp prune``, or ``python -m tpp prune`` where it is not installed."""

import difflib
import importlib
import sys
from pathlib import Path

from tpp import __version__
from tpp.common.errors import UserError, run_command

COMMANDS = {
    "prune": "remove filters from a checkpoint",
    "sparsify": "set weights of a checkpoint to zero, and keep a mask",
    "describe": "show what is in a checkpoint, layer by layer",
    "latency": "time pruned networks beside the dense ones that they came from",
    "export": "write a checkpoint as ONNX or as an exported program of PyTorch",
}


def _help(prog: str) -> str:
    commands = "\n".join(f"  {name:10}{what}" for name, what in COMMANDS.items())
    return (
        f"usage: {prog} COMMAND ...\n\nTrainability Preserving Pruning: smaller classifiers.\n\n"
        f"commands:\n{commands}\n\n"
        f"{prog} COMMAND --help says more of each; {prog} --version names this version."
    )


def _main() -> None:
    prog = "tpp" if Path(sys.argv[0]).stem == "tpp" else "python -m tpp"
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(_help(prog))
    elif name == "--version":
        print(f"tpp {__version__}")
    elif name in COMMANDS:
        # Only the one that is wanted, and it in turn reads its options before it imports PyTorch.
        importlib.import_module(f"tpp.{name}").main(arguments, f"{prog} {name}")
    else:
        near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0)[0]
        raise UserError(f"{prog} {name}: no such command; did you mean {near}?")


def command() -> None:
    """The installed command ``tpp``."""
    run_command(_main)


if __name__ == "__main__":
    command()
