"""The GPU script stays runnable where there is no GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import trajectory

ROOT = Path(__file__).resolve().parents[2]


def gpu(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)


def test_every_part_runs_at_tiny_sizes_and_is_not_run_twice(tmp_path):
    output = tmp_path / "gpu.json"
    first = gpu("--device", "cpu", "--tiny", "--output", str(output))
    assert first.returncode == 0, first.stderr
    results = json.loads(output.read_text())
    assert set(results) == {"trajectory", "penalty"}
    # The CPU against itself: nothing may differ, or the comparison compares the wrong things.
    assert results["trajectory"]["weights_relative_difference"] == 0
    assert results["penalty"]["ratio"] > 0
    again = gpu("--device", "cpu", "--tiny", "--output", str(output))
    assert again.stdout.count("done before") == 2


def test_an_unknown_part_is_one_line():
    result = gpu("--parts", "penalti")
    assert result.returncode == 2
    assert result.stderr == "error: --parts: no part 'penalti'; there are: trajectory, penalty\n"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cpu_and_gpu_give_the_same_trajectory():
    found = trajectory(torch.device("cuda"), tiny=False)
    assert found["loss_relative_difference_first"] < 1e-5
    assert found["weights_relative_difference"] < 1e-3
