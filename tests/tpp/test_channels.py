"""Coupled tensors are checked against two truths: which inputs turn NaN when filters do (any
network, here), and that pruning equals zeroing (test_prune)."""

import random
from contextlib import suppress

import pytest
import torch
from torch import nn

from tpp.channels import check_plan, find_channels
from tpp.errors import UserError
from tpp.models import build_model
from tpp.plan import PruningPlan
from tpp.selection import prunable_layers


def lone_layers(model, example, limit, shuffled):
    """A few layers, drawn at random, whose filters can go alone."""
    layers = list(prunable_layers(model))
    found = {}
    for layer in shuffled.sample(layers, len(layers)):
        with suppress(UserError):
            found |= find_channels(model, [layer], example_input=example)
        if len(found) == limit:
            break
    return found


def nan_inputs(model, layer, filters, example):
    """Run with NaN in some filters of a layer: which inputs of which layers are reached.

    Consumers see zeros instead, so that nothing behind them is reached. Depthwise convolutions
    pass NaN on and count among the reached.
    """
    reached = {}

    def watch(name, module):
        def hook(_, args):
            x = args[0]
            channels = 1 if x.dim() == 4 and isinstance(module, nn.Conv2d) else x.dim() - 1
            others = [d for d in range(x.dim()) if d != channels]
            nan = x.isnan().flatten() if not others else x.isnan().amax(others)
            if nan.any():
                reached[name] = set(nan.nonzero().flatten().tolist())
            if getattr(module, "groups", 1) == 1:
                return (x.nan_to_num(0.0),)
            return None

        return module.register_forward_pre_hook(hook)

    modules = prunable_layers(model)
    hooks = [watch(name, module) for name, module in modules.items()]
    weight = modules[layer].weight
    saved = weight.detach().clone()
    with torch.no_grad():
        weight[filters] = float("nan")
        out = model(example)
        weight.copy_(saved)
    for hook in hooks:
        hook.remove()
    assert not out.isnan().any()
    return reached


@pytest.mark.parametrize(
    ("name", "args", "shape"),
    [
        ("cifar_resnet8", {}, (3, 32, 32)),
        ("cifar_vgg19_bn", {}, (3, 32, 32)),
        ("mlp7_linear", {}, (1, 28, 28)),
        ("resnet50", {}, (3, 32, 32)),
        ("alexnet", {}, (3, 64, 64)),  # channels flattened with their pixels
        ("squeezenet1_1", {}, (3, 32, 32)),  # concatenations
        ("densenet121", {}, (3, 32, 32)),  # channels that many layers read
        ("googlenet", {}, (3, 32, 32)),
        ("mobilenet_v2", {}, (3, 32, 32)),  # depthwise convolutions
        ("efficientnet_b0", {}, (3, 32, 32)),  # squeeze and excitation
        ("timm:convnext_atto", {}, (3, 32, 32)),  # linear layers on channels-last activations
        ("timm:ghostnet_050", {}, (3, 32, 32)),
        ("timm:vit_tiny_patch16_224", {"img_size": 32}, (3, 32, 32)),
    ],
)
def test_consumers_are_those_that_a_filter_reaches(name, args, shape):
    torch.manual_seed(0)
    model = build_model(name, 10, **args).eval()
    example = torch.rand(1, *shape)
    shuffled = random.Random(0)
    layers = lone_layers(model, example, 2, shuffled)
    assert layers
    for layer, found in layers.items():
        filters = sorted(shuffled.sample(range(found.filters), (found.filters + 1) // 2))
        expected = nan_inputs(model, layer, filters, example)
        claimed = {}
        for entry in found.slices:
            owner, _, key = entry.tensor.rpartition(".")
            module = model.get_submodule(owner)
            depthwise = getattr(module, "groups", 1) > 1
            if isinstance(module, nn.Conv2d | nn.Linear) and (
                entry.dim == 1 or (depthwise and key == "weight")
            ):
                claimed[owner] = set(entry.positions[filters].flatten().tolist())
        assert claimed == expected, layer


def test_a_bottleneck_by_hand():
    found = find_channels(build_model("resnet50", 10), ["layer1.0.conv2"])["layer1.0.conv2"]
    assert found.layer == "layer1.0.conv2"
    assert found.weight == "layer1.0.conv2.weight"
    assert found.bias is None
    assert found.filters == 64
    assert found.norms == ("layer1.0.bn2",)
    assert {(s.tensor, s.dim) for s in found.slices} == {
        ("layer1.0.conv2.weight", 0),
        ("layer1.0.bn2.weight", 0),
        ("layer1.0.bn2.bias", 0),
        ("layer1.0.bn2.running_mean", 0),
        ("layer1.0.bn2.running_var", 0),
        ("layer1.0.conv3.weight", 1),
    }
    for entry in found.slices:
        assert entry.positions.dtype == torch.int64
        assert torch.equal(entry.positions, torch.arange(64)[:, None])


def test_flattened_channels_take_all_their_pixels():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 5))
    found = find_channels(model, ["0"], example_input=torch.zeros(1, 3, 8, 8))["0"]
    assert found.bias == "0.bias"
    assert found.norms == ()
    positions = {s.tensor: s.positions for s in found.slices}
    assert torch.equal(positions["3.weight"], torch.arange(4 * 36).view(4, 36))


def test_an_activation_with_one_parameter_keeps_it():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.PReLU(), nn.Conv2d(4, 2, 1))
    found = find_channels(model, ["0"], example_input=torch.zeros(1, 3, 8, 8))["0"]
    assert {s.tensor for s in found.slices} == {"0.weight", "0.bias", "2.weight"}


def test_a_depthwise_convolution_and_both_norms_go_along():
    model = build_model("mobilenet_v2", 10)
    layer = "features.2.conv.0.0"
    found = find_channels(model, [layer])[layer]
    assert found.norms == ("features.2.conv.0.1", "features.2.conv.1.1")
    slices = {(s.tensor, s.dim) for s in found.slices}
    assert ("features.2.conv.1.0.weight", 0) in slices
    assert ("features.2.conv.2.weight", 1) in slices


def test_tied_layers_are_found_together_each_with_its_own_norm():
    layers = ["layer2.0.conv2", "layer2.0.downsample.0", "layer2.1.conv2"]
    found = find_channels(build_model("resnet18", 10), layers)
    norms = {layer: channels.norms for layer, channels in found.items()}
    assert norms == {
        "layer2.0.conv2": ("layer2.0.bn2",),
        "layer2.0.downsample.0": ("layer2.0.downsample.1",),
        "layer2.1.conv2": ("layer2.1.bn2",),
    }
    for layer in layers:
        assert found[layer].tied == tuple(other for other in layers if other != layer)


class PreActivation(nn.Module):
    """Two layers added, and the sum normalised: one BatchNorm for both."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x):
        return self.head(self.norm(self.a(x) + self.b(x)).relu()).mean((2, 3))


def test_a_norm_of_a_sum_is_named_once():
    found = find_channels(PreActivation(), ["a", "b"], example_input=torch.zeros(1, 3, 8, 8))
    assert found["a"].norms == ("norm",) and found["b"].norms == ()


def test_a_depthwise_convolution_can_be_asked_for_with_its_feeder():
    layers = ["features.2.conv.0.0", "features.2.conv.1.0"]
    found = find_channels(build_model("mobilenet_v2", 10), layers)
    assert found[layers[0]].norms == ("features.2.conv.0.1",)
    assert found[layers[1]].norms == ("features.2.conv.1.1",)
    assert found[layers[1]].tied == (layers[0],) and found[layers[1]].groups == 1


def test_a_plan_that_cannot_be_carried_out_is_refused():
    model = build_model("resnet18", 10)
    tied = ["layer2.0.conv2", "layer2.0.downsample.0", "layer2.1.conv2"]
    pruned = {tied[0]: [1], tied[1]: [1], tied[2]: [2]}
    plan = PruningPlan(dict.fromkeys(tied, 128), pruned)
    with pytest.raises(UserError, match=r"layer2\.0\.conv2 and layer2\.1\.conv2 are tied"):
        check_plan(plan, find_channels(model, tied))
    grouped = PruningPlan({"layer1.0.conv2": 128}, {"layer1.0.conv2": [0, 4]})
    channels = find_channels(build_model("resnext50_32x4d", 10), ["layer1.0.conv2"])
    with pytest.raises(UserError, match="each of its 32 groups must lose as many filters"):
        check_plan(grouped, channels)
    even = PruningPlan({"layer1.0.conv2": 128}, {"layer1.0.conv2": list(range(1, 128, 4))})
    check_plan(even, channels)


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.head(self.b(self.a(x)))


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8)
        self.head, self.idle = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 2, 1)

    def forward(self, x):
        return self.head(self.norm(self.conv(x))).mean((2, 3))


class Shuffled(Normed):
    def forward(self, x):
        x = self.conv(x)
        n, _, h, w = x.shape
        x = x.view(n, 2, 4, h, w).transpose(1, 2).reshape(n, 8, h, w)
        return self.head(x).mean((2, 3))


class Padded(Normed):
    def forward(self, x):
        return self.head(nn.functional.pad(self.conv(x)[:, :6], (0, 0, 0, 0, 1, 1))).mean((2, 3))


@pytest.mark.parametrize(
    ("model", "layer", "message"),
    [
        (lambda: build_model("resnet18", 10), "layer1.0.conv", "did you mean layer1.0.conv"),
        (lambda: build_model("resnet18", 10), "layer1.0.bn1", "no Conv2d or Linear"),
        (lambda: build_model("resnet18", 10), "fc", "fc: its filters are the network's output"),
        (lambda: build_model("squeezenet1_1", 10), "classifier.1", "network's output"),
        (
            lambda: build_model("resnet50", 10),
            "layer1.0.conv3",
            "layer1.0.conv3: its filters are added to or multiplied with those of "
            "layer1.0.downsample.0, layer1.1.conv3, layer1.2.conv3",
        ),
        (lambda: build_model("cifar_resnet8", 10), "layer1.0.conv2", "layer2.0.conv2"),
        (lambda: build_model("resnext50_32x4d", 10), "layer1.0.conv1", "feeds layer1.0.conv2"),
        (
            lambda: build_model("mobilenet_v2", 10),
            "features.2.conv.1.0",
            "with those of features.2.conv.0.0 and cannot be removed alone: prune all",
        ),
        (lambda: build_model("shufflenet_v2_x0_5", 10), "conv1.0", "cannot be followed"),
        (Normed, "conv", "conv: its filters reach norm, a GroupNorm"),
        (Normed, "idle", "idle: not used"),
        (Shuffled, "conv", "conv: its filters reach a reshape into more than four dimensions"),
        (Padded, "conv", "conv: its filters reach a padding of the channels"),
    ],
)
def test_a_layer_that_cannot_go_alone_is_refused_by_name(model, layer, message):
    with pytest.raises(UserError) as caught:
        find_channels(model(), [layer])
    assert message in str(caught.value)


def test_a_shared_weight_is_refused():
    with pytest.raises(UserError, match=r"a: a\.weight is shared with another layer"):
        find_channels(Shared(), ["a"], example_input=torch.zeros(1, 8))


def test_an_input_that_does_not_fit_is_named():
    with pytest.raises(UserError, match="does not run on an input of 1x1x28x28"):
        find_channels(
            build_model("cifar_resnet8", 10),
            ["layer1.0.conv1"],
            example_input=torch.zeros(1, 1, 28, 28),
        )


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_model_is_left_alone(mode):
    model = build_model("resnet18", 10)
    model.layer1.eval()
    model.conv1.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    training = [module.training for module in model.modules()]
    with mode():
        find_channels(model, ["layer1.0.conv1", "layer2.0.conv1"])
    assert [module.training for module in model.modules()] == training
    assert not model.conv1.weight.requires_grad
    assert model.layer1[0].conv1.weight.requires_grad
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_any_dtype_and_device_give_the_same_answer():
    model = build_model("cifar_resnet8", 10)
    layers = ["layer2.0.conv1", "layer1.0.conv1"]
    expected = find_channels(model, layers)
    assert list(expected) == layers
    for other in (model.double(), model.bfloat16(), model.to("meta")):
        found = find_channels(other, layers)
        for layer in layers:
            assert [s.tensor for s in found[layer].slices] == [
                s.tensor for s in expected[layer].slices
            ]
    assert find_channels(model, []) == {}
