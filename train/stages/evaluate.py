"""The stage that evaluates a network."""

from typing import Any

from tpp.measure.counts import count
from train.run import Run, say_bad_images
from train.run_folder.log import say
from train.run_folder.networks import evaluate_network, load_input, place


def evaluate_stage(run: Run, name: str) -> dict[str, Any]:
    """Evaluate the network of the input's checkpoint."""
    model = place(run, load_input(run, run.config.stages[name].input))
    scores = evaluate_network(run, model)
    say_bad_images(run.data.take_new_bad(), say)
    return {**scores.to_dict(), **run.count_fields(count(model))}
