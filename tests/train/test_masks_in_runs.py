"""Runs with masked weights: made without data, held by every stage, engine and restart."""

import copy
import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import tpp
from tpp.checkpoints.model_file import read_checkpoint
from tpp.checkpoints.sparsify_file import sparsify_checkpoint
from tpp.common.errors import UserError
from tpp.masks import SparsifySection, share_masked
from tpp.models.architecture import Architecture, build_model
from train.config.config import Config
from train.preflight import check_masks, check_methods

ZERO1 = Path(__file__).resolve().parents[2] / "launch" / "deepspeed" / "zero1.json"


@pytest.fixture
def sparse_config(tiny_config):
    """Dense, 80% of the weights masked, retrained, then pruned and retrained once more."""
    stages = tiny_config["stages"]
    tiny_config["method"] = {"name": "l1"}
    tiny_config["stages"] = {
        "dense": stages["dense"],
        "sparsify": {"sparsify": {"sparsity": 0.8}},
        "retrain": {"kind": "finetune", "epochs": 2, "optimizer": {"lr": 0.02}},
        "prune": {},
        "finetune": {"epochs": 1, "optimizer": {"lr": 0.02}},
        "evaluate": {},
    }
    return tiny_config


def masked(config, stage):
    """A stage's tensors and mask; nothing masked may be anything but zero."""
    tensors, companions, _ = read_checkpoint(Path(config["output"]) / stage / "model.safetensors")
    mask = {key: stays.bool() for key, stays in companions["mask"].items()}
    for key, stays in mask.items():
        assert not tensors[key][~stays].any(), key
    return tensors, mask


def test_a_mask_is_held_to_the_end_and_cut_with_the_filters(sparse_config, run_main):
    printed = run_main(sparse_config).stdout
    folder = Path(sparse_config["output"])
    first, mask = masked(sparse_config, "sparsify")
    dense = load_file(folder / "dense" / "model.safetensors")
    total, zeros = (
        sum(int(f(m)) for m in mask.values()) for f in (torch.numel, lambda m: (~m).sum())
    )
    assert zeros == round(0.8 * total)
    for key, tensor in dense.items():
        expected = tensor * mask[key] if key in mask else tensor
        assert torch.equal(first[key], expected), key
    retrained, same = masked(sparse_config, "retrain")
    assert all(torch.equal(mask[key], same[key]) for key in mask)
    assert any(not torch.equal(retrained[key], first[key]) for key in mask)
    final, cut = masked(sparse_config, "finetune")
    assert all(cut[key].shape == final[key].shape for key in cut)
    assert sum(m.numel() for m in cut.values()) < total
    assert tpp.load_model(folder / "finetune" / "model.safetensors")

    stages = json.loads((folder / "results.json").read_text())["stages"]
    assert stages["sparsify"]["top1"] is not None, "the next stage has measured it"
    for name in ("sparsify", "retrain"):
        stage = stages[name]
        assert stage["nonzero_parameters"] == stage["parameters"] - zeros
        assert stage["sparsity"] == pytest.approx(0.8, abs=1e-4)
        assert stage["nonzero_macs"] < 0.6 * stage["macs"]
    assert stages["evaluate"]["nonzero_parameters"] == stages["finetune"]["nonzero_parameters"]
    assert "sparsity" not in stages["dense"]
    assert f"{stages['retrain']['nonzero_parameters']:,} not masked (80.00% sparse)" in printed


@pytest.mark.parametrize("how", ["killed", "two ranks", "ZeRO 1"])
def test_masked_runs_end_alike(sparse_config, run_main, how):
    """With momentum, weight decay and accumulation: as one undisturbed process does."""
    sparse_config["training"] |= {"accumulation": 2}
    sparse_config["checkpoints"] = {"every": "2 steps"}
    del sparse_config["stages"]["prune"], sparse_config["stages"]["finetune"]
    other = copy.deepcopy(sparse_config)
    other["output"] += "-other"
    if how == "ZeRO 1":
        other["training"]["deepspeed"] = str(ZERO1)
    run_main(sparse_config)
    if how == "killed":
        checkpoint = Path(other["output"]) / "retrain" / "checkpoints" / "step-00000004"
        run_main(other, kill_when=checkpoint, expect=None)
        assert not (Path(other["output"]) / "retrain" / "done.json").exists()
    printed = run_main(other, ranks=2 if how == "two ranks" else 1).stdout
    undisturbed, mask = masked(sparse_config, "retrain")
    found, other_mask = masked(other, "retrain")
    if how != "killed":
        assert mask.keys() == other_mask.keys()
        return
    assert "resumed after" in printed
    for key, tensor in undisturbed.items():
        assert torch.equal(tensor, found[key]), key


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({}, "a sparsify stage needs sparsify, such as"),
        ({"sparsify": {"sparsity": 0.5}, "epochs": 1}, "take neither epochs nor optimizer"),
        ({"sparsify": {"sparsity": 2.0}}, "less than 1"),
        ({"sparsify": {"sparsty": 0.5}}, "sparsty"),
    ],
)
def test_settings_of_the_stage(sparse_config, stage, message):
    sparse_config["stages"]["sparsify"] = stage
    with pytest.raises(ValueError, match=message):
        Config.model_validate(sparse_config)
    sparse_config["stages"]["sparsify"] = {"sparsify": {"sparsity": 0.5}}
    sparse_config["stages"]["finetune"]["sparsify"] = {"sparsity": 0.5}
    with pytest.raises(ValueError, match="stages of kind finetune take no sparsify"):
        Config.model_validate(sparse_config)


def test_patterns_that_match_nothing_are_found_before_anything_is_trained(sparse_config, run_main):
    sparse_config["stages"]["sparsify"]["sparsify"]["skip"] = ["conv9"]
    done = run_main(sparse_config, expect=2)
    assert done.stderr == (
        "error: stages.sparsify.sparsify: skip: 'conv9' matches no Conv2d or Linear layer\n"
    )
    assert not Path(sparse_config["output"]).exists()


@pytest.mark.parametrize("first", ["finetune", "prune", "sparsify"])
def test_the_mask_of_the_starting_weights_is_held(sparse_config, tmp_path, run_inside, first):
    dense, start = tmp_path / "dense.safetensors", tmp_path / "start.safetensors"
    torch.manual_seed(0)
    tpp.save_model(dense, build_model("cifar_resnet8", 4))
    sparsify_checkpoint(dense, SparsifySection(sparsity=0.8), start)
    before = read_checkpoint(start)[1]["mask"]
    stages = sparse_config["stages"]
    stages["sparsify"] = {"sparsify": {"sparsity": 0.9}}
    sparse_config["stages"] = {name: stages[name] for name in dict.fromkeys([first, "finetune"])}
    sparse_config["model"] |= {"checkpoint": str(start), "num_classes": 4}
    run_inside(sparse_config)
    _, mask = masked(sparse_config, "finetune")
    shares = {"finetune": 0.8, "sparsify": 0.9}
    if first in shares:
        assert share_masked(mask) == pytest.approx(shares[first], abs=1e-4)
        assert not any((mask[key] & ~before[key].bool()).any() for key in before)
    else:
        assert mask.keys() == before.keys() and any(
            m.shape != before[k].shape for k, m in mask.items()
        )


@pytest.mark.parametrize("later", [0.79, 0.8])
def test_less_sparsity_than_before_is_found_before_anything_is_trained(sparse_config, later):
    stages = sparse_config["stages"]
    again = {"kind": "sparsify", "sparsify": {"sparsity": later}}
    sparse_config["stages"] = {"sparsify": stages["sparsify"], "again": again}
    config = Config.model_validate(sparse_config)
    if later == 0.8:
        check_masks(config, Architecture("cifar_resnet8", 4))
        return
    with pytest.raises(UserError, match=r"^stages\.again\.sparsify\.sparsity: 0\.79 is less than"):
        check_masks(config, Architecture("cifar_resnet8", 4))


def test_tpp_keeps_its_filters_to_the_end_behind_a_mask(sparse_config, run_main, tiny_config):
    config = yaml.safe_load(yaml.safe_dump(sparse_config))
    config["method"] = {
        "name": "tpp",
        "delta": 0.1,
        "update_interval": 1,
        "stabilize_steps": 9,
        "zero_out_interval": 1,
    }
    stages = config["stages"]
    config["stages"] = {
        "sparsify": {**stages["sparsify"], "input": None},
        "regularize": {"optimizer": {"lr": 0.01}},
        "prune": {},
    }
    config["model"]["num_classes"] = 4
    run_main(config)
    tensors, _ = masked(config, "regularize")
    pruned, cut = masked(config, "prune")
    assert tensors["layer1.0.conv1.weight"].shape[0] == 2 * pruned["layer1.0.conv1.weight"].shape[0]
    assert cut["layer1.0.conv1.weight"].shape == pruned["layer1.0.conv1.weight"].shape
    config["method"]["remove_at_zero"] = True
    config["output"] += "-2"
    done = run_main(config, expect=2)
    assert (
        "filters cannot be removed in the middle of it because of stage 'sparsify'" in done.stderr
    )


@pytest.mark.parametrize(
    ("kind", "method", "why"),
    [
        ("finetune", {"name": "interspace", "sparsity": 0.9}, "one of coefficients"),
        ("finetune", {"name": "linear_overparam"}, "use expand: false"),
        ("regularize", {"name": "while_training"}, "filters that will go"),
        ("regularize", {"name": "polarization"}, "filters that will go"),
        ("finetune", {"name": "linear_overparam", "expand": False, "similarity": 1.0}, None),
        ("finetune", {"name": "l1"}, None),
    ],
)
def test_methods_that_cannot_keep_a_mask_say_so_before_anything_is_trained(
    sparse_config, kind, method, why
):
    length = {"epochs": 1, "optimizer": {"lr": 0.02}}
    stages = sparse_config["stages"]
    stages["retrain"] = {"kind": kind, "method": method, **length}
    config = Config(**sparse_config)
    architecture = Architecture(config.model.name, 4, {})
    if why is None:
        check_methods(config, architecture)
        return
    line = rf"stages\.retrain\.method\.name: {method['name']} does not go behind stage 'sparsify'"
    with pytest.raises(UserError, match=rf"{line}.*{why}"):
        check_methods(config, architecture)
    stages["retrain"]["input"] = "dense"
    stages["sparsify"]["input"] = "retrain"
    stages["prune"]["input"] = "sparsify"
    sparse_config["stages"] = {key: stages[key] for key in ("dense", "retrain", "sparsify")}
    check_methods(Config(**sparse_config), architecture)
