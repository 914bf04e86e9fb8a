"""Small runs of the benchmarks of what goes."""

import json
import sys

import pytest
import torch
from torchvision.io import write_png

from benchmarks import criteria, knapsack
from tpp.checkpoints.model_file import save_model
from tpp.models.architecture import build_model
from tpp.selection.criteria import CRITERIA


def run(monkeypatch, script, *arguments):
    monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
    script.main()


@pytest.fixture
def dense(tmp_path):
    torch.manual_seed(0)
    prepared = {"image_size": 16, "resize": None, "mean": [0.5] * 3, "std": [0.3] * 3}
    path = tmp_path / "dense.safetensors"
    model = build_model("cifar_resnet8", 2).eval()
    save_model(path, model, preprocessing={**prepared, "channels": 3})
    return path


@pytest.mark.filterwarnings("ignore::tpp.common.errors.Note")
def test_criteria(tmp_path, dense, monkeypatch, capsys):
    for side, name in ((side, name) for side in ("train", "val") for name in ("a", "b")):
        (tmp_path / side / name).mkdir(parents=True)
        for number in range(3):
            image = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)
            write_png(image, str(tmp_path / side / name / f"{number}.png"))
    output = tmp_path / "criteria.json"
    folders = ("--data", tmp_path / "train", "--val", tmp_path / "val")
    run(
        monkeypatch,
        criteria,
        "--checkpoint",
        dense,
        *folders,
        "--speedups",
        1.3,
        "--output",
        output,
    )
    found = json.loads(output.read_text())
    assert found["settings"]["images"] == 6 and found["settings"]["training_images"] == 6
    rows = found["results"][1:]
    assert [row["criterion"] for row in rows] == [*CRITERIA]
    assert all(1.3 <= row["speedup"] < 1.4 for row in rows)
    assert all(0 <= row[key] <= 100 for row in rows for key in ("top1", "recalibrated_top1"))
    assert "group_norm" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::tpp.common.errors.Note")
def test_knapsack(tmp_path, dense, monkeypatch, capsys):
    output, table = tmp_path / "knapsack.json", tmp_path / "times.json"
    quick = ("--backend", "torch", "--repeats", 2, "--tries", 1, "--speedup", 1.5)
    files = ("--checkpoint", dense, "--table", table, "--output", output)
    run(monkeypatch, knapsack, "--model", "cifar_resnet8", *quick, *files)
    rows = json.loads(output.read_text())["results"]
    assert rows["dense"]["score"] == rows["dense"]["counted_speedup"] == 1.0
    for name in ("budget of MACs", "knapsack, equal MACs"):
        assert rows[name]["counted_speedup"] >= 1.5 and 0 < rows[name]["score"] < 1
    assert json.loads(table.read_text())["milliseconds"]
    assert "at an equal time the knapsack keeps" in capsys.readouterr().out
