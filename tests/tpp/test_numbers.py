"""Numbers that code derives from widths: found where they change what is left, and only there."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from zeroing import relative_difference, zeroed

from tpp.channels.removal import prune_model
from tpp.channels.survey import survey_channels
from tpp.plan import PruningPlan
from tpp.selection.budget import Budget
from tpp.selection.selection import select_filters

EXAMPLE = torch.rand(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def attended(x, **scale):
    tokens = x.flatten(2).transpose(1, 2)
    count = tokens.shape[1]  # a window before it may leave fewer
    places = torch.arange(count, device=x.device, dtype=x.dtype).view(1, count, 1)
    places = places.expand(len(x), count, 1)
    found = F.scaled_dot_product_attention(tokens, tokens, places, **scale)
    return x * found.view(-1, 1, *x.shape[2:])


def by_hand(x, power):
    tokens = x.flatten(2).transpose(1, 2)
    weights = (20 * power * tokens @ tokens.transpose(1, 2)).softmax(-1)
    return x * weights.amax(2).view(-1, 1, *x.shape[2:])


# What a network may do to its channels, and whether removing some is then as zeroing them.
PIECES = {
    "divided by the width": (lambda x: x / x.shape[1], False),
    "attention's default scale": (attended, False),
    "a scale by hand": (lambda x: by_hand(x, x.shape[1] ** -0.5), False),
    "a number in a tensor": (lambda x: x * torch.tensor(float(x.shape[1]), device=x.device), False),
    "a tensor of one number": (
        lambda x: x * torch.full((1,), 1 / x.shape[1], device=x.device, dtype=x.dtype),
        False,
    ),
    "a root in a tensor": (lambda x: x / torch.sqrt(torch.FloatTensor([x.size(1)])).to(x), False),
    "a power": (lambda x: x.abs() ** (1 + 1 / x.shape[1]), False),
    "a bound": (lambda x: x.clamp(max=x.shape[1] / 100), False),
    "a mean over channels": (lambda x: x * x.mean(1, keepdim=True), False),
    "a mean by hand": (lambda x: x * (x.sum(1, keepdim=True) / x.shape[1]), False),
    "a branch": (lambda x: x.abs() if x.shape[1] < 8 else x.square(), False),
    "a window": (lambda x: F.avg_pool2d(x, 3, 1, 1 if x.shape[1] == 8 else 0), False),
    "a given scale": (lambda x: attended(x, scale=0.3), True),
    "a fixed number by hand": (lambda x: by_hand(x, 8**-0.5), True),
    "a sum over channels": (lambda x: x * x.sum(1, keepdim=True), True),
    "a norm over channels": (lambda x: x * x.norm(dim=1, keepdim=True), True),
    "normalised": (lambda x: F.normalize(x, dim=1), True),
    "numbers of pixels and images": (lambda x: x * x.shape[2] ** 0.5 / x.shape[0], True),
    "a mean over pixels": (lambda x: x * x.mean((2, 3), keepdim=True), True),
}


class Pieces(nn.Module):
    """Channels that pieces act upon, between two convolutions."""

    def __init__(self, *names):
        super().__init__()
        torch.manual_seed(1)
        self.conv, self.head = nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 2, 1)
        self.names = names

    def forward(self, x):
        x = self.conv(x)
        for name in self.names:
            x = PIECES[name][0](x)
        return self.head(x).mean((2, 3))


def pruned_and_zeroed(model, gone=(0, 3, 4, 6)):
    model = model.double()
    plan = PruningPlan({"conv": 8}, {"conv": sorted(gone)})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        pruned = prune_model(model, plan, example_input=EXAMPLE[:1])
    dense = zeroed(model, plan.pruned, EXAMPLE)
    with torch.no_grad():
        difference = relative_difference(pruned(EXAMPLE), dense(EXAMPLE))
    return difference, [str(w.message) for w in said]


@pytest.mark.parametrize("name", PIECES)
def test_what_depends_on_a_width_is_found_and_nothing_else(name):
    difference, said = pruned_and_zeroed(Pieces(name))
    exact = PIECES[name][1]
    assert difference < 1e-10 if exact else difference > 1e-3  # the table itself is right
    inexact = (
        survey_channels(Pieces(name), example_input=EXAMPLE[:1].float()).channels["conv"].inexact
    )
    assert (inexact is None) == exact
    assert any("dense network with these filters at zero" in line for line in said) == (not exact)


@settings(max_examples=15, deadline=None)
@given(
    names=st.lists(st.sampled_from(sorted(PIECES)), min_size=2, max_size=4),
    gone=st.sets(st.integers(0, 7), min_size=1, max_size=6),
)
def test_what_is_called_exact_is(names, gone):
    difference, said = pruned_and_zeroed(Pieces(*names), gone)
    if not any("at zero" in line for line in said):
        assert difference < 1e-10
    if all(PIECES[name][1] for name in names):
        assert not any("dense network with" in line for line in said)


class InTraining(Pieces):
    """Drops as many values as its width says, in training mode alone."""

    def forward(self, x):
        x = F.dropout(self.conv(x), 1 / self.conv(x).shape[1], self.training)
        return self.head(x).mean((2, 3))


def test_training_mode_is_looked_at_too():
    difference, said = pruned_and_zeroed(InTraining().eval())
    assert difference < 1e-10
    assert any("bernoulli 0.875 becomes bernoulli 0.75" in line for line in said), said
    assert any("in training mode" in line for line in said)
    found = survey_channels(InTraining(), example_input=EXAMPLE[:1].float()).channels["conv"]
    assert "in training mode" in found.inexact


def test_a_budget_leaves_such_layers_as_they_are():
    class Two(Pieces):
        def __init__(self):
            super().__init__("attention's default scale")
            self.head = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 2, 1))

    model = Two()
    example = EXAMPLE[:1].float()
    plan = select_filters(model, budget=Budget("speedup", 1.5), example_input=example)
    assert plan.active_layers == ["head.0"]
    asked = select_filters(model, {"conv": 0.5}, example_input=example)
    assert asked.active_layers == ["conv"]
