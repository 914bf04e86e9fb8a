"""The benchmark of the pruner runs, and says what it is asked."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments):
    command = [sys.executable, "-m", "benchmarks.pruner", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_both_sides_are_measured(tmp_path):
    done = run("--parts", "time", "--rounds", 1, "--output", tmp_path / "results.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "results.json").read_text())["time"]
    # ResNet-50's 25.6 M weights in float32, and what a process that reads them all must hold.
    assert 102 < found["checkpoint_mb"] < 104
    for side in ("ours", "torch_pruning"):
        assert found[side]["seconds"] > 0 and found[side]["peak_over_size"] > 1
    assert "Torch-Pruning, live model" in done.stdout


def test_a_part_that_there_is_not(tmp_path):
    done = run("--parts", "speed", "--output", tmp_path / "results.json")
    assert done.returncode == 2
    assert (
        done.stderr
        == "error: --parts: there is no 'speed'; there are time, large, cases, refused\n"
    )
    assert not (tmp_path / "results.json").exists()
