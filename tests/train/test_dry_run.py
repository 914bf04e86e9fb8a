"""What --dry-run prints, against the published figures; no data and no weights are there."""

import re
import sys
from pathlib import Path

import pytest

from data_pipelines.images.image_index import scan_class_folders
from data_pipelines.sets.shard_writer import write_shards
from tpp.common.errors import run_command
from train.main import main

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def dry_run(monkeypatch, capsys, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["main.py", "--dry-run", *arguments])
    run_command(main)
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("config", "speedup"),
    [
        ("imagenet/resnet34_tpp_1.32x", "1.3168"),
        ("imagenet/resnet50_tpp_1.49x", "1.4894"),
        ("imagenet/resnet50_tpp_2.31x", "2.3081"),
        ("imagenet/resnet50_tpp_2.56x", "2.5641"),
        ("imagenet/resnet50_tpp_3.06x", "3.0634"),
        ("cifar10/resnet56_tpp_pr0.3", "1.452"),
        ("cifar10/resnet56_tpp_pr0.5", "1.993"),
        ("cifar10/resnet56_tpp_pr0.7", "3.593"),
    ],
)
def test_speedups_are_the_published_ones(monkeypatch, capsys, tmp_path, config, speedup):
    monkeypatch.chdir(tmp_path)
    printed = dry_run(monkeypatch, capsys, "--config", str(CONFIGS / f"{config}.yaml"))
    (line,) = [line for line in printed.splitlines() if line.startswith("speedup: ")]
    counted = float(line.removeprefix("speedup: ").split("x")[0])
    digits = len(speedup.split(".")[1])
    assert f"{counted:.{digits}f}" == speedup
    assert not list(tmp_path.iterdir()), "a dry run writes nothing"


def test_plan_and_shares(monkeypatch, capsys):
    config = str(CONFIGS / "imagenet" / "resnet50_tpp_2.31x.yaml")
    printed = dry_run(monkeypatch, capsys, "--config", config, "--ranks", "64")
    rows = {line.split("│")[1].strip(): line for line in printed.splitlines() if "│" in line}
    cells = [cell.strip() for cell in rows["layer3.5.conv2"].split("│")]
    assert cells[1:5] == ["layer3.5.conv2", "256", "154", "102"]  # ceil(0.6 * 256) go
    assert "layer3.5.conv3" not in rows
    assert "\n  root: data/imagenet\n" in printed
    (line,) = [line for line in printed.splitlines() if line.startswith("penalty of regularize: ")]
    assert "shared over 64 rank(s)" in line
    assert 0 <= float(line.rpartition("(")[2].removesuffix("%)")) < 5


@pytest.mark.parametrize("name", ["l1", "greg1", "kernorth_l1"])
def test_methods_without_a_gram_penalty_claim_no_cost(monkeypatch, capsys, name):
    config = str(CONFIGS / "cifar10" / f"resnet56_{name}_pr0.9.yaml")
    printed = dry_run(monkeypatch, capsys, "--config", config)
    assert "speedup: 11.5776x" in printed and "penalty of" not in printed


def kept_filters(printed: str) -> dict[str, int]:
    cells = [[cell.strip() for cell in line.split("│")] for line in printed.splitlines()]
    return {row[1]: int(row[4]) for row in cells if len(row) > 5 and row[4].isdigit()}


def test_ratios_are_rounded_and_floored_as_in_the_run(monkeypatch, capsys):
    config = str(CONFIGS / "imagenet" / "resnet50_tpp_2.31x.yaml")
    printed = dry_run(
        monkeypatch,
        capsys,
        *("--config", config, "pruning.round_to=32", "pruning.floors={layer4*: 0.9}"),
        "pruning.skip=[layer1*]",
    )
    kept = kept_filters(printed)
    # ceil(0.6 * 256) of 256 would go, which leaves 102; in layer4 ceil(0.9 * 512) = 461 stay.
    assert kept["layer3.5.conv2"] == 128 and kept["layer4.1.conv2"] == 480
    assert not any(layer.startswith("layer1") for layer in kept)
    said = printed.partition("plan (which")[2].partition("the configuration, resolved:")[0]
    assert said and "budget" not in said


@pytest.mark.parametrize(
    ("budget", "line", "speedups"),
    [
        ("{speedup: 2}", "budget, a speedup of 2x: widths depend on the weights", (2, 2.02)),
        ("{macs: 2.0G}", "budget, 2,000,000,000 MACs: widths depend on the weights", (2.04, 2.07)),
        (
            "{latency_ms: 5}",
            "budget, 5 ms per batch: latency is measured when the plan",
            (7, 12),
        ),
    ],
)
def test_a_budget_says_that_widths_depend_on_the_weights(
    monkeypatch, capsys, budget, line, speedups
):
    config = str(CONFIGS / "imagenet" / "resnet50_tpp_2.31x.yaml")
    arguments = ["--config", config, "pruning.ratios={}", f"pruning.budget={budget}"]
    printed = dry_run(monkeypatch, capsys, *arguments)
    assert len([text for text in printed.splitlines() if text.startswith(line)]) == 1
    (counted,) = [text for text in printed.splitlines() if text.startswith("speedup: ")]
    lowest, highest = speedups
    assert lowest <= float(counted.removeprefix("speedup: ").split("x")[0]) <= highest


def test_a_budget_out_of_reach_shows_before_anything_runs(monkeypatch, capsys):
    config = str(CONFIGS / "imagenet" / "resnet50_tpp_2.31x.yaml")
    monkeypatch.setattr(
        sys, "argv", ["main.py", "--dry-run", "--config", config, "pruning.budget.speedup=4"]
    )
    with pytest.raises(SystemExit) as exit_:
        run_command(main)
    assert exit_.value.code == 2
    # With these ratios as ceilings it is the published speedup.
    expected = (
        "error: budget: a speedup of 4x cannot be met: the best that ratios, floors, skip and "
    )
    assert capsys.readouterr().err == f"{expected}round_to allow is 2.3081x\n"


def test_classes_are_counted_in_shards_too(monkeypatch, capsys, tiny_data, tmp_path):
    for name in ("train", "test"):
        write_shards(scan_class_folders(tiny_data / "train"), tmp_path / name)
    config = str(CONFIGS / "cifar10" / "resnet56_tpp_pr0.5.yaml")
    overrides = (f"data.root={tmp_path}", "model.num_classes=null")
    of_ten = dry_run(monkeypatch, capsys, "--config", config, "model.num_classes=10")
    of_four = dry_run(monkeypatch, capsys, "--config", config, *overrides)
    # Six outputs less: 64 weights and a bias each.
    counts = [_parameters(printed) for printed in (of_ten, of_four)]
    assert counts[0] - counts[1] == 6 * 65


def _parameters(printed: str) -> int:
    found = re.search(r"^parameters: ([\d,]+)", printed, re.MULTILINE)
    assert found is not None, printed
    return int(found[1].replace(",", ""))


def test_no_ranks_is_a_mistake(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["main.py", "--dry-run", "--ranks", "0"])
    with pytest.raises(SystemExit) as exit_:
        run_command(main)
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "error: --ranks must be at least 1, not 0\n"
