"""The networks of a run's stages: read, placed, evaluated, saved."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from tpp.checkpoints.model_file import load_model, save_model
from train.config.sections import MODEL_FILE, StageSection
from train.distributed.collectives import broadcast_buffers
from train.run import Run
from train.tasks.classification import Accuracy, evaluate
from train.weights import load_starting_weights


def load_input(run: Run, stage: StageSection) -> nn.Module:
    """The network that a stage starts from, on the CPU."""
    if stage.input is not None:
        return load_model(run.stage_folder(stage.input) / MODEL_FILE)
    with run.accelerator.local_main_process_first():  # one download per node, not one per rank
        return load_starting_weights(run.config.model, run.architecture, run.config.seed)


def place(run: Run, model: nn.Module) -> nn.Module:
    """Move a network to this rank's device, in the memory format that the run computes in."""
    model.to(run.accelerator.device)
    if run.config.training.channels_last:
        model.to(memory_format=torch.channels_last)
    return model


def evaluate_network(run: Run, model: nn.Module) -> Accuracy:
    """Evaluate over the validation images, shared over the ranks."""
    run.at("evaluation")
    # Each rank has normalised its own batches; what is measured must be what is saved.
    broadcast_buffers(model)
    training, accelerator = run.config.training, run.accelerator
    local_batch = training.batch_size // (accelerator.num_processes * training.accumulation)
    batches = run.data.eval_batches(training.evaluate_batch_size or local_batch)
    return evaluate(model, batches, accelerator)


def save_network(
    run: Run, name: str, path: Path, model: nn.Module, accuracy: Accuracy | None
) -> None:
    """Write a self-describing checkpoint of ``model``."""
    extra: dict[str, Any] = {
        "run": run.config.name,
        "stage": name,
        "classes": run.data.train.index.classes,
    }
    if accuracy is not None:
        extra["accuracy"] = accuracy.to_dict()
    save_model(path, model, preprocessing=run.config.data.preprocessing(), extra=extra)
