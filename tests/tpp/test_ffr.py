"""FFR against paths whose length and angles are known, and against sums written down in NumPy."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tpp.common.errors import UserError
from tpp.methods import base, method_class
from tpp.methods.ffr import FFR, Settings, curvature, length, steps_of, trajectories
from tpp.models.architecture import Architecture, build_model, build_on_meta, example_input_for
from tpp.models.edsr import ResidualBlock
from tpp.plan import PruningPlan
from tpp.selection.selection import Selection
from train.distributed.arithmetic import compile_network, is_compiled
from train.distributed.engine import Engine
from train.loop.meter import Meter
from train.loop.step import gradients
from train.tasks import make_task

RATIOS = {"layer*.conv1": 0.5}
PLAN = PruningPlan({}, {})
shapes = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4))  # images, c, h
seeds = st.integers(0, 2**31)


def draw(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def path(seed: int, points: int, shape: tuple[int, ...]) -> list[torch.Tensor]:
    return list(draw(seed, points, *shape))


def terms(points, *, norm=1, form="second_difference"):
    steps = steps_of(points)
    return length(steps, norm).item(), curvature(steps, form, norm).item()


def by_hand(points, norm):
    """Length, second differences and angles (of images one by one) with NumPy's own norms."""
    x = np.stack([point.numpy().reshape(len(point), -1) for point in points])  # point, image, value
    share = x.shape[-1] if norm == 1 else 1
    v = np.diff(x, axis=0)
    bends = np.diff(x, n=2, axis=0)
    angles = [
        math.acos(np.clip(a @ b / math.sqrt(a @ a) / math.sqrt(b @ b), -1, 1))
        for one, other in itertools.pairwise(v)
        for a, b in zip(one, other, strict=True)
    ]
    return [
        sum(np.linalg.norm(row, norm) for step in each for row in step) / share / x.shape[1]
        for each in (v, bends)
    ] + [sum(angles) / x.shape[1]]


# ---- length and curvature ------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(seeds, shapes, st.integers(2, 6), st.sampled_from([1, 2]))
def test_terms_are_the_sums_written_down(seed, shape, points, norm):
    made = path(seed, points, shape)
    travelled, second = terms(made, norm=norm)
    angle = terms(made, norm=norm, form="angle")[1]
    assert (travelled, second) == pytest.approx(by_hand(made, norm)[:2], rel=1e-12)
    assert angle == pytest.approx(by_hand(made, norm)[2], abs=1e-7)  # the arc cosine's own error


@settings(deadline=None, max_examples=20)
@given(seeds, shapes, st.integers(2, 8), st.sampled_from([1, 2]))
def test_a_line_is_as_long_as_its_steps_and_does_not_bend(seed, shape, steps, norm):
    start, step = path(seed, 2, shape)
    line = [start + number * step for number in range(steps + 1)]
    travelled, second = terms(line, norm=norm)
    rows = step.flatten(1)
    each = rows.abs().mean(1) if norm == 1 else rows.square().sum(1).sqrt()
    assert travelled == pytest.approx(steps * each.mean().item(), rel=1e-12)
    assert abs(second) < 1e-12 * steps * 10
    # The points are rounded, so a step in them is as crooked as its length allows.
    assert terms(line, norm=norm, form="angle")[1] < 1e-12 * steps / rows.norm(dim=1).min()


@settings(deadline=None, max_examples=20)
@given(seeds, shapes, st.integers(3, 6), st.floats(-100, 100).filter(lambda c: abs(c) > 1e-3))
def test_scaling(seed, shape, points, factor):
    made = path(seed, points, shape)
    scaled = [factor * point for point in made]
    for norm in (1, 2):
        expected = [abs(factor) * term for term in terms(made, norm=norm)]
        assert terms(scaled, norm=norm) == pytest.approx(expected, rel=1e-12)
    assert terms(scaled, form="angle")[1] == pytest.approx(terms(made, form="angle")[1], rel=1e-12)


@settings(deadline=None, max_examples=20)
@given(seeds, st.integers(1, 4), st.integers(2, 9), st.integers(3, 6))
def test_orthogonal_maps_change_nothing(seed, images, width, points):
    made = path(seed, points, (images, width))
    turn, _ = torch.linalg.qr(draw(seed + 1, width, width))
    turned = [point @ turn for point in made]
    for form in ("second_difference", "angle"):
        assert terms(turned, norm=2, form=form) == pytest.approx(
            terms(made, norm=2, form=form), rel=1e-10
        )


@settings(deadline=None, max_examples=20)
@given(seeds, shapes, st.integers(2, 6))
def test_no_way_is_shorter_than_the_straight_one(seed, shape, points):
    made = path(seed, points, shape)
    straight = terms([made[0], made[-1]], norm=2)[0]
    assert terms(made, norm=2)[0] >= straight * (1 - 1e-12)


@pytest.mark.parametrize("corners", [3, 4, 5, 8, 100])
def test_the_angles_of_a_polygon_are_a_full_turn(corners):
    around = 2 * math.pi * torch.arange(corners + 2, dtype=torch.float64) / corners
    polygon = torch.stack([around.cos(), around.sin()], 1)  # closed, and one step further
    assert terms(list(polygon[:, None]), form="angle")[1] == pytest.approx(2 * math.pi, rel=1e-13)
    side = 2 * math.sin(math.pi / corners)
    travelled, second = terms(list(polygon[:, None]), norm=2)
    assert travelled == pytest.approx((corners + 1) * side, rel=1e-12)
    # For steps of one length s a second difference is 2 s sin(angle / 2).
    assert second == pytest.approx(corners * 2 * side * math.sin(math.pi / corners), rel=1e-11)


def test_a_step_back_is_half_a_turn_and_small_steps_are_no_straighter():
    there, back = draw(0, 1, 7), draw(1, 1, 7)
    assert terms([there, back, there], form="angle")[1] == pytest.approx(math.pi, rel=1e-15)
    made = path(2, 4, (2, 5))
    angle = terms(made, form="angle")[1]
    for factor in (1e-17, 1e17):  # the squares of their products are none that float32 has
        points = [torch.tensor(factor, dtype=torch.float32) * point.float() for point in made]
        assert terms(points, form="angle")[1] == pytest.approx(angle, rel=1e-5)


def test_the_mean_over_two_halves_of_a_batch_is_that_of_the_whole():
    made = path(3, 5, (8, 2, 3))
    for norm in (1, 2):
        for form in ("second_difference", "angle"):
            halves = [terms([p.chunk(2)[i] for p in made], norm=norm, form=form) for i in (0, 1)]
            whole = terms(made, norm=norm, form=form)
            assert whole == pytest.approx(np.mean(halves, axis=0), rel=1e-13)


@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("form", ["second_difference", "angle"])
def test_gradients_are_finite_differences(form, norm):
    points = [point.requires_grad_() for point in path(4, 4, (3, 2, 2))]

    def loss(*points):
        steps = steps_of(points)
        return length(steps, norm) + curvature(steps, form, norm)

    assert torch.autograd.gradcheck(loss, points)


@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("form", ["second_difference", "angle"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("moves", [(0, 0, 0), (1, 0, 1), (0, 1, 0), (1, 1, 1)])
def test_at_the_kink_there_is_a_gradient(form, norm, dtype, moves):
    """Where a step is 0 its part is 0; on a line, where the angle has its kink, it is finite."""
    step = draw(5, 2, 6).to(dtype)
    points = [draw(6, 2, 6).to(dtype)]
    for move in moves:
        points.append(points[-1] + move * step)
    points = [point.detach().requires_grad_() for point in points]
    steps = steps_of(points)
    total = length(steps, norm) + curvature(steps, form, norm)
    total.backward()
    gradients = torch.stack([point.grad for point in points])
    assert gradients.isfinite().all() and total.isfinite()
    if not any(moves):
        assert total == 0 and not gradients.any()
    if form == "angle" and 0 in moves:
        # Beside a step of length 0 there is no angle: the length's gradient alone is left.
        fresh = [point.detach().requires_grad_() for point in points]
        length(steps_of(fresh), norm).backward()
        assert gradients.equal(torch.stack([point.grad for point in fresh]))


def test_it_is_computed_in_float32_or_wider():
    made = path(7, 4, (2, 50))
    half = [point.bfloat16() for point in made]
    for form in ("second_difference", "angle"):
        with torch.autocast("cpu", torch.bfloat16):
            steps = steps_of(half)
            found = length(steps, 2) + curvature(steps, form, 2)
        assert found.dtype == torch.float32
        assert found.item() == pytest.approx(
            sum(terms([p.double() for p in half], norm=2, form=form)), rel=1e-6
        )
    assert steps_of(made)[0].dtype == torch.float64


def test_trajectories_end_where_the_shape_changes():
    def of(*sizes):
        return [torch.zeros(2, size) for size in sizes]

    kept = [*zip(of(3, 3, 3, 4, 4, 3, 5), of(3, 3, 4, 4, 3, 3, 6), strict=True), (None, of(6)[0])]
    found = [[point.shape[1] for point in points] for points in trajectories(kept)]
    assert found == [[3, 3, 3], [4, 4], [3, 3], [6, 6]]
    assert trajectories(kept)[0][0] is kept[0][0]
    # A leaf's input is no feature.
    assert trajectories([(None, one) for one in of(3, 4, 4, 5)])[0][0].shape[1] == 4


# ---- the method ----------------------------------------------------------------------------------


def prepared(model, *, stage="regularize", **given):
    method = FFR(Settings(**given))
    context = base.TrainingContext(
        stage=stage,
        plan=None,
        selection=Selection(RATIOS),
        rank=0,
        world_size=1,
        example_input=example_input_for(model),
    )
    method.modify(model, stage)
    method.prepare(model, context)
    return method


def asked(model, method, images):
    return method.batch_terms((images, torch.zeros(len(images))), model(images))


def block_outputs(model, x):
    """Features of a CifarResNet by its own forward pass: per stage, with what goes into layer1."""
    x = F.relu(model.bn1(model.conv1(x)))
    found, stages = [x], []
    for stage in (model.layer1, model.layer2, model.layer3):
        for block in stage:
            x = block(x)
            found.append(x)
        stages.append(found)
        found = []
    return stages


@pytest.mark.parametrize(("norm", "form"), [(1, "second_difference"), (2, "angle")])
def test_a_residual_networks_features_are_its_block_outputs(norm, form):
    torch.manual_seed(0)
    model = build_model("cifar_resnet20", 10).double()
    images = torch.rand(4, 3, 32, 32, dtype=torch.float64)
    stages = block_outputs(copy.deepcopy(model), images)
    assert [len(stage) for stage in stages] == [4, 3, 3]
    method = prepared(model, length=0.3, curvature=0.7, norm=norm, form=form)
    found = asked(model, method, images)
    column = 1 if form == "second_difference" else 2
    truth = [by_hand([p.detach() for p in stage], norm) for stage in stages]
    assert {key: term.item() for key, term in found.items()} == {
        "flow_length": pytest.approx(0.3 * sum(row[0] for row in truth), rel=1e-12),
        "flow_curvature": pytest.approx(0.7 * sum(row[column] for row in truth), rel=1e-8),
    }


def test_a_plain_networks_features_are_its_activated_convolutions():
    torch.manual_seed(0)
    model = build_model("cifar_vgg16_bn", 10).double()
    twin, x = copy.deepcopy(model), torch.rand(2, 3, 32, 32, dtype=torch.float64)
    method = prepared(model, length=1.0, curvature=0.0)
    found = asked(model, method, x)
    stages = [[]]
    for layer in twin.features:
        x = layer(x)
        if isinstance(layer, nn.ReLU):
            stages[-1].append(x.detach().clone())
        elif isinstance(layer, nn.MaxPool2d):
            stages.append([])
    assert [len(stage) for stage in stages] == [2, 2, 3, 3, 3]
    truth = sum(by_hand(stage, 1)[0] for stage in stages)
    assert found.keys() == {"flow_length"}
    assert found["flow_length"].item() == pytest.approx(truth, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "args", "stretches"),
    [
        # Points of each trajectory, from the papers' tables: blocks per stage, and one more where
        # the stage begins with its own shape.
        ("cifar_resnet56", {}, [10, 9, 9]),
        ("cifar_vgg19_bn", {}, [2, 2, 4, 4, 4]),
        ("resnet18", {}, [3, 2, 2, 2]),
        ("resnet50", {}, [3, 4, 6, 3]),
        ("vgg16_bn", {}, [2, 2, 3, 3, 3]),
        ("mobilenet_v2", {}, [2, 3, 4, 3, 3]),
        ("convnext_tiny", {}, [4, 4, 10, 4]),
        ("timm:convnext_atto", {}, [3, 3, 7, 3]),
        ("timm:resnet50d", {}, [3, 4, 6, 3]),
        ("timm:vit_tiny_patch16_224", {}, [13]),
        ("edsr", {}, [5]),
    ],
)
def test_networks_from_elsewhere_have_trajectories(name, args, stretches):
    model = build_on_meta(Architecture(name, None if name == "edsr" else 10, args))
    method = FFR(Settings(length=1.0, curvature=1.0))
    method.check(model, PLAN)
    names = method._find(model)
    kept = []
    for one in names:
        module = model.get_submodule(one)
        module.register_forward_hook(
            lambda m, i, o: kept.append((i[0] if [*m.children()] else None, o))
        )
    model.eval()(example_input_for(model, "meta"))
    assert [len(points) for points in trajectories(kept)] == stretches


def test_zeroed_branches_neither_travel_nor_bend():
    model = build_model("cifar_resnet20", 10)
    for name, module in model.named_modules():
        if name.endswith("bn2"):
            nn.init.zeros_(module.weight)
    for form in ("second_difference", "angle"):
        method = prepared(model, length=1.0, curvature=1.0, form=form)
        found = asked(model, method, torch.rand(2, 3, 32, 32))
        assert all(term == 0 for term in found.values())
        sum(found.values()).backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        method.restore(model)
    short = build_model("cifar_resnet8", 10)  # one step: nothing can bend
    found = asked(short, prepared(short, length=1.0, curvature=1.0), torch.rand(2, 3, 32, 32))
    assert found["flow_length"] > 0 and found["flow_curvature"] == 0


def test_features_are_those_of_the_last_training_batch_and_are_forgotten():
    torch.manual_seed(1)
    model = build_model("cifar_resnet20", 10)
    method = prepared(model, length=1.0, curvature=1.0)
    one, other = torch.rand(2, 2, 3, 32, 32)
    alone = asked(model, method, one)
    assert method._features.read() == []
    model(other)  # a pass that nobody asks about
    output = model(one)
    model.eval()(other)
    model.train()
    again = method.batch_terms((one, one), output)
    assert all(again[key].equal(alone[key]) for key in alone)
    model.eval()(other)
    assert method._features.read() == []
    model.train()(one)
    method.restore(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    copy.deepcopy(model)


def test_it_acts_in_the_regularised_stage_alone_and_with_weights_of_zero_not_at_all():
    for stage, weight in (("finetune", 1.0), ("dense", 1.0), ("regularize", 0.0)):
        model = build_model("cifar_resnet20", 10)
        method = prepared(model, stage=stage, length=weight, curvature=weight)
        assert asked(model, method, torch.rand(2, 3, 32, 32)) == {}
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert (FFR.picks, FFR.faithful, method.steps()) == ("after", False, None)
    assert method.steps_before_picking() == math.inf


def trained(given, steps=3):
    """A network after a few of the loop's steps of two micro-batches, with a method or none."""
    torch.manual_seed(0)
    model = build_model("cifar_resnet14", 4)
    method = base.Method(base.Settings()) if given is None else prepared(model, **given)
    accelerator = Accelerator(cpu=True)
    engine = Engine(accelerator, model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9))
    task = make_task({"kind": "classification"})
    for step in range(steps):
        images = draw(step, 8, 3, 32, 32).float()
        batches = zip(images.chunk(2), (torch.arange(8) % 4).chunk(2), strict=True)
        gradients(engine, batches, task, method, Meter(accelerator), accumulation=2)
        engine.step()
    return model.state_dict()


def test_weights_of_zero_are_plain_training_to_the_bit():
    plain, zero, flow = (
        trained(given)
        for given in (None, {"length": 0.0, "curvature": 0.0}, {"length": 0.1, "curvature": 0.0})
    )
    assert all(zero[key].equal(tensor) for key, tensor in plain.items())
    assert not flow["layer1.0.conv1.weight"].equal(plain["layer1.0.conv1.weight"])


def test_patterns_name_the_outer_modules():
    model = build_on_meta(Architecture("cifar_resnet20", 10, {}))

    def found(*patterns):
        method = FFR(Settings(length=1.0, curvature=1.0, features=list(patterns)))
        method.check(model, PLAN)
        return method._find(model)

    assert found("layer1.*", "layer3.*") == [f"layer{s}.{b}" for s in (1, 3) for b in range(3)]
    assert found("layer2.*.conv?") == [f"layer2.{b}.conv{n}" for b in range(3) for n in (1, 2)]


@pytest.mark.parametrize(
    ("network", "given", "message"),
    [
        ("cifar_resnet20", {"features": ["layer9.*"]}, "pattern 'layer9.*' matches no module; "),
        ("cifar_resnet20", {"features": ["conv1", "layer2.0"]}, "no two successive features"),
        ("cifar_vgg16_bn", {"features": ["features.1", "features.4"]}, "follows features.1 "),
        ("cifar_resnet8", {"length": 0.0}, "method.curvature: no three successive features"),
        ("densenet121", {}, "no two successive features have the same shape (by default: "),
        ("mlp7_linear", {}, "LinearMLP has neither blocks in a row nor"),
        ("timm:vit_tiny_patch16_224", {"features": ["blocks.0.attn.q_norm", "no"]}, "'no'"),
    ],
)
def test_features_that_are_no_trajectory_are_one_line(network, given, message):
    model = build_on_meta(Architecture(network, 10, {}))
    method = FFR(Settings(**{"length": 1.0, "curvature": 1.0, **given}))
    with pytest.raises(UserError) as error:
        method.check(model, PLAN)
    said = str(error.value)
    assert message in said and "\n" not in said and said.count("method.") <= 3


@pytest.mark.parametrize(
    "given",
    [
        {"length": -1.0},
        {"form": "cosine"},
        {"norm": 3},
        {"features": []},
        {"features": "layer1.*"},
        {"length": math.nan},
        {"curvature": None},
    ],
)
def test_settings_out_of_bounds(given):
    with pytest.raises(ValueError):
        method_class("ffr").settings_type(**{"length": 1.0, "curvature": 1.0, **given})


@pytest.mark.processes  # the compiler's
def test_a_compiled_network_keeps_the_same_features():
    """In float64, where rounding takes no step over a kink; hooks are part of the one graph."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(*(ResidualBlock(4) for _ in range(3))))
    plain.double()
    found = []
    for model, mode in ((plain, "off"), (copy.deepcopy(plain), "default")):
        method = prepared(model, length=0.3, curvature=0.7)
        compile_network(model, mode)
        for seed in (0, 1, 0):
            asked_for = asked(model, method, draw(seed, 2, 3, 8, 8))
        model.zero_grad()
        sum(asked_for.values()).backward()
        found.append([*asked_for.values(), *(p.grad for p in model.parameters())])
    assert is_compiled(model) and not is_compiled(plain)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-13)
