"""Layers whose module keeps their width as a number, or computes their weights: named, left out."""

import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from zeroing import randomised, relative_difference, zeroed

from tpp.channels.removal import prune_model
from tpp.channels.survey import survey_channels
from tpp.common.errors import UserError
from tpp.models.architecture import build_model
from tpp.plan import PruningPlan
from tpp.selection.budget import Budget
from tpp.selection.selection import select_filters

EXAMPLE = torch.rand(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Keeping(nn.Module):
    """A module that wrote down its width when it was made."""

    def __init__(self, width):
        super().__init__()
        self.conv, self.width = nn.Conv2d(3, width, 1), width

    def keep(self, x):
        return x.reshape(len(x), self.width, 36).view(x.shape)

    def forward(self, x):
        return self.keep(self.conv(x))


class Multiplying(Keeping):
    def keep(self, x):
        return F.conv2d(x, torch.ones(self.width, 1, 1, 1).to(x), groups=self.width)


class Asserting(Keeping):
    def keep(self, x):
        assert x.shape[1] == self.width, "not my width"
        return x


class Even(Keeping):
    """Fine at half of its width, and not at every width."""

    def keep(self, x):
        if x.shape[1] % 2:
            raise ValueError("an odd number of channels")
        return x


class Net(nn.Module):
    def __init__(self, kind, width=8):
        super().__init__()
        torch.manual_seed(0)
        self.odd, self.fine = kind(width), nn.Conv2d(width, 16, 3, padding=1)
        self.also, self.head = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 2, 1)

    def forward(self, x):
        return self.head(self.also(self.fine(self.odd(x)).relu()).relu()).mean((2, 3))


@pytest.mark.parametrize("kind", [Keeping, Multiplying, Asserting])
def test_a_module_that_keeps_its_width_is_named_and_left_out(kind):
    model = Net(kind).double()
    survey = survey_channels(model, example_input=EXAMPLE[:1])
    assert list(survey.channels) == ["fine", "also"]
    assert "(at odd" in survey.refused["odd.conv"] or "reach" in survey.refused["odd.conv"]
    plan = PruningPlan({"odd.conv": 8, "fine": 16}, {"odd.conv": [1, 5], "fine": [2]})
    with pytest.raises(UserError, match=r"^odd\.conv: its ") as caught:
        prune_model(model, plan, example_input=EXAMPLE[:1])
    assert "fine" not in str(caught.value)
    chosen = select_filters(model, budget=Budget("speedup", 2), example_input=EXAMPLE[:1])
    assert chosen.active_layers == ["fine", "also"]
    prune_model(model, chosen, example_input=EXAMPLE[:1])


def test_a_budget_goes_on_without_what_is_unfit_at_the_widths_that_it_found():
    model = Net(Even).double()
    assert "odd.conv" in survey_channels(model, example_input=EXAMPLE[:1]).channels
    model.odd.conv.weight.data[:] = 1
    model.odd.conv.weight.data[:5] = 1e-6  # these go first: an odd number of them
    lines = []
    for speedup in (1.2, 1.5, 2, 2.5):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            budget = Budget("speedup", speedup)
            plan = select_filters(model, budget=budget, example_input=EXAMPLE[:1])
        lines += [str(w.message) for w in said]
        assert not said or "odd.conv" not in plan.active_layers
        prune_model(model, plan, example_input=EXAMPLE[:1])
    assert lines
    for line in lines:
        assert line.startswith("budget: odd.conv left as wide as before: its code does not allow")
        assert re.search(r"\(at odd, test_own_widths\.py:\d+\): an odd number of channels$", line)


def test_a_budget_of_a_network_of_others():
    model = build_model("timm:lambda_resnet26t", 10)
    plan = select_filters(model, budget=Budget("speedup", 1.3))
    assert not any("stages.3.0.conv1" in layer for layer in plan.active_layers)
    prune_model(model, plan)


# Computed weights and held activations

COMPUTED = {
    "prune": (lambda m: prune.l1_unstructured(m, "weight", 0.3), "torch.nn.utils.prune.remove"),
    "prune twice": (
        lambda m: [prune.l1_unstructured(m, "weight", 0.2) for _ in range(2)],
        "torch.nn.utils.prune.remove",
    ),
    "weight_norm": (parametrizations.weight_norm, "remove_parametrizations"),
    "spectral_norm": (parametrizations.spectral_norm, "remove_parametrizations"),
    "old weight_norm": (nn.utils.weight_norm, "remove_weight_norm"),
    "old spectral_norm": (nn.utils.spectral_norm, "remove_spectral_norm"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", COMPUTED)
def test_a_computed_weight_is_refused_with_what_to_call(name):
    change, call = COMPUTED[name]

    def changed():
        model = randomised("cifar_resnet8").eval()
        change(model.layer1[0].conv1)
        return model

    model = changed()
    model(EXAMPLE)
    with torch.no_grad():  # PyTorch copies it only so
        twin = changed()
        twin(EXAMPLE)
    with pytest.raises(UserError, match=rf"^layer1\.0\.conv1: its weight is computed by .*{call}"):
        select_filters(model, {"layer1.0.conv1": 0.5})
    # What has to do with others is not in the way.
    plan = select_filters(model, {"layer3.0.conv1": 0.5})
    dense = zeroed(twin, plan.pruned, EXAMPLE)
    assert relative_difference(prune_model(model, plan)(EXAMPLE), dense(EXAMPLE)) < 1e-10
    if name == "old spectral_norm":
        return  # what PyTorch leaves of it after the call does not load its own state_dict
    # And after the call it goes.
    layer = model.layer1[0].conv1
    if call == "remove_parametrizations":
        parametrize.remove_parametrizations(layer, "weight")
    elif call.endswith("prune.remove"):
        prune.remove(layer, "weight")
    else:
        getattr(nn.utils, call)(layer)
    plan = select_filters(model, {"layer1.0.conv1": 0.5})
    dense = zeroed(model, plan.pruned, EXAMPLE)
    assert relative_difference(prune_model(model, plan)(EXAMPLE), dense(EXAMPLE)) < 1e-10


@pytest.mark.parametrize("kept", [lambda o: o, lambda o: {"outputs": [o]}, lambda o: (o, 3)])
def test_activations_that_hooks_hold_are_not_in_the_way(kept):
    model = randomised("cifar_resnet8").eval()
    layer = model.layer1[0]
    layer.register_forward_hook(lambda module, _, out: setattr(module, "held", kept(out)))
    model(EXAMPLE)
    assert layer.held is not None
    plan = select_filters(model, {"layer1.0.conv1": 0.5})
    dense = zeroed(randomised("cifar_resnet8").eval(), plan.pruned, EXAMPLE)
    assert relative_difference(prune_model(model, plan)(EXAMPLE), dense(EXAMPLE)) < 1e-10


def test_what_cannot_be_copied_is_one_line():
    model = build_model("cifar_resnet8", 10)
    model.layer1.kept = (number for number in range(3))
    with pytest.raises(UserError, match=r"cannot be copied: .*; take off it"):
        select_filters(model, {"layer1.0.conv1": 0.5})


@pytest.mark.parametrize("training", [False, True])
def test_what_an_evaluation_has_computed_once_is_computed_anew(training):
    class Caching(nn.Module):
        """Keeps a table for evaluation until train() is called, as timm's LeViT does."""

        def __init__(self):
            super().__init__()
            self.conv, self.out = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
            self.bias, self.tables = nn.Parameter(torch.ones(4, 1, 1)), {}

        def train(self, mode=True):
            if mode:
                self.tables = {}
            return super().train(mode)

        def forward(self, x):
            x = self.out(self.conv(x).relu())
            if self.training:
                return x + 2 * self.bias
            device = str(x.device)
            if device not in self.tables:
                self.tables[device] = 2 * self.bias
            return x + self.tables[device]

    torch.manual_seed(0)
    model, unused = Caching().double().eval(), Caching().double().eval()
    unused.load_state_dict(model.state_dict())
    model(EXAMPLE)
    model.conv.train(training)  # modes are each module's own, and stay
    plan = PruningPlan({"conv": 8}, {"conv": [1, 5]})
    pruned = prune_model(model, plan, example_input=EXAMPLE)
    assert (pruned.training, pruned.conv.training) == (False, training)
    with torch.no_grad():
        expected = zeroed(unused, plan.pruned, EXAMPLE)(EXAMPLE)
        assert relative_difference(pruned(EXAMPLE), expected) < 1e-10
    assert list(model.tables) == ["cpu"]  # the user's own network is left alone
