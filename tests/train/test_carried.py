"""Momentum that goes on from one stage into the next, cut and masked along with the weights."""

import copy
import json
from pathlib import Path

import pytest
import torch

import tpp
from tpp.checkpoints.model_file import read_checkpoint
from tpp.checkpoints.training_state import read_state, state_folder
from train.config.config import Config

ZERO1 = Path(__file__).resolve().parents[2] / "launch" / "deepspeed" / "zero1.json"
SGD = {"lr": 0.02, "momentum": 0.9}


@pytest.fixture
def two_stages(tiny_config):
    """Two epochs from a file in two stages, one after the other."""
    tiny_config["method"] = {"name": "l1"}
    tiny_config["model"]["num_classes"] = 4
    tiny_config["stages"] = {
        "dense": {"epochs": 1, "optimizer": SGD},
        "more": {"kind": "finetune", "epochs": 1, "optimizer": SGD, "carry_optimizer": True},
    }
    return tiny_config


def companions_of(config, stage):
    return read_checkpoint(Path(config["output"]) / stage / "model.safetensors")


@pytest.mark.parametrize("optimizer", [SGD, {"name": "adamw", "lr": 0.01}])
def test_momentum_goes_on_as_it_was(two_stages, run_main, optimizer):
    """Against a run whose second stage begins without it, after one step."""
    for stage in two_stages["stages"].values():
        stage["optimizer"] = optimizer
    two_stages["checkpoints"] = {"every": "1 step", "keep": 99, "keep_every": 1}
    without = copy.deepcopy(two_stages)
    without["output"] += "-without"
    del without["stages"]["more"]["carry_optimizer"]
    run_main(two_stages)
    run_main(without)
    _, companions, _ = companions_of(two_stages, "dense")
    names = {"optimizer.momentum_buffer"}
    if optimizer is not SGD:
        names = {"optimizer.exp_avg", "optimizer.exp_avg_sq", "optimizer.step"}
    assert set(companions) == names
    _, none, _ = companions_of(without, "dense")
    assert not none
    first, other = (
        read_state(state_folder(Path(config["output"]) / "more" / "checkpoints", 1)).optimizer
        for config in (two_stages, without)
    )
    key = "momentum_buffer" if optimizer is SGD else "exp_avg"
    before = companions[f"optimizer.{key}"]
    assert len(before) == len(first["state"]) == len(other["state"])
    model = tpp.load_model(Path(two_stages["output"]) / "dense" / "model.safetensors")
    for number, (name, _) in enumerate(model.named_parameters()):
        # Of the same weights and images: all that differs is 0.9 times what was carried.
        found = first["state"][number][key] - other["state"][number][key]
        torch.testing.assert_close(found, 0.9 * before[name], rtol=1e-4, atol=1e-6, msg=name)
        if optimizer is not SGD:
            steps = companions["optimizer.step"][name]
            assert first["state"][number]["step"] == steps + 1 == 7


def test_zero_momentum_is_no_momentum(two_stages, run_main):
    two_stages["stages"]["dense"]["optimizer"] = {**SGD, "momentum": 0.0}
    two_stages["stages"]["more"]["optimizer"] = {**SGD, "momentum": 0.0}
    done = run_main(two_stages, expect=2)
    assert "holds no optimiser's state" in done.stderr


@pytest.mark.parametrize("how", ["one rank", "two ranks", "ZeRO 1"])
def test_it_is_cut_and_masked_along(two_stages, run_main, how):
    stages = two_stages["stages"]
    two_stages["stages"] = {
        "dense": stages["dense"],
        "sparsify": {"sparsify": {"sparsity": 0.5}},
        "prune": {},
        "more": stages["more"],
    }
    if how == "ZeRO 1":
        two_stages["training"]["deepspeed"] = str(ZERO1)
    run_main(two_stages, ranks=2 if how == "two ranks" else 1)
    key = "optimizer.momentum_buffer"
    dense, _, _ = companions_of(two_stages, "dense")
    _, whole, _ = companions_of(two_stages, "dense")
    _, masked, _ = companions_of(two_stages, "sparsify")
    pruned, cut, _ = companions_of(two_stages, "prune")
    for name, momentum in whole[key].items():
        expected = momentum
        if name in masked["mask"]:
            expected = torch.where(masked["mask"][name].bool(), momentum, 0.0)
        assert torch.equal(masked[key][name], expected), name
        assert cut[key][name].shape == pruned[name].shape, name
    assert whole[key].keys() <= dense.keys()
    final, _, _ = companions_of(two_stages, "more")
    for name, stays in cut["mask"].items():
        assert not final[name][~stays.bool()].any(), name


def test_a_stage_done_before_is_told(two_stages, run_main):
    asked = copy.deepcopy(two_stages)
    del two_stages["stages"]["more"]
    run_main(two_stages)
    done = run_main(asked, expect=2)
    assert "stages.more.carry_optimizer" in done.stderr and "delete" in done.stderr
    results = json.loads((Path(asked["output"]) / "results.json").read_text())
    assert "more" not in results["stages"]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({"more": {}}, None),
        ({"dense": {"carry_optimizer": True}}, "no stage before it trains"),
        (
            {"more": {"optimizer": {"name": "adamw", "lr": 0.1}}},
            "adamw cannot go on with the state",
        ),
        ({"more": {"method": {"name": "interspace", "sparsity": 0.5}}}, "what interspace trains"),
        ({"check": {"kind": "evaluate", "carry_optimizer": True}}, "take no carry_optimizer"),
    ],
)
def test_where_nothing_can_be_carried(two_stages, stages, message):
    for name, change in stages.items():
        two_stages["stages"][name] = {**two_stages["stages"].get(name, {}), **change}
    if message is None:
        assert Config.model_validate(two_stages).stages["more"].carry_optimizer
        return
    with pytest.raises(ValueError, match=message):
        Config.model_validate(two_stages)
