"""The benchmark of the recipe's parts makes the steps that it says, and the script runs."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import step as benchmark
from tpp.models.architecture import build_model
from train.loop.average import WeightAverage

ROOT = Path(__file__).resolve().parents[2]


def test_each_kind_of_step_does_what_it_is_called(monkeypatch):
    """What a step leaves in the network's weights and in their average."""
    setup = benchmark.Setup("cifar_resnet8", 10, 32, 4, 1, "cpu", "fp32")
    averages = []

    def averaged(network, settings):
        averages.append(WeightAverage(network, settings))
        return averages[-1]

    monkeypatch.setattr(benchmark, "WeightAverage", averaged)
    torch.manual_seed(0)
    start = build_model("cifar_resnet8", 10)
    weights = {}
    for name, kind in benchmark.KINDS.items():
        torch.manual_seed(1)
        student, teacher = copy.deepcopy(start), build_model("cifar_resnet8", 10)
        step = benchmark.make_step(kind, student, teacher, setup)
        step()
        step()
        assert all(parameter.grad is None for parameter in student.parameters())
        weights[name] = torch.cat([p.detach().flatten() for p in student.parameters()])
    plain = weights.pop("plain")
    same = {name for name, found in weights.items() if torch.equal(found, plain)}
    assert same == {"EMA"}  # it changes no weight, and every other kind does
    assert len(averages) == 2
    for average in averages:
        assert average.state_dict()["conv1.weight"].isfinite().all()


def test_the_script_runs_at_tiny_sizes(tmp_path):
    output = tmp_path / "step.json"
    command = [sys.executable, "-m", "benchmarks.step", "--tiny", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())
    for part in ("small", "large"):
        assert list(results[part]) == list(benchmark.KINDS)
        assert results[part]["plain"]["throughput"] == 1
        for row in results[part].values():
            expected = results[part]["plain"]["step_ms"] / row["step_ms"]
            assert row["throughput"] == pytest.approx(expected)
    assert list(results["loader"]) == ["plain", "TrivialAugment", "RandAugment", "176 pixels"]
    assert "throughput beside plain" in done.stdout
