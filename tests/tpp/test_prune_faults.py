"""A full disk, a kill or a bad plan leaves the input and an older output as they were."""

import hashlib
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tpp.checkpoints.model_file import load_model, save_model
from tpp.models.architecture import build_model

ROOT = Path(__file__).resolve().parents[2]
RATIO = "--ratio=layer*.conv1=0.5"


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def command(source, output, *arguments):
    return [
        *(sys.executable, "-m", "tpp.prune", "--checkpoint", str(source)),
        *("--output", str(output), "--overwrite", *arguments),
    ]


def run(source, output, *arguments):
    return subprocess.run(
        command(source, output, *arguments), cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.fixture
def source(tmp_path):
    torch.manual_seed(0)
    save_model(tmp_path / "dense.safetensors", build_model("cifar_resnet20", 10))
    return tmp_path / "dense.safetensors"


def test_a_full_disk_leaves_the_older_output(source, small_disk):
    output = small_disk / "pruned.safetensors"
    assert run(source, output, RATIO).returncode == 0
    before = digest(output)
    (small_disk / "filler").write_bytes(b"x" * (2 * 1024 * 1024 - output.stat().st_size - 100_000))
    done = run(source, output, "--ratio=layer*.conv1=0.25")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {output}: cannot write the checkpoint: ")
    assert "No space left on device" in done.stderr and len(done.stderr.splitlines()) == 1
    assert digest(output) == before
    assert sorted(path.name for path in small_disk.iterdir()) == ["filler", output.name]
    # With room again, it works.
    (small_disk / "filler").unlink()
    assert run(source, output, "--ratio=layer*.conv1=0.25").returncode == 0
    assert load_model(output).layer1[0].conv1.out_channels == 12


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"layer1.0.conv9": {"filters": 16, "pruned": [0]}}, "no Conv2d or Linear layer is called"),
        ({"layer1.0.conv1": {"filters": 64, "pruned": [0]}}, "is for 64 filters, the network has"),
        ({"layer1.0.conv1": {"filters": 16, "pruned": [99]}}, "indices must be in 0..15"),
        ({"layer1.0.conv1": {"filters": 16, "pruned": [1, 1]}}, "without repeats"),
        ({"layer1.0.conv2": {"filters": 16, "pruned": [0]}}, "added to or multiplied with those"),
        ({"linear": {"filters": 10, "pruned": [0]}}, "are the network's output and must stay"),
        ({"layer1.0.conv1": {"filters": 16, "pruned": list(range(16))}}, "must stay"),
    ],
)
def test_a_bad_plan_leaves_everything(source, tmp_path, monkeypatch, capsys, plan, message):
    from tpp import prune
    from tpp.common.errors import run_command

    output = tmp_path / "pruned.safetensors"
    output.write_bytes(b"an older file")
    before = digest(source)
    content = {"format": "tpp-pruning-plan", "version": 1, "layers": plan}
    (tmp_path / "plan.json").write_text(json.dumps(content))
    arguments = command(source, output, "--plan", str(tmp_path / "plan.json"))
    monkeypatch.setattr(sys, "argv", arguments[2:])
    with pytest.raises(SystemExit) as ended:
        run_command(prune.main)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and message in error and len(error.splitlines()) == 1
    assert output.read_bytes() == b"an older file" and digest(source) == before
    assert len(list(tmp_path.iterdir())) == 3


def test_a_kill_at_any_moment_leaves_a_whole_output(tmp_path):
    """Killed while it prunes, again and again: what is there is the older file or the new one."""
    torch.manual_seed(0)
    source, output = tmp_path / "dense.safetensors", tmp_path / "pruned.safetensors"
    save_model(source, build_model("resnet18", 1000))
    ratios = ["--ratio=layer*.conv1=0.25", "--ratio=layer*.conv1=0.5"]
    whole = {}
    for ratio in ratios:
        started = time.monotonic()
        assert run(source, output, ratio).returncode == 0
        lasts = time.monotonic() - started
        whole[digest(output)] = ratio
    before, moments, killed = digest(source), random.Random(0), 0
    for number in range(8):
        process = subprocess.Popen(
            command(source, output, ratios[number % 2]),
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        # Half of them while a file is being written, which is short.
        deadline = time.monotonic() + moments.uniform(0.5, 1.0) * lasts
        while process.poll() is None and time.monotonic() < deadline:
            if number % 2 and any(path.suffix == ".tmp" for path in tmp_path.iterdir()):
                time.sleep(moments.uniform(0, 0.05))
                break
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        assert digest(output) in whole and digest(source) == before
        load_model(output)
    assert killed >= 4
