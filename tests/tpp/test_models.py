import copy

import pytest
import torch
import torchvision
from torch import nn

from tpp.common.errors import UserError
from tpp.models.architecture import (
    Architecture,
    build_model,
    build_on_meta,
    example_input_for,
    input_shape,
    meta_copy,
    model_names,
)


@pytest.mark.parametrize(
    ("name", "classes", "args", "shape"),
    [
        ("cifar_resnet20", 10, {}, (3, 32, 32)),
        ("cifar_vgg19_bn", 100, {}, (3, 32, 32)),
        ("mlp7_linear", 10, {}, (1, 28, 28)),
        ("mlp7_linear", 10, {"width": 20, "image_size": 32}, (1, 32, 32)),
        ("plain_mlp", 10, {"skip": 2}, (1, 28, 28)),
        ("plain_mlp", 10, {"channels": 3, "image_size": 8}, (3, 8, 8)),
        ("plain_convnet", 10, {"depth": 6, "skip": 2}, (3, 32, 32)),
        ("plain_convnet", 10, {"channels": 1, "depth": 6}, (1, 32, 32)),
        ("resnet18", 7, {}, (3, 224, 224)),
        ("googlenet", 7, {}, (3, 224, 224)),
        ("vit_b_16", 5, {"image_size": 32}, (3, 32, 32)),
        ("timm:resnet18", 7, {"in_chans": 1}, (1, 224, 224)),
        ("timm:convnext_atto", 7, {}, (3, 224, 224)),
    ],
)
def test_a_model_runs_on_its_example_input_and_carries_its_architecture(name, classes, args, shape):
    model = build_on_meta(Architecture(name, classes, args))
    assert model.architecture == Architecture(name, classes, args)
    assert copy.deepcopy(model).architecture == model.architecture
    assert input_shape(name, **args) == shape
    assert example_input_for(model).shape == (1, *shape)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert model.eval()(example_input_for(model).to("meta")).shape == (1, classes)


@pytest.mark.parametrize("depth", [8, 14, 20, 32, 44, 56, 110])
def test_cifar_resnet_has_6n_plus_2_layers(depth):
    model = build_model(f"cifar_resnet{depth}", 10)
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == depth


def test_the_public_resnet56_loads_strictly(shared_data):
    path = shared_data("resnet56-cifar10.th")
    public = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    model = build_model("cifar_resnet56", 10)
    model.load_state_dict({k.removeprefix("module."): v for k, v in public.items()}, strict=True)


def test_the_option_a_shortcut_subsamples_and_pads():
    block = build_model("cifar_resnet8", 10).layer2[0].eval()
    nn.init.zeros_(block.bn2.weight)  # nothing but the shortcut is left
    x = torch.rand(2, 16, 8, 8)
    expected = torch.zeros(2, 32, 4, 4)
    expected[:, 8:24] = x[:, :, ::2, ::2]
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize(("depth", "parameters"), [(16, 14_770_212), (19, 20_081_188)])
def test_vgg_is_convolutions_and_one_classifier(depth, parameters):
    """Parameters of 3x3 convolutions, BatchNorm's two per filter, and 513 per class, by hand."""
    model = build_model(f"cifar_vgg{depth}_bn", 100)
    convs = [m for m in model.features if isinstance(m, nn.Conv2d)]
    more = depth == 19
    widths = [64] * 2 + [128] * 2 + [256] * (3 + more) + [512] * (6 + 2 * more)
    assert [conv.out_channels for conv in convs] == widths
    by_hand = 513 * 100 + sum(
        9 * before * after + 2 * after for before, after in zip([3, *widths], widths, strict=False)
    )
    assert sum(p.numel() for p in model.parameters()) == by_hand == parameters
    assert model.features[0] is convs[0]
    assert model.classifier.in_features == 512


def test_the_linear_network_is_affine():
    model = build_model("mlp7_linear", 10).double()
    a, b = torch.rand(2, 4, 1, 28, 28, dtype=torch.float64)
    torch.testing.assert_close(model(a + b) - model(b), model(a) - model(a * 0))


def test_every_torchvision_classifier_is_known():
    assert set(torchvision.models.list_models(module=torchvision.models)) < set(model_names())


@pytest.mark.parametrize(
    ("name", "classes", "args", "message"),
    [
        ("cifar_resnet18", 10, {}, "did you mean cifar_resnet"),
        ("resnet5", 10, {}, "resnet50"),
        ("timm:resnet5", 10, {}, "resnet50"),
        ("no such thing", 10, {}, "no model is called 'no such thing'"),
        ("resnet18", 0, {}, "num_classes must be a positive number"),
        ("resnet18", 10, {"foo": 1}, "foo"),
        ("resnet18", 10, {"weights": "DEFAULT"}, "loaded from a file"),
        ("mlp7_linear", 10, {"width": -3}, "mlp7_linear"),
        ("plain_mlp", 10, {"activation": "sine"}, "'sine' is none of tanh, relu, identity"),
        ("plain_mlp", 10, {"skip": -1}, "skip: a number of layers"),
        ("plain_convnet", 10, {"depth": 17}, "depth: 6, 10, 14, 18, ..., not 17"),
    ],
)
def test_mistakes_are_named(name, classes, args, message):
    for build in (
        lambda: build_model(name, classes, **args),
        lambda: build_on_meta(Architecture(name, classes, args)),
    ):
        with pytest.raises(UserError) as caught:
            build()
        assert message in str(caught.value)


def test_an_architecture_survives_plain_data():
    architecture = Architecture("mlp7_linear", 10, {"width": 20})
    assert Architecture.from_dict(architecture.to_dict()) == architecture
    for broken in (None, {}, {"name": "x", "num_classes": "10", "args": {}}):
        with pytest.raises(UserError):
            Architecture.from_dict(broken)


def test_meta_copy_keeps_everything_but_memory():
    model = build_model("cifar_resnet8", 10).double().eval()
    model.conv1.weight.requires_grad_(False)
    copied = meta_copy(model)
    for (name, ours), (_, theirs) in zip(
        copied.state_dict(keep_vars=True).items(),
        model.state_dict(keep_vars=True).items(),
        strict=True,
    ):
        assert ours.is_meta and not theirs.is_meta, name
        assert (ours.shape, ours.dtype, ours.requires_grad) == (
            theirs.shape,
            theirs.dtype,
            theirs.requires_grad,
        )
    assert not copied.training
    assert copied.architecture == model.architecture
