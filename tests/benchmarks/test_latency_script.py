"""The latency benchmark measures the published networks, and the script runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.latency import networks_of
from tpp.measure.counts import count

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.latency", *arguments]
    # Compiling ResNet-34 takes half a minute; tests/tpp/test_latency.py does compile.
    environment = {**os.environ, "TORCH_COMPILE_DISABLE": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, timeout=300, env=environment
    )


def test_the_networks_are_the_published_ones():
    entries = networks_of(("ResNet-34 1.32x",), (1,))
    assert list(entries) == ["ResNet-34", "ResNet-34 1.32x"]
    dense, pruned = (count(entry.network).macs for entry in entries.values())
    assert round(dense / pruned, 4) == 1.3168
    assert all(entry.dense == "ResNet-34" for entry in entries.values())


def test_every_part_runs_at_tiny_sizes(tmp_path):
    output = tmp_path / "latency.json"
    done = run("--tiny", "--parts", "published,round_to,compiled", "--output", str(output))
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())
    assert list(results["published"]) == ["ResNet-34", "ResNet-34 1.32x"]
    conditions = {
        part: len(results[part]["ResNet-34"]["times"]) for part in results if part != "on"
    }
    assert conditions == {"published": 8, "round_to": 4, "compiled": 4}
    row = results["published"]["ResNet-34 1.32x"]
    counted = row["counted_speedup"]
    assert counted > 1.3
    for condition, time in row["times"].items():
        dense = results["published"]["ResNet-34"]["times"][condition]
        assert dense["arrives"] is None
        real = dense["median_ms"] / time["median_ms"]
        assert time["real_speedup"] == pytest.approx(real)
        assert time["arrives"] == pytest.approx((real - 1) / (counted - 1))
    names = ["ResNet-34", *(f"ResNet-34 1.32x, multiples of {n}" for n in (1, 8))]
    assert list(results["round_to"]) == names
    # More filters are kept where their number is rounded up.
    exact, rounded = (results["round_to"][name]["counted_speedup"] for name in names[1:])
    assert exact == counted and 1.2 < rounded < exact
    assert "channels last" in done.stdout


def test_an_unknown_part():
    done = run("--parts", "published,speed")
    assert done.returncode == 2
    assert done.stderr == (
        "error: --parts: no part 'speed'; there are: published, round_to, compiled\n"
    )
