"""Checkpoints of ours whose weights are not float32 are evaluated and trained in float32."""

import json
import re
import sys

import pytest
import torch

from tpp.checkpoints.model_file import load_model, save_model
from tpp.models.architecture import build_model
from train.evaluate import main as evaluate


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16, torch.double])
def test_a_checkpoint_of_another_type(
    dtype, tiny_config, tiny_data, tmp_path, run_inside, monkeypatch, capsys
):
    torch.manual_seed(0)
    model = build_model("cifar_resnet8", 4)
    said = {"image_size": 32, "resize": None, "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225], "channels": 3}  # fmt: skip
    figures = []
    for name, kept in (("a", model.to(dtype)), ("b", model.to(dtype).float())):
        save_model(tmp_path / name, kept, preprocessing=said)
        command = ["--checkpoint", str(tmp_path / name), "--data", str(tiny_data / "val")]
        monkeypatch.setattr(sys, "argv", ["evaluate", *command, "--threads", "1"])
        evaluate()
        found = re.search(r"top-1 .*", capsys.readouterr().out)
        assert found is not None
        figures.append(found[0])
    assert figures[0] == figures[1]
    tiny_config["model"]["checkpoint"] = str(tmp_path / "a")
    tiny_config["stages"] = {
        "prune": {"kind": "prune", "input": None},
        "finetune": {"kind": "finetune", "input": "prune", "epochs": 0.2, "optimizer": {"lr": 0.1}},
        "evaluate": {"kind": "evaluate", "input": "finetune"},
    }
    run_inside(tiny_config)
    kinds = {p.dtype for p in load_model(tmp_path / "run/finetune/model.safetensors").parameters()}
    assert kinds == {torch.float32}
    assert json.loads((tmp_path / "run/results.json").read_text())["status"] == "finished"
