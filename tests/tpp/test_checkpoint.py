import hashlib
import json
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from tpp.channels.removal import prune_model
from tpp.checkpoints import model_file as checkpoint
from tpp.checkpoints.model_file import (
    FORMAT,
    load_model,
    load_optimizer_state,
    read_checkpoint,
    read_metadata,
    save_model,
)
from tpp.common.errors import UserError
from tpp.models.architecture import Architecture, build_model, build_on_meta
from tpp.models.fitting import fit_to_shapes
from tpp.plan import PruningPlan

PREPROCESSING = {"image_size": 32, "resize": 32, "mean": [0.5], "std": [0.25], "channels": 3}


def small():
    """A pruned network with BatchNorm statistics that are not the initial ones."""
    torch.manual_seed(0)
    model = build_model("cifar_resnet8", 10)
    model(torch.rand(4, 3, 32, 32))
    layer = "layer2.0.conv1"
    return prune_model(model, PruningPlan({layer: 32}, {layer: list(range(3, 20))}))


def same(a, b):
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


def rewrite(path, metadata=None, tensors=None):
    """Replace parts of a checkpoint, keeping the file itself well formed."""
    stored = load_file(path)
    data = metadata_of(path)
    stored |= tensors or {}
    data |= metadata or {}
    save_file(
        {name: tensor for name, tensor in stored.items() if tensor is not None},
        path,
        metadata={FORMAT: json.dumps(data)},
    )


def metadata_of(path):
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(json.loads(raw[8 : 8 + length])["__metadata__"][FORMAT])


def test_a_pruned_network_comes_back_from_the_file_alone(tmp_path):
    model = small()
    save_model(tmp_path / "ckpt", model, preprocessing=PREPROCESSING, extra={"top1": 93.5})
    loaded = load_model(tmp_path / "ckpt")
    same(loaded.state_dict(), model.state_dict())
    assert loaded.bn1.num_batches_tracked == 1
    assert not loaded.training
    assert loaded.architecture == model.architecture
    assert loaded.preprocessing == PREPROCESSING
    assert str(loaded) == str(model)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(loaded(images), model.eval()(images))
    info = read_metadata(tmp_path / "ckpt")
    assert info.architecture == Architecture("cifar_resnet8", 10)
    assert info.extra == {"top1": 93.5}
    assert info.widths["layer2.0.conv1"] == [16, 15]
    assert info.shapes == {name: tuple(t.shape) for name, t in model.state_dict().items()}
    # Saved again, it keeps what it carries and is the same bytes.
    save_model(tmp_path / "again", loaded, extra={"top1": 93.5})
    assert (tmp_path / "again").read_bytes() == (tmp_path / "ckpt").read_bytes()


@settings(max_examples=15, deadline=None)
@given(
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
    width=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_any_dtype_and_width_is_kept(tmp_path_factory, dtype, width, seed):
    torch.manual_seed(seed)
    model = build_model("mlp7_linear", 3, width=width, image_size=2).to(dtype)
    path = tmp_path_factory.mktemp("any") / "ckpt"
    save_model(path, model)
    loaded = load_model(path)
    same(loaded.state_dict(), model.state_dict())
    assert loaded.architecture.args == {"width": width, "image_size": 2}


def test_strided_and_overlapping_memory_is_stored_as_it_looks(tmp_path):
    model = build_model("cifar_resnet8", 10).to(memory_format=torch.channels_last)
    base = torch.randn(100)
    model.bn1.weight.data, model.bn1.bias.data = base[0:16], base[8:24]
    save_model(tmp_path / "ckpt", model)
    same(load_model(tmp_path / "ckpt").state_dict(), model.state_dict())


class Tied(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.a, self.b = nn.Linear(num_classes, num_classes), nn.Linear(num_classes, num_classes)
        self.b.weight = self.a.weight
        self.register_buffer("scale", torch.tensor(3.0), persistent=False)

    def forward(self, x):
        return self.b(self.a(x.mean((2, 3)))) * self.scale


def test_tied_tensors_are_stored_once_and_tied_again(tmp_path, monkeypatch):
    monkeypatch.setitem(checkpoint.build_model.__globals__["_OWN_MODELS"], "tied", Tied)
    model = build_model("tied", 3)
    save_model(tmp_path / "ckpt", model)
    assert sorted(load_file(tmp_path / "ckpt")) == ["a.bias", "a.weight", "b.bias"]
    state = torch.random.get_rng_state()
    loaded = load_model(tmp_path / "ckpt")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert loaded.b.weight is loaded.a.weight
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(loaded(images), model.eval()(images))
    tensors, _, _ = read_checkpoint(tmp_path / "ckpt")
    same({name: tensors[name] for name in model.state_dict()}, model.state_dict())


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    model = small()
    path = tmp_path / "ckpt"
    save_model(path, model)
    before = path.read_bytes()

    def damage(aside):  # a disk that loses a byte
        data = bytearray(aside.read_bytes())
        data[-1] ^= 1
        aside.write_bytes(data)

    monkeypatch.setattr(checkpoint, "sync", damage)
    with pytest.raises(UserError, match=r"cannot write the checkpoint: the bytes of .* are not"):
        save_model(path, model, extra={"new": 1})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["ckpt"]  # noqa: PTH208


def test_what_cannot_be_saved_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not say which one it is"):
        save_model(tmp_path / "ckpt", nn.Linear(2, 2))
    model = small()
    tensors = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=r"cannot save as cifar_resnet8: .* lacks conv1\.weight"):
        save_model(tmp_path / "ckpt", tensors, architecture=model.architecture)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the checkpoint"):
        save_model(tmp_path / "file" / "ckpt", model)
    assert not (tmp_path / "ckpt").exists()


@pytest.mark.parametrize("cut", [0, 4, 100, 5000, -1])
def test_a_truncated_file_is_refused(tmp_path, cut):
    path = tmp_path / "ckpt.safetensors"
    save_model(path, small())
    path.write_bytes(path.read_bytes()[:cut])
    for read in (load_model, read_metadata, read_checkpoint):
        with pytest.raises(UserError) as caught:
            read(path)
        said = "not a whole safetensors file" if cut else "an empty file; copy it again"
        assert str(caught.value).startswith(f"{path}: {said}")


def test_a_damaged_tensor_is_named(tmp_path):
    path = tmp_path / "ckpt"
    save_model(path, small())
    weight = load_file(path)["linear.weight"].numpy().tobytes()
    path.write_bytes(path.read_bytes().replace(weight, weight[:-1] + b"\x01"))
    for read in (load_model, read_checkpoint):
        with pytest.raises(UserError, match=r"damaged: the bytes of linear\.weight"):
            read(path)


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"),
    [
        ({"version": 3}, {}, "version 3, expected 2"),
        ({"more": 1}, {}, "the metadata must hold"),
        ({"architecture": {}}, {}, "expected"),
        ({"architecture": {"name": "resnet5", "num_classes": 10, "args": {}}}, {}, "resnet50"),
        (
            {"architecture": {"name": "resnet18", "num_classes": 10, "args": {}}},
            {},
            r"does not fit ResNet: lacks layer1\.1\.conv1\.weight",
        ),
        ({}, {"bn1.bias": None}, r"bn1\.bias is missing"),
        ({}, {"bn9.bias": torch.zeros(3)}, r"bn9\.bias is unexpected"),
        ({"sha256": {}, "widths": {}}, {}, "is unexpected"),
        ({"widths": {"conv1": [3, 15]}}, {}, r"conv1\.weight has \[inputs, outputs\] \[3, 16\]"),
        ({"ties": {"x": "y"}}, {}, "x is said to be y, which is missing"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(tmp_path, metadata, tensors, message):
    path = tmp_path / "ckpt"
    save_model(path, small())
    rewrite(path, metadata, tensors)
    with pytest.raises(UserError, match=message) as caught:
        load_model(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize("key", ["widths", "ties", "sha256", "extra", "companions"])
@pytest.mark.parametrize("value", [None, 3, "x", [1], [[]], {"a": [1]}])
def test_metadata_of_the_wrong_kinds_is_refused(tmp_path, key, value):
    if (key, value) == ("extra", {"a": [1]}):
        return  # which is nothing wrong
    path = tmp_path / "ckpt"
    save_model(path, small())
    rewrite(path, {key: value})
    with pytest.raises(UserError) as caught:
        load_model(path)
    assert str(caught.value).startswith(str(path))


def test_widths_that_do_not_fit_each_other_are_refused(tmp_path):
    """Every tensor by itself is fine, hashes and widths too: only a run tells."""
    path = tmp_path / "ckpt"
    save_model(path, small())
    weight = torch.zeros(32, 14, 3, 3)  # conv1 before it has 15 filters
    widths = metadata_of(path)["widths"] | {"layer2.0.conv2": [14, 32]}
    sha256 = metadata_of(path)["sha256"]
    sha256["layer2.0.conv2.weight"] = hashlib.sha256(weight.numpy().tobytes()).hexdigest()
    rewrite(path, {"sha256": sha256, "widths": widths}, {"layer2.0.conv2.weight": weight})
    with pytest.raises(
        UserError, match=r"ckpt: its layers do not fit each other at layer2\.0\.conv2: "
    ):
        load_model(path)


def test_a_new_classifier(tmp_path):
    model = small()
    model.linear = nn.Linear(model.linear.in_features, 5)
    save_model(tmp_path / "ckpt", model, extra={"classes": list("abcde")})
    loaded = load_model(tmp_path / "ckpt")
    assert loaded.architecture == Architecture("cifar_resnet8", 5)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(loaded(images), model.eval()(images)) and loaded(images).shape == (2, 5)
    # It trains on, and can be pruned again.
    optimizer = torch.optim.SGD(loaded.train().parameters(), lr=0.1)
    torch.nn.functional.cross_entropy(loaded(images), torch.tensor([0, 4])).backward()
    optimizer.step()
    plan = PruningPlan({"layer2.0.conv1": 15}, {"layer2.0.conv1": [0, 14]})
    assert prune_model(loaded.eval(), plan)(images).shape == (2, 5)
    # A file that claims other outputs than it has is caught.
    rewrite(tmp_path / "ckpt", {"architecture": Architecture("cifar_resnet8", 10).to_dict()})
    with pytest.raises(UserError, match="said to have 10 outputs"):
        load_model(tmp_path / "ckpt")


def test_companions_come_back(tmp_path):
    model = small()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model(torch.rand(4, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    states = {
        f"optimizer.{key}": {n: optimizer.state[p][key] for n, p in model.named_parameters()}
        for key in ("exp_avg", "exp_avg_sq", "step")
    }
    average = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    save_model(tmp_path / "ckpt", model, companions={**states, "ema": average})
    same(load_model(tmp_path / "ckpt").state_dict(), model.state_dict())
    same(load_model(tmp_path / "ckpt", companion="ema").state_dict(), average)
    with pytest.raises(UserError, match="holds no 'swa'; it has optimizer"):
        load_model(tmp_path / "ckpt", companion="swa")
    loaded = load_model(tmp_path / "ckpt")
    fresh = torch.optim.Adam(loaded.parameters(), lr=0.01)
    count = len(list(model.parameters()))
    assert load_optimizer_state(tmp_path / "ckpt", loaded, fresh) == count
    # The next step is the one that would have been.
    images = torch.rand(4, 3, 32, 32)
    for network, steps in ((model.eval(), optimizer), (loaded, fresh)):
        network.zero_grad()
        network(images).square().sum().backward()
        steps.step()
    same(loaded.state_dict(), model.state_dict())
    with pytest.raises(UserError, match=r"exp_avg of conv1\.weight is of shape"):
        other = build_model("cifar_resnet8", 10)
        other.conv1 = nn.Conv2d(3, 8, 3)
        load_optimizer_state(tmp_path / "ckpt", other, torch.optim.SGD(other.parameters()))
    save_model(tmp_path / "bare", model)
    with pytest.raises(UserError, match="holds no optimiser's state"):
        load_optimizer_state(tmp_path / "bare", loaded, fresh)


def test_a_file_of_version_1_loads(tmp_path):
    path = tmp_path / "ckpt"
    save_model(path, small())
    data = metadata_of(path) | {"version": 1}
    del data["companions"]
    save_file(load_file(path), path, metadata={FORMAT: json.dumps(data)})
    same(load_model(path).state_dict(), small().state_dict())


def test_a_tensor_of_another_shape_is_named(tmp_path):
    path = tmp_path / "ckpt"
    save_model(path, small())
    for name, shape in (("bn1.running_var", (15,)), ("layer2.0.conv1.weight", (15, 16, 1, 1))):
        tensor = torch.zeros(shape)
        sha256 = metadata_of(path)["sha256"]
        sha256[name] = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        rewrite(path, {"sha256": sha256}, {name: tensor})
        with pytest.raises(UserError) as caught:
            load_model(path)
        assert f"{name}: shape {'x'.join(map(str, shape))} does not fit" in str(caught.value)
        save_model(path, small())


def test_other_files_are_refused(tmp_path):
    plain, text = tmp_path / "plain.safetensors", tmp_path / "text"
    save_file({"x": torch.zeros(1)}, plain)
    text.write_text("hello, this is no checkpoint at all")
    for path, message in (
        (tmp_path / "none", "no such file"),
        (tmp_path, "a folder, not a tpp-checkpoint: name a file in it, or make one of it"),
        (plain, "plain safetensors, not a tpp-checkpoint: it does not say which network"),
        (text, r"a text file \(hello, this"),
    ):
        with pytest.raises(UserError, match=message):
            load_model(path)


@settings(max_examples=30, deadline=None)
@given(widths=st.lists(st.integers(1, 40), min_size=2, max_size=2))
def test_fit_to_shapes_gives_the_shapes_asked_for(widths):
    first, second = widths
    model = build_on_meta(Architecture("mlp7_linear", 10))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    shapes |= {"fc1.weight": (first, 784), "fc1.bias": (first,), "fc2.weight": (second, first)}
    shapes |= {"fc2.bias": (second,), "fc3.weight": (100, second)}
    fit_to_shapes(model, shapes)
    assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == shapes
    assert (model.fc2.in_features, model.fc2.out_features) == (first, second)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("conv1.weight", (16, 3, 5, 5)),
        ("conv1.weight", (16, 3)),
        ("conv1.weight", (0, 3, 3, 3)),
        ("bn1.bias", (15,)),
        ("bn1.num_batches_tracked", (1,)),
        ("linear.weight", (10, 64, 1)),
    ],
)
def test_fit_to_shapes_names_what_cannot_be(name, shape):
    model = build_on_meta(Architecture("cifar_resnet8", 10))
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    with pytest.raises(UserError) as caught:
        fit_to_shapes(model, shapes | {name: shape})
    assert str(caught.value).startswith(f"{name}: shape ")
