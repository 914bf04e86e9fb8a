"""The penalty against its definition: loops over pairs, differentiated by autograd."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tpp
from tpp.penalty import block_penalty, entry_decay


def definition(weight: torch.Tensor, pruned: list[int]) -> torch.Tensor:
    """(1/n^2) * sum over ordered pairs (i, j), i or j pruned, of (w_i . w_j)^2."""
    rows = weight.reshape(weight.shape[0], -1)
    total = weight.new_zeros(())
    for i in range(len(rows)):
        for j in range(len(rows)):
            if i in pruned or j in pruned:
                total = total + (rows[i] * rows[j]).sum() ** 2
    return total / len(rows) ** 2


@st.composite
def layers(draw):
    filters = draw(st.integers(1, 9))
    conv = draw(st.booleans())
    shape = (filters, draw(st.integers(1, 4)), *((3, 2) if conv else ()))
    pruned = draw(st.sets(st.integers(0, filters - 1), max_size=filters - 1))
    seed = draw(st.integers(0, 2**31))
    weight = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return weight, sorted(pruned)


@given(layers())
@settings(max_examples=80, deadline=None)
def test_value_and_gradient_equal_the_definition(layer):
    weight, pruned = layer
    ours = weight.clone().requires_grad_()
    value = tpp.gram_penalty(ours, pruned)
    value.backward()
    truth = weight.clone().requires_grad_()
    expected = definition(truth, pruned)
    if pruned:
        expected.backward()
    gradient = truth.grad if pruned else torch.zeros_like(weight)
    assert value.item() == pytest.approx(expected.item(), rel=1e-10, abs=1e-300)
    assert (ours.grad - gradient).norm() <= 1e-10 * gradient.norm()


@given(layers(), st.data())
@settings(max_examples=50, deadline=None)
def test_blocks_add_up_to_the_whole(layer, data):
    weight, pruned = layer
    owners = [data.draw(st.integers(0, 2)) for _ in pruned]
    kept = torch.tensor([i for i in range(len(weight)) if i not in pruned], dtype=torch.int64)
    shared = weight.clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for owner in range(3):
        rows = [row for row, of in zip(pruned, owners, strict=True) if of == owner]
        gram, decay = block_penalty(shared, torch.tensor(rows, dtype=torch.int64), kept)
        total = total + gram + 3.0 * decay
    total.backward()
    truth = weight.clone().requires_grad_()
    expected = definition(truth, pruned) + 3.0 * 0.5 * truth[pruned].square().sum()
    expected.backward()
    assert total.item() == pytest.approx(expected.item(), rel=1e-10, abs=1e-300)
    assert (shared.grad - truth.grad).norm() <= 1e-10 * truth.grad.norm()


def test_kept_filters_among_themselves_are_free():
    weight = torch.eye(4, dtype=torch.float64)
    weight[1, 2] = 5.0  # filters 1 and 2 correlate; neither goes
    weight.requires_grad_()
    value = tpp.gram_penalty(weight, [3])
    value.backward()
    assert value.item() == pytest.approx(1 / 16)  # only the diagonal entry of filter 3
    assert weight.grad[:3].abs().max() == 0


def test_half_precision_weights_are_penalised_in_float32():
    weight = torch.randn(8, 16, 3, 3, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.bfloat16, torch.float16):
        low = weight.to(dtype).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = tpp.gram_penalty(low, [0, 3])
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(
            definition(low.detach().double(), [0, 3]).item(), rel=1e-6
        )
        value.backward()
        assert low.grad.dtype == dtype


def test_autocast_does_not_lower_the_precision():
    weight = nn.Parameter(torch.randn(16, 64, 3, 3, generator=torch.Generator().manual_seed(1)))
    plain = tpp.gram_penalty(weight, list(range(7)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = tpp.gram_penalty(weight, list(range(7)))
    assert inside.item() == plain.item()


def test_entry_decay_has_the_entries_as_its_gradient():
    vector = torch.tensor([1.0, -2.0, 3.0], requires_grad=True)
    entry_decay(vector, torch.tensor([0, 1])).backward()
    assert vector.grad.tolist() == [1.0, -2.0, 0.0]
