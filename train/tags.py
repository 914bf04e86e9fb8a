"""What TensorBoard's curves show, with units: it stands beside each of them."""

import math
import re
from collections.abc import Mapping
from statistics import fmean
from typing import Any

ALL_STAGES = "all_stages"
# The first pattern that a tag matches as a whole.
_TAGS: dict[str, str] = {
    r"all_stages/(.*)": "`\\1` of the validation images over the steps of all stages, each "
    "beginning where the one before ended.",
    r"(val|val_\w+)/top1": "Accuracy of the validation images, in per cent{weights}.",
    r"(val|val_\w+)/top5": "Share of the validation images whose class is among the five most "
    "likely, in per cent{weights}.",
    r"(val|val_\w+)/psnr": "Peak signal-to-noise ratio of the validation images on luma, borders "
    "cut, in dB{weights}.",
    r"(val|val_\w+)/ssim": "Structural similarity of the validation images on luma, borders cut, "
    "at most 1{weights}.",
    r"(val|val_\w+)/loss": "Loss of the validation images, per image{weights}.",
    r"(val|val_\w+)/images": "Images that were evaluated{weights}.",
    r"train/loss": "Sum of the loss terms, mean of the steps since the last point.",
    r"train/loss/task": "The task's own loss.",
    r"train/loss/(.*)": "What `\\1` adds to the loss, with its weight.",
    r"train/top1": "Accuracy of the training images as augmented, in per cent.",
    r"train/lr": "Learning rate of the step.",
    r"train/gradient_norm": "Euclidean norm of all gradients, before any clipping.",
    r"train/lambda": "Strength of the regularisation that drives filters to zero.",
    r"train/sparsity": "Share of masked weights, 0 to 1.",
    r"train/images_per_second": "Training images per second over all ranks, without evaluations "
    "and checkpoints.",
    r"train/step_time": "Seconds of an optimiser step.",
    r"train/data_wait": "Share of a step's time that the loop waits for images, 0 to 1.",
    r"train/checkpoint_stall": "Seconds that training stood still for checkpoints since the last "
    "point.",
    r"train/tflops": "What one device computes for the network, in TFLOP/s.",
    r"train/mfu": "That as a share of the device's dense peak, 0 to 1.",
    r"train/peak_memory_gib": "Most memory of the main rank, in GiB: of tensors on a GPU, else of "
    "the process.",
    r"train/interspace_sparsity": "Share of numbers that are gone, bases counted in, 0 to 1.",
    r"train/interspace_left": "Numbers that are left, bases counted in.",
    r"train/smallest_norm_share": "Share of the weights' norm in those that would be set to zero "
    "now, 0 to 1.",
    r"train/gates_open": "Share of gates that are open, over images, 0 to 1.",
    r"train/gates_variance": "Mean variance of a gate over images; 0 where all say the same.",
    r"train/gates_stay": "Share of channels that would stay, 0 to 1.",
    r"data/skipped_images": "Images that could not be read so far.",
    r"weights/pruned_magnitude": "Mean absolute weight of the filters that go, mean of the layers.",
    r"weights/kept_magnitude": "Mean absolute weight of the filters that stay, mean of the layers.",
    r"weights/correlation": "Mean absolute correlation of filters that go with the others, mean of "
    "the layers.",
    r"weights_(\w+)/(.*)": "`weights/\\1` of layer `\\2` alone.",
    r"trainability/jsv_(\w+)": "\\1 of the singular values of the network's input-output Jacobian.",
    r"trainability/condition": "Largest singular value of that Jacobian over the smallest.",
}


_STATISTICS = ("pruned_magnitude", "kept_magnitude", "correlation")
# What stands before the names of an event's values.
_PREFIXES = {"train": "train/", "evaluate": "val/", "skipped_images": "data/", "iteration": ""}
_AVERAGED = "evaluate_"
_BESIDE = ("event", "stage", "time", "step")


def points_of(entry: Mapping[str, Any], *, layers: bool = True) -> dict[str, float]:
    """The points of a line of log.jsonl, by tag, as TensorBoard has them.

    Args:
        entry: of the log; one of an event that draws nothing has no points.
        layers: whether those of single layers are wanted too.
    """
    event = entry.get("event")
    if event == "layers":
        return layer_points(entry["layers"], single=layers)
    if event == "trainability":
        prefix = "trainability/"
    elif isinstance(event, str) and event.startswith(_AVERAGED):
        prefix = f"val_{event.removeprefix(_AVERAGED)}/"
    elif event in _PREFIXES:
        prefix = _PREFIXES[event]
    else:
        return {}
    return {
        prefix + name: value
        for name, value in entry.items()
        if name not in _BESIDE and isinstance(value, int | float) and math.isfinite(value)
    }


def layer_points(
    statistics: Mapping[str, Mapping[str, float]], *, single: bool = True
) -> dict[str, float]:
    """The points of the statistics of a method's layers, and of their means.

    Args:
        statistics: by layer and name.
        single: whether those of single layers are wanted too.
    """
    points: dict[str, float] = {}
    for name in _STATISTICS:
        values = {layer: of_layer[name] for layer, of_layer in statistics.items()}
        if single:
            points |= {f"weights_{name}/{layer}": value for layer, value in values.items()}
        points[f"weights/{name}"] = fmean(values.values())
    return points


def describe_tag(tag: str) -> str:
    """What a curve shows; empty of one that a method of somebody's own draws."""
    for pattern, text in _TAGS.items():
        if found := re.fullmatch(pattern, tag):
            said = found.expand(text)
            of = found[1].removeprefix("val_") if tag.startswith("val_") else ""
            return said.replace("{weights}", f", with the {of} weights" if of else "")
    return ""
