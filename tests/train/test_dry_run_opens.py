"""--dry-run opens what is there, and ends with what the run would end with."""

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tpp.checkpoints.model_file import save_model
from tpp.common.errors import run_command
from tpp.models.architecture import build_model
from train.main import main


class Told:
    """A configuration, and what --dry-run and the run itself say of it."""

    def __init__(self, config: dict[str, Any], path: Path, monkeypatch, capsys) -> None:
        self.config = config
        self._path, self._patch, self._capsys = path, monkeypatch, capsys

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        self._path.write_text(yaml.safe_dump(self.config, sort_keys=False))
        command = ["main.py", "--config", str(self._path), *arguments]
        self._patch.setattr(sys, "argv", command)
        code = 0
        try:
            run_command(main)
        except SystemExit as ended:
            code = int(ended.code or 0)
        out, err = self._capsys.readouterr()
        return code, out, err

    def same_in_both(self, *arguments: str) -> str:
        """The one line that both end with."""
        dry, run = self("--dry-run", *arguments), self(*arguments)
        assert dry[0] == run[0] == 2 and dry[2].count("\n") == 1
        assert dry[2] == run[2]
        assert dry[1] == "", "a mistake comes before all else"
        return dry[2]


@pytest.fixture
def told(tiny_config: dict[str, Any], tmp_path: Path, monkeypatch, capsys) -> Told:
    monkeypatch.chdir(tmp_path)
    return Told(tiny_config, tmp_path / "config.yaml", monkeypatch, capsys)


def test_all_is_well(told: Told, tmp_path: Path) -> None:
    save_model(tmp_path / "dense.safetensors", build_model("cifar_resnet8", 4))
    told.config["model"]["checkpoint"] = "dense.safetensors"
    before = {path.name for path in tmp_path.iterdir()} | {"config.yaml"}
    code, out, err = told("--dry-run")
    assert (code, err) == (0, "") and "not looked at" not in out
    assert {path.name for path in tmp_path.iterdir()} == before, "a dry run writes nothing"


def test_what_is_not_there_is_named(told: Told) -> None:
    told.config["model"] |= {"num_classes": 4, "checkpoint": "nowhere.pth"}
    told.config["data"]["root"] = "nowhere"
    code, out, _ = told("--dry-run")
    assert code == 0
    assert out.splitlines()[-2:] == [
        "not looked at: model.checkpoint: nowhere.pth: no such file",
        "not looked at: data.root: there is no folder nowhere here",
    ]
    told.config["model"]["checkpoint"] = "https://example.org/no/such-file.pth"
    code, out, err = told("--dry-run")
    assert "https://example.org/no/such-file.pth: is downloaded when a run starts" in out, err


def test_a_network_of_other_classes(told: Told) -> None:
    told.config["model"]["num_classes"] = 10
    assert "4 class" in told.same_in_both() or "10" in told.same_in_both()


def test_a_checkpoint_that_does_not_fit(told: Told, tmp_path: Path) -> None:
    torch.save(build_model("cifar_resnet14", 4).state_dict(), tmp_path / "other.pth")
    told.config["model"]["checkpoint"] = "other.pth"
    code, out, err = told("--dry-run")
    assert (code, out) == (2, "") and err.count("\n") == 1 and "other.pth" in err
    save_model(tmp_path / "other.safetensors", build_model("cifar_resnet14", 4))
    told.config["model"]["checkpoint"] = "other.safetensors"
    code, out, err = told("--dry-run")
    assert (code, out) == (2, "") and "other.safetensors holds cifar_resnet14 (4 classes), " in err


def test_images_that_a_run_refuses(told: Told, tmp_path: Path, tiny_data: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(tiny_data, root)
    told.config["data"]["root"] = str(root)
    odd = next((root / "val").iterdir())
    odd.rename(odd.with_name("of_its_own"))
    assert "is in only one of 'train' and 'val'" in told.same_in_both()
    shutil.rmtree(root / "val")
    assert str(root / "val") in told.same_in_both()


def test_a_folder_that_a_run_refuses(told: Told, tmp_path: Path, run_inside) -> None:
    told.config["stages"] = {"dense": told.config["stages"]["dense"]}
    run_inside(told.config)
    told._capsys.readouterr()
    assert "stage 'dense' was run with other settings: seed" in told.same_in_both("seed=7")
    (tmp_path / "file").touch()
    code, out, err = told("--dry-run", f"output={tmp_path / 'file' / 'run'}")
    assert (code, out) == (2, "") and f"{tmp_path / 'file'} is a file" in err


def test_ranks_that_do_not_share_the_batch(told: Told) -> None:
    assert told("--dry-run")[0] == 0, "nobody has said how many there are"
    code, out, err = told("--dry-run", "--ranks", "3")
    assert (code, out) == (2, "") and "batch" in err


def test_engines_that_a_run_refuses(told: Told, tmp_path: Path) -> None:
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 3}}')
    told.config["training"]["deepspeed"] = "zero.json"
    assert "zero_optimization.stage 3 splits" in told.same_in_both()
    told.config["training"]["deepspeed"] = "nowhere.json"
    assert "nowhere.json" in told.same_in_both()
