"""rec-LRA in whole runs."""

import copy
import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import tpp
from tpp.common.errors import UserError
from train.config.config import load_config
from train.dry_run import dry_run
from train.run_folder.same_run import stage_settings

ZERO1 = Path(__file__).resolve().parents[2] / "launch" / "deepspeed" / "zero1.json"


@pytest.fixture
def local_config(tiny_config):
    """A dense stage in micro-batches, and an evaluation."""
    tiny_config["method"] = {"name": "rec_lra", "noise": 0.1}
    args = {"depth": 5, "width": 12, "skip": 2, "channels": 3, "image_size": 32}
    tiny_config["model"] = {"name": "plain_mlp", "num_classes": 4, "args": args}
    tiny_config["training"] |= {"accumulation": 2}
    tiny_config["checkpoints"] = {"every": "2 steps"}
    optimizer = {"name": "adamw", "lr": 0.002}
    tiny_config["stages"] = {
        "dense": {"epochs": 1, "optimizer": optimizer, "ema": {"decay": 0.9}},
        "evaluate": {},
    }
    return tiny_config


def file_of(config):
    return Path(config["output"]) / "dense" / "model.safetensors"


@pytest.mark.parametrize("deepspeed", [None, ZERO1], ids=["DDP", "ZeRO 1"])
def test_killed_it_goes_on_to_the_bit_and_the_file_is_plain(local_config, run_main, deepspeed):
    if deepspeed is not None:
        local_config["training"]["deepspeed"] = str(deepspeed)
    broken = copy.deepcopy(local_config)
    broken["output"] += "-broken"
    run_main(local_config, ranks=2)
    checkpoint = Path(broken["output"]) / "dense" / "checkpoints" / "step-00000002"
    run_main(broken, ranks=2, kill_when=checkpoint, expect=None)
    assert "resumed after" in run_main(broken, ranks=2).stdout
    whole, again = load_file(file_of(local_config)), load_file(file_of(broken))
    assert whole.keys() == again.keys()
    assert any(key.startswith("raw:") for key in whole)
    for key, tensor in whole.items():
        assert torch.equal(tensor, again[key]), key
    # E is in the checkpoints, and not in the network.
    assert not any("errors" in key for key in tpp.load_model(file_of(local_config)).state_dict())
    lines = map(json.loads, (Path(local_config["output"]) / "log.jsonl").read_text().splitlines())
    found = [line["loss/discrepancy"] for line in lines if line["event"] == "train"]
    assert found and all(value > 0 for value in found)
    results = json.loads((Path(local_config["output"]) / "results.json").read_text())
    assert results["stages"]["dense"]["method"] == "rec_lra"
    assert results["stages"]["evaluate"]["loss"] == results["stages"]["dense"]["loss"]


def loaded(config, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return load_config(path)


@pytest.mark.parametrize("of_the_stage", [False, True])
def test_a_dense_stage_depends_on_it_where_it_has_a_say(
    local_config, tmp_path, of_the_stage, capsys
):
    if of_the_stage:
        local_config["stages"]["dense"]["method"] = local_config["method"]
        local_config["method"] = {"name": "l1"}
    config = loaded(local_config, tmp_path)
    settings = stage_settings(config, "dense")["stages"]["dense"]
    assert settings["method"] == {"name": "rec_lra", "noise": 0.1}
    dry_run(config)
    assert "rec-LRA: a reconstruction" in capsys.readouterr().out
    del local_config["stages"]["dense"]["ema"]
    local_config["stages"]["dense"]["method"] = None
    local_config["method"] = {"name": "l1"}
    assert (
        "method" not in stage_settings(loaded(local_config, tmp_path), "dense")["stages"]["dense"]
    )


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"method": {"name": "tpp"}}, r"stages\.dense\.method: 'tpp' has no say in the training"),
        ({"label_smoothing": 0.1}, r"stages\.dense\.label_smoothing: method 'rec_lra' goes with"),
        ({"loss": "bce"}, r"stages\.dense\.loss: method 'rec_lra' goes with plain"),
    ],
)
def test_what_does_not_go_together_is_said_of_the_configuration(
    local_config, tmp_path, changes, told
):
    local_config["stages"]["dense"] |= changes
    with pytest.raises(UserError, match=told):
        loaded(local_config, tmp_path)


def test_a_network_that_is_no_chain_shows_in_the_dry_run(local_config, tmp_path):
    local_config["model"] = {"name": "cifar_resnet8", "num_classes": 4}
    with pytest.raises(UserError, match=r"^method\.name: rec_lra trains chains .* CifarResNet "):
        dry_run(loaded(local_config, tmp_path), ranks=1)
