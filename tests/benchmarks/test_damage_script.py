"""The script that damages checkpoints counts what is noticed, and fails if something is not."""

import json
from random import Random

import pytest

from benchmarks import damage
from tpp.checkpoints import training_state
from tpp.common.errors import run_command

TINY = ("--model=cifar_resnet8", "--damages=20")


def test_all_damage_is_noticed(tmp_path, monkeypatch, capsys):
    output = tmp_path / "damage.json"
    monkeypatch.setattr("sys.argv", ["damage", *TINY, "--seed=3", f"--output={output}"])
    run_command(damage.main)
    found = json.loads(output.read_text())
    assert found["flipped"] == found["flipped_found"] == 4 * 20
    assert found["cut"] == found["cut_found"] == 4 * 128  # the edges of each file
    assert len(found["files"]) == 4
    assert "bits flipped 80 of 80 found" in capsys.readouterr().out


def test_damage_that_is_not_noticed_fails(tmp_path, monkeypatch):
    """With hashes that are not compared, only what safetensors itself stumbles over is noticed."""
    monkeypatch.setattr(training_state, "_compare", lambda *_: None)
    output = tmp_path / "damage.json"
    monkeypatch.setattr("sys.argv", ["damage", *TINY, f"--output={output}"])
    with pytest.raises(SystemExit) as ended:
        run_command(damage.main)
    assert ended.value.code == 1


def test_lengths_are_below_the_size_and_near_its_ends():
    assert {*damage.lengths(100, 500, Random(0))} == {*range(100)}
    assert {*damage.lengths(1000, 200, Random(0))} >= {*range(64), *range(936, 1000)}
