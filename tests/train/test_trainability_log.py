"""Trainability in a run: what is logged, and that nothing else changes."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import tpp
from data_pipelines.images.image_index import ImageIndex, scan_class_folders
from data_pipelines.loading.augment import ImageTransform
from train.stages.trainability import TrainabilityProbe, probe_images


@given(
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=12),
    count=st.integers(1, 60),
)
def test_probe_images_are_spread_over_the_classes(sizes, count):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    names = [str(i) for i in range(len(sizes))]
    index = ImageIndex.of(Path(), [f"{i}" for i in range(len(labels))], labels, names)
    chosen = probe_images(index, count)
    assert len(set(chosen.tolist())) == len(chosen) == min(count, len(labels))
    taken = np.bincount(labels[chosen], minlength=len(sizes))
    if count < len(sizes):
        assert taken.max() == 1
        gaps = np.diff(np.flatnonzero(taken))
        assert gaps.size == 0 or gaps.max() - gaps.min() <= 1
    else:
        # No class gives two more than another that has images left.
        assert all(taken.max() - t <= 1 for t, size in zip(taken, sizes, strict=True) if t < size)


def entries(folder: Path, event: str) -> list[dict]:
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry["event"] == event]


def test_it_is_logged_and_changes_no_weight(tiny_config, run_main, tmp_path):
    # Of two ranks only the main one measures. Dense training has 6 steps, the regularised stage
    # 19 and finetuning 6.
    runs = {}
    for every in (None, 4):
        config = copy.deepcopy(tiny_config)
        config["output"] = str(tmp_path / f"every-{every}")
        config["training"] |= {"trainability_every": every, "trainability_images": 6}
        config["training"]["precision"] = "bf16"
        run_main(config, ranks=2)
        runs[every] = Path(config["output"])
    stages = ("dense", "regularize", "finetune")
    for stage in stages:
        plain, measured = (load_file(runs[e] / stage / "model.safetensors") for e in (None, 4))
        assert all(torch.equal(plain[name], measured[name]) for name in plain)
    assert entries(runs[None], "trainability") == []

    found = entries(runs[4], "trainability")
    steps = {stage: [e["step"] for e in found if e["stage"] == stage] for stage in stages}
    assert steps == {"dense": [0, 4, 6], "regularize": [0, 4, 8, 12, 16, 20], "finetune": [0, 4, 6]}
    # The end of one stage is the start of the next: the same weights at the same images.
    last, first = (
        next(e for e in found if (e["stage"], e["step"]) == key)
        for key in (("dense", 6), ("regularize", 0))
    )
    assert last["jsv_mean"] == first["jsv_mean"]
    # In float32 although the run is in bf16: what anybody measures at the saved network.
    data = tiny_config["data"]
    transform = ImageTransform(32, None, "none", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    probe = TrainabilityProbe(
        scan_class_folders(Path(data["root"]) / "val"),
        transform,
        lambda images: images,
        count=6,
        loader="torchvision",
        device=torch.device("cpu"),
    )
    measured = probe(tpp.load_model(runs[4] / "dense" / "model.safetensors"))
    assert last["jsv_mean"] == pytest.approx(measured.mean, rel=1e-4)
    assert last["condition"] == pytest.approx(measured.condition, rel=1e-3)

    board = EventAccumulator(str(runs[4] / "regularize"))
    board.Reload()
    points = board.Scalars("trainability/jsv_mean")
    assert [p.step for p in points] == steps["regularize"]
    assert points[0].value == pytest.approx(first["jsv_mean"])
    assert {"trainability/jsv_std", "trainability/condition"} <= set(board.Tags()["scalars"])


def test_it_may_be_switched_on_when_a_run_is_resumed(tiny_config, run_main, tmp_path):
    tiny_config["stages"] = {"dense": {"epochs": 40, "optimizer": {"lr": 0.01}}}
    folder = Path(tiny_config["output"])
    checkpoint = folder / "dense" / "checkpoints" / "step-00000010"
    run_main(tiny_config, kill_when=checkpoint)
    run_main(tiny_config, "training.trainability_every=50")
    steps = [entry["step"] for entry in entries(folder, "trainability")]
    assert steps[0] >= 50 and steps[-1] == 240 and len(set(steps)) == len(steps)
