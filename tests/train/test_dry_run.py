"""What --dry-run prints, against the published figures; no data and no weights are there."""

import sys
from pathlib import Path

import pytest

from tpp.errors import run_command
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
    assert "data:\n  root: data/imagenet\n" in printed
    (line,) = [line for line in printed.splitlines() if line.startswith("penalty of regularize: ")]
    assert "shared over 64 rank(s)" in line
    assert 0 <= float(line.rpartition("(")[2].removesuffix("%)")) < 5


@pytest.mark.parametrize("name", ["l1", "greg1", "kernorth_l1"])
def test_methods_without_a_gram_penalty_claim_no_cost(monkeypatch, capsys, name):
    config = str(CONFIGS / "cifar10" / f"resnet56_{name}_pr0.9.yaml")
    printed = dry_run(monkeypatch, capsys, "--config", config)
    assert "speedup: 11.5776x" in printed and "penalty of" not in printed


def test_no_ranks_is_a_mistake(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["main.py", "--dry-run", "--ranks", "0"])
    with pytest.raises(SystemExit) as exit_:
        run_command(main)
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "error: --ranks must be at least 1, not 0\n"
