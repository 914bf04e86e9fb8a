"""The benchmark of the recipe's parts makes the steps that it says, and the script runs."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import loops as benchmark_loops
from benchmarks import step as benchmark
from benchmarks.loops import Setting, contestants
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


def test_all_loops_train_alike(monkeypatch):
    """From the same weights on the same batch, to the same weights."""
    setting = Setting("cifar_resnet8", 10, 32, 4, 1, 2, "cpu")
    kept = {}

    def keep(setting):
        kept.update(contestants(setting))
        return kept

    monkeypatch.setattr(benchmark_loops, "contestants", keep)
    result = benchmark_loops.measure(setting)
    weights = {name: c.network.state_dict() for name, c in kept.items()}
    start = contestants(setting)["bare"].network.state_dict()
    assert list(weights) == ["ours", "bare", "torchvision", "timm"]
    for found in weights.values():
        for key, value in found.items():
            torch.testing.assert_close(value, weights["bare"][key], rtol=1e-5, atol=1e-7)
        assert found["bn1.num_batches_tracked"] == 3  # two turns, after a first one
        assert not torch.equal(found["conv1.weight"], start["conv1.weight"])
    rates = result["images_per_second"]
    assert result["ours_beside"]["timm"] == pytest.approx(rates["ours"] / rates["timm"])


def test_compiling_is_compared_with_the_bare_loop():
    rows = {
        "a, fp32, eager": {"images_per_second": {"ours": 2.0, "bare": 4.0}},
        "a, fp32, compiled": {"images_per_second": {"ours": 3.0, "bare": 5.0}},
        "a, bf16, eager": {"images_per_second": {"ours": 2.0, "bare": 4.0}},
    }
    gains = {"ours": 1.5, "bare": 1.25, "ours_beside_bare": 1.2}
    assert benchmark_loops.gains_of_compiling(rows) == {"a, fp32": pytest.approx(gains)}


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
    names = [f"cifar_resnet8, fp32, {how}" for how in ("eager", "compiled")]
    assert [*results["loops"]["settings"]] == names
    assert [*results["loops"]["compiling"]] == ["cifar_resnet8, fp32"]
    assert "ours / torchvision" in done.stdout
    assert list(results["loader"]) == ["plain", "TrivialAugment", "RandAugment", "176 pixels"]
    assert "throughput beside plain" in done.stdout
