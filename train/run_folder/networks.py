"""The networks of a run's stages: read, placed, evaluated, saved."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tpp.checkpoints.model_file import Companions, load_model, read_companion, save_model
from tpp.common.errors import UserError
from tpp.masks import COMPANION, Mask, hold_mask
from tpp.models.architecture import (
    Architecture,
    architecture_of,
    build_model,
    set_preprocessing,
)
from tpp.models.fitting import assign_tensors, fill_buffers, fitted
from train.config.sections import MODEL_FILE, StageSection
from train.distributed.arithmetic import eagerly
from train.distributed.collectives import EveryRankError, broadcast_buffers, sum_over_ranks
from train.distributed.engine import forward_pass
from train.run import Run
from train.run_folder.log import say
from train.tasks.base import Scores
from train.weights import load_starting_weights, starting_companion

Shapes = dict[str, tuple[int, ...]]


def load_input(run: Run, stage: str | None) -> nn.Module:
    """The network of a stage that another starts from, or the starting weights; on the CPU.

    In float32, whatever the file's type is, as training and evaluation need it.
    """
    if stage is not None:
        model = load_model(_file_of(run, stage))
    else:
        with run.accelerator.local_main_process_first():  # one download per node, not per rank
            tell = say if run.accelerator.is_main_process else lambda _: None
            model = load_starting_weights(run.config.model, run.architecture, run.config.seed, tell)
    # What public weights were trained with does not count: the run prepares the images.
    set_preprocessing(model, run.config.data.preprocessing())
    return model.float()


def place(run: Run, model: nn.Module) -> nn.Module:
    """Move a network to this rank's device, in the memory format that the run computes in."""
    model.to(run.accelerator.device)
    if run.config.training.channels_last:
        model.to(memory_format=torch.channels_last)
    return model


def evaluate_network(
    run: Run, model: nn.Module, image_size: int | None = None, folders: Sequence[str] = ()
) -> Scores:
    """Evaluate over the validation images, shared over the ranks; left in evaluation mode.

    Args:
        run: the run.
        model: the network.
        image_size: another side of the images than the run's, in pixels.
        folders: of the validation images, to evaluate each by itself too.
    """
    run.at("evaluation")
    # Each rank has normalised its own batches; what is measured must be what is saved.
    broadcast_buffers(model)
    training, accelerator = run.config.training, run.accelerator
    local_batch = training.batch_size // (accelerator.num_processes * training.accumulation)
    with eagerly(model):
        return run.task.evaluate(
            forward_pass(model.eval(), accelerator),
            run.data.eval_batches(training.evaluate_batch_size or local_batch, image_size),
            device=accelerator.device,
            over_ranks=sum_over_ranks,
            folders=folders,
        )


def dense_network(run: Run, name: str | None) -> nn.Module:
    """The dense network that stage ``name`` comes from: placed, in evaluation mode, and fixed."""
    network = load_input(run, run.config.dense_stage(name))
    return place(run, network).eval().requires_grad_(False)


def companion_of_input(run: Run, stage: StageSection, name: str) -> dict[str, Tensor]:
    """Tensors that a stage's input holds beside the network's; empty where it has none such."""
    if stage.input is None:
        return starting_companion(run.config.model, run.architecture, name)
    return read_companion(_file_of(run, stage.input), name)


def file_of_input(run: Run, name: str, network: nn.Module | None = None) -> Path:
    """The checkpoint that a stage which works on files reads; on one rank.

    Starting weights, whatever kind of file they came in, are written down beside its own file, with
    their mask.

    Args:
        run: the run.
        name: of the stage.
        network: that of its input, where it has been loaded.
    """
    stage = run.config.stages[name]
    if stage.input is not None:
        return _file_of(run, stage.input)
    path = run.stage_folder(name) / "dense.safetensors"
    mask = companion_of_input(run, stage, COMPANION)
    companions = {COMPANION: mask} if mask else None
    network = load_input(run, None) if network is None else network
    save_network(run, name, path, network, None, companions)
    return path


def hold_mask_of_input(run: Run, name: str, network: nn.Module) -> Mask:
    """Hold the mask that a training stage's input has, see :func:`tpp.masks.hold_mask`.

    Args:
        run: the run.
        name: of the stage.
        network: on its device, with what the method adds, before the engine is made.

    Returns:
        the mask; empty where the input has none.

    Raises:
        EveryRankError: the network that trains has other weights.
    """
    mask = companion_of_input(run, run.config.stages[name], COMPANION)
    try:
        hold_mask(network, mask)
    except UserError as error:
        raise EveryRankError(
            f"stages.{name}: its input has masked weights, which cannot be held: {error}"
        ) from None
    return mask


def _file_of(run: Run, stage: str) -> Path:
    return run.stage_folder(stage) / MODEL_FILE


def shapes_of(model: nn.Module) -> Shapes:
    """The shape of every tensor in a network's state."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def network_of_shapes(run: Run, architecture: Architecture, shapes: Shapes) -> nn.Module:
    """An ordinary network of these shapes, on the CPU; its weights are still to be loaded.

    Raises:
        UserError: they are no shapes of such a network.
    """
    images = run.config.data.preprocessing()
    network = fitted(architecture, shapes, images=images)
    set_preprocessing(network, images)
    empty = {name: torch.zeros_like(t, device="cpu") for name, t in network.state_dict().items()}
    assign_tensors(network, empty)
    if any(buffer.is_meta for buffer in network.buffers()):
        arch = architecture_of(network)
        assert arch is not None
        with torch.random.fork_rng(devices=[]):
            fill_buffers(network, build_model(arch.name, arch.num_classes, **arch.args))
    return network


def save_network(
    run: Run,
    name: str,
    path: Path,
    model: nn.Module,
    scores: Scores | None,
    companions: Companions | None = None,
) -> None:
    """Write a self-describing checkpoint of ``model``."""
    extra: dict[str, Any] = {
        "run": run.config.name,
        "stage": name,
        **run.task.file_extra(run.data.train.index.classes),
    }
    if scores is not None:
        extra["accuracy"] = scores.to_dict()
    preprocessing = run.config.data.preprocessing()
    save_model(path, model, preprocessing=preprocessing, extra=extra, companions=companions)
