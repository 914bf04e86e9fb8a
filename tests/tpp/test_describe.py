import fnmatch
import re
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from torch import nn

from tpp.channels.removal import prune_model
from tpp.checkpoints.model_file import load_model, save_model
from tpp.common.errors import UserError
from tpp.describe import _kept_bar, main, plot_description, print_description
from tpp.measure.counts import count
from tpp.models.architecture import Architecture, build_model, build_on_meta
from tpp.models.layers import prunable_layers
from tpp.plan import PruningPlan
from tpp.plot import draw_layers
from tpp.selection.criteria import pruned_count

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


def test_a_module_that_is_called_with_a_view_of_a_parameter_is_counted():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.query = nn.Parameter(torch.zeros(1, 8))
            self.fc = nn.Linear(8, 3)

        def forward(self, x):
            return self.fc(self.query.expand(2, -1)) + x

    assert count(Net(), example_input=torch.zeros(1, 3)).macs == 2 * 8 * 3
    assert count(build_model("timm:test_vit3", 4)).macs > 0


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


def lines_of(text):
    return {line.split()[0]: line.split() for line in text.splitlines() if line.split()}


def printed(path, tmp_path, width=100, encoding="utf-8"):
    with (tmp_path / "out").open("w", encoding=encoding) as file:
        print_description(str(path), Console(file=file, width=width))
    return (tmp_path / "out").read_text(encoding=encoding)


def test_the_table(saved, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["describe", str(saved)])
    main()
    text = capsys.readouterr().out
    lines = lines_of(text)
    assert lines["layer1.0.conv1"][1:6] == ["4", "/", "16", "██░░░░░░░░", "16"]
    assert lines["layer1.0.conv2"][1:6] == ["16", "/", "16", "██████████", "4"]
    assert lines["conv1"][6] == "432"
    assert "\x1b" not in text
    assert lines["stage"] == ["stage", "finetune"]
    assert lines["top1"] == ["top1", "87.5"]
    assert lines["images"] == ["images", "image_size=32"]
    model = build_model("cifar_resnet8", 10)
    speedup = count(model).macs / count(pruned_by(model, {"layer*.conv1": 0.75})).macs
    assert lines["speedup"] == ["speedup", f"{speedup:.4f}x"]


def test_the_columns_add_up_to_the_totals(saved, tmp_path):
    lines = list(lines_of(printed(saved, tmp_path)).values())
    end = next(i for i, line in enumerate(lines) if line[0] == "total")
    layers, others, total = lines[1 : end - 1], lines[end - 1], lines[end]
    assert others[0] == "others" and len(layers) == 8
    assert int(total[1]) == sum(int(line[1]) for line in layers)
    assert int(total[3]) == sum(int(line[3]) for line in layers)
    parameters = [int(line[6].replace(",", "")) for line in layers]
    batch_norm = sum(p.numel() for n, p in load_model(saved).named_parameters() if "bn" in n)
    assert others[1] == str(batch_norm)
    assert total[4] == f"{sum(parameters) + batch_norm:,}"
    shares = [float(next(cell for cell in line if "%" in cell)[:-1]) for line in layers]
    assert sum(shares) == pytest.approx(100, abs=0.05)


def test_the_table_without_unicode(saved, tmp_path):
    text = printed(saved, tmp_path, encoding="ascii")
    assert "####" in text
    assert lines_of(text)["layer1.0.conv1"][4] == "##........"


def test_a_long_network_is_broken_up_into_stages(tmp_path):
    for name, gaps in (("cifar_resnet8", 2), ("cifar_resnet32", 2 + 4)):
        save_model(tmp_path / name, build_model(name, 10))
        lines = printed(tmp_path / name, tmp_path).splitlines()
        assert sum(not line.strip() for line in lines) == gaps
    before = next(i for i, line in enumerate(lines) if line.startswith("layer2.0.conv1")) - 1
    assert not lines[before].strip() and lines[before - 1].startswith("layer1.4.conv2")


@pytest.mark.parametrize("width", [80, 100, 120])
@pytest.mark.parametrize("name", ["resnet50", "densenet121"])
def test_figures_are_never_cut_short(name, width, tmp_path):
    save_model(tmp_path / "ckpt", build_model(name, 1000))
    text = printed(tmp_path / "ckpt", tmp_path, width)
    layers = count(build_on_meta(Architecture(name, 1000))).layers
    rows = [line for line in text.splitlines() if "%" in line and "removed" not in line]
    rows = [row for row in rows if not row.startswith(("others", "total"))]
    assert max(map(len, text.splitlines())) <= width
    assert len(rows) == len(layers)
    for row, layer in zip(rows, layers, strict=True):
        start = row.split()[0]
        assert start == layer.name or (start[:2] == ".." and layer.name.endswith(start[2:]))
        assert f"{layer.parameters:,}" in row.split()
    assert ("█" in text) == (name == "resnet50" or width == 120)


@pytest.mark.parametrize(
    ("kept", "bar"), [(1, "█░░░░"), (50, "██░░░"), (99, "████░"), (100, "█████")]
)
def test_what_is_kept_and_what_is_gone_never_round_away(kept, bar):
    assert _kept_bar(kept, 100, 5, Console()) == bar


def test_the_picture(saved, tmp_path, monkeypatch, capsys):
    picture = tmp_path / "new" / "layers.svg"
    monkeypatch.setattr(sys, "argv", ["describe", str(saved), "--plot", str(picture)])
    main()
    assert capsys.readouterr().out.endswith(f"\nwrote {picture}\n")
    assert [path.name for path in picture.parent.iterdir()] == ["layers.svg"]
    texts = re.findall(r"<!-- (.*) -->", picture.read_text())
    for wanted in ("cifar_resnet8, 10 classes", "layer1.0.conv1", "4 / 16", "64 / 64", "removed"):
        assert wanted in texts
    assert any("speedup 3.6082x" in text for text in texts)
    first = picture.read_bytes()
    picture.write_text("an older picture")
    (tmp_path / "older").hardlink_to(picture)
    plot_description(str(saved), picture)
    assert picture.read_bytes() == first
    assert (tmp_path / "older").read_text() == "an older picture"  # written aside


def test_the_bars_are_what_was_counted():
    dense = count(build_on_meta(Architecture("cifar_resnet8", 10)))
    counts = count(pruned_by(build_model("cifar_resnet8", 10), {"layer*.conv1": 0.75}))
    figure = draw_layers(dense, counts, title="a network", headline="its size")
    filters, macs = figure.axes

    def lengths(container):
        return [bar.get_width() for bar in container]

    assert lengths(filters.containers[0]) == [100] * 8
    assert lengths(filters.containers[1]) == [100, 25, 100, 25, 100, 25, 100, 100]
    assert lengths(macs.containers[0]) == [layer.macs for layer in dense.layers]
    assert lengths(macs.containers[1]) == [layer.macs for layer in counts.layers]
    names = [label.get_text() for label in filters.get_yticklabels()]
    assert names == [layer.name for layer in dense.layers]
    assert filters.yaxis_inverted()
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in macs.texts]
    assert max(box.x1 for box in boxes) <= macs.get_window_extent().x1


@pytest.mark.parametrize(("name", "start"), [("a.png", b"\x89PNG"), ("a.pdf", b"%PDF")])
def test_other_pictures(name, start, saved, tmp_path):
    plot_description(str(saved), tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(start)


def test_a_picture_that_cannot_be_drawn(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["describe", str(saved), "--plot", "layers.jpg"])
    with pytest.raises(UserError, match=r"layers.jpg: the name .* must end in .png, .svg, .pdf"):
        main()
    assert capsys.readouterr().out == ""
    folder = tmp_path / "folder.png"
    folder.mkdir()
    for place in (folder, saved / "layers.png"):
        with pytest.raises(UserError, match=f"{place}: cannot write the picture: "):
            plot_description(str(saved), place)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt", "folder.png"]


def test_without_a_picture_matplotlib_is_not_imported(saved):
    code = f"import sys, tpp.describe as d; d.print_description({str(saved)!r}, d.make_console())"
    code += "; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_file_that_is_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        print_description(str(tmp_path / "none"), Console())
