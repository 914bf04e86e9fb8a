"""Top-1, top-5 and loss over a validation set, each image counted exactly once."""

import argparse
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tpp.common.command_line import Parser
from tpp.common.errors import UserError, run_command
from tpp.common.files import write_json_option
from tpp.common.images import CROP_MODES
from tpp.common.imports import quick_imports
from tpp.common.options import (
    add_checkpoint,
    add_model,
    add_reading,
    checkpoint_of,
    reading_of,
    share,
)
from tpp.common.outputs import check_output
from tpp.common.own_code import is_own

if TYPE_CHECKING:
    from torch import nn

    from data_pipelines.images.batch import Batch
    from data_pipelines.images.image_index import ImageIndex
    from data_pipelines.loading.augment import ImageTransform
    from tpp.models.architecture import Architecture
    from train.tasks.base import Scores, Task


def make_parser(prog: str = "python -m train.evaluate") -> Parser:
    """What the command takes."""
    parser = Parser(
        prog,
        "Top-1, top-5 and loss of a checkpoint over a folder of images.",
        more="Each image is counted exactly once. Under torchrun or accelerate launch, with "
        "-m train.evaluate, every rank takes its share of them.",
        examples=[
            "half.safetensors --data /data/imagenet/val",
            "resnet50.pth --model resnet50 --data /data/imagenet/val --batch-size 256",
        ],
    )
    add_checkpoint(parser)
    share(
        parser,
        "--data",
        ", or with tars made for WebDataset; or a tar, a pattern of tars, a list of images (.csv, "
        ".txt)",
        required=True,
    )
    add_reading(parser)
    add_model(parser)
    share(parser, "--batch-size", ", of each rank", default=128)
    share(parser, "--loader", default="auto")
    share(parser, "--threads", " that decode images", default=4)
    share(parser, "--precision", default="fp32")
    share(parser, "--device", " (default: a GPU where there is one)")
    share(parser, "--json")
    share(parser, "--overwrite")
    parser.add_argument(
        "--on-error",
        choices=("fail", "skip"),
        default="fail",
        help="of images that cannot be read: end, or leave them out (default: fail)",
    )
    parser.add_argument(
        "--max-skipped",
        type=float,
        default=0.001,
        metavar="SHARE",
        help="of all images that may be left out (default: 0.001)",
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
    share(images, "--image-size", "; without --resize it is the same part of an image")
    scale = images.add_mutually_exclusive_group()
    share(scale, "--resize", "; 0: as it is")
    scale.add_argument("--crop-share", type=float, metavar="R", help="image size over resize")
    images.add_argument("--interpolation", choices=("bilinear", "bicubic"))
    images.add_argument("--crop-mode", choices=CROP_MODES, help="squash: to a square")
    images.add_argument("--mean", type=float, nargs="+", metavar="M", help="per channel, in 0..1")
    images.add_argument("--std", type=float, nargs="+", metavar="S", help="per channel")
    return parser


def main(words: Sequence[str] | None = None, prog: str = "python -m train.evaluate") -> None:
    """Evaluate a checkpoint; ``prog`` is how it was called, for ``--help``."""
    parser = make_parser(prog)
    arguments = parser.parse_args(words)
    checkpoint_of(parser, arguments)
    with quick_imports():
        from data_pipelines.images.batch import LoaderSettings
        from data_pipelines.images.source import BadImages
        from data_pipelines.loaders import eval_batches, resolve_loader
        from data_pipelines.sets.inputs import Input
        from train.cards import check_cards
        from train.data import open_for_all_ranks, test_sets
        from train.distributed.accelerator import make_accelerator
        from train.distributed.collectives import sum_over_ranks
        from train.distributed.engine import forward_pass
        from train.distributed.environment import settle_environment
        from train.distributed.ranks import settle_ranks
        from train.run_folder.log import say

    if arguments.json:
        check_output(
            "--json",
            arguments.json,
            kind="JSON",
            ending=".json",
            overwrite=arguments.overwrite,
            inputs=[arguments.checkpoint],
        )
    _settle_device(arguments.device)
    settle_ranks(os.environ)
    to_tell = settle_environment(os.environ, arguments.precision)
    to_tell += check_cards(os.environ, arguments.precision)
    accelerator = make_accelerator(arguments.precision)
    for line in to_tell:
        accelerator.print(line)
    index = open_for_all_ranks(Input(arguments.data, **reading_of(arguments)), accelerator)
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
        folders=test_sets(task, index, found.transform.crop_mode),
    )
    for path, reason in bad.take_new():
        say(f"skipped: {path} ({reason})")
    if accelerator.is_main_process:
        for folder, part in scores.folders.items():
            print(f"{folder}: {_figures(task, part)} over {part.images:,} images")
        print(
            f"{arguments.checkpoint}: {_figures(task, scores)} over {scores.images:,}"
            + (" images" if scores.images == len(index) else f" of {len(index):,} images")
        )
        if arguments.json:
            _write_json(arguments, scores, len(index))
    accelerator.end_training()


def _settle_device(device: str | None) -> None:
    import torch

    if device == "cpu":
        # For all that looks for one: loaders, Accelerate, the network.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no CUDA GPU on this machine; use cpu")


def _write_json(options: argparse.Namespace, scores: "Scores", images: int) -> None:
    """What was found, as ``results.json`` has it, and of what."""
    content = {
        "checkpoint": str(options.checkpoint),
        "data": str(options.data),
        "images_there": images,
        **scores.to_dict(),
    }
    if scores.folders:
        content["folders"] = {name: part.to_dict() for name, part in scores.folders.items()}
    write_json_option(options.json, content)


def _figures(task: "Task", scores: "Scores") -> str:
    return ", ".join(metric.say(scores.values[metric.name]) for metric in task.metrics)


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
    from tpp.checkpoints.any_file import open_network
    from tpp.checkpoints.model_file import find_metadata, load_model
    from tpp.checkpoints.sources import agreed, load_weights, read_source
    from tpp.common.hub import local
    from tpp.models.architecture import Architecture, build_model
    from tpp.models.fitting import check_logits
    from tpp.selection.configured import network_named
    from train.tasks import make_task
    from train.tasks.classification import Classification

    path, folders = local(options.checkpoint), index.classes
    info = find_metadata(path)
    named = network_named(options.model, options.image_size, options.model_args)
    names = None
    # A folder of Hugging Face, or one that training resumes from, says its network.
    said = named is None and path.is_dir() and read_source(path).architecture
    if info is not None:
        agreed(path, info.architecture, named)
        architecture = info.architecture
        task = make_task(info.extra.get("task", {"kind": Classification.kind}))
        names = _class_names(info.extra.get("classes"), architecture.num_classes)
    else:
        task = make_task({"kind": Classification.kind})
        if said:
            architecture = said
        elif named is not None:
            architecture = Architecture(named.name, len(folders))
        else:
            raise UserError(f"{path} does not say which network it holds; name it with --model")
    file, place = str(path), str(index.root)
    labels = task.labels(folders, architecture, names, options.class_order, file=file, place=place)
    prepared = info.preprocessing if info is not None else None
    transform, assumed = _transform(options, prepared, architecture, path)
    left_out: tuple[str, ...] = ()
    if info is not None:
        model = load_model(path).float()
    elif said:
        opened = open_network(path)
        model, left_out = opened.model.float(), tuple(opened.notes)
    else:
        model = build_model(architecture.name, architecture.num_classes)
        left_out = load_weights(model, path)
        if is_own(architecture.name):
            check_logits(model)
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
