"""A tiny run that goes through every stage in seconds."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_pipelines.demo import generate_demo

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four classes of 24 training and 10 validation images, 32x32."""
    root = tmp_path_factory.mktemp("data") / "tiny"
    generate_demo(root, classes=4, train_per_class=24, val_per_class=10, image_size=32, seed=1)
    return root


@pytest.fixture
def tiny_config(tiny_data: Path, tmp_path: Path) -> dict[str, Any]:
    """Dense, regularize, prune, finetune and evaluate a ResNet-8 in a few dozen steps."""
    return {
        "name": "tiny",
        "output": str(tmp_path / "run"),
        "model": {"name": "cifar_resnet8"},
        "data": {
            "root": str(tiny_data),
            "augmentation": "cifar",
            "image_size": 32,
            "resize": None,
            "threads": 1,
        },
        "training": {
            "batch_size": 16,
            "log_every": 2,
            "statistics_every": 5,
            "checkpoint_every": 5,
            "evaluate_every": 2.0,
        },
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


RunMain = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run_main(tmp_path: Path) -> RunMain:
    """Run train/main.py in processes of its own; ``kill_when`` a path exists, with SIGKILL."""

    def run(
        config: dict[str, Any] | None,
        *arguments: str,
        ranks: int = 1,
        expect: int | None = 0,
        kill_when: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable]
        if ranks > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command += [str(ROOT / "train" / "main.py")]
        if config is not None:
            path = tmp_path / "config.yaml"
            path.write_text(yaml.safe_dump(config, sort_keys=False))
            command += ["--config", str(path)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        options: dict[str, Any] = {"cwd": tmp_path, "env": environment, "text": True}
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen([*command, *arguments], **options) as process:
            while kill_when is not None and not kill_when.exists():
                assert process.poll() is None, f"ended before {kill_when} was there"
                time.sleep(0.005)
            if kill_when is not None:
                process.kill()
                expect = -signal.SIGKILL
            out, err = process.communicate(timeout=300)
        if expect is not None:
            assert process.returncode == expect, out + err
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    return run
