"""The benchmark of evaluations gives both sides the same to do, and the script runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.evaluate", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)


def test_both_sides_see_the_same_images_at_tiny_size(tmp_path):
    output = tmp_path / "evaluate.json"
    done = run("--tiny", "--output", str(output))
    assert done.returncode == 0, done.stderr
    (found,) = (row for name, row in json.loads(output.read_text()).items() if name != "on")
    ours, timms = found["ours"], found["timm"]
    assert ours["images"] == timms["images"] == 10
    # Other decoders and resizes, but the same images, crops, labels and way of summing up; a
    # network with random weights tells mean, crop or labels that differ by tenths.
    assert ours["loss"] == pytest.approx(timms["loss"], abs=0.01)
    assert ours["top5"] == timms["top5"]
    rates = ours["images_per_second"], timms["images_per_second"]
    assert found["ratio"] == pytest.approx(rates[0] / rates[1])
    assert min(rates) > 0 and "resnet18" in done.stdout


def test_a_folder_that_is_not_there(tmp_path):
    done = run("--data", str(tmp_path / "none"), "--output", str(tmp_path / "evaluate.json"))
    assert done.returncode == 2
    assert done.stderr == f"error: --data {tmp_path}/none: no such folder\n"
