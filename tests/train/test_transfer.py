"""configs/transfer, from weights of 1000 classes to a pruned network of one's own, offline."""

import json
from pathlib import Path

import pytest
import torch

from tpp.checkpoints.model_file import load_model
from train.main import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("config", "network", "ratios"),
    [
        ("resnet50", "test_resnet", "{layer*.conv1: 0.5}"),
        ("convnext_tiny", "test_convnext", "{stages.*.mlp.fc1: 0.5}"),
    ],
)
def test_a_network_of_timm_is_pruned_for_own_classes(
    config, network, ratios, tiny_data, tmp_path, monkeypatch, capsys
):
    import timm

    torch.manual_seed(0)
    weights = timm.create_model(network, num_classes=1000)
    torch.save(weights.state_dict(), tmp_path / "public.pth")
    output = tmp_path / "run"
    overrides = [
        f"model.name=timm:{network}",
        f"model.checkpoint={tmp_path / 'public.pth'}",
        f"data.root={tiny_data}", f"output={output}", "data.image_size=64", "data.resize=64",
        "data.threads=1", "training.batch_size=16", "training.batch=as_given",
        "stages.dense.epochs=0.3", "stages.dense.optimizer.warmup_epochs=0",
        "stages.dense_evaluate.image_sizes=[32,48]",
        "stages.finetune.epochs=0.3", "stages.finetune.optimizer.warmup_epochs=0",
        f"pruning.ratios={ratios}",
        "method.delta=0.5", "method.stabilize_steps=32", "method.zero_out_interval=1",
    ]  # fmt: skip
    path = ROOT / "configs" / "transfer" / f"{config}.yaml"
    monkeypatch.setattr("sys.argv", ["main.py", "--config", str(path), *overrides])
    main()
    out = capsys.readouterr().out
    assert "the classifier for 1000 classes is left out" in out
    assert "Dense at 48 px" in out and "Beside the dense network at fewer pixels" in out
    results = json.loads((output / "results.json").read_text())
    assert results["status"] == "finished"
    dense, pruned = results["stages"]["dense"], results["stages"]["finetune"]
    assert pruned["macs"] < dense["macs"] and pruned["raw"]["images"] == 40
    model = load_model(output / "finetune" / "model.safetensors").eval()
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 4)
