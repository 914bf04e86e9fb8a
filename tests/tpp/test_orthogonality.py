"""Orthogonality against matrices written out in full, in float64."""

import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import nn

from tpp.models.architecture import build_model
from tpp.models.layers import prunable_layers
from tpp.regularization.orthogonality import (
    OrthogonalityPenalty,
    convolution_residual,
    kernel_residual,
    orthogonalize,
)
from tpp.regularization.sharding import share_of

SHAPES = [(4, 9), (9, 4), (5, 5), (6, 3, 3, 3), (30, 2, 3, 3), (8, 3, 1, 1)]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def toeplitz_residual(weight: torch.Tensor, **conv) -> float:
    """||row gram - identity||^2 of the convolution's matrix, rows of one position in the middle.

    The image is large enough for every window that shares a pixel with the one in the middle.
    """
    groups = conv.get("groups", 1)
    filters, channels = weight.shape[0], weight.shape[1] * groups
    stride, dilation = conv.get("stride", (1, 1)), conv.get("dilation", (1, 1))
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, weight.shape[2:], strict=True)]
    size = [r + 2 * s * ((r - 1) // s) for r, s in zip(reach, stride, strict=True)]
    pixels = channels * size[0] * size[1]
    basis = torch.eye(pixels, dtype=weight.dtype).view(pixels, channels, *size)
    maps = F.conv2d(basis, weight, **conv)  # (pixels, filters, positions...)
    matrix = maps.flatten(2).permute(1, 2, 0)  # (filters, positions, pixels)
    middle = matrix.shape[1] // 2
    total = 0.0
    for i, j in itertools.product(range(filters), repeat=2):
        for position in range(matrix.shape[1]):
            product = (matrix[i, middle] @ matrix[j, position]).item()
            total += (product - float(i == j and position == middle)) ** 2
    return total


@pytest.mark.parametrize(
    ("shape", "conv"),
    [
        ((4, 3, 3, 3), {}),
        ((4, 3, 3, 3), {"stride": (2, 2)}),
        ((3, 2, 5, 5), {"stride": (2, 2)}),
        ((3, 2, 5, 5), {"stride": (3, 3)}),
        ((3, 2, 3, 2), {"stride": (1, 2)}),
        ((4, 3, 1, 1), {}),
        ((4, 3, 2, 2), {"stride": (2, 2)}),
        ((3, 2, 3, 3), {"dilation": (2, 2)}),
        ((3, 2, 3, 3), {"dilation": (3, 2), "stride": (2, 1)}),
        ((6, 2, 3, 3), {"groups": 3}),
        ((4, 1, 3, 3), {"groups": 4, "stride": (2, 2)}),
    ],
)
def test_convolution_residual_is_that_of_the_block_toeplitz_matrix(shape, conv):
    weight = random(*shape)
    found = convolution_residual(weight, **conv).square().sum().item()
    assert found == pytest.approx(toeplitz_residual(weight, **conv), rel=1e-12)


def test_an_orthogonal_convolution_has_no_residual_and_keeps_the_norm():
    """A delta kernel with an orthonormal matrix in its middle, as in Xiao et al. 2018."""
    weight = torch.zeros(4, 6, 3, 3, dtype=torch.float64)
    weight[:, :, 1, 1] = orthogonalize(random(4, 6))
    assert convolution_residual(weight).abs().max() < 1e-14
    output = random(2, 4, 7, 7, seed=1)
    back = F.conv_transpose2d(output, weight, padding=1)
    assert back.norm().item() == pytest.approx(output.norm().item(), rel=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_residual_and_its_gradient(shape):
    weight = random(*shape).requires_grad_()
    W = weight.detach().flatten(1).numpy()
    gram = W @ W.T - np.eye(len(W))
    excess = max(W.shape[0] - W.shape[1], 0)  # the other form is smaller by this constant
    value = kernel_residual(weight).square().sum()
    assert value.item() == pytest.approx((gram**2).sum() - excess, rel=1e-12)
    (gradient,) = torch.autograd.grad(value, weight)
    np.testing.assert_allclose(gradient.flatten(1).numpy(), 4 * gram @ W, rtol=1e-11, atol=1e-11)


def test_kernel_residual_is_taken_group_by_group():
    weight = random(6, 2, 3, 3)
    whole = kernel_residual(weight, groups=3)
    for group in range(3):
        part = kernel_residual(weight[2 * group : 2 * group + 2])
        torch.testing.assert_close(whole[group], part[0])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gain", [1.0, 2.0**0.5])
def test_all_singular_values_become_the_gain(shape, gain):
    weight = random(*shape)
    result = orthogonalize(weight, gain=gain)
    assert result.shape == weight.shape and result.dtype == weight.dtype
    values = np.linalg.svd(result.flatten(1).numpy(), compute_uv=False)
    np.testing.assert_allclose(values, gain, rtol=1e-12)


def test_orthogonalize_is_gram_schmidt_of_the_rows():
    weight = random(5, 12)
    rows = []
    for row in weight.numpy():
        for other in rows:
            row = row - (row @ other) * other
        rows.append(row / np.linalg.norm(row))
    np.testing.assert_allclose(orthogonalize(weight).numpy(), np.stack(rows), atol=1e-12)


def test_orthogonalize_leaves_orthonormal_rows_alone_and_mends_dependent_ones():
    orthonormal = orthogonalize(random(4, 9))
    torch.testing.assert_close(orthogonalize(orthonormal), orthonormal)
    dependent = random(4, 9).float()
    dependent[2] = 0
    dependent[3] = dependent[0]
    values = torch.linalg.svdvals(orthogonalize(dependent))
    torch.testing.assert_close(values, torch.ones(4))


def test_orthogonalize_keeps_groups_apart_and_half_precision():
    weight = random(6, 2, 3, 3).half()
    result = orthogonalize(weight, groups=2)
    assert result.dtype == torch.half
    torch.testing.assert_close(result[3:], orthogonalize(weight[3:]))


class Mixed(nn.Module):
    """One layer of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.strided = nn.Conv2d(8, 12, 3, stride=2)
        self.depthwise = nn.Conv2d(12, 12, 3, groups=12)
        self.pointwise = nn.Conv2d(12, 20, 1)
        self.patches = nn.Conv2d(20, 6, 2, stride=2)
        self.head = nn.Linear(6, 10)


def mixed() -> nn.Module:
    torch.manual_seed(0)
    return Mixed().double()


@pytest.mark.parametrize("squared", [True, False])
def test_penalty_is_the_sum_over_the_layers_that_the_papers_regularise(squared):
    model = mixed()
    power = (lambda r: r.square().sum()) if squared else (lambda r: r.square().sum().sqrt())
    kernel = {
        name: power(kernel_residual(layer.weight, groups=getattr(layer, "groups", 1)))
        for name, layer in prunable_layers(model).items()
    }
    penalty = OrthogonalityPenalty(model, "kernel", strength=0.3, squared=squared)
    assert penalty().item() == pytest.approx(0.3 * sum(kernel.values()).item(), rel=1e-12)
    convolution = {
        "strided": power(convolution_residual(model.strided.weight, stride=(2, 2))),
        "depthwise": power(convolution_residual(model.depthwise.weight, groups=12)),
        **{name: kernel[name] for name in ("pointwise", "patches", "head")},  # not the stem
    }
    penalty = OrthogonalityPenalty(model, "convolution", strength=0.3, squared=squared)
    assert penalty().item() == pytest.approx(0.3 * sum(convolution.values()).item(), rel=1e-12)


def test_gradient_is_finite_where_a_layer_is_orthogonal():
    layer = nn.Linear(4, 4)
    layer.weight.data = torch.eye(4)
    OrthogonalityPenalty(layer, "kernel", strength=1.0, squared=False)().backward()
    assert torch.equal(layer.weight.grad, torch.zeros(4, 4))


@pytest.mark.parametrize("form", ["kernel", "convolution"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 60])
def test_shares_average_to_the_whole(form, world_size):
    model = build_model("cifar_resnet8", 10).double()
    whole = OrthogonalityPenalty(model, form, strength=0.1, squared=True)()
    gradients = torch.autograd.grad(whole, list(model.parameters()), materialize_grads=True)
    mean = [torch.zeros_like(gradient) for gradient in gradients]
    for rank in range(world_size):
        share = OrthogonalityPenalty(
            model, form, strength=0.1, squared=True, rank=rank, world_size=world_size
        )()
        if share.requires_grad:
            parts = torch.autograd.grad(share, list(model.parameters()), materialize_grads=True)
            for total, part in zip(mean, parts, strict=True):
                total += part / world_size
    torch.testing.assert_close(mean, list(gradients), rtol=1e-12, atol=1e-12)


@given(
    st.lists(st.integers(1, 10**6), min_size=1, max_size=40),
    st.integers(1, 64),
)
@settings(max_examples=60, deadline=None)
def test_shares_are_disjoint_whole_and_even(sizes, world_size):
    costs = {f"layer{i}": size for i, size in enumerate(sizes)}
    shares = [share_of(costs, rank, world_size) for rank in range(world_size)]
    assert sorted(name for share in shares for name in share) == sorted(costs)
    loads = [sum(costs[name] for name in share) for share in shares]
    assert max(loads) <= sum(sizes) / world_size + max(sizes)
    for share, load in zip(shares, loads, strict=True):  # nothing should have gone elsewhere
        assert load - min((costs[name] for name in share), default=0) <= min(loads)


@pytest.mark.parametrize("form", ["kernel", "convolution"])
def test_float32_whatever_the_autocast(form):
    torch.manual_seed(0)
    model = Mixed()
    penalty = OrthogonalityPenalty(model, form, strength=0.1, squared=True)
    plain = penalty()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed_precision = penalty()
    assert mixed_precision.dtype == torch.float32
    assert mixed_precision.item() == plain.item()


def test_channels_last_makes_no_difference():
    model = mixed()
    before = OrthogonalityPenalty(model, "convolution", strength=1.0, squared=True)().item()
    model.to(memory_format=torch.channels_last)
    after = OrthogonalityPenalty(model, "convolution", strength=1.0, squared=True)().item()
    assert after == pytest.approx(before, rel=1e-12)


def test_descending_the_penalty_makes_a_network_orthogonal():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), nn.Conv2d(4, 3, 3, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    penalty = OrthogonalityPenalty(model, "convolution", strength=1.0, squared=True)
    before = penalty().item()
    for _ in range(300):
        optimizer.zero_grad()
        penalty().backward()
        optimizer.step()
    assert penalty().item() < 1e-3 * before
