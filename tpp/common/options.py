"""What several commands' options are called, what they take and what is said of them.

Each is here once, so that it means the same wherever it stands. A command adds it with
:func:`share`, which puts what is the command's own behind the common words.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpp.common.command_line import OVERRIDE, Parser, at_least_one
from tpp.common.hub import pinned
from tpp.common.paths import user_path

# As training.precision has them.
PRECISIONS = ("fp32", "bf16", "fp16")
DEVICES = ("cpu", "cuda")

Adds = Callable[..., argparse.Action]


def model_arg(text: str) -> tuple[str, Any]:
    """The name and the value of ``KEY=VALUE``; the value is read as YAML reads it.

    Raises:
        argparse.ArgumentTypeError: it is something else.
    """
    import yaml

    key, sign, value = text.partition("=")
    if not sign or not key.strip().isidentifier():
        raise argparse.ArgumentTypeError(f"{text}: write KEY=VALUE, as width=16")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError:
        raise argparse.ArgumentTypeError(f"{text}: {value} is not a value of YAML") from None


@dataclass(frozen=True)
class Shared:
    """An option that several commands have.

    Attributes:
        metavar: what stands for its value; FILE, DIR, NAME, N or SIZE; None for a switch, or
            where ``choices`` stand for it.
        says: what it is, without a full stop.
        kind: what makes a value of a word.
        choices: the words that it takes.
    """

    metavar: str | None
    says: str
    kind: Callable[[str], Any] | None = None
    choices: Sequence[str] | None = None


CHECKPOINT_HELP = (
    "a checkpoint of tpp's, weights as .pth or .safetensors, or a folder of DeepSpeed, Accelerate "
    "or Hugging Face, or hf-hub:OWNER/NAME@REVISION; docs/checkpoints.md lists what is read"
)
# What commands that read a checkpoint say of --model.
NOT_SAID = (
    ", if the checkpoint does not say it; FILE.py:CLASS for one of your own (the file is run)"
)
SHARED = {
    "--checkpoint": Shared("FILE", "the same as CHECKPOINT", user_path),
    "--config": Shared("FILE", "YAML file of settings", user_path),
    "--model": Shared("NAME", "the network"),
    "--model-arg": Shared(
        "KEY=VALUE", "argument of the network's class, as width=16; may be repeated", model_arg
    ),
    "--data": Shared("DIR", "images: a folder with one folder for each class", user_path),
    "--output": Shared("FILE", "where to write", user_path),
    "--overwrite": Shared(None, "replace files that are there already"),
    "--json": Shared("FILE", "write the results as JSON too", user_path),
    "--image-size": Shared("SIZE", "side of the images, in pixels", at_least_one),
    "--resize": Shared("SIZE", "scale to this shorter side first, in pixels", int),
    "--batch-size": Shared("N", "images per batch", at_least_one),
    "--precision": Shared(None, "precision of the computation", choices=PRECISIONS),
    "--device": Shared(None, "device to compute on", choices=DEVICES),
    "--threads": Shared("N", "threads on the CPU", at_least_one),
    "--loader": Shared(None, "what reads images", choices=("auto", "dali", "torchvision")),
    "--seed": Shared("N", "random seed", int),
    "--dry-run": Shared(None, "do nothing; say what would be done"),
    "--until": Shared(
        "STAGE[:STEP]", "end after this stage, or this step of it; the next run goes on from there"
    ),
    "--skip": Shared("PATTERN", "leave these layers alone; may be repeated"),
    "--jobs": Shared("N", "runs at once", at_least_one),
    "--quality": Shared("N", "quality of scaled JPEGs", int),
    "--shard-size": Shared("SIZE", "size of a tar file, as 256MB or 1GB"),
    "--rounds": Shared("N", "how often all is measured in turn", at_least_one),
    "--parts": Shared("NAME,NAME", "what to measure"),
    "--tiny": Shared(None, "tiny sizes, to try the script"),
}


def share(
    to: argparse._ActionsContainer, name: str, own: str = "", **changes: Any
) -> argparse.Action:
    """Add an option that several commands have.

    Args:
        to: a parser, or a group of one.
        name: of the option, as :data:`SHARED` has it.
        own: what holds for this command; it is put behind the common words as it is, so it begins
            with a comma, a colon or a semicolon.
        changes: what else ``add_argument`` takes. A ``default`` is told, but for None, False, an
            empty text and what is ``argparse.SUPPRESS``.
    """
    shared = SHARED[name]
    said = shared.says + own
    default = changes.get("default")
    untold = any(default is one for one in (None, False, "", argparse.SUPPRESS))
    if not untold and not isinstance(default, list):
        said += f" (default: {_shown(default)})"
    given: dict[str, Any] = {"help": said.replace("%", "%%")}
    if shared.metavar is None and shared.choices is None:
        given["action"] = "store_true"
    else:
        given |= {"metavar": shared.metavar, "type": shared.kind, "choices": shared.choices}
    given = {key: value for key, value in {**given, **changes}.items() if value is not None}
    return to.add_argument(name, **given)


def _shown(default: Any) -> str:
    """A default in words; a path as seen from here."""
    if isinstance(default, Path) and default.is_relative_to(Path.cwd()):
        return str(default.relative_to(Path.cwd()))
    return str(default)


def add_model(to: argparse._ActionsContainer, own: str = NOT_SAID, **changes: Any) -> None:
    """Add ``--model``, and ``--model-arg`` for what its class is called with.

    Args:
        to: a parser, or a group of one.
        own: what holds for this command.
        changes: what else ``add_argument`` takes of both.
    """
    share(to, "--model", own, **changes)
    share(to, "--model-arg", action="append", dest="model_args", **changes)


def add_checkpoint(
    parser: Parser, own: str = "", *, several: bool = False, needed: bool = True
) -> None:
    """Add CHECKPOINT, which ``--checkpoint`` names too; :func:`checkpoint_of` reads it.

    Args:
        parser: of the command.
        own: what holds for this command.
        several: whether there may be more than one.
        needed: whether there has to be one.
    """
    action = parser.add_argument(
        "checkpoint",
        nargs="*" if several else "?",
        type=user_path,
        metavar="CHECKPOINT",
        help=CHECKPOINT_HELP + own,
    )
    many: dict[str, Any] = {"nargs": "+", "action": "extend"} if several else {}
    share(parser, "--checkpoint", dest="named_checkpoint", default=None, **many)
    if needed:
        parser.needed.append(action)


def checkpoint_of(parser: Parser, found: argparse.Namespace) -> None:
    """Let ``found.checkpoint`` be what was named in either way, a list where it may be several.

    What is on the Hub is fetched here, and is from now on named with its commit.

    Raises:
        UserError: it was named in both ways, or in none although there has to be one; or there is
            no such repository on the Hub.
    """
    named = vars(found).pop("named_checkpoint")
    if isinstance(found.checkpoint, list):
        found.checkpoint += named or []
    elif named is not None:
        if found.checkpoint is not None:
            parser.error(f"{found.checkpoint} and --checkpoint {named}: name one checkpoint")
        found.checkpoint = named
    if parser.needed and not found.checkpoint:
        parser.error(f"there is no CHECKPOINT; {parser.prog} --help says what it may be")
    if isinstance(found.checkpoint, list):
        found.checkpoint = [pinned(path) for path in found.checkpoint]
    elif found.checkpoint is not None:
        found.checkpoint = pinned(found.checkpoint)


def add_reading(parser: Parser, *, tables: bool = False) -> None:
    """Add what says how images that others have arranged are read, docs/data.md.

    Args:
        parser: of the command.
        tables: whether it reads Parquet files.
    """
    add = parser.add_argument
    add(
        "--list",
        dest="listing",
        metavar="FILE",
        type=user_path,
        help="list of the images in DIR and their classes",
    )
    add(
        "--class-names",
        metavar="FILE",
        type=user_path,
        help="the classes in their order, one a line, or JSON",
    )
    add("--path-key", metavar="NAME", help="column of paths in a list")
    of_tables = " or in Parquet files" * tables
    add(
        "--label-key",
        metavar="NAME",
        help=f"column of labels in a list{of_tables}, or key in .json in tars",
    )
    if tables:
        add("--image-key", metavar="NAME", help="column of images in Parquet files")


_READING = ("listing", "class_names", "path_key", "label_key", "image_key")


def reading_of(found: argparse.Namespace) -> dict[str, Any]:
    """What :func:`add_reading` has found, as the keys of ``data_pipelines.sets.inputs.Input``."""
    return {key: getattr(found, key) for key in _READING if hasattr(found, key)}


def add_settings(parser: Parser, own: str = "") -> None:
    """Add ``key.sub=value ...``, settings that replace those of ``--config``."""
    parser.add_argument(
        "overrides", nargs="*", metavar=OVERRIDE, help=f"settings that replace the file's{own}"
    )
