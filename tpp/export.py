"""Networks for serving: ``tpp export CHECKPOINT --output FILE.onnx`` (or FILE.pt2)."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tpp.common.command_line import Parser
from tpp.common.errors import run_command
from tpp.common.options import add_checkpoint, add_model, checkpoint_of, share
from tpp.common.outputs import check_output

if TYPE_CHECKING:
    from tpp.checkpoints.export_file import Exported

_KINDS = {".onnx": "ONNX", ".pt2": "an exported program"}


def make_parser(prog: str = "python -m tpp.export") -> Parser:
    """What the command takes."""
    parser = Parser(
        prog,
        "Write a checkpoint, pruned or not, as a file for serving programs.",
        more="The file is run on random images beside the network before it is written.",
        examples=["half.safetensors --output half.onnx", "half.safetensors --output half.pt2"],
    )
    add_checkpoint(parser)
    share(parser, "--output", ": FILE.onnx for ONNX, FILE.pt2 for torch.export", required=True)
    add_model(parser)
    share(parser, "--overwrite")
    share(parser, "--batch-size", " (default: any number)")
    share(parser, "--image-size", " (default: what the checkpoint says)")
    parser.add_argument("--opset", type=int, metavar="N", help="version of the ONNX operators")
    parser.add_argument(
        "--no-check",
        action="store_true",
        help="do not run the file on random images beside the network",
    )
    parser.renamed("--batch", "--batch-size")
    return parser


def _say(source: str, exported: "Exported") -> None:
    size = exported.path.stat().st_size / 1e6
    kind = f"ONNX opset {exported.opset}" if exported.opset else "PyTorch exported program"
    shape = "x".join(map(str, (exported.batch or "N", *exported.image_shape)))
    print(f"{source}: {kind}, images {shape} float32, {size:.1f} MB")
    if exported.difference is None:
        print("not checked against the network")
    else:
        runtime = "onnxruntime" if exported.opset else "PyTorch, loaded back"
        what = f"{exported.output} off by {exported.difference:.1e} of the largest"
        print(f"checked in {runtime}: {what}")
    print(f"wrote {exported.path}")


def _check_output(options: argparse.Namespace) -> None:
    ending = Path(options.output).suffix
    if ending in _KINDS:  # of others export_model says which there are
        check_output(
            "--output",
            options.output,
            kind=_KINDS[ending],
            ending=ending,
            overwrite=options.overwrite,
            inputs=[options.checkpoint],
        )


def main(arguments: Sequence[str] | None = None, prog: str = "python -m tpp.export") -> None:
    """Command-line entry point; ``prog`` is how it was called, for ``--help``."""
    parser = make_parser(prog)
    options = parser.parse_args(arguments)
    checkpoint_of(parser, options)
    _check_output(options)
    from tpp.checkpoints.export_file import export_model
    from tpp.selection.configured import network_named

    exported = export_model(
        options.checkpoint,
        options.output,
        architecture=network_named(options.model, options.image_size, options.model_args),
        batch=options.batch_size,
        opset=options.opset,
        check=not options.no_check,
        image_size=options.image_size,
    )
    _say(options.checkpoint, exported)


if __name__ == "__main__":
    run_command(main)
