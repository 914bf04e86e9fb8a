"""Gates that close channels while a network trains, in whole runs."""

import copy
import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import tpp
from train.config.config import load_config
from train.dry_run import dry_run

ZERO1 = Path(__file__).resolve().parents[2] / "launch" / "deepspeed" / "zero1.json"


@pytest.fixture
def gated(tiny_config):
    """From random weights in twelve steps, of which the last four have fixed gates."""
    tiny_config["method"] = {"name": "polarization", "open": 0.3, "fixed": 0.6, "activation": 300.0}
    tiny_config["model"]["num_classes"] = 4
    tiny_config["training"] |= {"accumulation": 2}
    tiny_config["checkpoints"] = {"every": "1 step"}
    momentum = {"lr": 0.05, "nesterov": True, "weight_decay": 1e-3}
    tiny_config["stages"] = {
        "regularize": {"epochs": 2, "optimizer": momentum, "ema": {"decay": 0.5}},
        "prune": {},
        "evaluate": {},
    }
    return tiny_config


def trained(config, stage="regularize"):
    return load_file(Path(config["output"]) / stage / "model.safetensors")


@pytest.mark.parametrize("how", ["two ranks", "ZeRO 1"])
def test_killed_it_goes_on_to_the_bit_and_pruning_changes_nothing(gated, run_main, how, tmp_path):
    ranks = 2 if how == "two ranks" else 1
    if how == "ZeRO 1":
        gated["training"]["deepspeed"] = str(ZERO1)
    broken = copy.deepcopy(gated)
    broken["output"] += "-broken"
    run_main(gated, ranks=ranks)
    # Once before gates are fixed, once after.
    for step in (4, 9):
        checkpoint = Path(broken["output"]) / "regularize" / "checkpoints" / f"step-{step:08}"
        run_main(broken, ranks=ranks, kill_when=checkpoint, expect=None)
        assert not (Path(broken["output"]) / "regularize" / "done.json").exists()
    run_main(broken, ranks=ranks)
    whole, again = trained(gated), trained(broken)
    assert whole.keys() == again.keys() and not any(".gate." in key for key in whole)
    for key, tensor in whole.items():
        assert torch.equal(tensor, again[key]), key

    folder = Path(gated["output"])
    plan = tpp.PruningPlan.load(folder / "regularize" / "plan.json")
    assert list(plan.filters) == [f"layer{n}.0.conv1" for n in (1, 2, 3)]
    assert 0 < sum(len(gone) for gone in plan.pruned.values()) < 112
    stages = json.loads((folder / "results.json").read_text())["stages"]
    assert stages["evaluate"]["top1"] == stages["regularize"]["top1"]
    assert stages["evaluate"]["loss"] == pytest.approx(stages["regularize"]["loss"], rel=1e-5)
    assert stages["evaluate"]["parameters"] < stages["regularize"]["parameters"]
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    told = [line for line in log if "gates_open" in line]
    assert {"loss/polarization", "loss/activation"} <= told[-1].keys()
    small = tpp.load_model(folder / "prune" / "model.safetensors")
    kept = [small.get_submodule(name).out_channels for name in plan.filters]
    assert sum(kept) == round(112 * told[-1]["gates_stay"])


def test_the_dry_run_says_that_it_is_a_reconstruction(gated, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(gated, sort_keys=False))
    dry_run(load_config(path))
    assert "Polarization: a reconstruction" in capsys.readouterr().out
