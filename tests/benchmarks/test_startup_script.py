"""The start-up benchmark ends commands at their first line, and the script runs."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.startup import MODULES, TORCH, first_line, make_data
from data_pipelines.images.image_index import open_images
from data_pipelines.images.source import ON_ERROR
from data_pipelines.sets.small_sets import IMAGENETTE_SIZES

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.startup", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)


@pytest.mark.processes
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_command_is_ended_at_its_first_line(stream):
    code = f"import sys, time; print('there', file=sys.{stream}, flush=True); time.sleep(60)"
    line, seconds, processor = first_line(["-c", code])
    assert line == "there\n" and 0 < processor <= seconds + 0.05 < 30


def test_help_at_tiny_size(tmp_path):
    output = tmp_path / "startup.json"
    output.write_text('{"first_line": "kept"}')
    done = run("--tiny", "--parts", "help", "--output", str(output))
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())
    assert results["first_line"] == "kept"
    rows = results["help"]
    assert list(rows) == [TORCH, "train/main.py", "tpp", *MODULES]
    for name in MODULES:
        row = rows[name]
        assert row["line"].startswith(f"usage: python -m {name} ")
        assert row["ratio"] == pytest.approx(row["seconds"] / rows[TORCH]["seconds"])
        # Of the processor's, as this machine may be busy: no --help waits for PyTorch.
        assert row["processor_ratio"] < 0.5, name
    assert rows[TORCH]["ratio"] == 1 and "launch.check" in done.stdout


def test_first_lines_at_tiny_size(tmp_path):
    done = run("--tiny", "--parts", "first_line", "--output", str(tmp_path / "startup.json"))
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "startup.json").read_text())["first_line"]
    assert rows["train/main.py --dry-run"]["line"].startswith("run folder  ")
    mistake = rows["train/main.py, a wrong key"]
    assert mistake["line"].endswith("trainin: unknown key; did you mean 'training'?")
    # Told before anything but PyTorch is there: Accelerate, DALI, TensorBoard, its compiler.
    assert mistake["processor_ratio"] < 1.5
    assert rows["tpp.describe, resnet50"]["line"].startswith("layer ")


@pytest.mark.processes
def test_first_steps_at_tiny_size(tmp_path):
    output = tmp_path / "startup.json"
    done = run("--tiny", "--parts", "first_step", "--ranks", "2", "--output", str(output))
    assert done.returncode == 0, done.stderr
    rows = json.loads(output.read_text())["first_step"]
    assert list(rows) == ["2 ranks"]
    row = rows["2 ranks"]
    # A run has to do all that the loaders do, and a step.
    assert 0 < row["loader_seconds"] < row["seconds"]
    assert row["above"] == pytest.approx(row["seconds"] - row["loader_seconds"])


def test_the_index_made_for_first_steps_is_one_that_runs_take(tmp_path):
    make_data(tmp_path / "train", 30, 10)
    index = open_images(tmp_path / "train")
    assert (len(index), len(index.classes)) == (30, 10)
    place = index.location(29)
    data = Path(place.path).read_bytes()[place.offset :][: place.length]
    assert Image.open(io.BytesIO(data)).size == (500, 375)


@pytest.mark.parametrize("ranks", ["0", "1,two", ""])
def test_numbers_of_ranks(ranks):
    done = run("--parts", "first_step", "--ranks", ranks)
    assert done.returncode == 2
    assert done.stderr == f"error: --ranks {ranks}: must be numbers of ranks, such as 1,16\n"


@pytest.mark.parametrize(
    ("command", "option", "values"),
    [
        (("train.evaluate",), "--on-error", ON_ERROR),
        (("data_pipelines.prepare", "imagenette"), "--size", IMAGENETTE_SIZES),
    ],
)
def test_parsers_write_out_what_they_would_have_to_wait_for(command, option, values):
    done = subprocess.run(
        [sys.executable, "-m", *command, "--help"], capture_output=True, text=True, cwd=ROOT
    )
    assert f"{option} {{{','.join(values)}}}" in done.stdout


def test_unknown_parts():
    done = run("--parts", "help,speed")
    assert done.returncode == 2
    assert (
        done.stderr == "error: --parts: no part 'speed'; there are: first_line, help, first_step\n"
    )
