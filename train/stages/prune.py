"""The stage that removes filters from a checkpoint."""

from typing import Any

from tpp.checkpoints.model_file import (
    load_model,
    network_of,
    read_checkpoint,
    read_metadata,
    save_model,
)
from tpp.masks import COMPANION
from tpp.measure.counts import count
from tpp.models.layers import filters_removed, layer_widths, prunable_layers
from tpp.plan import PruningPlan
from train.config.sections import MODEL_FILE
from train.run import Run
from train.run_folder.log import say
from train.run_folder.networks import load_input, save_network
from train.run_folder.plans import choose_plan


def prune_stage(run: Run, name: str) -> dict[str, Any]:
    """Remove the planned filters from the input checkpoint: no data, no GPU, one rank."""
    stage, folder = run.config.stages[name], run.stage_folder(name)
    output = folder / MODEL_FILE
    method = run.config.stage_method(name)
    if run.is_main:
        folder.mkdir(parents=True, exist_ok=True)
    model = load_input(run, stage.input)
    plan = choose_plan(run, name, model, method)
    assert plan is not None
    widths = layer_widths(model)
    removed_before = filters_removed(model, plan)
    if removed_before:  # the stage that drove them to zero did it, and nothing is left to do
        plan = PruningPlan.from_indices({layer: widths[layer][1] for layer in plan.filters}, {})
    if run.is_main:
        if removed_before:
            say(f"{name}: stage {stage.input!r} has removed the filters already")
        if stage.input is not None:
            source = run.stage_folder(stage.input) / MODEL_FILE
        else:  # straight from the starting weights, whatever kind of file they came in
            source = folder / "dense.safetensors"
            save_network(run, name, source, model, None)
        method.remove(source, plan, output)
        pruned = load_model(output)
        if method.after_removal(pruned, run.config.seed):
            save_model(output, pruned, extra=read_metadata(output).extra)
    run.accelerator.wait_for_everyone()
    _, companions, info = read_checkpoint(output)
    layers = prunable_layers(model)
    removed = [
        layers[layer].weight.detach()[plan.pruned[layer]].abs().max().item()
        for layer in plan.active_layers
    ]
    return {
        **{metric.name: None for metric in run.task.metrics},
        **run.count_fields(
            count(network_of(info, source=str(output))), companions.get(COMPANION, {})
        ),
        "removed_magnitude": max(removed, default=0.0),
    }
