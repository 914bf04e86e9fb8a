"""Checkpoints to the Hugging Face Hub: ``tpp push CHECKPOINT OWNER/NAME``."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from tpp.common.command_line import Parser
from tpp.common.errors import UserError, run_command
from tpp.common.files import in_bytes
from tpp.common.hub import (
    CARD,
    CONFIG,
    MAIN,
    WEIGHTS,
    NotAskedError,
    Reference,
    check_may_write,
    check_write,
    local,
    reference,
    write,
)
from tpp.common.options import share
from tpp.common.paths import user_path


def make_parser(prog: str = "python -m tpp.push") -> Parser:
    """What the command takes."""
    parser = Parser(
        prog,
        "Write a checkpoint, its configuration and a model card to the Hugging Face Hub.",
        more="""
            The card says what was pruned and by what, size beside the dense network, and what was
            measured: of a stage's checkpoint the run's own results. The token is that of HF_TOKEN.
            A dry run asks the Hub, where it can, whether the push is refused; docs/hub.md.
        """,
        examples=[
            "runs/own/finetune/model.safetensors me/resnet50-half --private --dry-run",
            "half.safetensors me/resnet50-half --license bsd-3-clause "
            '--accuracy "75.6 top-1 on ImageNet val, measured by tpp evaluate"',
        ],
    )
    add = parser.add_argument
    add("checkpoint", type=user_path, metavar="CHECKPOINT", help="a checkpoint of tpp's")
    add("repository", metavar="OWNER/NAME", help="the repository; it is made if need be")
    add("--branch", metavar="NAME", default=MAIN, help="of the repository; made if need be")
    add("--message", metavar="TEXT", help="of the commit")
    add("--private", action="store_true", help="make a new repository nobody else's to see")
    add("--accuracy", metavar="TEXT", help="accuracy, on what, and who measured it")
    add("--pruned-by", metavar="TEXT", help="method, criterion and plan, where no run says them")
    add("--license", metavar="NAME", help="of the weights, by the Hub's name, as bsd-3-clause")
    add("--dataset", metavar="NAME", help="trained and measured on, as imagenet-1k")
    add("--base-model", metavar="NAME", help="pruned from, by the Hub's name, OWNER/NAME")
    add("--latency", type=user_path, metavar="FILE", help="what tpp latency --json wrote of it")
    share(parser, "--overwrite", " and other than these")
    share(parser, "--dry-run", ": the files, and the card; the Hub is asked whether it refuses")
    return parser


def main(arguments: Sequence[str] | None = None, prog: str = "python -m tpp.push") -> None:
    """Command-line entry point; ``prog`` is how it was called, for ``--help``."""
    options = make_parser(prog).parse_args(arguments)
    target = _target(options)
    if not options.dry_run:
        check_may_write(target)
    from tpp.checkpoints.model_file import OPTIMIZER, read_checkpoint
    from tpp.model_card import Told, card, config_json, facts_of

    path = local(options.checkpoint)
    _, companions, _ = read_checkpoint(path)  # every tensor is as its hash says
    facts = facts_of(path, options.latency)
    keys = ("accuracy", "pruned_by", "license", "dataset", "base_model", "latency")
    text = card(facts, Told(**{key: getattr(options, key) for key in keys}), target)
    files: dict[str, Path | bytes] = {
        WEIGHTS: path,
        CONFIG: config_json(facts).encode(),
        CARD: text.encode(),
    }
    if any(name.startswith(OPTIMIZER) for name in companions):
        print(f"note: {path} holds an optimiser's state too, which is written along")
    if options.license is None:
        print("note: the card names no license (--license); without one nobody else may use it")
    if options.dry_run:
        try:
            check_write(target, files, private=options.private, overwrite=options.overwrite)
        except NotAskedError as error:
            print(f"note: the Hub was not asked whether it refuses this: {error}")
        for name, data in files.items():
            size = len(data) if isinstance(data, bytes) else data.stat().st_size
            print(f"would write {target}: {name}, {in_bytes(size)}")
        print(f"\n{text}", end="")
        return
    message = options.message or f"tpp push {path.name}"
    done = write(
        target, files, message=message, private=options.private, overwrite=options.overwrite
    )
    if not done.changed:
        print(f"{done.reference}: all of it was there already")
    else:
        made = "made, and " if done.created else ""
        print(f"{made}wrote {done.reference}")
    print(done.url)


def _target(options: argparse.Namespace) -> Reference:
    target = reference(options.repository)
    if target.revision is not None:
        raise UserError(f"{options.repository}: write OWNER/NAME, and the branch as --branch NAME")
    return target._replace(revision=options.branch)


if __name__ == "__main__":
    run_command(main)
