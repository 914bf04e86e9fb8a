"""What is left of a network's accuracy when filters go by each criterion, before any finetuning.

    python -m benchmarks.criteria FILE --model NAME --data DIR --val DIR
        [--speedups 1.5,2] [--images N] [--batches N] [--output FILE]

Filters are removed once, by a budget of multiply-accumulates, and the network is evaluated as it is
and with BatchNorm's running statistics estimated anew on training images. All criteria and all
evaluations see the same images. The random numbers are of seed 0. Results go to
benchmarks/results/criteria.json.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from tpp.channels.removal import prune_model
from tpp.checkpoints.any_file import open_network
from tpp.class_folders import ClassFolders
from tpp.common.command_line import Parser
from tpp.common.errors import run_command
from tpp.common.files import write_json_option
from tpp.common.options import add_checkpoint, add_model, checkpoint_of, share
from tpp.common.paths import user_path
from tpp.measure.counts import count
from tpp.models.architecture import architecture_of, set_preprocessing
from tpp.models.preparation import find_preparation
from tpp.models.recalibration import recalibrate
from tpp.selection.budget import Budget
from tpp.selection.configured import network_named
from tpp.selection.criteria import CRITERIA
from tpp.selection.selection import Selection

RESULTS = Path(__file__).parent / "results" / "criteria.json"
_BATCH = 100


def _options() -> argparse.Namespace:
    parser = Parser.of_script(
        "python -m benchmarks.criteria",
        __doc__,
        ["resnet56.th --model cifar_resnet56 --data /data/cifar10/train --val /data/cifar10/test"],
    )
    add_checkpoint(parser)
    add_model(parser)
    share(parser, "--data", ", to find statistics on", required=True)
    add = parser.add_argument
    add("--val", metavar="DIR", type=user_path, required=True, help="images to evaluate on")
    add("--speedups", default="1.5,2", metavar="X,X", help="in MACs (default: 1.5,2)")
    add("--images", type=int, default=2000, metavar="N", help="to evaluate on (default: 2000)")
    add(
        "--batches",
        type=int,
        default=10,
        metavar="N",
        help=f"of {_BATCH} training images (default: 10)",
    )
    share(parser, "--output", default=RESULTS)
    options = parser.parse_args()
    checkpoint_of(parser, options)
    return options


def main() -> None:
    """Measure, print and write."""
    options = _options()
    named = network_named(options.model, args=options.model_args)
    dense = open_network(options.checkpoint, named).model.float()
    architecture = architecture_of(dense)
    assert architecture is not None and architecture.num_classes is not None
    values = find_preparation(
        getattr(dense, "preprocessing", None), architecture, str(options.checkpoint)
    ).values
    set_preprocessing(dense, values)
    folders = {
        name: ClassFolders(
            folder,
            values,
            outputs=architecture.num_classes,
            names=None,
            file=str(options.checkpoint),
            batch_size=_BATCH,
            seed=0,
        )
        for name, folder in (("train", options.data), ("val", options.val))
    }
    validation = [*folders["val"](max(1, options.images // _BATCH))]
    training = [*folders["train"](options.batches)]
    rows: list[dict[str, Any]] = [{"criterion": None, "top1": _top1(dense, validation)}]
    for speedup in map(float, options.speedups.split(",")):
        for criterion in CRITERIA:
            plan = Selection(
                criterion=criterion,
                budget=Budget("speedup", speedup),
                batches=options.batches,
                gradients=folders["train"].gradients,
            ).select(dense)
            pruned = prune_model(dense, plan)
            row = {
                "criterion": criterion,
                "speedup": count(dense).macs / count(pruned).macs,
                "top1": _top1(pruned, validation),
            }
            recalibrate(pruned, (images for images, _ in training))
            row["recalibrated_top1"] = _top1(pruned, validation)
            rows.append(row)
            print(row, file=sys.stderr)
    _print(rows)
    settings = {
        "network": architecture.name,
        "images": sum(len(labels) for _, labels in validation),
        "training_images": sum(len(labels) for _, labels in training),
        "torch": torch.__version__,
    }
    write_json_option(options.output, {"settings": settings, "results": rows})


@torch.no_grad()
def _top1(network: nn.Module, batches: list[Any]) -> float:
    network.eval()
    right = sum(int((network(images).argmax(1) == labels).sum()) for images, labels in batches)
    return 100 * right / sum(len(labels) for _, labels in batches)


def _print(rows: list[dict[str, Any]]) -> None:
    table = Table(box=None, title="top-1 % without finetuning", title_justify="left")
    for heading in ("criterion", "speedup", "removed", "recalibrated"):
        table.add_column(heading, justify="left" if heading == "criterion" else "right")
    for row in rows:
        speedup = row.get("speedup")
        table.add_row(
            row["criterion"] or "dense",
            "" if speedup is None else f"{speedup:.2f}x",
            f"{row['top1']:.2f}",
            f"{row['recalibrated_top1']:.2f}" if "recalibrated_top1" in row else "",
        )
    Console().print(table)


if __name__ == "__main__":
    run_command(main)
