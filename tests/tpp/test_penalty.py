"""The penalty against its definition: loops over pairs, differentiated by autograd."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tpp
from tpp.regularization.gram import entry_decay, layer_blocks, make_batches


def definition(weight: torch.Tensor, pruned: list[int], groups: int = 1) -> torch.Tensor:
    """(1/n^2) * sum over ordered pairs (i, j), i or j pruned, of (w_i . w_j)^2.

    Filters of different groups see different inputs: as filters of the dense convolution that
    one in groups is, their product is zero.
    """
    rows = weight.reshape(weight.shape[0], -1)
    group = len(rows) // groups
    total = weight.new_zeros(())
    for i in range(len(rows)):
        for j in range(len(rows)):
            if (i in pruned or j in pruned) and i // group == j // group:
                total = total + (rows[i] * rows[j]).sum() ** 2
    return total / len(rows) ** 2


@st.composite
def layers(draw):
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    filters = groups * draw(st.integers(1, 9 // groups))
    conv = draw(st.booleans())
    shape = (filters, draw(st.integers(1, 4)), *((3, 2) if conv else ()))
    pruned = draw(st.sets(st.integers(0, filters - 1), max_size=filters - 1))
    seed = draw(st.integers(0, 2**31))
    weight = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    if conv and draw(st.booleans()):
        weight = weight.contiguous(memory_format=torch.channels_last)
    return weight, sorted(pruned), groups


@given(layers())
@settings(max_examples=80, deadline=None)
def test_value_and_gradient_equal_the_definition(layer):
    weight, pruned, groups = layer
    ours = weight.clone().requires_grad_()
    value = tpp.gram_penalty(ours, pruned, groups=groups)
    value.backward()
    truth = weight.clone().requires_grad_()
    expected = definition(truth, pruned, groups)
    if pruned:
        expected.backward()
    gradient = truth.grad if pruned else torch.zeros_like(weight)
    assert value.item() == pytest.approx(expected.item(), rel=1e-10, abs=1e-300)
    assert (ours.grad - gradient).norm() <= 1e-10 * gradient.norm()


@given(st.lists(layers(), min_size=1, max_size=4), st.data())
@settings(max_examples=80, deadline=None)
def test_blocks_of_many_layers_add_up_to_the_whole(several, data):
    ours = [weight.clone().requires_grad_() for weight, _, _ in several]
    truth = [weight.clone().requires_grad_() for weight, _, _ in several]
    owners = [[data.draw(st.integers(0, 2)) for _ in pruned] for _, pruned, _ in several]
    total = torch.zeros((), dtype=torch.float64)
    expected = torch.zeros((), dtype=torch.float64)
    for owner in range(3):
        blocks = [
            (str(number), block)
            for number, (weight, pruned, groups) in enumerate(several)
            for block in layer_blocks(
                len(weight), pruned, groups,
                [row for row, of in zip(pruned, owners[number], strict=True) if of == owner],
            )
        ]  # fmt: skip
        sizes = {str(number): weight[0].numel() for number, (weight, _, _) in enumerate(several)}
        for batch in make_batches(blocks, sizes):
            batch.whole_product = data.draw(st.booleans())  # two ways to the same gradient
            gram, decay = batch.penalty([ours[int(name)] for name in batch.names])
            total = total + gram + 3.0 * decay
    for weight, (_, pruned, groups) in zip(truth, several, strict=True):
        expected = expected + definition(weight, pruned, groups)
        expected = expected + 3.0 * 0.5 * weight[pruned].square().sum()
    assert total.item() == pytest.approx(expected.item(), rel=1e-10, abs=1e-300)
    if total.requires_grad:
        total.backward()
        expected.backward()
    for mine, theirs in zip(ours, truth, strict=True):
        gradient = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
        found = torch.zeros_like(gradient) if mine.grad is None else mine.grad
        assert (found - gradient).norm() <= 1e-10 * gradient.norm()


def test_a_convolution_in_groups_costs_what_the_dense_one_that_it_is_costs():
    conv = nn.Conv2d(6, 8, 3, groups=2).double()
    dense = torch.zeros(8, 6, 3, 3, dtype=torch.float64)
    dense[:4, :3] = conv.weight.detach()[:4]
    dense[4:, 3:] = conv.weight.detach()[4:]
    pruned = [1, 4, 6]
    assert tpp.gram_penalty(conv.weight, pruned, groups=2).item() == pytest.approx(
        tpp.gram_penalty(dense, pruned).item(), rel=1e-12
    )


def test_the_way_to_the_gradient_is_chosen_by_cost():
    """Few pruned filters of many: the zeros are left out. Small layers: they cost nothing."""
    ways = {
        (filters, pruned): make_batches([("w", layer_blocks(filters, range(pruned))[0])], {"w": 9})[
            0
        ].whole_product
        for filters, pruned in ((512, 108), (512, 256), (256, 154), (64, 20))
    }
    assert list(ways.values()) == [False, False, True, True]


def test_large_layers_are_not_copied_side_by_side():
    blocks = [(name, block) for name in "abc" for block in layer_blocks(512, range(100))]
    sizes = dict.fromkeys("abc", 4608)
    assert [batch.names for batch in make_batches(blocks, sizes)] == [["a"], ["b"], ["c"]]
    assert [batch.names for batch in make_batches(blocks, dict.fromkeys("abc", 9))] == [[*"abc"]]


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
        inside.backward()  # in the wrong place, and yet
    assert inside.item() == plain.item()
    lowered, weight.grad = weight.grad, None
    plain.backward()
    assert torch.equal(lowered, weight.grad)


def test_entry_decay_has_the_entries_as_its_gradient():
    one, other = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([4.0], dtype=torch.bfloat16)
    one.requires_grad_(), other.requires_grad_()
    value = entry_decay([one, other], torch.tensor([1.0, 1.0, 0.0, 1.0]))
    value.backward()
    assert value.item() == 10.5
    assert one.grad.tolist() == [1.0, -2.0, 0.0] and other.grad.tolist() == [4.0]
