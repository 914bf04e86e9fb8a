"""A stage that is done is compared with the settings of now by what it depends on."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from tiny_run import tiny_run

from tpp.common.errors import UserError
from train.config.config import Config
from train.run_folder.same_run import check_same_settings, stage_settings

FROM_FILE = {"evaluate_file": {"kind": "evaluate"}}  # nothing of this run's making is in it
STAGES: dict[str, Any] = {
    "dense": {"epochs": 1, "optimizer": {"lr": 0.05}},
    "dense_evaluate": {"kind": "evaluate"},
    "regularize": {"optimizer": {"lr": 0.01}, "input": "dense"},
    "prune": {},
    "evaluate": {},
    "l1_prune": {
        "kind": "prune",
        "input": "dense",
        "method": {"name": "l1"},
        "pruning": {"ratios": {"layer3*.conv1": 0.5}},
    },
}


def refusal(stage: str, change: dict[str, Any], stages: dict[str, Any] = STAGES) -> str:
    """What is said of a stage that is done when a setting has changed since; "" for nothing."""
    config = {**tiny_run(Path("data"), Path("run")), "stages": stages}
    before = Config.model_validate(copy.deepcopy(config))
    for key, value in change.items():
        *sections, last = key.split(".")
        place = config
        for section in sections:
            place[section] = copy.deepcopy(place.get(section, {}))
            place = place[section]
        place[last] = value
    now = Config.model_validate(config)
    kept = json.loads(json.dumps(stage_settings(before, stage)))
    try:
        check_same_settings(now, stage, kept)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("stage", "change"),
    [
        ("dense_evaluate", {"method.delta": 0.2}),
        ("dense_evaluate", {"method": {"name": "l1"}, "stages": {**STAGES, "regularize": {
            **STAGES["regularize"], "epochs": 1, "kind": "finetune"}}}),
        ("dense_evaluate", {"pruning.ratios": {"layer1*.conv1": 0.5}}),
        ("l1_prune", {"pruning.ratios": {"layer1*.conv1": 0.5}}),
        ("l1_prune", {"method.delta": 0.2}),
    ],
)  # fmt: skip
def test_what_a_stage_does_not_depend_on_may_change(stage: str, change: dict[str, Any]) -> None:
    assert refusal(stage, change) == ""
    assert refusal("prune", change) != ""


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"method.delta": 0.2}, "stages.regularize.method.delta was 0.1 and is 0.2"),
        ({"stages.regularize.optimizer": {"lr": 0.5}}, "stages.regularize.optimizer.lr"),
        ({"pruning.ratios": {"layer1*.conv1": 0.5}}, "pruning.ratios"),
        ({"training.batch_size": 8}, "training.batch_size was 16 and is 8"),
        ({"data.augmentation": "none"}, "data.augmentation was 'cifar' and is 'none'"),
        ({"seed": 3}, "seed was 0 and is 3"),
    ],
)
def test_what_it_depends_on_may_not(change: dict[str, Any], named: str) -> None:
    """Through the stages that it goes back to, whose own settings come first."""
    assert named in refusal("evaluate", change)


@pytest.mark.parametrize(
    "change",
    [
        {"training.batch_size": 8},
        {"training.accumulation": 2},
        {"training.sync_batchnorm": True},
        {"training.clip_gradient_norm": 1.0},
        {"data.augmentation": "none"},
        {"data.shuffle_window": 100},
    ],
)
def test_how_training_goes_is_nothing_to_a_network_from_a_file(change: dict[str, Any]) -> None:
    assert refusal("evaluate_file", change, FROM_FILE) == ""
    assert refusal("dense_evaluate", change) != ""


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"training.precision": "bf16"}, "training.precision"),
        ({"data.image_size": 28}, "data.image_size"),
        ({"data.val": "test"}, "data.val"),
        ({"model.checkpoint": "other.pth"}, "model.checkpoint"),
    ],
)
def test_how_it_is_evaluated_is(change: dict[str, Any], named: str) -> None:
    assert named in refusal("evaluate_file", change, FROM_FILE)


def test_removal_from_a_file_needs_no_training_at_all() -> None:
    stages = {"prune": {"method": {"name": "l1"}}}
    assert refusal("prune", {"training.precision": "bf16"}, stages) == ""
    assert "pruning.round_to" in refusal("prune", {"pruning.round_to": 8}, stages)


@pytest.mark.timeout(120)
def test_a_run_goes_on_with_another_delta(
    tiny_config: dict[str, Any], run_inside: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """As when one looks at the dense network first, and then at what to prune it with."""
    tiny_config["stages"] = STAGES
    run_inside(tiny_config, "--until", "dense_evaluate")
    capsys.readouterr()
    run_inside(tiny_config, "method.delta=0.25", "--until", "regularize")
    assert "dense_evaluate: done before, skipped" in capsys.readouterr().out
    run_inside(tiny_config, "method.delta=0.5", expect=2)
    error = capsys.readouterr().err
    assert "stage 'regularize' was run with other settings" in error and error.count("\n") == 1
