import fnmatch
import sys

import pytest
import torch
from rich.console import Console
from torch import nn

from tpp.checkpoint import save_model
from tpp.describe import count, main, print_description
from tpp.errors import UserError
from tpp.models import Architecture, build_model, build_on_meta
from tpp.plan import PruningPlan
from tpp.prune import prune_model
from tpp.selection import prunable_layers, pruned_count

RESNET34 = {
    "layer1.[12].conv1": 0.5,
    "layer2.[12].conv1": 0.6,
    "layer3.[1234].conv1": 0.4,
}


def pruned_by(model, ratios):
    """Prune the last filters of every matched layer: for counting, any will do."""
    filters, pruned = {}, {}
    for name, layer in prunable_layers(model).items():
        for pattern, ratio in ratios.items():
            if fnmatch.fnmatchcase(name, pattern):
                n = filters[name] = layer.weight.shape[0]
                pruned[name] = list(range(n))[n - pruned_count(ratio, n) :]
    return prune_model(model, PruningPlan(filters, pruned))


@pytest.mark.parametrize(("name", "gmacs"), [("resnet34", 3.6638), ("resnet50", 4.0892)])
def test_published_sizes_of_dense_networks(name, gmacs):
    counts = count(build_on_meta(Architecture(name, 1000)))
    assert round(counts.macs / 1e9, 4) == gmacs
    assert sum(layer.macs for layer in counts.layers) == counts.macs


# Wang & Fu 2023, ImageNet: the layer ratios of each published row, and the speedup they give.
@pytest.mark.parametrize(
    ("name", "ratios", "speedup"),
    [
        ("resnet34", RESNET34, 1.3168),
        ("resnet50", {"layer[1-3]*conv[1-2]": 0.30, "layer4*conv[1-2]": 0.14}, 1.4894),
        ("resnet50", {"layer[1-3]*conv[1-2]": 0.60, "layer4*conv[1-2]": 0.21}, 2.3081),
        (
            "resnet50",
            {"layer[1-2]*conv[1-2]": 0.74, "layer3*conv[1-2]": 0.60, "layer4*conv[1-2]": 0.21},
            2.5641,
        ),
        ("resnet50", {"layer[1-3]*conv[1-2]": 0.68, "layer4*conv[1-2]": 0.50}, 3.0634),
    ],
)
def test_published_speedups_on_imagenet(name, ratios, speedup):
    model = build_on_meta(Architecture(name, 1000))
    assert round(count(model).macs / count(pruned_by(model, ratios)).macs, 4) == speedup


@pytest.mark.parametrize(
    ("ratio", "speedup", "removed"),
    [
        (0.3, 1.452, 31.14),
        (0.5, 1.993, 49.82),
        (0.7, 3.593, 70.58),
        (0.9, 11.578, 90.45),
        (0.95, 19.846, 95.18),
    ],
)
def test_published_sizes_of_resnet56(ratio, speedup, removed):
    model = build_on_meta(Architecture("cifar_resnet56", 10))
    before, after = count(model), count(pruned_by(model, {"layer*.conv1": ratio}))
    assert round(before.macs / after.macs, 3) == speedup
    assert round(100 * (1 - after.parameters / before.parameters), 2) == removed


@pytest.mark.parametrize("name", ["mobilenet_v2", "alexnet", "swin_t", "mlp7_linear"])
def test_layers_agree_with_the_textbook_formula(name):
    model = build_on_meta(Architecture(name, 10))
    expected = {}

    def formula(layer_name):
        def hook(module, _, out):
            per_output = module.weight[0].numel()
            expected[layer_name] = out[0].numel() * per_output

        return hook

    for layer_name, module in prunable_layers(model).items():
        module.register_forward_hook(formula(layer_name))
    counts = count(model)
    shape = (1, 28, 28) if name == "mlp7_linear" else (3, 224, 224)
    model.eval()(torch.empty(1, *shape, device="meta"))
    called = {layer.name: layer.macs for layer in counts.layers}
    assert called == {key: expected[key] for key in called}
    assert called.keys() == expected.keys()


def test_attention_counts_its_linear_layers_only():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.fc = nn.Linear(8, 3)

        def forward(self, x):
            return self.fc(self.attention(x, x, x, need_weights=False)[0])

    counts = count(Net().train(), example_input=torch.zeros(5, 4, 8))
    assert counts.macs == 4 * (3 * 8 * 8 + 8 * 8 + 8 * 3)
    assert [(layer.name, layer.macs) for layer in counts.layers] == [("fc", 4 * 8 * 3)]


def test_the_model_is_left_alone_and_one_image_counts():
    model = build_model("cifar_resnet8", 10)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    counts = count(model, example_input=torch.zeros(7, 3, 32, 32))
    assert counts == count(model)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    with pytest.raises(UserError, match="does not run on an input of 1x1x8x8"):
        count(model, example_input=torch.zeros(1, 1, 8, 8))


@pytest.fixture
def saved(tmp_path):
    model = pruned_by(build_model("cifar_resnet8", 10), {"layer*.conv1": 0.75})
    path = tmp_path / "ckpt"
    save_model(
        path, model, preprocessing={"image_size": 32}, extra={"stage": "finetune", "top1": 87.5}
    )
    return path


def test_the_table(saved, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["describe", str(saved)])
    main()
    text = capsys.readouterr().out
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line.split()}
    assert lines["layer1.0.conv1"][1:4] == ["4", "/", "16"]
    assert lines["layer1.0.conv2"][1:5] == ["16", "/", "16", "4"]
    assert lines["conv1"][5] == "432"
    assert "█" in text and "\x1b" not in text
    assert lines["stage"] == ["stage", "finetune"]
    assert lines["top1"] == ["top1", "87.5"]
    assert lines["images"] == ["images", "image_size=32"]
    model = build_model("cifar_resnet8", 10)
    speedup = count(model).macs / count(pruned_by(model, {"layer*.conv1": 0.75})).macs
    assert lines["speedup"] == ["speedup", f"{speedup:.4f}x"]


def test_the_table_without_unicode(saved, tmp_path):
    with (tmp_path / "out").open("w", encoding="ascii") as file:
        print_description(str(saved), Console(file=file, width=100))
    assert "####" in (tmp_path / "out").read_text()


def test_a_file_that_is_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        print_description(str(tmp_path / "none"), Console())
