"""For every architecture: a pruned network is the dense one with the same filters at zero."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import NETWORKS
from zeroing import randomised, relative_difference, zeroed

from tpp.channels.removal import prune_model
from tpp.channels.survey import survey_channels
from tpp.checkpoints.model_file import load_model, save_model
from tpp.plan import PruningPlan


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    """One network at a time: all of them together are gigabytes. Its name, itself, its layers."""
    model = randomised(request.param, **NETWORKS[request.param][2])
    return request.param, model, survey_channels(model, coupled=True).channels


def exact(channels):
    return {layer: found for layer, found in channels.items() if found.inexact is None}


def images(name, size, batch=2):
    channels = 1 if name == "mlp7_linear" else 3
    generator = torch.Generator().manual_seed(size)
    return torch.rand(batch, channels, size, size, generator=generator, dtype=torch.float64)


@st.composite
def plans(draw, model, channels, most=6):
    """A plan for a few layers at random, with those tied to them."""
    names = draw(st.lists(st.sampled_from(sorted(channels)), min_size=1, max_size=most))
    pruned = {}
    for name in names:
        found = channels[name]
        groups, per_group = found.groups, found.filters // found.groups
        if not pruned.keys().isdisjoint((name, *found.tied)) or per_group == 1:
            continue  # what is tied has its filters already
        count = draw(st.integers(1, per_group - 1))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        order = torch.stack([torch.randperm(per_group, generator=generator) for _ in range(groups)])
        gone = order[:, :count] + per_group * torch.arange(groups)[:, None]
        for layer in (name, *found.tied):
            pruned[layer] = gone.flatten().tolist()
    filters = {
        layer: model.get_submodule(layer).weight.shape[0] for layer in channels if layer in pruned
    }
    return PruningPlan.from_indices(filters, pruned)


def check_equal(model, plan, name, sizes):
    """Logits of the pruned network are those of the zeroed one; returns the pruned one."""
    pruned = prune_model(model, plan)
    dense = zeroed(model, plan.pruned, images(name, sizes[0], batch=1))
    for size in sizes:
        batch = images(name, size)
        for training in (False, True):
            with torch.no_grad():
                expected, actual = (m.train(training)(batch) for m in (dense, pruned))
            assert relative_difference(actual, expected) < 1e-10, (size, training)
    with torch.no_grad():
        batch = images(name, sizes[0]).float()
        expected, actual = (m.float().eval()(batch) for m in (dense, pruned))
    assert relative_difference(actual, expected) < 1e-4
    return pruned


@settings(max_examples=2, deadline=None)
@given(data=st.data())
def test_removing_filters_equals_zeroing_them(network, data, tmp_path_factory):
    name, model, channels = network
    plan = data.draw(plans(model, exact(channels)))
    pruned = check_equal(model, plan, name, NETWORKS[name][3])
    for layer, indices in plan.pruned.items():
        assert pruned.get_submodule(layer).weight.shape[0] == plan.filters[layer] - len(indices)
    path = tmp_path_factory.mktemp("pruned") / "model.safetensors"
    save_model(path, pruned)
    loaded = load_model(path)
    batch = images(name, NETWORKS[name][3][0]).float()
    for key, tensor in pruned.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
    with torch.no_grad():
        assert relative_difference(loaded(batch), pruned(batch)) < 1e-6


@pytest.mark.parametrize(
    "network", ["cifar_resnet20", "resnext50_32x4d", "mobilenet_v3_large"], indirect=True
)
@settings(max_examples=2, deadline=None)
@given(data=st.data())
def test_a_pruned_network_is_pruned_again(network, data):
    name, model, channels = network
    once = prune_model(model, data.draw(plans(model, exact(channels), most=3)))
    left = exact(survey_channels(once, coupled=True).channels)
    check_equal(once, data.draw(plans(once, left, most=3)), name, NETWORKS[name][3][:1])


def test_how_many_layers_can_go(network):
    name, model, channels = network
    alone = survey_channels(model)
    assert (len(alone.channels), len(exact(channels))) == NETWORKS[name][:2]
    assert all(found.inexact is None for found in alone.channels.values())
    for layer, reason in alone.refused.items():
        assert reason, layer
