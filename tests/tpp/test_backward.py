"""Under DeepSpeed the penalty counts as it is, or the backward pass says what would be right."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_worker import ACCUMULATIONS, PLAN, STAGES, STEP, network

import tpp
from tpp.regularization.schedule import GrowthSchedule

WORKER = Path(__file__).with_name("backward_worker.py")
PARTS = ACCUMULATIONS[1]


@pytest.fixture(scope="module")
def found(forks, tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("backward")
    done = forks.run(1, WORKER, [str(folder)], folder, 240)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("stage", STAGES)
def test_the_documented_loop_gives_the_exact_gradient(found, stage):
    for parts in ACCUMULATIONS:
        assert found[f"{stage} {parts} as_documented"] < 1e-5


@pytest.mark.parametrize("stage", STAGES)
def test_a_backward_pass_past_the_engine(found, stage):
    """With one micro-batch there is nothing to divide, and nothing is refused."""
    alone, divided = (found[f"{stage} {parts} by_the_loss"] for parts in (1, PARTS))
    if stage == 0:  # which DeepSpeed itself refuses
        assert alone.startswith("RuntimeError: Direct calls to tensor.backward() are not supported")
    else:
        assert alone < 1e-5
    assert divided.startswith("UserError: under DeepSpeed loss.backward() divides the task's loss")
    assert f"({PARTS})" in divided and "call engine.backward(loss) once per micro" in divided


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("parts", ACCUMULATIONS)
def test_a_backward_pass_of_the_penalty_alone(found, stage, parts):
    assert found[f"{stage} {parts} by_the_penalty"].startswith(
        "UserError: the penalty has a backward pass of its own"
    )
    twice = found[f"{stage} {parts} twice"]
    if stage == 0:  # which keeps both
        assert twice < 1e-5
    else:
        assert twice.startswith("UserError: the penalty has a backward pass of its own")


def test_without_deepspeed_a_penalty_may_go_backward_alone():
    """DeepSpeed may be imported, by Accelerate or by a test before."""
    net = network()
    growth = GrowthSchedule(delta=0.1, tau=1.0, update_interval=1)
    regularizer = tpp.Regularizer(net, PLAN, growth=growth, example_input=torch.zeros(1, 3, 8, 8))
    regularizer.penalty(STEP).backward()
    assert net.conv1.weight.grad is not None and net.conv1.weight.grad.norm() > 0
