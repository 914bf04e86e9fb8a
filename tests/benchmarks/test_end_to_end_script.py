"""The benchmark of loader and step together runs, and compares with the slower of the two."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.step import make_photos

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.end_to_end", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)


def test_the_script_runs_at_tiny_sizes(tmp_path):
    folder, output = tmp_path / "photos", tmp_path / "end_to_end.json"
    folder.mkdir()
    make_photos(folder, 6)
    done = run("--tiny", "--data", folder, "--output", output)
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())
    (row,) = results["rows"].values()
    rates = row["images_per_second"]
    assert list(rates) == ["loader", "step", "end_to_end"]
    slower = min(rates["loader"], rates["step"])
    assert row["of_the_slower"] == pytest.approx(rates["end_to_end"] / slower)
    assert 0 <= row["data_wait"] <= 1
    assert results["on"]["photos"] == 6 and not results["on"]["made"]
    assert "of the slower" in done.stdout


def test_what_is_wrong_is_one_line(tmp_path):
    done = run("--turns", 0)
    said = "error: python -m benchmarks.end_to_end: --turns: must be at least 1, not 0\n"
    assert (done.returncode, done.stderr) == (2, said)
