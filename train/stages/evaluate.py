"""The stage that evaluates a network."""

from typing import Any

from torch import nn

from tpp.masks import COMPANION
from tpp.measure.counts import count
from tpp.models.architecture import set_preprocessing
from train.data import preprocessing_at, smaller_sizes, test_sets
from train.run import LEFT, Run, say_bad_images
from train.run_folder.log import say
from train.run_folder.networks import companion_of_input, evaluate_network, load_input, place


def evaluate_stage(run: Run, name: str) -> dict[str, Any]:
    """Evaluate the network of the input's checkpoint, at smaller image sizes too if asked."""
    stage = run.config.stages[name]
    model = place(run, load_input(run, stage.input))
    folders = test_sets(run.task, run.data.val.index, run.config.data.crop_mode)
    scores = evaluate_network(run, model, folders=folders)
    # What the stage that made it said of its sparsity: of a network of sparse factors its file
    # has the dense product alone.
    made_by = run.done.get(stage.input or "", {})
    results = {
        **scores.to_dict(),
        **{key: made_by[key] for key in LEFT if key in made_by},
        **run.count_fields(count(model), companion_of_input(run, stage, COMPANION)),
    }
    if scores.folders:
        results["folders"] = [
            {"folder": folder, **found.to_dict()} for folder, found in scores.folders.items()
        ]
        if run.is_main:
            for folder, found in scores.folders.items():
                say(f"{name}: {folder}: {run.task.say(found.values)} over {found.images:,} images")
    smaller, others = smaller_sizes(run.config, name)
    if others and run.is_main:
        say(
            f"{name}: image_sizes {', '.join(map(str, others))} left out: not smaller than "
            f"data.image_size={run.config.data.image_size}"
        )
    sizes = [_at_size(run, name, model, size) for size in smaller]
    if sizes:
        results["sizes"] = sizes
    say_bad_images(run.data.take_new_bad(), say)
    return results


def _at_size(run: Run, name: str, model: nn.Module, size: int) -> dict[str, Any]:
    """What the same network scores and costs with images of another side, in pixels."""
    scores = evaluate_network(run, model, size)
    set_preprocessing(model, preprocessing_at(run.config, size))
    counts = count(model)
    if run.is_main:
        told = run.task.say(scores.values)
        speedup = run.dense.macs / counts.macs
        say(f"{name} at {size} pixels: {told}, {speedup:.4f}x fewer MACs")
    return {
        "image_size": size,
        **scores.to_dict(),
        "parameters": counts.parameters,
        "macs": counts.macs,
    }
