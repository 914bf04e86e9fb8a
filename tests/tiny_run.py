"""A run on tiny images that goes through every stage in seconds."""

from pathlib import Path
from typing import Any

from data_pipelines.demo import generate_demo
from data_pipelines.settings import DemoData


def make_tiny_data(root: Path) -> Path:
    """Four classes of 24 training and 10 validation images, 32x32."""
    generate_demo(root, DemoData(classes=4, train_per_class=24, val_per_class=10, seed=1))
    return root


def tiny_run(data: Path, output: Path) -> dict[str, Any]:
    """Dense, regularize, prune, finetune and evaluate a ResNet-8 in a few dozen steps."""
    return {
        "name": "tiny",
        "output": str(output),
        "model": {"name": "cifar_resnet8"},
        "data": {
            "root": str(data),
            "augmentation": "cifar",
            "image_size": 32,
            "resize": None,
            "threads": 1,
        },
        "training": {
            "batch_size": 16,
            "log_every": 2,
            "statistics_every": 5,
            "evaluate_every": 2.0,
        },
        "checkpoints": {"every": "5 steps"},
        "pruning": {"ratios": {"layer*.conv1": 0.5}},
        "method": {
            "name": "tpp",
            "delta": 0.1,
            "update_interval": 1,
            "stabilize_steps": 9,
            "zero_out_interval": 1,
        },
        "stages": {
            "dense": {"epochs": 1, "optimizer": {"lr": 0.05}},
            "regularize": {"optimizer": {"lr": 0.01}},
            "prune": {},
            "finetune": {"epochs": 1, "optimizer": {"lr": 0.02}},
            "evaluate": {},
        },
    }
