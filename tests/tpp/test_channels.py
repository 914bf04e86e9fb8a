"""Coupled tensors are checked against two truths: which inputs turn NaN when filters do (any
network, here), and that pruning equals zeroing (test_prune)."""

import copy
import random

import pytest
import torch
from torch import nn
from zeroing import randomised, reached, relative_difference, zeroed

from tpp.channels.channel_map import check_plan, find_channels
from tpp.channels.removal import prune_model
from tpp.channels.survey import survey_channels
from tpp.common.errors import UserError
from tpp.models.architecture import build_model
from tpp.plan import PruningPlan


@pytest.mark.parametrize(
    ("name", "args", "shape"),
    [
        ("cifar_resnet8", {}, (3, 32, 32)),
        ("cifar_vgg19_bn", {}, (3, 32, 32)),
        ("mlp7_linear", {}, (1, 28, 28)),
        ("plain_mlp", {"skip": 2}, (1, 28, 28)),
        ("plain_convnet", {"skip": 2, "depth": 10, "width": 8}, (3, 32, 32)),
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
def test_consumers_and_norms_are_those_that_a_filter_reaches(name, args, shape):
    model = randomised(name, torch.float32, **args)
    example = torch.rand(1, *shape)
    channels = survey_channels(model, example_input=example).channels
    shuffled = random.Random(0)
    assert channels
    for layer in shuffled.sample(sorted(channels), min(3, len(channels))):
        found = channels[layer]
        filters = sorted(shuffled.sample(range(found.filters), (found.filters + 1) // 2))
        claimed = {}
        for entry in found.slices:
            owner, _, key = entry.tensor.rpartition(".")
            module = model.get_submodule(owner)
            depthwise = isinstance(module, nn.Conv2d) and module.weight.shape[1] == 1
            reads = isinstance(module, nn.Conv2d | nn.Linear) and entry.dim == 1
            if reads or (depthwise and owner != layer and key == "weight"):
                claimed[owner] = sorted(entry.positions[filters].flatten().tolist())
        for norm in found.norms:
            claimed[norm.module] = sorted(norm.positions[filters].flatten().tolist())
        assert claimed == reached(model, {layer: filters}, example), layer


def norms(found):
    return [norm.module for norm in found.norms]


def test_a_bottleneck_by_hand():
    found = find_channels(build_model("resnet50", 10), ["layer1.0.conv2"])["layer1.0.conv2"]
    assert found.layer == "layer1.0.conv2"
    assert found.weight == "layer1.0.conv2.weight"
    assert found.bias is None
    assert found.filters == 64
    assert norms(found) == ["layer1.0.bn2"]
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
    assert norms(found) == []
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
    assert norms(found) == ["features.2.conv.0.1", "features.2.conv.1.1"]
    slices = {(s.tensor, s.dim) for s in found.slices}
    assert ("features.2.conv.1.0.weight", 0) in slices
    assert ("features.2.conv.2.weight", 1) in slices


def test_tied_layers_are_found_together_each_with_its_own_norm():
    layers = ["layer2.0.conv2", "layer2.0.downsample.0", "layer2.1.conv2"]
    found = find_channels(build_model("resnet18", 10), layers)
    assert {layer: norms(channels) for layer, channels in found.items()} == {
        "layer2.0.conv2": ["layer2.0.bn2"],
        "layer2.0.downsample.0": ["layer2.0.downsample.1"],
        "layer2.1.conv2": ["layer2.1.bn2"],
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
    assert norms(found["a"]) == ["norm"] and norms(found["b"]) == []


def test_a_depthwise_convolution_can_be_asked_for_with_its_feeder():
    layers = ["features.2.conv.0.0", "features.2.conv.1.0"]
    found = find_channels(build_model("mobilenet_v2", 10), layers)
    assert norms(found[layers[0]]) == ["features.2.conv.0.1"]
    assert norms(found[layers[1]]) == ["features.2.conv.1.1"]
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


class Softmaxed(Normed):
    def forward(self, x):
        return self.head(self.conv(x).softmax(1)).mean((2, 3))


class Masked(Normed):
    def forward(self, x):
        mask = torch.linspace(0, 1, 8, device=x.device).view(1, 8, 1, 1)
        return self.head(self.conv(x) * mask).mean((2, 3))


class Sorted(Normed):
    def forward(self, x):
        return self.head(self.conv(x).sort(1).values).mean((2, 3))


class Mixed(Normed):
    def __init__(self):
        super().__init__()
        self.other, self.grouped = nn.Conv2d(3, 4, 3), nn.Conv2d(12, 12, 1, groups=2)
        self.head = nn.Conv2d(12, 2, 1)

    def forward(self, x):
        x = self.grouped(torch.cat([self.conv(x), self.other(x)], 1))
        return self.head(x).mean((2, 3))


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
        (
            lambda: build_model("mobilenet_v2", 10),
            "features.2.conv.1.0",
            "its filters only gate or filter those of features.2.conv.0.0 one by one and go along",
        ),
        (
            lambda: build_model("shufflenet_v2_x0_5", 10),
            "stage2.1.branch2.5",
            "reach a reshape that splits channels into parts (at stage2.1)",
        ),
        (
            lambda: build_model("timm:vit_tiny_patch16_224", 10),
            "blocks.0.attn.qkv",
            "reach a reshape that splits channels into parts (at blocks.0.attn)",
        ),
        (
            lambda: build_model("cifar_resnet8", 10),
            "layer3.0.conv2",
            "are added to a padding of the channels or another fixed value (at layer3.0)",
        ),
        (Normed, "conv", "conv: its filters reach a GroupNorm in 2 groups (at norm)"),
        (Normed, "idle", "idle: not used"),
        (
            Shuffled,
            "conv",
            "conv: its filters reach a reshape that splits channels into parts (in forward())",
        ),
        (Padded, "conv", "conv: its filters reach a slice of the channels (in forward())"),
        (Softmaxed, "conv", "conv: its filters reach a softmax over the channels"),
        (Masked, "conv", "conv: its filters are combined with a tensor whose size forward() fixes"),
        (Mixed, "conv", "conv: feeds grouped, a convolution in 2 groups, together with other"),
        (Sorted, "conv", "conv: its filters reach sort, which they are not followed through"),
    ],
)
def test_a_layer_that_cannot_go_alone_is_refused_by_name(model, layer, message):
    with pytest.raises(UserError) as caught:
        find_channels(model(), [layer])
    assert message in str(caught.value)


def test_a_shared_weight_is_refused():
    with pytest.raises(UserError, match=r"a: its filters meet values that cannot be narrowed"):
        find_channels(Shared(), ["a"], example_input=torch.zeros(1, 8))


class Reused(nn.Module):
    """One layer called twice, with a norm of its own after each call."""

    def __init__(self):
        super().__init__()
        self.a, self.twice, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 2, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(2))

    def forward(self, x):
        x = self.a(x)
        for norm in self.norms:
            x = norm(self.twice(x)).relu()
        return self.head(x).mean((2, 3))


def test_a_layer_that_is_called_twice():
    example = torch.zeros(1, 3, 8, 8)
    found = find_channels(Reused(), ["twice"], coupled=True, example_input=example)
    # What it reads the second time is what it wrote the first time.
    assert list(found) == ["a", "twice"] and found["twice"].tied == ("a",)
    assert norms(found["twice"]) == ["norms.0", "norms.1"]
    slices = {(s.tensor, s.dim) for s in found["a"].slices}
    assert {("a.weight", 0), ("twice.weight", 0), ("twice.weight", 1), ("head.weight", 1)} < slices


class Scaled(nn.Module):
    """A parameter per channel outside of any layer, and an activation with one per channel."""

    def __init__(self):
        super().__init__()
        self.conv, self.act, self.head = nn.Conv2d(3, 6, 3), nn.PReLU(6), nn.Conv2d(6, 2, 1)
        self.scale = nn.Parameter(torch.ones(6, 1, 1))

    def forward(self, x):
        return self.head(self.act(self.conv(x)) * self.scale).mean((2, 3))


def test_parameters_per_channel_go_along():
    model = Scaled()
    example = torch.rand(2, 3, 8, 8)
    found = find_channels(model, ["conv"], example_input=example)["conv"]
    assert {(s.tensor, s.dim) for s in found.slices} == {
        ("conv.weight", 0),
        ("conv.bias", 0),
        ("act.weight", 0),
        ("scale", 0),
        ("head.weight", 1),
    }
    plan = PruningPlan({"conv": 6}, {"conv": [0, 4]})
    pruned = prune_model(model, plan, example_input=example)
    expected = zeroed(model, plan.pruned, example)(example)
    torch.testing.assert_close(pruned(example), expected)


class Shifted(Normed):
    def forward(self, x):
        return self.head(self.conv(x).sigmoid()).mean((2, 3))


@pytest.mark.parametrize(
    ("model", "layer", "reason"),
    [
        (
            Shifted,
            "conv",
            "are not zero where their filters are: an activation shifts them (at head",
        ),
        (
            lambda: build_model("convnext_tiny", 10),
            "features.0.0",
            "are normalised together by a LayerNorm (at features.0.1)",
        ),
        (lambda: build_model("resnet18", 10), "layer1.0.conv2", None),
        (lambda: build_model("mobilenet_v3_large", 10), "features.4.block.0.0", None),
    ],
)
def test_removal_that_is_not_zeroing_is_said(model, layer, reason):
    inexact = find_channels(model(), [layer], coupled=True)[layer].inexact
    assert inexact is None if reason is None else inexact.startswith(reason)


def test_channels_under_a_layernorm():
    """ConvNeXt's residual stream: what is left is the dense network whose LayerNorms take their
    means over the channels that stay."""
    model = randomised("timm:convnext_atto", torch.float64).eval()
    gone = list(range(3, 20))
    found = find_channels(model, ["stem.0"], coupled=True)
    assert found["stem.0"].filters == 40 and "LayerNorm" in found["stem.0"].inexact
    plan = PruningPlan(dict.fromkeys(found, 40), dict.fromkeys(found, gone))
    pruned = prune_model(model, plan)
    kept = [i for i in range(40) if i not in gone]

    def over_the_kept(norm, args, _):
        x = args[0]
        dim = 1 if x.shape[1] == 40 else x.dim() - 1
        part = x.index_select(dim, torch.tensor(kept))
        mean = part.mean(dim, keepdim=True)
        var = part.var(dim, unbiased=False, keepdim=True)
        shape = [40 if d == dim else 1 for d in range(x.dim())]
        y = (x - mean) / (var + norm.eps).sqrt() * norm.weight.view(shape) + norm.bias.view(shape)
        return y.index_fill(dim, torch.tensor(gone), 0.0)

    dense = copy.deepcopy(model)
    stage = [(n, m) for n, m in dense.named_modules() if n.startswith(("stem", "stages.0"))]
    for _, module in stage:
        if isinstance(module, nn.LayerNorm):
            module.register_forward_hook(over_the_kept)
    dense.stages[1].downsample[0].register_forward_hook(over_the_kept)
    with torch.no_grad():
        for name, module in stage:
            makes_the_stream = name in found or name.endswith("conv_dw")
            if makes_the_stream:
                module.weight[gone], module.bias[gone] = 0, 0
        images = torch.rand(2, 3, 64, 64, dtype=torch.float64)
        expected, actual = dense(images), pruned(images)
    assert relative_difference(actual, expected) < 1e-10


def test_coupled_adds_the_partners():
    model = build_model("resnet18", 10)
    found = find_channels(model, ["layer2.1.conv2"], coupled=True)
    assert list(found) == ["layer2.0.conv2", "layer2.0.downsample.0", "layer2.1.conv2"]
    survey = survey_channels(model, coupled=True)
    assert list(survey.refused) == ["fc"] and len(survey.channels) == 20
    assert survey.channels["layer2.1.conv2"].tied == (
        "layer2.0.conv2",
        "layer2.0.downsample.0",
    )


def test_channels_of_a_convolution_in_groups_by_hand():
    found = find_channels(build_model("resnext50_32x4d", 10), ["layer1.0.conv1"])["layer1.0.conv1"]
    assert found.groups == 32
    grouped = next(s for s in found.slices if s.tensor == "layer1.0.conv2.weight")
    assert (grouped.dim, grouped.groups) == (1, 32)
    assert torch.equal(grouped.positions, torch.arange(128)[:, None])


class Filtered(nn.Module):
    """A depthwise convolution beside what it filters: x + depthwise(x)."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.depthwise, self.head = nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Conv2d(6, 2, 1)

    def forward(self, x):
        x = self.conv(x)
        return self.head(x + self.norm(self.depthwise(x))).mean((2, 3))


def test_a_depthwise_convolution_that_is_added_does_not_just_go_along():
    example = torch.rand(2, 3, 8, 8)
    for layer, other in (("conv", "depthwise"), ("depthwise", "conv")):
        with pytest.raises(UserError, match=f"{layer}: its filters are added to .* of {other} and"):
            find_channels(Filtered(), [layer], example_input=example)
    found = find_channels(Filtered(), ["conv"], coupled=True, example_input=example)
    assert list(found) == ["conv", "depthwise"]


class Multiplied(nn.Module):
    """A depthwise convolution with four filters for each channel, on the image and behind."""

    def __init__(self):
        super().__init__()
        self.first, self.plain = nn.Conv2d(3, 12, 3, groups=3), nn.Conv2d(12, 5, 1)
        self.second, self.head = nn.Conv2d(5, 20, 3, groups=5), nn.Conv2d(20, 2, 1)

    def forward(self, x):
        x = self.plain(self.first(x).relu()).relu()
        return self.head(self.second(x).relu()).mean((2, 3))


def test_several_filters_for_each_channel():
    model, example = Multiplied(), torch.rand(2, 3, 8, 8)
    with pytest.raises(UserError, match="plain: its filters feed a convolution with several"):
        find_channels(model, ["plain"], example_input=example)
    found = find_channels(model, ["first", "second"], example_input=example)
    assert (found["first"].groups, found["second"].groups) == (3, 5)
    pruned = {"first": [0, 7, 8], "second": [1, 2, 4, 7, 8, 9, 14, 15, 18, 19]}
    plan = PruningPlan({"first": 12, "second": 20}, pruned)
    expected = zeroed(model, plan.pruned, example)(example)
    smaller = prune_model(model, plan, example_input=example)
    assert (smaller.second.groups, smaller.second.out_channels) == (5, 10)
    torch.testing.assert_close(smaller(example), expected)


class Branching(nn.Module):
    """Its code asks how wide it is, and turns the channels round when it is narrower."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = self.conv(x)
        return self.head(x if x.shape[1] == 8 else x.flip(1)).mean((2, 3))


class Fixed(Branching):
    def forward(self, x):
        return self.head(self.conv(x)[:, range(8)]).mean((2, 3))


def test_a_network_that_counts_channels_in_its_own_way_is_found_out():
    plan = PruningPlan({"conv": 8}, {"conv": [0, 5]})
    example = torch.zeros(1, 3, 8, 8)
    with pytest.raises(UserError, match="its channels reach other places than before"):
        prune_model(Branching(), plan, example_input=example)
    with pytest.raises(UserError, match="conv: its filters reach index"):
        prune_model(Fixed(), plan, example_input=example)


class Flattening(nn.Module):
    """Its only hidden channels reach a Linear layer with all their pixels."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 5, 3), nn.Linear(5 * 36, 4)

    def forward(self, x):
        return self.head(self.conv(x).relu().flatten(1))


def test_one_filter_that_is_flattened_is_all_that_need_be_left():
    model, example = Flattening(), torch.rand(2, 3, 8, 8)
    plan = PruningPlan({"conv": 5}, {"conv": [0, 1, 3, 4]})
    smaller = prune_model(model, plan, example_input=example)
    assert smaller.head.in_features == 36
    torch.testing.assert_close(smaller(example), zeroed(model, plan.pruned, example)(example))


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
