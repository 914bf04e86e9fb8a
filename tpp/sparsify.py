"""Masking weights of a checkpoint: ``tpp sparsify`` needs neither data nor a GPU."""

from collections.abc import Sequence

from tpp.common.command_line import Parser
from tpp.common.errors import UserError, run_command
from tpp.common.imports import quick_imports
from tpp.common.options import add_checkpoint, add_model, checkpoint_of, share
from tpp.common.outputs import check_output


def make_parser(prog: str = "python -m tpp.sparsify") -> Parser:
    """What the command takes."""
    parser = Parser(
        prog,
        "Set the smallest weights of a checkpoint to zero, and keep a mask.",
        more="Shapes stay as they are; training and tpp prune keep to the mask of the weights "
        "that stay. Needs neither data nor a GPU.",
        examples=[
            "dense.safetensors --output masked.safetensors --sparsity 0.9",
            "dense.safetensors --output masked.safetensors --pattern 2:4 --skip conv1",
        ],
    )
    add_checkpoint(parser, "; a mask that it has is kept to")
    share(parser, "--output", ": the masked checkpoint (safetensors)", required=True)
    add_model(parser)
    share(parser, "--overwrite")
    many = parser.add_argument_group("how much goes (one of these)").add_mutually_exclusive_group(
        required=True
    )
    add = many.add_argument
    add(
        "--sparsity",
        type=float,
        metavar="S",
        help="the share of all these weights that is zero in the end, as 0.9",
    )
    add(
        "--fraction",
        type=float,
        metavar="P",
        help="the share that goes of the weights that are not masked yet",
    )
    add(
        "--pattern",
        metavar="N:M",
        help="N of M weights in a row along the input channels stay, as 2:4",
    )
    which = parser.add_argument_group("which weights")
    which.add_argument(
        "--scope",
        default="global",
        choices=("global", "layer"),
        help="the smallest of all layers together, or the same share of each (default: global)",
    )
    which.add_argument(
        "--layers",
        action="append",
        metavar="PATTERN",
        help="only these layers; may be repeated (default: all)",
    )
    share(which, "--skip", action="append")
    return parser


def main(arguments: Sequence[str] | None = None, prog: str = "python -m tpp.sparsify") -> None:
    """Command-line entry point; ``prog`` is how it was called, for ``--help``."""
    parser = make_parser(prog)
    options = parser.parse_args(arguments)
    checkpoint_of(parser, options)
    check_output(
        "--output",
        options.output,
        kind="safetensors",
        ending=".safetensors",
        overwrite=options.overwrite,
        inputs=[options.checkpoint],
    )
    with quick_imports():
        from pydantic import ValidationError

        from tpp.checkpoints.sparsify_file import sparsify_checkpoint
        from tpp.common.settings import mistakes
        from tpp.masks import SparsifySection
        from tpp.selection.configured import network_named
    try:
        settings = SparsifySection(
            sparsity=options.sparsity,
            fraction=options.fraction,
            pattern=options.pattern,
            scope=options.scope,
            **({"layers": options.layers} if options.layers else {}),
            skip=options.skip or [],
        )
    except ValidationError as error:
        raise UserError(f"--{mistakes(error, SparsifySection)[0]}") from None
    named = network_named(options.model, args=options.model_args)
    found = sparsify_checkpoint(options.checkpoint, settings, options.output, architecture=named)
    left, counts = found.sparsity, found.counts
    print(
        f"{found.network}: {counts.parameters:,} -> {left.parameters:,} parameters that are not "
        f"masked, {counts.macs:,} -> {left.macs:,} MACs with them; {left.sparsity:.4%} of the "
        "weights of masked layers are zero"
    )
    for note in found.notes:
        print(f"note: {note}")
    print(f"wrote {options.output}")


if __name__ == "__main__":
    run_command(main)
