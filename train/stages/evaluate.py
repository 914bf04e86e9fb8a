"""The stage that evaluates a network."""

from typing import Any

from tpp.measure.counts import count
from train.config.sections import StageSection
from train.run import Run, say_bad_images
from train.run_folder.log import say
from train.run_folder.networks import evaluate_network, load_input, place


def evaluate_stage(run: Run, name: str, stage: StageSection) -> dict[str, Any]:
    model = place(run, load_input(run, stage))
    accuracy = evaluate_network(run, model)
    say_bad_images(run.data.take_new_bad(), say)
    return {
        **accuracy.to_dict(),
        **run.count_fields(count(model)),
    }
