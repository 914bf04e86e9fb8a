"""Finding a user's mistakes before anything is loaded, downloaded or trained."""

from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from data_pipelines.demo import generate_demo
from data_pipelines.index import ImageIndex, scan_class_folders
from data_pipelines.loaders import resolve_loader
from tpp.errors import UserError
from tpp.models import Architecture, build_on_meta
from tpp.plan import PruningPlan
from tpp.selection import prunable_layers, select_filters
from train.config import Config
from train.distributed import check_batch_size
from train.weights import starting_weights_exist


@dataclass(frozen=True)
class Preflight:
    """What was found out about a configuration before anything is loaded."""

    train_index: ImageIndex
    val_index: ImageIndex
    architecture: Architecture


def preflight(config: Config, accelerator: Accelerator) -> Preflight:
    """Find a user's mistakes before anything is loaded, downloaded or written.

    Raises:
        UserError: the batch cannot be shared evenly, no class folders, a pattern that matches no
            layer or one whose filters cannot be removed, a schedule too short to zero every
            layer out, a missing checkpoint or loader.
    """
    check_batch_size(config.training, accelerator.num_processes)
    resolve_loader(config.data.loader)
    starting_weights_exist(config.model)
    if config.data.demo:
        demo = config.data.demo
        with accelerator.local_main_process_first():  # the others find it there
            generate_demo(
                Path(config.data.root),
                classes=demo.classes,
                train_per_class=demo.train_per_class,
                val_per_class=demo.val_per_class,
                image_size=config.data.image_size,
                seed=demo.seed,
            )
    root = Path(config.data.root)
    train_index = scan_class_folders(root / config.data.train)
    val_index = scan_class_folders(root / config.data.val)
    if train_index.classes != val_index.classes:
        odd = sorted(set(train_index.classes) ^ set(val_index.classes))[0]
        raise UserError(
            f"data.root: {root}: class folder {odd!r} is in only one of "
            f"{config.data.train!r} and {config.data.val!r}"
        )
    classes = len(train_index.classes)
    if config.model.num_classes not in (None, classes):
        raise UserError(
            f"model.num_classes is {config.model.num_classes}, but {root / config.data.train} "
            f"holds {classes} class folders"
        )
    architecture = Architecture(config.model.name, classes, config.model.args)
    check_plans(config, architecture)
    return Preflight(train_index, val_index, architecture)


def check_plans(config: Config, architecture: Architecture) -> PruningPlan | None:
    """Check ratios and schedules against the architecture; returns the plan's widths.

    The indices in the plan are stand-ins: which filters go is decided from the weights.
    """
    model = build_on_meta(architecture)
    plan = None
    for name, stage in config.stages.items():
        if stage.kind in ("regularize", "prune"):
            plan = plan or stand_in_plan(model, config.pruning.ratios)
            if stage.kind == "regularize":
                config.stage_method(name).check(model, plan)
    return plan


def stand_in_plan(model: nn.Module, ratios: dict[str, float]) -> PruningPlan:
    """A plan with the right number of filters per layer, the last ones for want of weights."""
    layers = prunable_layers(model)
    last_go = {name: -torch.arange(len(layer.weight)) for name, layer in layers.items()}
    return select_filters(model, ratios, scores=last_go)
