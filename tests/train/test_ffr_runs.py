"""Feature-flow regularisation in whole runs."""

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
from train.reporting.rows import summary_rows
from train.run_folder.results import Results


@pytest.fixture
def flow_config(tiny_config):
    """From random weights, in float32 and micro-batches."""
    stages = tiny_config["stages"]
    tiny_config["method"] = {"name": "ffr", "length": 0.3, "curvature": 0.2, "form": "angle"}
    tiny_config["model"] |= {"name": "cifar_resnet14", "num_classes": 4}
    tiny_config["training"] |= {"accumulation": 2}
    tiny_config["checkpoints"] = {"every": "2 steps"}
    tiny_config["stages"] = {
        "regularize": {"epochs": 1, "optimizer": {"lr": 0.05}},
        "prune": {},
        "finetune": stages["finetune"],
        "evaluate": {},
    }
    return tiny_config


def trained(config):
    return load_file(Path(config["output"]) / "regularize" / "model.safetensors")


def logged(config, stage):
    lines = map(json.loads, (Path(config["output"]) / "log.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == "train" and line["stage"] == stage]


def test_from_random_weights_to_a_smaller_network(flow_config, run_main, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(flow_config, sort_keys=False))
    dry_run(load_config(path))
    told = "FFR: a reconstruction: the published settings are not known"
    assert told in capsys.readouterr().out
    run_main(flow_config)
    terms = logged(flow_config, "regularize")
    assert all(line["loss/length"] > 0 and line["loss/curvature"] > 0 for line in terms)
    assert not any("loss/length" in line for line in logged(flow_config, "finetune"))
    folder = Path(flow_config["output"])
    small = tpp.load_model(folder / "finetune" / "model.safetensors")
    assert small.layer3[0].conv1.out_channels == 32
    results = Results.model_validate(json.loads((folder / "results.json").read_text()))
    assert summary_rows(results)[-1].network == "FFR (a reconstruction)"


def test_killed_it_goes_on_to_the_bit_and_without_weights_it_is_plain(flow_config, run_main):
    other, none, plain = (copy.deepcopy(flow_config) for _ in range(3))
    for config, name in ((other, "-other"), (none, "-none"), (plain, "-plain")):
        config["output"] += name
        config["stages"] = {"regularize": config["stages"]["regularize"]}
    flow_config["stages"] = other["stages"]
    none["method"] |= {"length": 0.0, "curvature": 0.0}
    plain["stages"] = {"dense": plain["stages"]["regularize"]}
    run_main(flow_config)
    checkpoint = Path(other["output"]) / "regularize" / "checkpoints" / "step-00000002"
    run_main(other, kill_when=checkpoint, expect=None)
    run_main(other)
    for config in (none, plain):
        run_main(config)
    whole, broken, without = (trained(config) for config in (flow_config, other, none))
    ordinary = load_file(Path(plain["output"]) / "dense" / "model.safetensors")
    for key, tensor in whole.items():
        assert torch.equal(tensor, broken[key]), key
        assert torch.equal(without[key], ordinary[key]), key
    assert any(not torch.equal(whole[key], ordinary[key]) for key in whole)


def test_two_ranks_have_terms_of_their_own_images(flow_config, run_main):
    """Their mean is that of one process as far as BatchNorm lets it be."""
    two = copy.deepcopy(flow_config)
    two["output"] += "-two"
    for config in (flow_config, two):
        config["stages"] = {"regularize": config["stages"]["regularize"]}
        config["training"] |= {"sync_batchnorm": True, "accumulation": 1}
    run_main(flow_config)
    run_main(two, ranks=2)
    one, other = (logged(config, "regularize")[0] for config in (flow_config, two))
    for key in ("loss/length", "loss/curvature"):
        assert other[key] == pytest.approx(one[key], rel=1e-3)
