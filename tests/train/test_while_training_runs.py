"""Filters that go in the middle of a training run, in whole runs."""

import copy
import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import tpp
from tpp.channels.removal import prune_model
from train.config.config import load_config
from train.dry_run import dry_run

ZERO1 = Path(__file__).resolve().parents[2] / "launch" / "deepspeed" / "zero1.json"


@pytest.fixture
def thinning(tiny_config):
    """From random weights; three events in twelve steps, then nothing is left to prune."""
    stages = tiny_config["stages"]
    tiny_config["method"] = {"name": "while_training", "events": 3, "start": 0.0, "end": 0.75}
    tiny_config["model"]["num_classes"] = 4
    tiny_config["checkpoints"] = {"every": "1 step"}
    momentum = {"lr": 0.05, "nesterov": True, "weight_decay": 1e-3}
    tiny_config["stages"] = {
        "regularize": {"epochs": 2, "optimizer": momentum},
        "prune": {},
        "finetune": stages["finetune"],
        "evaluate": {},
    }
    return tiny_config


def trained(config, stage="regularize"):
    return load_file(Path(config["output"]) / stage / "model.safetensors")


def plan_of(config):
    return tpp.PruningPlan.load(Path(config["output"]) / "regularize" / "plan.json")


def test_filters_go_three_times_and_pruning_has_nothing_left(thinning, run_main, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(thinning, sort_keys=False))
    dry_run(load_config(path))
    told = capsys.readouterr().out
    assert "Pruned while training: a reconstruction" in told
    assert "filters go while it trains: " in told and "% of the multiply-adds of a stage" in told
    printed = run_main(thinning).stdout
    steps = [line.split()[2] for line in printed.splitlines() if "filters removed," in line]
    assert steps == ["3:", "6:", "9:"]
    assert "stage 'regularize' has removed the filters already" in printed
    folder = Path(thinning["output"])
    small = tpp.load_model(folder / "regularize" / "model.safetensors")
    assert small.layer3[0].conv1.out_channels == 32
    one, other = trained(thinning), trained(thinning, "prune")
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    plan = tpp.PruningPlan.load(folder / "regularize" / "plan.json")
    assert [len(gone) for gone in plan.pruned.values()] == [8, 16, 32]
    stages = json.loads((folder / "results.json").read_text())["stages"]
    assert stages["evaluate"]["speedup"] > 1.9


@pytest.mark.parametrize("how", ["killed", "two ranks, activations", "ZeRO 1, activations"])
def test_it_goes_on_to_the_bit_from_between_events(thinning, run_main, how):
    ranks = 2 if "two ranks" in how else 1
    thinning["training"] |= {"accumulation": 2}
    thinning["stages"] = {"regularize": thinning["stages"]["regularize"]}
    if "ZeRO 1" in how:
        thinning["training"]["deepspeed"] = str(ZERO1)
    if "activations" in how:
        thinning["method"]["criterion"] = "activation"
    broken = copy.deepcopy(thinning)
    broken["output"] += "-broken"
    run_main(thinning, ranks=ranks)
    checkpoint = Path(broken["output"]) / "regularize" / "checkpoints" / "step-00000007"
    run_main(broken, ranks=ranks, kill_when=checkpoint, expect=None)
    assert not (Path(broken["output"]) / "regularize" / "done.json").exists()
    run_main(broken, ranks=ranks)
    assert plan_of(thinning) == plan_of(broken)
    whole, again = trained(thinning), trained(broken)
    assert whole.keys() == again.keys()
    for key, tensor in whole.items():
        assert torch.equal(tensor, again[key]), key


def test_one_event_at_the_end_is_pruning_what_was_trained(thinning, run_main):
    plain, nothing = copy.deepcopy(thinning), copy.deepcopy(thinning)
    thinning["method"] |= {"events": 1, "end": 1.0}
    thinning["stages"] = {"regularize": thinning["stages"]["regularize"]}
    plain["output"] += "-plain"
    plain["stages"] = {"dense": plain["stages"]["regularize"]}
    nothing["output"] += "-nothing"
    nothing["stages"] = thinning["stages"]
    nothing["pruning"] = {"ratios": {"layer*.conv1": 0.0}}
    for config in (thinning, plain, nothing):
        run_main(config)
    dense = tpp.load_model(Path(plain["output"]) / "dense" / "model.safetensors")
    plan = tpp.Selection({"layer*.conv1": 0.5}).select(dense)
    truth, found = prune_model(dense, plan).state_dict(), trained(thinning)
    assert truth.keys() == found.keys()
    kept = trained(nothing)
    for key, tensor in truth.items():
        assert torch.equal(tensor, found[key]), key
        assert torch.equal(dense.state_dict()[key], kept[key]), key


def test_two_ranks_remove_what_one_does_by_the_activations_of_all_images(thinning, run_main):
    """After three steps, before what ranks round otherwise has grown."""
    thinning["stages"] = {"regularize": thinning["stages"]["regularize"] | {"epochs": 0.5}}
    thinning["training"]["sync_batchnorm"] = True
    thinning["method"] |= {"criterion": "activation", "events": 1, "end": 1.0}
    plans = []
    for ranks in (1, 2):
        config = copy.deepcopy(thinning)
        config["output"] += f"-{ranks}"
        printed = run_main(config, ranks=ranks).stdout
        assert printed.count("filters removed,") == 1
        plans.append(plan_of(config))
        assert trained(config)["layer3.0.conv1.weight"].shape[0] == 32
    assert plans[0] == plans[1]
