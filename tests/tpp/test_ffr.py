"""Feature-flow regularisation against geometry, brute force and finite differences."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tpp.common.errors import UserError
from tpp.methods.base import TrainingContext
from tpp.methods.ffr import FFR, Settings, curvature, followed, length
from tpp.models.architecture import Architecture, build_model, build_on_meta
from tpp.selection.selection import Selection

FORMS = ("second_difference", "angle")


def path_of(points):
    return [torch.tensor([point], dtype=torch.float64) for point in points]


def polygon(corners):
    """Once around and one step more."""
    angles = [2 * math.pi * k / corners for k in range(corners + 2)]
    return path_of([(math.cos(a), math.sin(a)) for a in angles])


@given(st.integers(2, 8), st.integers(1, 6), st.integers(0, 10_000))
def test_a_straight_path_does_not_bend(steps, elements, seed):
    numbers = torch.Generator().manual_seed(seed)
    start, step = torch.randn(2, 3, elements, dtype=torch.float64, generator=numbers)
    path = [start + n * step for n in range(steps + 1)]
    for form in FORMS:
        assert curvature(path, form, 2) < 1e-6
    assert length(path, 2) == pytest.approx(steps * step.norm(dim=1).mean().item())
    assert length(path, 1) == pytest.approx(steps * step.abs().mean().item())


@pytest.mark.parametrize("corners", [3, 5, 8])
def test_a_closed_polygon_turns_once_around(corners):
    assert curvature(polygon(corners), "angle", 2) == pytest.approx(2 * math.pi, rel=1e-12)
    side = 2 * math.sin(math.pi / corners)
    assert length(polygon(corners), 2) == pytest.approx((corners + 1) * side)
    # Between equal steps: 2 s sin(angle / 2).
    bend = 2 * side * math.sin(math.pi / corners)
    assert curvature(polygon(corners), "second_difference", 2) == pytest.approx(corners * bend)


@given(st.integers(0, 10_000), st.floats(0.1, 10))
def test_scale_and_rotation(seed, factor):
    numbers = torch.Generator().manual_seed(seed)
    path = list(torch.randn(5, 4, 6, dtype=torch.float64, generator=numbers))
    rotation, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=numbers))
    scaled, turned = [factor * x for x in path], [x @ rotation for x in path]
    for norm in (1, 2):
        assert length(scaled, norm) == pytest.approx(factor * length(path, norm).item())
        bent = curvature(path, "second_difference", norm).item()
        assert curvature(scaled, "second_difference", norm) == pytest.approx(factor * bent)
    angle = curvature(path, "angle", 2).item()
    assert curvature(scaled, "angle", 2) == pytest.approx(angle)
    assert curvature(turned, "angle", 2) == pytest.approx(angle)
    assert length(path, 2) >= (path[-1] - path[0]).norm(dim=1).mean() - 1e-12


def dot(u, v):
    return sum(a * b for a, b in zip(u, v, strict=True))


def test_against_a_loop_over_everything():
    torch.manual_seed(0)
    path = list(torch.randn(4, 3, 5, dtype=torch.float64))
    long, bent, turned = [], [], []
    for image in range(3):
        steps = [[(b - a).item() for a, b in zip(path[k][image], path[k + 1][image], strict=True)]
                 for k in range(3)]  # fmt: skip
        long.append(sum(sum(abs(x) for x in step) for step in steps) / 5)
        pairs = list(itertools.pairwise(steps))
        bent.append(sum(sum(abs(b - a) for a, b in zip(u, v, strict=True)) for u, v in pairs) / 5)
        turned.append(
            sum(math.acos(dot(u, v) / (math.hypot(*u) * math.hypot(*v))) for u, v in pairs)
        )
    assert length(path, 1) == pytest.approx(sum(long) / 3)
    assert curvature(path, "second_difference", 1) == pytest.approx(sum(bent) / 3)
    assert curvature(path, "angle", 1) == pytest.approx(sum(turned) / 3)


@pytest.mark.parametrize("form", FORMS)
def test_gradients(form):
    torch.manual_seed(1)
    features = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: curvature(list(x), form, 2), features)
    assert torch.autograd.gradcheck(lambda x: length(list(x), 2), features)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("norm", [1, 2])
def test_where_nothing_moves_the_gradient_is_zero(form, norm):
    features = torch.ones(4, 2, 3, dtype=torch.float64, requires_grad=True)
    total = length(list(features), norm) + curvature(list(features), form, norm)
    total.backward()
    assert total == 0 and torch.equal(features.grad, torch.zeros_like(features))


def context(model):
    return TrainingContext("regularize", None, Selection(), 0, 1, torch.zeros(1, 3, 32, 32))


def terms_of(model, images, **settings):
    method = FFR(Settings(**settings))
    method.prepare(model, context(model))
    outputs = model.train()(images)
    return method, method.batch_terms((images, torch.zeros(len(images))), outputs)


def resnet():
    torch.manual_seed(0)
    return build_model("cifar_resnet14", 4).double()


def test_blocks_of_a_stage_are_one_path_from_what_goes_into_it():
    """Against features that hooks of this test have kept."""
    model, images = resnet(), torch.randn(4, 3, 16, 16, dtype=torch.float64)
    kept: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda m, inputs, output, name=name: kept.update({name: output, f"{name}<": inputs[0]})
        )
    _, terms = terms_of(model, images, length=2.0, curvature=3.0, norm=2)
    paths = [
        [kept["layer1.0<"], kept["layer1.0"], kept["layer1.1"]],
        [kept["layer2.0"], kept["layer2.1"]],
        [kept["layer3.0"], kept["layer3.1"]],
    ]
    flat = [[x.flatten(1) for x in path] for path in paths]
    long = sum((b - a).norm(dim=1).mean() for p in flat for a, b in itertools.pairwise(p))
    first = flat[0]
    bent = (first[2] - 2 * first[1] + first[0]).norm(dim=1).mean()
    torch.testing.assert_close(terms["length"], 2 * long)
    torch.testing.assert_close(terms["curvature"], 3 * bent)


def test_branches_of_nothing_move_nothing():
    model = resnet()
    for name, module in model.named_modules():
        if name.endswith("bn2"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    _, terms = terms_of(model, torch.rand(2, 3, 16, 16, dtype=torch.float64))
    assert terms["length"] == terms["curvature"] == 0


def test_plain_networks_are_followed_behind_activations():
    model = build_on_meta(Architecture("cifar_vgg16_bn", 10, {}))
    names = followed(model, None)
    assert len(names) == 13
    assert all(isinstance(model.get_submodule(name), nn.ReLU) for name in names)
    blocks = followed(build_on_meta(Architecture("resnet50", 10, {})), None)
    assert blocks[:4] == ["layer1.0", "layer1.1", "layer1.2", "layer2.0"] and len(blocks) == 16
    assert followed(model, ["features.[25]", "features.8"]) == [
        "features.2",
        "features.5",
        "features.8",
    ]


def test_halves_of_a_batch_have_the_mean_of_the_whole():
    images = torch.randn(8, 3, 16, 16, dtype=torch.float64)
    model = resnet()
    for module in model.modules():  # statistics of a batch are those of its images
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = False
            module.eval()
    method = FFR(Settings())
    method.prepare(model, context(model))
    found = []
    for part in (images, images[:4], images[4:]):
        model.train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        found.append(method.batch_terms((part, part), model(part)))
    for name in ("length", "curvature"):
        torch.testing.assert_close(found[0][name], (found[1][name] + found[2][name]) / 2)


def test_validation_images_leave_nothing_behind():
    model = resnet()
    method, _ = terms_of(model, torch.randn(2, 3, 16, 16, dtype=torch.float64))
    model.eval()(torch.randn(2, 3, 16, 16, dtype=torch.float64))
    assert method.batch_terms((None, None), None) == {}


def test_without_weights_nothing_is_looked_at():
    model = resnet()
    _, terms = terms_of(
        model, torch.randn(2, 3, 16, 16, dtype=torch.float64), length=0, curvature=0
    )
    assert terms == {} and not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (["blocks.*"], "features: 'blocks.*' matches no module"),
        (["layer1.0"], None),
        (["bn1"], "same shape"),
    ],
)
def test_what_is_to_be_followed_is_checked_beforehand(features, message):
    model = build_on_meta(Architecture("cifar_resnet8", 4, {}))
    method = FFR(Settings(features=features))
    if message is None:  # from what goes into the block to what comes out
        method.check_network(model, "regularize")
        return
    with pytest.raises(UserError, match=message.replace("*", r"\*")):
        method.check_network(model, "regularize")
