"""Steps that would ruin the network: stopped, left out, or gone back from; whole runs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from poison_main import Poison
from safetensors.torch import load_file

from data_pipelines.images.image_index import open_images
from data_pipelines.images.order import permutation
from tpp.checkpoints.training_state import read_state, state_folders
from tpp.methods import available_methods
from train.distributed.accelerator import make_engine
from train.loop.bad_steps import StepCheck

BATCH = 16
WORKER = Path(__file__).parent / "poison_main.py"


@pytest.fixture
def poisoned(tiny_config, tmp_path, monkeypatch, run_inside):
    """Run 12 steps in this process with ruined ones; returns the exit code and the stage's folder.

    Its checkpoints are kept for good, so that they can be looked at after the end.
    """
    monkeypatch.setitem(available_methods(), "poison", Poison)
    number = iter(range(100))

    def run(expect: int = 0, every: int = 1, **settings: Any) -> Path:
        training = {key: settings.pop(key) for key in [*settings] if key not in POISON}
        config = {
            **tiny_config,
            "output": str(tmp_path / f"run{next(number)}"),
            "training": {**tiny_config["training"], **training},
            "checkpoints": {"every": f"{every} steps", "keep_every": 1},
            "stages": {
                "finetune": {
                    "epochs": 2,
                    "optimizer": {"lr": 0.02},
                    "method": {"name": "poison", **settings},
                }
            },
        }
        run_inside(config, expect=expect)
        return Path(config["output"]) / "finetune"

    return run


POISON = ("steps", "inputs", "slope", "rank")


def steps_of(stage: Path) -> list[int]:
    return [int(path.name[5:]) for path in reversed(state_folders(stage / "checkpoints"))]


def state(stage: Path, step: int) -> tuple[dict, dict]:
    found = read_state(stage / "checkpoints" / f"step-{step:08d}")
    return found.model, {k: v["momentum_buffer"] for k, v in found.optimizer["state"].items()}


def logged(stage: Path, event: str) -> list[dict[str, Any]]:
    lines = (stage.parent / "log.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry["event"] == event]


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def finite(tensors: dict) -> bool:
    return all(torch.isfinite(tensor).all() for tensor in tensors.values())


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"inputs": "nan"}, "the loss is nan"),
        ({"slope": "inf"}, "the loss is "),
        ({"slope": "1000000.0", "max_gradient_norm": 1000.0}, ", above 1000"),
    ],
)
def test_a_bad_step_stops_the_run_and_names_its_images(poisoned, tiny_data, capsys, how, says):
    """Also when it is noticed only at the next report: no ruined weights become a checkpoint."""
    stage = poisoned(expect=2, every=5, steps=[7], log_every=12, **how)
    error = capsys.readouterr().err
    path = stage / "bad_step-00000008.json"
    assert error.startswith("error: stage finetune: step 8: ") and says in error
    assert len(error.splitlines()) == 1 and str(path) in error
    assert f"the last good checkpoint is {stage / 'checkpoints' / 'step-00000005'}" in error
    assert steps_of(stage) == [5] and finite(state(stage, 5)[0])
    # Which images these are by the order's definition: 96 images, so step 7 is in epoch 1.
    index = open_images(tiny_data / "train")
    samples = np.arange(7 * BATCH, 8 * BATCH) - 96
    expected = [f"{tiny_data}/train/{index.files[i]}" for i in permutation(0, 1, 96)[samples]]
    found = json.loads(path.read_text())
    assert found["images"] == expected and found["step"] == 8
    assert all(Path(image).is_file() for image in expected)


def test_a_skipped_step_changes_nothing(poisoned, capsys):
    """Neither weights nor momentum nor BatchNorm's statistics, which the forward pass changes."""
    stage = poisoned(on_bad_step="skip", steps=[4, 5], inputs="nan", max_bad_steps=2, log_every=6)
    assert steps_of(stage) == [*range(1, 12)]
    for part in (0, 1):
        assert equal(state(stage, 4)[part], state(stage, 6)[part])
        assert not equal(state(stage, 4)[part], state(stage, 7)[part])
    assert finite(load_file(stage / "model.safetensors"))
    assert capsys.readouterr().out.count("; left out, its images are named in ") == 2
    assert [entry["step"] for entry in logged(stage, "bad_step")] == [5, 6]
    # Nor the averages that are shown.
    assert [entry["step"] for entry in logged(stage, "train")] == [6, 12]
    assert all(np.isfinite(entry["loss"]) for entry in logged(stage, "train"))


def test_rolling_back_is_leaving_out_all_since_the_checkpoint(poisoned, capsys):
    one_by_one = poisoned(on_bad_step="skip", steps=[5, 6, 7], inputs="nan")
    back = poisoned(on_bad_step="rollback", every=5, steps=[7], inputs="nan")
    assert "back to the weights after 5 steps; steps 6 to 8 are left out" in capsys.readouterr().out
    for part in (0, 1):
        assert equal(state(back, 10)[part], state(one_by_one, 10)[part])
    assert equal(load_file(back / "model.safetensors"), load_file(one_by_one / "model.safetensors"))


def test_rolling_back_to_the_start_of_the_stage(poisoned):
    skipped = poisoned(on_bad_step="skip", steps=[0, 1, 2], inputs="nan")
    back = poisoned(on_bad_step="rollback", every=5, steps=[2], inputs="nan")
    assert equal(load_file(back / "model.safetensors"), load_file(skipped / "model.safetensors"))


@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_only_so_many_steps_are_left_out(poisoned, capsys, action):
    stage = poisoned(expect=2, on_bad_step=action, steps=[3, 6, 8], inputs="nan", max_bad_steps=2)
    error = capsys.readouterr().err
    assert "step 9: " in error and "training.max_bad_steps allows 2 of them" in error
    assert steps_of(stage)[-1] == 8
    assert read_state(state_folders(stage / "checkpoints")[0]).extra["bad_steps"] == 2


def test_two_ranks_leave_out_the_same_step(tiny_config, run_main):
    """Only rank 1 has bad images; both meet them in the averaged gradient."""
    tiny_config["training"] |= {"on_bad_step": "skip", "log_every": 1}
    tiny_config["checkpoints"] = {"every": "1 step", "keep_every": 1}
    method = {"name": "poison", "steps": [2], "inputs": "nan", "rank": 1}
    finetune = {"epochs": 1, "optimizer": {"lr": 0.02}, "method": method}
    tiny_config["stages"] = {"finetune": finetune}
    run_main(tiny_config, ranks=2, script=WORKER)
    stage = Path(tiny_config["output"]) / "finetune"
    assert equal(state(stage, 2)[0], state(stage, 3)[0])
    assert [entry["step"] for entry in logged(stage, "bad_step")] == [3]
    assert finite(load_file(stage / "model.safetensors"))


@pytest.mark.parametrize("clip", [None, 0.5, 1e6])
def test_the_gradient_norm_is_that_of_all_parameters(clip):
    """Before clipping, which makes the step's gradient as long as asked where it is longer."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Linear(3, 2))
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine = make_engine(Accelerator(cpu=True), model, optimizer, clip=clip)
    engine.backward(engine.model(torch.randn(4, 5)).square().sum(), last=True)
    every = torch.cat([p.grad.flatten() for p in model.parameters()]).double()
    length = every.square().sum().sqrt().item()
    assert 0.5 < length < 1e6
    assert engine.gradient_norm().item() == pytest.approx(length, rel=1e-6)
    engine.step()
    moved = torch.cat([(b - p).flatten() for b, p in zip(before, model.parameters(), strict=True)])
    assert moved.norm().item() == pytest.approx(min(length, clip or length), rel=1e-4)
    assert all(p.grad is None for p in model.parameters())


def test_the_first_bad_step_is_the_one_that_is_told():
    model = torch.nn.Linear(2, 1)
    check = StepCheck(model, max_norm=10.0, at_once=False)
    for step, size in enumerate([1.0, 2.0, 50.0, torch.nan, 60.0]):
        check(step, torch.tensor(size), torch.tensor(size))
    bad = check.first_bad()
    assert (bad.step, bad.loss, bad.gradient_norm) == (3, 50, 50)
    assert bad.reason(10.0) == "the gradient's norm is 50, above 10"


def test_a_loss_scaler_may_meet_infinite_gradients():
    """It leaves such steps out by itself; a loss that is not finite is still bad."""
    model = torch.nn.Linear(2, 1)
    check = StepCheck(model, max_norm=None, at_once=False, scaled=True)
    infinite = torch.tensor(torch.inf)
    check(0, torch.tensor(1.0), infinite)
    assert check.first_bad() is None
    check(1, infinite, infinite)
    assert check.first_bad().step == 2
