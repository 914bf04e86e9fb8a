"""Convolutions in groups that are left with one filter in each, and so look like others."""

import pytest
import torch
from test_architectures import check_equal, images
from torch import nn
from zeroing import randomised, relative_difference, zeroed

from tpp.channels.removal import prune_model
from tpp.channels.survey import survey_channels
from tpp.checkpoints.model_file import load_model, save_model
from tpp.models.architecture import build_model
from tpp.plan import PruningPlan
from tpp.selection.budget import Budget
from tpp.selection.selection import select_filters


def leaving(model, channels, layers, left):
    """A plan that leaves the last ``left`` filters of each group of some layers and their ties."""
    pruned = {}
    for layer in layers:
        found = channels[layer]
        size = found.filters // found.groups
        gone = [i for i in range(found.filters) if i % size < size - left(layer)]
        pruned |= dict.fromkeys((layer, *found.tied), gone)
    filters = {layer: channels[layer].filters for layer in channels if layer in pruned}
    return PruningPlan.from_indices(filters, pruned)


def groups_of_one(model):
    modules = model.modules()
    return [m for m in modules if isinstance(m, nn.Conv2d) and m.groups > 1 == m.weight.shape[1]]


@pytest.mark.parametrize(
    "name",
    [
        "resnext50_32x4d",
        "regnet_x_400mf",
        "timm:ecaresnext26t_32x4d",
        "timm:regnetz_b16",
        "timm:resnest14d",
    ],
)
def test_one_filter_left_in_each_group(name):
    model = randomised(name)
    before = len(groups_of_one(model))
    channels = survey_channels(model, coupled=True).channels
    grouped = [layer for layer, found in channels.items() if found.groups > 1]
    pruned = check_equal(model, leaving(model, channels, grouped[:6], lambda _: 1), name, (64,))
    assert len(groups_of_one(pruned)) > before


@pytest.mark.parametrize("left", [(1, 2), (2, 1), (1, 3)])
def test_groups_that_read_one_channel_and_make_several(left):
    """Then they look like a depthwise convolution with several filters for each channel."""
    name = "resnext50_32x4d"
    model = randomised(name)
    channels = survey_channels(model).channels
    layers = {"layer1.0.conv1": left[0], "layer1.0.conv2": left[1]}
    pruned = check_equal(model, leaving(model, channels, layers, layers.get), name, (64,))
    assert pruned.layer1[0].conv2.weight.shape[:2] == (32 * left[1], left[0])
    # What is left can be pruned on, down to one of each.
    if 2 in left:
        pruned = pruned.double()
        rest = survey_channels(pruned).channels
        wide = next(layer for layer, number in layers.items() if number == 2)
        check_equal(pruned, leaving(pruned, rest, [wide], lambda _: 1), name, (64,))


def test_groups_of_one_are_pruned_again_from_a_file(tmp_path):
    """They are then a depthwise convolution, which goes with what it reads."""
    model = randomised("resnext50_32x4d", torch.float32).eval()
    channels = survey_channels(model).channels
    layers = ["layer1.0.conv1", "layer1.0.conv2"]
    once = prune_model(model, leaving(model, channels, layers, lambda _: 1))
    save_model(tmp_path / "once", once)
    once = load_model(tmp_path / "once")
    plan = PruningPlan({"layer1.0.conv1": 32}, {"layer1.0.conv1": list(range(0, 32, 3))})
    save_model(tmp_path / "twice", prune_model(once, plan))
    twice = load_model(tmp_path / "twice")
    assert twice.layer1[0].conv2.groups == 21
    batch = images("resnext50_32x4d", 64).float()
    dense = zeroed(once, plan.pruned, batch)
    dense.layer1[0].bn2.weight.data[plan.pruned["layer1.0.conv1"]] = 0
    dense.layer1[0].bn2.bias.data[plan.pruned["layer1.0.conv1"]] = 0
    with torch.no_grad():
        assert relative_difference(twice(batch), dense(batch)) < 1e-4


@pytest.mark.parametrize(("name", "speedup"), [("resnext50_32x4d", 4), ("timm:regnetx_002", 20)])
def test_budgets_that_leave_groups_of_one(name, speedup):
    model = build_model(name, 10)
    plan = select_filters(model, budget=Budget("speedup", speedup), coupled=speedup > 4)
    pruned = prune_model(model, plan)
    assert len(groups_of_one(pruned)) > len(groups_of_one(model))
    assert pruned(torch.rand(2, 3, 64, 64)).shape == (2, 10)
