"""The GPU script stays runnable where there is no GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import Options, captured, trajectory

ROOT = Path(__file__).resolve().parents[2]


def gpu(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)


def test_every_part_runs_at_tiny_sizes_and_is_not_run_twice(tmp_path):
    output = tmp_path / "gpu.json"
    tiny = ("--device", "cpu", "--tiny", "--output", str(output), "--work", str(tmp_path / "work"))
    stopped = gpu(*tiny, "--parts", "resnet56", "--minutes", "0")
    assert stopped.returncode == 0, stopped.stderr
    assert not json.loads(output.read_text())["resnet56"]["complete"]
    first = gpu(*tiny)
    assert first.returncode == 0, first.stderr
    results = json.loads(output.read_text())
    assert set(results) == {"trajectory", "captured", "step", "penalty", "latency", "resnet56"}
    assert results["captured"]["weights_relative_difference"] == 0
    assert results["captured"]["ratio"] > 0
    assert results["step"]["complete"]
    assert list(results["step"]["settings"]) == [
        "cifar_resnet8, fp32, eager", "cifar_resnet8, fp32, compiled",
    ]  # fmt: skip
    column = results["resnet56"]
    assert column["complete"]
    stages = ("tpp_regularize", "tpp_finetune", "l1_finetune", "greg1_regularize", "greg1_finetune")
    assert list(column["runs"]) == [
        "dense", *(f"{stage}_seed{seed}" for seed in (0, 1) for stage in stages)
    ]  # fmt: skip
    assert list(column["top1"]) == ["dense", *stages]
    assert all(run["steps"] == 2 for run in column["runs"].values())
    # The CPU against itself: nothing may differ, or the comparison compares the wrong things.
    assert results["trajectory"]["weights_relative_difference"] == 0
    assert results["penalty"]["ratio"] > 0
    arriving = results["latency"]["2.31x, multiples of 1, batch 1, fp32"]
    assert arriving["counted_speedup"] == pytest.approx(2.3081, abs=5e-5)
    assert arriving["real_speedup"] > 0
    again = gpu(*tiny)
    assert again.stdout.count("done before") == 6


def test_an_unknown_part_is_one_line():
    result = gpu("--parts", "penalti")
    assert result.returncode == 2
    expected = (
        "error: --parts: no part 'penalti'; there are: "
        "trajectory, captured, step, penalty, latency, resnet56\n"
    )
    assert result.stderr == expected


def test_the_column_needs_images(tmp_path):
    result = gpu("--device", "cpu", "--parts", "resnet56", "--output", str(tmp_path / "gpu.json"))
    assert result.returncode == 2
    assert result.stderr.startswith("error: resnet56: needs --data") and "\n" in result.stderr


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@needs_gpu
def test_cpu_and_gpu_give_the_same_trajectory():
    found = trajectory(Options(torch.device("cuda")))
    assert found["loss_relative_difference_first"] < 1e-5
    assert found["weights_relative_difference"] < 1e-3


@needs_gpu
def test_replayed_steps_are_the_computed_ones():
    assert captured(Options(torch.device("cuda")))["weights_relative_difference"] < 1e-3
