"""Networks for serving: ``python -m tpp.export CHECKPOINT --output FILE.onnx`` (or FILE.pt2)."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tpp.common.errors import run_command
from tpp.common.outputs import check_output
from tpp.common.paths import user_path

if TYPE_CHECKING:
    from tpp.checkpoints.export_file import Exported

_KINDS = {".onnx": "ONNX", ".pt2": "an exported program"}


def _parse_arguments(arguments: Sequence[str] | None, prog: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Write a checkpoint, pruned or not, as a file for serving programs.",
    )
    parser.add_argument(
        "checkpoint", type=user_path, metavar="CHECKPOINT", help="a file that tpp wrote"
    )
    parser.add_argument(
        "--output",
        type=user_path,
        required=True,
        metavar="FILE",
        help="FILE.onnx (ONNX) or FILE.pt2 (torch.export)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it is there")
    parser.add_argument("--batch", type=int, metavar="N", help="images per call (default: any)")
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="N",
        help="side of the images, in pixels (default: what the checkpoint says)",
    )
    parser.add_argument("--opset", type=int, metavar="N", help="version of the ONNX operators")
    parser.add_argument(
        "--no-check",
        action="store_true",
        help="do not run the file on random images beside the network",
    )
    return parser.parse_args(arguments)


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
    options = _parse_arguments(arguments, prog)
    _check_output(options)
    from tpp.checkpoints.export_file import export_model

    exported = export_model(
        options.checkpoint,
        options.output,
        batch=options.batch,
        opset=options.opset,
        check=not options.no_check,
        image_size=options.image_size,
    )
    _say(options.checkpoint, exported)


if __name__ == "__main__":
    run_command(main)
