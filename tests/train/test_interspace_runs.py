"""Interspace pruning in whole runs."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tpp

ZERO1 = Path(__file__).resolve().parents[2] / "launch" / "deepspeed" / "zero1.json"


@pytest.fixture
def sparse_config(tiny_config):
    """From random weights, 70% of them gone from the first step on."""
    tiny_config["method"] = {"name": "interspace", "sparsity": 0.7}
    tiny_config["model"]["num_classes"] = 4
    tiny_config["training"] |= {"accumulation": 2}
    tiny_config["checkpoints"] = {"every": "2 steps"}
    tiny_config["stages"] = {
        "finetune": {"epochs": 1, "optimizer": {"lr": 0.05}, "ema": {"decay": 0.9}},
        "evaluate": {},
    }
    return tiny_config


def trained(config):
    return load_file(Path(config["output"]) / "finetune" / "model.safetensors")


@pytest.mark.parametrize("how", ["one rank", "two ranks", "ZeRO 1"])
def test_killed_it_goes_on_to_the_bit_and_the_file_is_plain(sparse_config, run_main, how):
    ranks = 2 if how == "two ranks" else 1
    if how == "ZeRO 1":
        sparse_config["training"]["deepspeed"] = str(ZERO1)
    broken = copy.deepcopy(sparse_config)
    broken["output"] += "-broken"
    run_main(sparse_config, ranks=ranks)
    checkpoint = Path(broken["output"]) / "finetune" / "checkpoints" / "step-00000002"
    run_main(broken, ranks=ranks, kill_when=checkpoint, expect=None)
    run_main(broken, ranks=ranks)
    whole, again = trained(sparse_config), trained(broken)
    assert whole.keys() == again.keys()
    for key, tensor in whole.items():
        assert torch.equal(tensor, again[key]), key
    model = tpp.load_model(Path(sparse_config["output"]) / "finetune" / "model.safetensors")
    assert not any("original" in key for key in model.state_dict())
    lines = (Path(sparse_config["output"]) / "log.jsonl").read_text().splitlines()
    told = [line for line in map(json.loads, lines) if "interspace_sparsity" in line]
    # The file is dense: what is left is in the results, of the evaluation that ends the run too.
    stages = json.loads((Path(sparse_config["output"]) / "results.json").read_text())["stages"]
    left = round(told[-1]["interspace_left"])
    plain = sum(p.numel() for p in model.parameters() if p.dim() < 2)
    for stage in ("finetune", "evaluate"):
        assert stages[stage]["nonzero_parameters"] == left + plain
        assert stages[stage]["sparsity"] == pytest.approx(0.7, abs=1e-4)
    for line in told:
        assert line["interspace_sparsity"] == pytest.approx(0.7, abs=1e-4)
