"""Checkpoints from the Hugging Face Hub: ``tpp pull OWNER/NAME[@REVISION] --output FILE``."""

import shutil
from collections.abc import Sequence

from tpp.common.command_line import Parser
from tpp.common.errors import UserError, run_command
from tpp.common.files import aside_of, in_bytes, new_file, sync
from tpp.common.hub import WEIGHTS, fetch, reference
from tpp.common.options import share
from tpp.common.outputs import check_output


def make_parser(prog: str = "python -m tpp.pull") -> Parser:
    """What the command takes."""
    parser = Parser(
        prog,
        "Fetch a checkpoint from the Hugging Face Hub.",
        more="""
            It is kept in the Hub's cache too, and every tensor is checked. Commands take
            hf-hub:OWNER/NAME@REVISION in place of a file without this. A private repository wants
            HF_TOKEN; docs/hub.md.
        """,
        examples=[
            "me/resnet50-half --output half.safetensors",
            "me/resnet50-half@v1 --output half.safetensors",
        ],
    )
    parser.add_argument(
        "repository",
        metavar="OWNER/NAME[@REVISION]",
        help="the repository, at a branch, a tag or a commit (default: main)",
    )
    share(parser, "--output", required=True)
    share(parser, "--overwrite")
    return parser


def main(arguments: Sequence[str] | None = None, prog: str = "python -m tpp.pull") -> None:
    """Command-line entry point; ``prog`` is how it was called, for ``--help``."""
    options = make_parser(prog).parse_args(arguments)
    wanted = reference(options.repository)
    check_output(
        "--output",
        options.output,
        kind="safetensors",
        ending=".safetensors",
        overwrite=options.overwrite,
    )
    from tpp.checkpoints.model_file import find_metadata, read_checkpoint

    found = fetch(wanted)
    if found.path != found.weights or find_metadata(found.weights) is None:
        raise UserError(
            f"{found.reference}: its {WEIGHTS} is no checkpoint of tpp's; make one of it: "
            f"tpp prune {found.reference} --ratio '*=0' --output NEW.safetensors"
        )
    read_checkpoint(found.weights)
    aside = aside_of(options.output)
    try:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        mode = new_file(aside)
        shutil.copyfile(found.weights, aside)
        aside.chmod(mode)
        sync(aside)
        aside.replace(options.output)
    except OSError as error:
        raise UserError(f"--output {options.output}: cannot write it: {error.strerror}") from None
    finally:
        aside.unlink(missing_ok=True)
    size = in_bytes(options.output.stat().st_size)
    print(f"{found.reference}: {size}")
    print(f"wrote {options.output}")


if __name__ == "__main__":
    run_command(main)
