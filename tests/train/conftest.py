"""A tiny run that goes through every stage in seconds."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from fork_server import BARE, Forks, wait_for_all
from in_process import in_process
from tiny_run import make_tiny_data, tiny_run

from train.main import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four classes of 24 training and 10 validation images, 32x32."""
    return make_tiny_data(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture
def tiny_config(tiny_data: Path, tmp_path: Path) -> dict[str, Any]:
    """Dense, regularize, prune, finetune and evaluate a ResNet-8 in a few dozen steps."""
    return tiny_run(tiny_data, tmp_path / "run")


RunMain = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run_main(tmp_path: Path, forks: Forks) -> RunMain:
    """Run train/main.py in processes of its own; ``kill_when`` a path exists, with SIGKILL."""

    def run(
        config: dict[str, Any] | None,
        *arguments: str,
        ranks: int = 1,
        expect: int | None = 0,
        kill_when: Path | None = None,
        script: Path | str = ROOT / "train" / "main.py",
    ) -> subprocess.CompletedProcess[str]:
        command = list(arguments)
        if config is not None:
            path = tmp_path / "config.yaml"
            path.write_text(yaml.safe_dump(config, sort_keys=False))
            command = ["--config", str(path), *command]
        environment = {**os.environ, **BARE}
        if ranks > 1:
            started = forks.start_ranks(ranks, script, command, tmp_path, environment)
        else:
            started = [forks.start(script, command, tmp_path, environment)]
        if kill_when is not None:
            while not kill_when.exists():
                assert started[0].poll() is None, f"ended before {kill_when} was there"
                time.sleep(0.005)
            for victim in started:
                victim.kill()
            expect = -signal.SIGKILL
        done = wait_for_all(started, 300)
        if expect is not None:
            assert done.returncode == expect, done.stdout + done.stderr
        return done

    return run


@pytest.fixture
def run_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run train/main.py in this process, which saves the imports; one rank."""

    return in_process(tmp_path, monkeypatch, "main.py", main)
