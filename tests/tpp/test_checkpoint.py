import hashlib
import json
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from tpp import checkpoint
from tpp.checkpoint import (
    FORMAT,
    fit_to_shapes,
    load_model,
    load_tensors,
    load_weights,
    read_metadata,
    save_model,
)
from tpp.errors import UserError
from tpp.models import Architecture, build_model, build_on_meta
from tpp.plan import PruningPlan
from tpp.prune import prune_model

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
        return self.b(self.a(x)) * self.scale


def test_tied_tensors_are_stored_once_and_tied_again(tmp_path, monkeypatch):
    monkeypatch.setitem(checkpoint.build_model.__globals__["_OWN_MODELS"], "tied", Tied)
    model = build_model("tied", 4)
    save_model(tmp_path / "ckpt", model)
    assert sorted(load_file(tmp_path / "ckpt")) == ["a.bias", "a.weight", "b.bias"]
    state = torch.random.get_rng_state()
    loaded = load_model(tmp_path / "ckpt")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert loaded.b.weight is loaded.a.weight
    assert torch.equal(loaded(torch.ones(1, 4)), model.eval()(torch.ones(1, 4)))
    tensors, _ = load_tensors(tmp_path / "ckpt")
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
    with pytest.raises(UserError, match="whose architecture is not known"):
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
    for read in (load_model, read_metadata, load_tensors):
        with pytest.raises(UserError) as caught:
            read(path)
        assert str(caught.value).startswith(f"{path}: not a whole safetensors file")


def test_a_damaged_tensor_is_named(tmp_path):
    path = tmp_path / "ckpt"
    save_model(path, small())
    weight = load_file(path)["linear.weight"].numpy().tobytes()
    path.write_bytes(path.read_bytes().replace(weight, weight[:-1] + b"\x01"))
    for read in (load_model, load_tensors):
        with pytest.raises(UserError, match=r"damaged: the bytes of linear\.weight"):
            read(path)


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"),
    [
        ({"version": 2}, {}, "version 2, expected 1"),
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
        (tmp_path, "no such file"),
        (plain, "not a tpp-checkpoint"),
        (text, "not a whole safetensors file"),
    ):
        with pytest.raises(UserError, match=message):
            load_model(path)


@pytest.mark.parametrize("key", [None, "state_dict", "model_state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("zipped", [True, False])
def test_foreign_files(tmp_path, key, prefix, zipped):
    state = {"a.weight": torch.rand(2, 3), "a.bias": torch.rand(2)}
    data = {prefix + name: tensor for name, tensor in state.items()}
    path = tmp_path / "weights.pth"
    torch.save(
        {key: data, "epoch": 3} if key else data, path, _use_new_zipfile_serialization=zipped
    )
    tensors, info = load_tensors(path)
    assert info is None
    same(tensors, state)


def test_old_batchnorm_weights_and_plain_safetensors(tmp_path):
    model = build_model("cifar_resnet8", 10)
    old = {n: t for n, t in model.state_dict().items() if not n.endswith("num_batches_tracked")}
    save_file(old, tmp_path / "old.safetensors")
    other = build_model("cifar_resnet8", 10)
    load_weights(other, tmp_path / "old.safetensors")
    same(other.state_dict(), model.state_dict())


class Anything:
    pass


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Anything(), "needs pickle"),
        ([1, 2], "holds a list"),
        ({"epoch": 3, "best": 1.0}, "epoch, best are no tensor"),
        ({}, "empty"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_files_without_weights(tmp_path, data, message, zipped):
    torch.save(data, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=message):
        load_tensors(tmp_path / "x.pth")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_pth_file(tmp_path, zipped, share):
    path = tmp_path / "x.pth"
    torch.save({"x": torch.rand(1000)}, path, _use_new_zipfile_serialization=zipped)
    raw = path.read_bytes()
    path.write_bytes(raw[: int(share * len(raw))])
    with pytest.raises(UserError):
        load_tensors(path)


def test_load_weights_names_what_does_not_fit(tmp_path):
    pruned, dense = small(), build_model("cifar_resnet8", 10)
    save_model(tmp_path / "ckpt", pruned)
    with pytest.raises(
        UserError, match=r"layer2\.0\.conv1\.weight is 15x16x3x3, the model's is 32"
    ):
        load_weights(dense, tmp_path / "ckpt")
    with pytest.raises(UserError, match=r"lacks layer1\.1\.conv1\.weight, .*in all"):
        load_weights(build_model("cifar_resnet14", 10), tmp_path / "ckpt")
    with pytest.raises(UserError, match="has unknown"):
        save_model(tmp_path / "deep", build_model("cifar_resnet14", 10))
        load_weights(dense, tmp_path / "deep")
    fresh = small().double()
    load_weights(fresh, tmp_path / "ckpt")
    assert fresh.conv1.weight.dtype == torch.float64
    assert torch.equal(fresh.conv1.weight, pruned.conv1.weight.double())


def test_the_public_resnet56_loads(shared_data):
    model = build_model("cifar_resnet56", 10)
    load_weights(model, shared_data("resnet56-cifar10.th"))
    path = shared_data("resnet56-cifar10.th")
    public = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    assert torch.equal(model.linear.weight, public["module.linear.weight"])


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
