"""Both sides of the penalty's benchmark compute the same, and the script runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.penalty import STEP, textbook_penalty
from tpp.models.architecture import build_model
from tpp.regularization.regularizer import Regularizer
from tpp.selection.selection import select_filters

ROOT = Path(__file__).resolve().parents[2]


def test_the_textbook_way_is_the_same_penalty():
    torch.manual_seed(0)
    model = build_model("cifar_resnet8", 10)
    plan = select_filters(model, {"layer*.conv1": 0.6})
    found = []
    for make_loss in (
        lambda: textbook_penalty(model, plan, 1.0),
        lambda: Regularizer(model, plan).penalty(10 * STEP),
    ):
        model.zero_grad(set_to_none=True)
        loss = make_loss()
        loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append((loss.item(), gradients))
    (textbook, their_gradients), (ours, our_gradients) = found
    assert ours == pytest.approx(textbook, rel=1e-5) and ours > 0
    assert our_gradients.keys() == their_gradients.keys()
    for name, gradient in their_gradients.items():
        assert (our_gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_the_script_runs_at_tiny_sizes(tmp_path):
    output = tmp_path / "penalty.json"
    command = [sys.executable, "-m", "benchmarks.penalty", "--tiny", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())
    row = results["textbook"]["ResNet-34 1.32x"]
    assert row["textbook_ms"] > 0 and row["ranks_4_ms"] > 0 and row["times_faster"] > 0
    assert results["share"]["batch 2"]["share_of_step"] > 0
    memory = results["memory"]["batch 2, each of two ranks"]
    weights_and_momentum = 2 * 25_557_032 * 4 / 2**20
    assert weights_and_momentum < memory["peak_mib"] < memory["peak_with_penalty_mib"]
    assert "times faster" in done.stdout
