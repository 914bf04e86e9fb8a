"""Mistakes are blamed on the file or the override that they are in, and say what would be right."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tpp.common.errors import UserError
from train.config.config import load_config
from train.grid import load_sweep

VALID: dict[str, Any] = {
    "name": "run",
    "model": {"name": "cifar_resnet20"},
    "data": {"root": "images"},
    "pruning": {"ratios": {"layer*.conv1": 0.5}},
    "stages": {"dense": {"epochs": 1, "optimizer": {"lr": 0.1}}},
}


def write(path: Path, content: Any) -> Path:
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def error_of(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_a_mistake_is_blamed_on_who_made_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", {**VALID, "seed": -1, "data": {"root": "x", "resize": 9}})
    lines = error_of(path, "training.batch_size=0", "name=fine").splitlines()
    assert lines == [
        f"{path}: seed: input should be greater than or equal to 0, not -1",
        f"{path}: data: resize (9) must not be smaller than image_size (224)",
        "override 'training.batch_size=0': training.batch_size: input should be greater than or "
        "equal to 1, not 0",
    ]
    # The file's own value is not what is wrong once another takes its place.
    of_both = error_of(path, "seed=-2").splitlines()
    assert of_both[0].startswith("override 'seed=-2': seed: ") and of_both[1].startswith(
        f"{path}: "
    )
    path = write(tmp_path / "b.yaml", VALID)
    between = error_of(path, "name=y", "data.image_size=300", "seed=1")
    assert between == (
        "override 'data.image_size=300': data: resize (256) must not be smaller than image_size "
        "(300)"
    )
    long = error_of(path, f"training.{'x' * 500}=1")
    assert long.startswith("override 'training.xxx") and " ... " in long


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("extends: *base.yaml", "what begins with * has to be in quotes"),
        ("pruning: {ratios: {*.conv1: 0.5}}", "what begins with * has to be in quotes"),
        ("pruning: {skip: [layer1.*, *conv2]}", "what begins with * has to be in quotes"),
        ("extends: &base.yaml", "what begins with & has to be in quotes"),
        ("extends: !base.yaml", "what begins with ! has to be in quotes"),
        ("name: %x", "what begins with % has to be in quotes"),
        ("name: @x", "what begins with @ has to be in quotes"),
        ("name: |x", "what begins with | has to be in quotes"),
        ("name: a: b", "a value with a colon and a space in it has to be in quotes"),
        ("data:\n\troot: x", "indent with spaces, not with tabs"),
    ],
)
def test_what_yaml_takes_for_something_else(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    line = error_of(tmp_path / "a.yaml")
    assert line.startswith(f"{tmp_path / 'a.yaml'}: not valid YAML: ")
    assert line.endswith(f"(line {text.count(chr(10)) + 1}); {expected}")


def test_a_sweep_is_no_run_and_a_run_no_sweep(tmp_path: Path) -> None:
    sweep = Path(__file__).resolve().parents[2] / "configs" / "cifar10" / "table1.yaml"
    assert error_of(sweep) == (f"{sweep}: a sweep of many runs; tpp sweep --config {sweep}")
    path = write(tmp_path / "a.yaml", VALID)
    with pytest.raises(UserError) as caught:
        load_sweep(path)
    assert (
        str(caught.value) == f"{path}: one run, and no sweep of many; train/main.py --config {path}"
    )
