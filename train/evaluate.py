"""Top-1, top-5 and loss over a validation set, each image counted exactly once."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from tpp.common.errors import UserError, run_command

if TYPE_CHECKING:
    from torch import nn

    from data_pipelines.images.image_index import ImageIndex
    from data_pipelines.loading.augment import ImageTransform
    from train.tasks.base import Task


def main() -> None:
    """Evaluate a checkpoint from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m train.evaluate",
        description="Top-1, top-5 and loss of a checkpoint over a folder of class folders; "
        "under torchrun or accelerate launch every rank takes its share of the images.",
    )
    parser.add_argument("--checkpoint", required=True, help="ours, .safetensors, .pth or .th")
    parser.add_argument("--data", required=True, help="folder of class folders")
    parser.add_argument("--model", help="architecture, for a checkpoint that does not say")
    parser.add_argument("--batch-size", type=int, default=128, help="per rank (default: 128)")
    parser.add_argument("--loader", default="auto", help="auto, dali or torchvision")
    parser.add_argument("--threads", type=int, default=4, help="decoding threads (default: 4)")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument(
        "--on-error",
        choices=("fail", "skip"),
        default="fail",
        help="leave out images that cannot be read",
    )
    parser.add_argument(
        "--max-skipped", type=float, default=0.001, help="share that may be (default: 0.001)"
    )
    arguments = parser.parse_args()
    for name in ("batch_size", "threads"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")

    from data_pipelines.images.batch import LoaderSettings
    from data_pipelines.images.source import BadImages
    from data_pipelines.loaders import eval_batches, resolve_loader
    from train.data import open_for_all_ranks
    from train.distributed.accelerator import make_accelerator
    from train.distributed.collectives import sum_over_ranks
    from train.distributed.engine import forward_pass
    from train.distributed.environment import settle_environment
    from train.distributed.ranks import settle_ranks
    from train.run_folder.log import say

    settle_ranks(os.environ)
    to_tell = settle_environment(os.environ, arguments.precision)
    accelerator = make_accelerator(arguments.precision)
    for line in to_tell:
        accelerator.print(line)
    index = open_for_all_ranks(Path(arguments.data), None, accelerator)
    model, transform, task = _load(Path(arguments.checkpoint), arguments.model, index)
    loader = resolve_loader(arguments.loader)
    bad = BadImages(
        index,
        on_error=arguments.on_error,
        limit=arguments.max_skipped,
        world_size=accelerator.num_processes,
    )
    scores = task.evaluate(
        forward_pass(model.to(accelerator.device).eval(), accelerator),
        eval_batches(
            index,
            transform,
            arguments.batch_size,
            LoaderSettings(
                loader=loader,
                threads=arguments.threads,
                device=accelerator.device,
                rank=accelerator.process_index,
                world_size=accelerator.num_processes,
            ),
            bad=bad,
        ),
        device=accelerator.device,
        over_ranks=sum_over_ranks,
    )
    for path, reason in bad.take_new():
        say(f"skipped: {path} ({reason})")
    if accelerator.is_main_process:
        found = ", ".join(metric.say(scores.values[metric.name]) for metric in task.metrics)
        print(
            f"{arguments.checkpoint}: {found} over {scores.images:,}"
            + (" images" if scores.images == len(index) else f" of {len(index):,} images")
        )
    accelerator.end_training()


def _load(
    path: Path, name: str | None, index: "ImageIndex"
) -> "tuple[nn.Module, ImageTransform, Task]":
    """The network, how images are prepared for it, and what it was trained for."""
    from data_pipelines.loading.augment import ImageTransform
    from tpp.checkpoints.model_file import find_metadata, load_model
    from tpp.checkpoints.sources import load_weights
    from tpp.models.architecture import build_model, input_shape
    from train.tasks import make_task
    from train.tasks.classification import Classification

    info = find_metadata(path)
    classes = len(index.classes)
    if info is not None:
        model = load_model(path)
        task = make_task(info.extra.get("task", {"kind": Classification.kind}))
        task.check_images(info.architecture, classes, str(path), str(index.root))
        prepared = info.preprocessing or {}
    elif name is None:
        raise UserError(f"{path} does not say which network it holds; name it with --model")
    else:
        task = make_task({"kind": Classification.kind})
        model = build_model(name, classes)
        load_weights(model, path)
        channels, size, _ = input_shape(name)
        # What torchvision's and the CIFAR networks' public weights were trained with.
        prepared = {
            "image_size": size,
            "resize": 256 if size == 224 else None,
            "mean": (0.485, 0.456, 0.406)[:channels],
            "std": (0.229, 0.224, 0.225)[:channels],
            "channels": channels,
        }
    try:
        return model, ImageTransform.prepared(prepared, augmentation="none"), task
    except TypeError:
        raise UserError(f"{path} does not say how images are prepared for it") from None


if __name__ == "__main__":
    run_command(main)
