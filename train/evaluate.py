"""Top-1, top-5 and loss over a validation set, each image counted exactly once."""

import argparse
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tpp.common.errors import UserError, run_command
from tpp.common.images import CROP_MODES
from tpp.common.imports import quick_imports
from tpp.common.paths import user_path

if TYPE_CHECKING:
    from torch import nn

    from data_pipelines.images.batch import Batch
    from data_pipelines.images.image_index import ImageIndex
    from data_pipelines.loading.augment import ImageTransform
    from tpp.models.architecture import Architecture
    from train.tasks.base import Task


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m train.evaluate",
        description="Top-1, top-5 and loss of a checkpoint over a folder of class folders; "
        "under torchrun or accelerate launch every rank takes its share of the images.",
    )
    parser.add_argument(
        "--checkpoint", type=user_path, required=True, help="ours, .safetensors, .pth or .th"
    )
    parser.add_argument("--data", type=user_path, required=True, help="folder of class folders")
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
    parser.add_argument(
        "--class-order",
        choices=("names", "text", "numbers"),
        help="names: class folders are found by name; text, numbers: the class folders, sorted "
        "so, are the classes in order, whatever they are called (default: names, where the "
        "checkpoint has them)",
    )
    images = parser.add_argument_group(
        "how images are prepared",
        "what is not given is as the checkpoint says, or as timm's or torchvision's weights of "
        "that network want it",
    )
    images.add_argument(
        "--image-size",
        type=int,
        metavar="N",
        help="side of the square that the network sees; without --resize it is the same part of "
        "an image",
    )
    scale = images.add_mutually_exclusive_group()
    scale.add_argument(
        "--resize", type=int, metavar="N", help="shorter side before the crop; 0: as it is"
    )
    scale.add_argument("--crop-share", type=float, metavar="R", help="image size over resize")
    images.add_argument("--interpolation", choices=("bilinear", "bicubic"))
    images.add_argument("--crop-mode", choices=CROP_MODES, help="squash: to a square")
    images.add_argument("--mean", type=float, nargs="+", metavar="M", help="per channel, in 0..1")
    images.add_argument("--std", type=float, nargs="+", metavar="S", help="per channel")
    arguments = parser.parse_args()
    for name in ("batch_size", "threads"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")
    return arguments


def main() -> None:
    """Evaluate a checkpoint from the command line."""
    arguments = _parse_arguments()
    with quick_imports():
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
    index = open_for_all_ranks(arguments.data, None, accelerator)
    found = _load(arguments, index)
    if accelerator.is_main_process:
        for note in found.notes:
            say(note)
    task = found.task
    loader = resolve_loader(arguments.loader)
    bad = BadImages(
        index,
        on_error=arguments.on_error,
        limit=arguments.max_skipped,
        world_size=accelerator.num_processes,
    )
    batches = eval_batches(
        index,
        found.transform,
        arguments.batch_size,
        LoaderSettings(
            loader=loader,
            threads=arguments.threads,
            device=accelerator.device,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
        ),
        bad=bad,
    )
    scores = task.evaluate(
        forward_pass(found.model.to(accelerator.device).eval(), accelerator),
        _relabelled(batches, found.outputs),
        device=accelerator.device,
        over_ranks=sum_over_ranks,
    )
    for path, reason in bad.take_new():
        say(f"skipped: {path} ({reason})")
    if accelerator.is_main_process:
        figures = ", ".join(metric.say(scores.values[metric.name]) for metric in task.metrics)
        print(
            f"{arguments.checkpoint}: {figures} over {scores.images:,}"
            + (" images" if scores.images == len(index) else f" of {len(index):,} images")
        )
    accelerator.end_training()


class _Loaded(NamedTuple):
    """A network and what it is evaluated with.

    Attributes:
        model: on the CPU, in float32.
        transform: how images are prepared for it.
        task: what it was trained for.
        outputs: of each class folder, in their order; None where there are no classes.
        notes: what was assumed.
    """

    model: "nn.Module"
    transform: "ImageTransform"
    task: "Task"
    outputs: list[int] | None
    notes: list[str]


def _load(options: argparse.Namespace, index: "ImageIndex") -> _Loaded:
    from tpp.checkpoints.model_file import find_metadata, load_model
    from tpp.checkpoints.sources import load_weights
    from tpp.models.architecture import Architecture, build_model
    from train.tasks import make_task
    from train.tasks.classification import Classification

    path, folders = Path(options.checkpoint), index.classes
    info = find_metadata(path)
    names = None
    if info is not None:
        architecture = info.architecture
        task = make_task(info.extra.get("task", {"kind": Classification.kind}))
        names = _class_names(info.extra.get("classes"), architecture.num_classes)
    elif options.model is None:
        raise UserError(f"{path} does not say which network it holds; name it with --model")
    else:
        task = make_task({"kind": Classification.kind})
        architecture = Architecture(options.model, len(folders))
    file, place = str(path), str(index.root)
    labels = task.labels(folders, architecture, names, options.class_order, file=file, place=place)
    prepared = info.preprocessing if info is not None else None
    transform, assumed = _transform(options, prepared, architecture, path)
    left_out: tuple[str, ...] = ()
    if info is not None:
        model = load_model(path).float()
    else:
        model = build_model(architecture.name, architecture.num_classes)
        left_out = load_weights(model, path)
    notes = [note for note in (*left_out, assumed, labels and labels.note) if note]
    return _Loaded(model, transform, task, labels and labels.outputs, notes)


def _class_names(said: Any, outputs: int | None) -> list[str] | None:
    """The names of a network's outputs, if a file has them: its classifier may be another one."""
    known = isinstance(said, list) and all(isinstance(name, str) for name in said)
    return said if known and len(said) == outputs else None


def _transform(
    options: argparse.Namespace,
    prepared: dict[str, Any] | None,
    architecture: "Architecture",
    path: Path,
) -> "tuple[ImageTransform, str | None]":
    """How images are prepared, and a line that says what of it was assumed or changed."""
    from data_pipelines.loading.augment import ImageTransform
    from tpp.models.preparation import find_preparation

    keys = ("image_size", "resize", "crop_share", "interpolation", "crop_mode", "mean", "std")
    options_given = {key: getattr(options, key) for key in keys}
    try:
        found = find_preparation(prepared, architecture, path.name).changed(**options_given)
        transform = ImageTransform.prepared(found.values, augmentation="none")
    except (TypeError, ValueError):  # a file of unknown origin may say anything
        raise UserError(f"{path}: what it says of how images are prepared is damaged") from None
    return transform, f"images {found}" if found.source else None


def _relabelled(batches: "Iterable[Batch]", outputs: list[int] | None) -> "Iterator[Batch]":
    """Batches whose labels are places among a network's outputs instead of the folders'."""
    import torch

    table = None
    for images, labels in batches:
        if outputs is not None:
            table = torch.tensor(outputs, device=labels.device) if table is None else table
            labels = table[labels]
        yield images, labels


if __name__ == "__main__":
    run_command(main)
