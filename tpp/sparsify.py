"""Masking weights of a checkpoint: ``python -m tpp.sparsify`` needs neither data nor a GPU."""

import argparse
from collections.abc import Sequence

from tpp.common.errors import UserError, run_command
from tpp.common.imports import quick_imports
from tpp.common.outputs import check_output
from tpp.common.paths import user_path


def _parse_arguments(arguments: Sequence[str] | None, prog: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Set the smallest weights of a checkpoint to zero, and keep a mask of those "
        "that stay. Shapes stay as they are; training and tpp.prune keep to the mask. Needs "
        "neither data nor a GPU.",
    )
    add = parser.add_argument
    add(
        "--checkpoint",
        type=user_path,
        required=True,
        metavar="IN",
        help="as of tpp.prune; a mask that it has is kept to",
    )
    add(
        "--output",
        type=user_path,
        required=True,
        metavar="OUT",
        help="the masked checkpoint (safetensors)",
    )
    add("--model", metavar="NAME", help="the network, where IN does not say it")
    add("--overwrite", action="store_true", help="replace OUT if it is there")
    many = parser.add_mutually_exclusive_group(required=True)
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
    which = parser.add_argument_group("which")
    add = which.add_argument
    add(
        "--scope",
        default="global",
        choices=("global", "layer"),
        help="the smallest of all layers together, or the same share of each (default: global)",
    )
    add("--layers", action="append", metavar="PATTERN", help="only these layers (default: all)")
    add("--skip", action="append", metavar="PATTERN", help="leave these layers alone")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None, prog: str = "python -m tpp.sparsify") -> None:
    """Command-line entry point; ``prog`` is how it was called, for ``--help``."""
    options = _parse_arguments(arguments, prog)
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
    named = network_named(options.model) if options.model else None
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
