"""Jacobian singular values against products of weight matrices and torch's own Jacobian."""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tpp
from tpp.common.errors import UserError
from tpp.measure.trainability import jacobian_singular_values, measure_trainability
from tpp.models.architecture import build_model


def conv_net(classes: int = 5) -> nn.Module:
    """Convolutions, BatchNorm with statistics of its own, dropout, and a nonlinearity."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Conv2d(4, 6, 3, stride=2),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24, classes),
    )
    model.train()
    for _ in range(5):
        model(torch.randn(8, 2, 6, 6) * 2 + 1)
    return model


def draw_random_numbers(*_: object) -> None:
    torch.rand(1)


def reference(model: nn.Module, images: Tensor) -> Tensor:
    """One image at a time, by torch's own Jacobian and SVD in float64."""
    model = copy.deepcopy(model).double().eval()
    values = []
    for image in images.double():
        jacobian = torch.autograd.functional.jacobian(lambda x: model(x[None])[0], image)
        values.append(torch.linalg.svdvals(jacobian.flatten(1)))
    return torch.stack(values)


def test_a_linear_network_is_exact():
    model = build_model("mlp7_linear", 10, width=30).double()
    product = torch.eye(784, dtype=torch.float64)
    for layer in model.children():
        product = layer.weight.detach() @ product
    expected = torch.linalg.svdvals(product)
    found = jacobian_singular_values(model, torch.randn(7, 1, 28, 28).double())
    assert found.shape == (7, 10)
    assert (found - expected).abs().max() < 1e-10 * expected.max()


def test_float32_is_as_exact_as_its_jacobian():
    model = build_model("mlp7_linear", 10, width=30)
    with torch.no_grad():
        model.fc7.weight *= torch.logspace(0, -2, 10)[:, None]  # a float32 gram matrix would not do
    images = torch.randn(3, 1, 28, 28)
    expected = reference(model, images)
    found = jacobian_singular_values(model, images)
    assert found.dtype == torch.float32
    assert ((found - expected).abs() < 1e-5 * expected).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_conv_net_agrees_with_the_jacobian_of_each_image(dtype):
    model, images = conv_net().to(dtype), torch.randn(6, 2, 6, 6, dtype=dtype)
    found = jacobian_singular_values(model, images)
    torch.testing.assert_close(
        found.double(),
        reference(model, images),
        rtol=0,
        atol=1e-5 if dtype.itemsize == 4 else 1e-12,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_more_outputs_than_inputs(dtype):
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 11)).to(dtype)
    found = jacobian_singular_values(model, torch.randn(2, 1, 2, 3, dtype=dtype))
    assert found.shape == (2, 6)
    expected = torch.linalg.svdvals(model[1].weight.detach().double())
    torch.testing.assert_close(found[1].double(), expected, rtol=1e-5, atol=0)


def test_memory_bound_changes_nothing_and_is_kept():
    model, images = conv_net().double(), torch.randn(7, 2, 6, 6).double()
    sizes = []
    model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    whole = jacobian_singular_values(model, images)
    assert sizes == [1, 7]  # one image to count the outputs
    parts = jacobian_singular_values(model, images, max_bytes=3 * 5 * 72 * 8)
    assert sizes[2:] == [1, 3, 3, 1]
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-14)
    assert len(jacobian_singular_values(model, images, max_bytes=1)) == 7


def test_a_network_that_vmap_cannot_take():
    class Branches(nn.Module):
        """Asks for the value of a tensor, as no vectorising transform allows."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([self.a(v) if v.sum().item() > 0 else self.b(v) for v in x])

    model, images = Branches(), torch.tensor([[1.0] * 4, [-1.0] * 4])
    found = jacobian_singular_values(model, images)
    for row, layer in zip(found, (model.a, model.b), strict=True):
        torch.testing.assert_close(row, torch.linalg.svdvals(layer.weight.detach()))


@settings(max_examples=40, deadline=None)
@given(
    factor=st.floats(-30, 30).filter(lambda c: abs(c) > 1e-3),
    order=st.permutations(range(4)),
    seed=st.integers(0, 2**16),
)
def test_scaling_the_last_layer_scales_all_values_and_images_stay_apart(factor, order, seed):
    model = conv_net().double()
    images = torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(seed)).double()
    before = jacobian_singular_values(model, images)
    with torch.no_grad():
        model[-1].weight *= factor
        model[-1].weight.copy_(model[-1].weight[torch.randperm(5)])  # nor does the classes' order
    after = jacobian_singular_values(model, images[list(order)])
    torch.testing.assert_close(after, abs(factor) * before[list(order)], rtol=1e-9, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(widths=st.lists(st.integers(3, 12), min_size=1, max_size=5), seed=st.integers(0, 2**16))
def test_orthogonal_layers_have_perfect_trainability(widths, seed):
    torch.manual_seed(seed)
    widths = [16, *sorted(widths, reverse=True)]
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight)
    found = measure_trainability(nn.Sequential(*layers), torch.randn(3, 16))
    for value in (found.mean, found.condition, found.min, found.max):
        assert value == pytest.approx(1, abs=1e-5)
    assert found.std < 1e-5


def test_the_summary_is_taken_image_by_image():
    class Scales(nn.Module):
        """Image i has the singular values abs(i) * [1, 2, 4]."""

        def forward(self, x: Tensor) -> Tensor:
            return 0.5 * x.square() * torch.tensor([1.0, 2.0, 4.0])

    images = torch.tensor([[3.0] * 3, [-1.0] * 3, [1.0, 1.0, 0.0]])
    found = tpp.measure_trainability(Scales(), images)
    assert found.mean == pytest.approx((7 + 7 / 3 + 1) / 3)
    spreads = [math.sqrt(14 / 9), math.sqrt(14 / 9) * 3, math.sqrt(2 / 3)]
    assert found.std == pytest.approx(sum(spreads) / 3)
    assert found.condition == 4  # of 4, 4 and infinity
    assert (found.min, found.max) == (0, 12)


def test_a_network_that_is_all_zero_or_not_finite():
    model = nn.Linear(4, 3)
    nn.init.zeros_(model.weight)
    dead = measure_trainability(model, torch.ones(2, 4))
    assert (dead.mean, dead.condition) == (0, math.inf)
    values = jacobian_singular_values(
        nn.Sequential(model, nn.Softplus()), torch.tensor([[1.0] * 4, [math.nan] * 4])
    )
    assert values[0].tolist() == [0, 0, 0]
    assert values[1].isnan().all()


@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_model_is_left_as_it_was(grad_mode):
    model, images = conv_net(), torch.randn(4, 2, 6, 6)
    model[1].eval()  # as when a part of the network is frozen
    # As a network does that draws random numbers even in evaluation.
    model[3].register_forward_hook(draw_random_numbers)
    model(images).sum().backward()
    state = copy.deepcopy(model.state_dict())
    gradients = [p.grad.clone() for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    random_state, pixels = torch.get_rng_state(), images.clone()
    with grad_mode():
        # The copy is an inference tensor where inference mode is on.
        first = jacobian_singular_values(model, images.clone())
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(images, pixels) and not images.requires_grad
    assert torch.equal(jacobian_singular_values(model, images), first)


def test_modes_come_back_after_an_error():
    model = conv_net()
    with pytest.raises(RuntimeError):
        measure_trainability(model, torch.randn(2, 3, 6, 6))  # three channels for two
    assert all(module.training for module in model.modules())


def test_autocast_does_not_reach_it():
    model, images = conv_net(), torch.randn(4, 2, 6, 6)
    plain = jacobian_singular_values(model, images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(jacobian_singular_values(model, images), plain)


def test_mistakes_are_one_line():
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4, track_running_stats=False))
    with pytest.raises(UserError, match=r"^1: normalises with the statistics of the batch"):
        measure_trainability(model, torch.randn(2, 4))
    with pytest.raises(UserError, match=r"\(batch, ...\), not \(0, 4\)"):
        measure_trainability(nn.Linear(4, 2), torch.empty(0, 4))
