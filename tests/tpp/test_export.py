import fnmatch
import json
import os
import subprocess
import sys
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from tpp.channels.removal import prune_model
from tpp.checkpoints.export_file import Exported, export_model
from tpp.checkpoints.model_file import load_model, save_model
from tpp.common.errors import UserError
from tpp.export import main
from tpp.models.architecture import Architecture, build_model, build_on_meta
from tpp.models.layers import prunable_layers
from tpp.plan import PruningPlan

REPOSITORY = Path(__file__).parents[2]
CLASSES = [f"class {i}" for i in range(10)]
PREPROCESSING = {"image_size": 64, "resize": 72, "mean": [0.5] * 3, "std": [0.25] * 3}
# A network of every kind, and layers that lose every third filter.
NETWORKS = {
    "cifar_resnet20": "layer*.conv1",
    "resnet50": "layer[1-3].*.conv[12]",
    "mobilenet_v3_large": "features.[23789].block.0.0",
    "densenet121": "features.denseblock[12].*.conv1",
    "timm:vit_tiny_patch16_224": "blocks.*.mlp.fc1",
}


def pruned(name):
    """A pruned network whose BatchNorm statistics are those of some images."""
    torch.manual_seed(0)
    args = {"img_size": 64} if name.startswith("timm:") else {}
    model = build_model(name, 10, **args)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    model(torch.randn(8, 3, 64, 64))
    layers = prunable_layers(model)
    names = fnmatch.filter(layers, NETWORKS[name])
    assert len(names) > 3
    filters = {layer: layers[layer].weight.shape[0] for layer in names}
    return prune_model(
        model, PruningPlan(filters, {k: list(range(0, n, 3)) for k, n in filters.items()})
    )


def checkpoint(folder, name="cifar_resnet20"):
    path = folder / "model.safetensors"
    save_model(path, pruned(name), preprocessing=PREPROCESSING, extra={"classes": CLASSES})
    return path


def run_onnx(path, images):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def assert_same_function(run, source):
    """The same logits, to a ten-thousandth of what tells one image from another."""
    model = load_model(source)
    images = torch.randn(5, 3, 64, 64) * torch.linspace(0.2, 2, 5).view(5, 1, 1, 1)
    with torch.no_grad():
        expected = model(images)
    between_images = (expected - expected.mean(0)).abs().max()
    for batch in (images, images[:1]):
        assert (run(batch) - expected[: len(batch)]).abs().max() < 1e-4 * between_images


@pytest.mark.parametrize("name", NETWORKS)
def test_a_pruned_network_as_onnx(name, tmp_path):
    source, output = checkpoint(tmp_path, name), tmp_path / "out.onnx"
    exported = export_model(source, output)
    assert exported == Exported(output, (3, 64, 64), None, exported.opset, exported.difference)
    assert exported.difference < 1e-5
    assert_same_function(lambda images: run_onnx(output, images), source)


@pytest.mark.parametrize("name", ["cifar_resnet20", "mobilenet_v3_large"])
def test_a_pruned_network_as_an_exported_program(name, tmp_path):
    source, output = checkpoint(tmp_path, name), tmp_path / "out.pt2"
    exported = export_model(source, output)
    assert exported == Exported(output, (3, 64, 64), None, None, exported.difference)
    assert exported.difference < 1e-5
    assert_same_function(torch.export.load(output).module(), source)


def test_what_a_serving_program_finds_in_the_file(tmp_path):
    source = checkpoint(tmp_path)
    expected = {
        "architecture": {"name": "cifar_resnet20", "num_classes": 10, "args": {}},
        "preprocessing": PREPROCESSING,
        "classes": CLASSES,
    }
    export_model(source, tmp_path / "new" / "out.onnx")
    export_model(source, tmp_path / "new" / "out.pt2")
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["out.onnx", "out.pt2"]
    model = onnx.load(tmp_path / "new" / "out.onnx", load_external_data=False)
    assert {entry.key: json.loads(entry.value) for entry in model.metadata_props} == expected
    (images,), (logits,) = model.graph.input, model.graph.output
    assert (images.name, shape_of(images)) == ("images", ["batch", 3, 64, 64])
    assert (logits.name, shape_of(logits)) == ("logits", ["batch", 10])
    onnx.checker.check_model(model)
    stored = dict.fromkeys(expected, "")
    program = torch.export.load(tmp_path / "new" / "out.pt2", extra_files=stored)
    assert {key: json.loads(value) for key, value in stored.items()} == expected
    assert program.example_inputs is None
    for name in ("out.onnx", "out.pt2"):
        content = (tmp_path / "new" / name).read_bytes()
        for place in (Path(torch.__file__).parent, REPOSITORY):
            assert str(place).encode() not in content


def shape_of(value):
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


def test_a_fixed_batch(tmp_path):
    source = checkpoint(tmp_path)
    exported = export_model(source, tmp_path / "out.onnx", batch=2)
    assert exported.batch == 2
    model = onnx.load(tmp_path / "out.onnx")
    assert shape_of(model.graph.input[0]) == [2, 3, 64, 64]
    assert shape_of(model.graph.output[0]) == [2, 10]
    export_model(source, tmp_path / "out.pt2", batch=2)
    with pytest.raises(RuntimeError, match="to be equal to 2, but got 3"):
        torch.export.load(tmp_path / "out.pt2").module()(torch.zeros(3, 3, 64, 64))


def test_opsets(tmp_path):
    model, output = build_model("cifar_resnet8", 10), tmp_path / "out.onnx"
    assert export_model(model, output, opset=18).opset == 18
    assert [entry.version for entry in onnx.load(output).opset_import] == [18]
    output.unlink()
    with pytest.raises(UserError, match="--opset 13: PyTorch's exporter can only write"):
        export_model(model, output, opset=13)
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path):
    save_model(tmp_path / "ckpt", build_model("cifar_resnet8", 10))
    # In a process of its own: PyTorch's logger keeps the standard error that it started with.
    command = [sys.executable, "-m", "tpp.export", "ckpt", "--output", "out.onnx", "--opset", "13"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: --opset 13: ")
    assert len(result.stderr.splitlines()) == 1


def test_the_command(tmp_path, monkeypatch, capfd):
    source = checkpoint(tmp_path)
    for name, kind in (("out.onnx", "ONNX opset "), ("out.pt2", "PyTorch exported program, ")):
        arguments = ["export", str(source), "--output", str(tmp_path / name)]
        monkeypatch.setattr(sys, "argv", arguments)
        main()
        text, error = capfd.readouterr()
        what, checked, wrote = text.splitlines()
        assert what.startswith(f"{source}: {kind}") and "images Nx3x64x64 float32, " in what
        assert "logits off by " in checked
        assert wrote == f"wrote {tmp_path / name}"
        assert error == ""
    monkeypatch.setattr(sys, "argv", [*arguments, "--batch-size", "4", "--no-check", "--overwrite"])
    main()
    text = capfd.readouterr().out
    assert "images 4x3x64x64" in text and "not checked" in text


def test_a_network_of_ones_own_is_left_alone(tmp_path):
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(), nn.Linear(144, 3))
    model = nn.Sequential(*layers).to(torch.bfloat16).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    blank = torch.zeros(1, 1, 8, 8)
    export_model(model, tmp_path / "out.onnx", example_input=blank, classes=["a", "b", "c"])
    assert model.training and all(module.training for module in model.modules())
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])
    images = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        expected = model.float().eval()(images)
    torch.testing.assert_close(run_onnx(tmp_path / "out.onnx", images), expected)
    stored = onnx.load(tmp_path / "out.onnx").metadata_props
    assert {entry.key: json.loads(entry.value) for entry in stored} == {"classes": ["a", "b", "c"]}


class Noisy(nn.Module):
    def forward(self, images):
        logits = images.mean((2, 3))
        return logits + torch.rand_like(logits)


class NotFinite(nn.Module):
    def forward(self, images):
        return images.mean((2, 3)) * float("nan")


class TwoOnly(nn.Module):
    def forward(self, images):
        return images.reshape(2, -1)


class DataDependent(nn.Module):
    def forward(self, images):
        return images.mean((2, 3)) if images.sum() > 0 else images.amax((2, 3))


class NoSuchOperator(nn.Module):
    def forward(self, images):
        return torch.special.bessel_j0(images.mean((2, 3)))


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
@pytest.mark.parametrize("network", [Noisy, NotFinite])
def test_a_file_that_computes_something_else_is_not_written(network, suffix, tmp_path):
    output = tmp_path / f"out{suffix}"
    output.write_text("an older file")
    with pytest.raises(UserError, match=r"not written: its logits differ .* more than 1e-04"):
        export_model(network(), output, example_input=torch.zeros(1, 3, 8, 8))
    assert output.read_text() == "an older file"
    assert list(tmp_path.iterdir()) == [output]
    unchecked = export_model(network(), output, example_input=torch.zeros(1, 3, 8, 8), check=False)
    assert unchecked.difference is None and output.stat().st_size > 100


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (
            TwoOnly,
            r"TwoOnly: PyTorch cannot trace it for any batch: .*; with --batch-size N it",
        ),
        (DataDependent, "DataDependent: PyTorch cannot trace it for any batch: Could not guard"),
        (NoSuchOperator, "NoSuchOperator: PyTorch cannot turn it into ONNX: No ONNX function"),
    ],
)
def test_a_network_that_cannot_be_exported(network, message, tmp_path, capfd):
    with pytest.raises(UserError, match=message) as caught:
        export_model(network(), tmp_path / "out.onnx", example_input=torch.zeros(2, 3, 8, 8))
    assert len(str(caught.value).splitlines()) == 1
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_a_batch_that_the_network_insists_on(tmp_path):
    images = torch.randn(2, 3, 8, 8)
    export_model(TwoOnly(), tmp_path / "out.onnx", example_input=images, batch=2)
    assert torch.equal(run_onnx(tmp_path / "out.onnx", images), images.reshape(2, -1))


def test_too_large_for_onnx(tmp_path):
    model = build_on_meta(Architecture("vit_h_14", 1000))
    with pytest.raises(UserError, match=r"2\.5 GB of float32 weights.* export it to a \.pt2 file"):
        export_model(model, tmp_path / "out.onnx")


@pytest.mark.parametrize(
    ("output", "options", "message"),
    [
        ("out.pb", {}, r"out\.pb: the name must end in \.onnx or \.pt2"),
        ("out.onnx", {"batch": 0}, "--batch-size 0: must be 1 or more"),
        ("out.pt2", {"opset": 18}, r"--opset 18: is for \.onnx files"),
        ("file/out.pt2", {}, r"file/out\.pt2: cannot write it: "),
        ("folder.pt2", {}, r"folder\.pt2: cannot write it: "),
    ],
)
def test_bad_requests(output, options, message, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder.pt2").mkdir()
    with pytest.raises(UserError, match=message):
        export_model(build_model("cifar_resnet8", 10), tmp_path / output, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.pt2"]


def test_bad_sources(tmp_path):
    with pytest.raises(UserError, match="none: no such file"):
        export_model(tmp_path / "none", tmp_path / "out.onnx")
    model = build_model("cifar_resnet8", 10)
    with pytest.raises(UserError, match="CifarResNet: does not run on images of 1x32x32: "):
        export_model(model, tmp_path / "out.pt2", example_input=torch.zeros(1, 1, 32, 32))


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"needs {package}: pip install onnx onnxscript onnxr"):
        export_model(build_model("cifar_resnet8", 10), tmp_path / "out.onnx")
