"""The stage that removes filters from a checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tpp.checkpoints.model_file import (
    load_model,
    network_of,
    read_checkpoint,
    read_companion,
    read_metadata,
    save_model,
    save_tensors,
)
from tpp.masks import COMPANION, norm_of
from tpp.measure.counts import count
from tpp.models.layers import filters_removed, layer_widths, prunable_layers
from tpp.models.recalibration import RECALIBRATED, with_statistics
from tpp.plan import PruningPlan
from train.config.sections import MODEL_FILE
from train.distributed.collectives import from_main_rank
from train.run import Run
from train.run_folder.calibration import recalibrate_network
from train.run_folder.log import say
from train.run_folder.networks import companion_of_input, file_of_input, load_input
from train.run_folder.plans import choose_plan


def prune_stage(run: Run, name: str) -> dict[str, Any]:
    """Remove the planned filters from the input checkpoint.

    Without images, a GPU or other ranks, unless the criterion or ``recalibrate`` needs them.
    """
    stage, folder = run.config.stages[name], run.stage_folder(name)
    output = folder / MODEL_FILE
    method = run.config.stage_method(name)
    if run.is_main:
        folder.mkdir(parents=True, exist_ok=True)
    model = load_input(run, stage.input)
    mask = companion_of_input(run, stage, COMPANION)
    plan = choose_plan(run, name, model, method)
    assert plan is not None
    widths = layer_widths(model)
    removed_before = filters_removed(model, plan)
    if removed_before:  # the stage that drove them to zero did it, and nothing is left to do
        plan = PruningPlan.from_indices({layer: widths[layer][1] for layer in plan.filters}, {})

    def remove() -> float:
        """Write the checkpoint; the norm of what is left of the weights."""
        if removed_before:
            say(f"{name}: stage {stage.input!r} has removed the filters already")
        method.remove(file_of_input(run, name, model), plan, output)
        pruned = load_model(output)
        left = norm_of(pruned.parameters())
        if method.after_removal(pruned, run.config.seed):
            save_model(output, pruned, extra=read_metadata(output).extra)
        return left

    norm_after = from_main_rank(run.accelerator, remove)
    if stage.recalibrate is not None:
        _recalibrate(run, name, stage.recalibrate, output)
    pruned = network_of(read_metadata(output), source=str(output))
    left = read_companion(output, COMPANION)
    layers = prunable_layers(model)
    removed = [
        layers[layer].weight.detach()[plan.pruned[layer]].abs().max().item()
        for layer in plan.active_layers
    ]
    return {
        **{metric.name: None for metric in run.task.metrics},
        **run.count_fields(count(pruned), left),
        "removed_share": 1 - _weights_of(pruned, left) / _weights_of(model, mask),
        "norm_before": norm_of(model.parameters()),
        "norm_after": norm_after,
        "removed_magnitude": max(removed, default=0.0),
        **({RECALIBRATED: stage.recalibrate} if stage.recalibrate is not None else {}),
    }


def _recalibrate(run: Run, name: str, batches: int, output: Path) -> None:
    """Give the pruned checkpoint running statistics of its own; its companions stay."""
    found = recalibrate_network(run, name, load_model(output), batches)

    def write() -> None:
        tensors, companions, info = read_checkpoint(output)
        save_tensors(
            output,
            with_statistics(tensors, found),
            network_of(info, source=str(output)),
            preprocessing=info.preprocessing,
            extra={**info.extra, RECALIBRATED: batches},
            companions=companions,
        )
        say(f"{name}: BatchNorm's running statistics are of {batches} batches of training images")

    from_main_rank(run.accelerator, write)


def _weights_of(model: nn.Module, mask: Mapping[str, Tensor]) -> int:
    """How many weights of Conv2d and Linear layers are not masked."""
    weights = {f"{name}.weight": layer.weight for name, layer in prunable_layers(model).items()}
    return sum(
        int(mask[key].bool().sum()) if key in mask else weight.numel()
        for key, weight in weights.items()
    )
