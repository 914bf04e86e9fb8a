"""The stage that evaluates a network."""

from typing import Any

from torch import nn

from tpp.masks import COMPANION
from tpp.measure.counts import count
from tpp.models.architecture import set_preprocessing
from train.data import preprocessing_at
from train.run import LEFT, Run, say_bad_images
from train.run_folder.log import say
from train.run_folder.networks import companion_of_input, evaluate_network, load_input, place


def evaluate_stage(run: Run, name: str) -> dict[str, Any]:
    """Evaluate the network of the input's checkpoint, at other sizes of the images too if asked."""
    stage = run.config.stages[name]
    model = place(run, load_input(run, stage.input))
    scores = evaluate_network(run, model)
    # What the stage that made it said of its sparsity: of a network of sparse factors its file
    # has the dense product alone.
    made_by = run.done.get(stage.input or "", {})
    results = {
        **scores.to_dict(),
        **{key: made_by[key] for key in LEFT if key in made_by},
        **run.count_fields(count(model), companion_of_input(run, stage, COMPANION)),
    }
    sizes = [_at_size(run, name, model, size) for size in stage.image_sizes or ()]
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
