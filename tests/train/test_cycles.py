"""Cycles of stages are plain stages by the time a configuration is read."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from tpp.checkpoints.model_file import read_checkpoint
from tpp.common.errors import UserError
from train.config.config import Config, load_config


@pytest.fixture
def cycled(tiny_config):
    """Dense, then twice: mask, retrain; in the end 75% of the weights are zero."""
    stages = tiny_config["stages"]
    tiny_config["method"] = {"name": "l1"}
    retrain = {"kind": "finetune", "epochs": 1, "optimizer": {"lr": 0.02}}
    tiny_config["stages"] = {
        "dense": stages["dense"],
        "imp": {
            "kind": "cycle",
            "times": 2,
            "stages": {"sparsify": {"sparsify": {"sparsity": 0.75}}, "retrain": retrain},
        },
        "evaluate": {},
    }
    return tiny_config


def test_a_cycle_is_its_stages_one_after_the_other(cycled):
    """The same configuration, written by hand."""
    stages = cycled["stages"]
    inner = stages["imp"]["stages"]
    by_hand = {
        **cycled,
        "stages": {
            "dense": stages["dense"],
            "imp1_sparsify": {"kind": "sparsify", "sparsify": {"fraction": 0.5}},
            "imp1_retrain": inner["retrain"],
            "imp2_sparsify": {"kind": "sparsify", "sparsify": {"fraction": 0.5}},
            "imp2_retrain": inner["retrain"],
            "evaluate": {},
        },
    }
    found = Config.model_validate(cycled)
    assert found == Config.model_validate(by_hand)
    assert Config.model_validate(found.model_dump()) == found, "as a run folder's config.yaml"
    inputs = [stage.input for stage in found.stages.values()]
    assert inputs == [
        None,
        "dense",
        "imp1_sparsify",
        "imp1_retrain",
        "imp2_sparsify",
        "imp2_retrain",
    ]


def test_inputs_within_a_round_and_from_outside(cycled):
    stages = cycled["stages"]
    stages["other"] = {"kind": "finetune", "epochs": 1, "optimizer": {"lr": 0.1}, "input": "dense"}
    stages["imp"]["stages"]["again"] = {
        "kind": "finetune",
        "input": "sparsify",
        "epochs": 1,
        "optimizer": {"lr": 0.1},
    }
    stages["more"] = {"kind": "cycle", "times": 1, "input": "imp", "stages": {"sparsify": {
        "sparsify": {"sparsity": 0.5}}}}  # fmt: skip
    stages["check"] = {"kind": "evaluate", "input": "imp"}
    found = Config.model_validate(cycled).stages
    assert found["imp1_again"].input == "imp1_sparsify"
    assert found["imp2_sparsify"].input == "imp1_again"
    assert found["more1_sparsify"].input == found["check"].input == "imp2_again"
    assert found["more1_sparsify"].sparsify.fraction == 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"times": 0}, r"stages\.imp\.times: input should be greater than or equal to 1"),
        ({"times": 10**9}, r"stages\.imp\.times: input should be less than or equal to 1000"),
        ({"tims": 2}, r"stages\.imp\.tims: unknown key; did you mean 'times'"),
        ({"epochs": 2}, r"stages\.imp\.epochs: unknown key; there are: times, stages, input \["),
        ({1: 2}, r"stages\.imp\.1: keys should be strings"),
        ({"stages": {}}, r"stages\.imp\.stages"),
        ({"stages": {"train": {}}}, r"stages\.imp\.stages\.train\.kind: .* not 'train'"),
        (
            {"stages": {"x": {"kind": "cycle"}}},
            r"stages\.imp\.stages\.x\.kind: .* cycles in cycles",
        ),
        ({"stages": {"evaluate": {}}}, "none of them makes a network"),
        (
            {"stages": {"sparsify": {"sparsify": {"sparsity": 1.5}}}},
            "imp1_sparsify.*less than 1|less",
        ),
        (
            {"stages": {"sparsify": {"sparsify": {"sparsity": False}}}},
            "number.*=False",
        ),
        ({"input": "nowhere"}, r"stages\.imp\.input: 'nowhere' is no earlier stage; .*: dense \["),
    ],
)
def test_mistakes_in_a_cycle_name_the_key(cycled, change, message):
    cycled["stages"]["imp"] |= change
    with pytest.raises(ValueError, match=message):
        Config.model_validate(cycled)


def test_a_mistake_in_a_cycle_is_said_once_and_where_it_stands(cycled, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(cycled))
    override = "stages.imp.stages.sparsify.sparsify.sparsity=1.5"
    with pytest.raises(UserError) as caught:
        load_config(file, [override, "seed=1"])
    key = override.partition("=")[0]
    assert (
        str(caught.value) == f"override {override!r}: {key}: input should be less than 1, not 1.5"
    )


def test_a_round_names_its_own_stages_and_other_cycles(cycled):
    inner = cycled["stages"]["imp"]["stages"]
    like = {"schedule": "llr", "like": "retrain"}
    inner["more"] = {"kind": "finetune", "epochs": 1, "optimizer": like}
    sparsify = {"input": "imp", "sparsify": {"sparsity": 0.9}}
    cycled["stages"]["back"] = {"kind": "cycle", "times": 2, "stages": {"sparsify": sparsify}}
    inner["retrain"] = {**inner["retrain"], "epochs": 3}
    found = Config.model_validate(cycled).stages
    assert found["imp2_more"].optimizer.reference.epochs == 3
    assert found["back2_sparsify"].input == "imp2_more"


def test_a_stage_of_the_same_name_is_refused(cycled):
    cycled["stages"]["imp1_retrain"] = {"kind": "evaluate"}
    with pytest.raises(ValueError, match=r"stages\.imp1_retrain: a cycle is written out into"):
        Config.model_validate(cycled)


def test_rounds_reach_the_sparsity_with_nested_masks(cycled, run_main):
    """Broken off in the second round, and gone on with."""
    folder = Path(cycled["output"])
    run_main(cycled, kill_when=folder / "imp2_sparsify" / "model.safetensors", expect=None)
    run_main(cycled)
    masks = [
        read_checkpoint(folder / stage / "model.safetensors")[1]["mask"]
        for stage in ("imp1_retrain", "imp2_retrain")
    ]
    total = sum(mask.numel() for mask in masks[0].values())
    gone = [sum(int((~mask.bool()).sum()) for mask in of.values()) for of in masks]
    assert abs(gone[0] - 0.5 * total) <= 1 and abs(gone[1] - 0.75 * total) <= 2
    for key, first in masks[0].items():
        assert not torch.any(masks[1][key].bool() & ~first.bool()), key
    results = json.loads((folder / "results.json").read_text())
    assert results["stages"]["evaluate"]["sparsity"] == pytest.approx(0.75, abs=1e-3)
