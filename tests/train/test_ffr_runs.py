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
    assert all(line["loss/flow_length"] > 0 and line["loss/flow_curvature"] > 0 for line in terms)
    assert not any("loss/flow_length" in line for line in logged(flow_config, "finetune"))
    folder = Path(flow_config["output"])
    small = tpp.load_model(folder / "finetune" / "model.safetensors")
    assert small.layer3[0].conv1.out_channels == 32
    results = Results.model_validate(json.loads((folder / "results.json").read_text()))
    assert summary_rows(results)[-1].network == "FFR (a reconstruction)"


def test_without_weights_it_is_plain_training(flow_config, run_main):
    flow_config["stages"] = {"regularize": flow_config["stages"]["regularize"]}
    plain = copy.deepcopy(flow_config)
    flow_config["method"] |= {"length": 0.0, "curvature": 0.0}
    plain["output"] += "-plain"
    plain["stages"] = {"dense": plain["stages"]["regularize"]}
    for config in (flow_config, plain):
        run_main(config)
    ordinary = load_file(Path(plain["output"]) / "dense" / "model.safetensors")
    for key, tensor in trained(flow_config).items():
        assert torch.equal(tensor, ordinary[key]), key
