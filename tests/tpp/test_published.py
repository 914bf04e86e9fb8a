"""Weights that torchvision publishes compute here what they compute there."""

import inspect
import re

import pytest
import torch
from torchvision import models
from zeroing import zeroed

from tpp.checkpoints.model_file import load_model, read_metadata, save_model
from tpp.checkpoints.prune_file import read_dense, write_pruned
from tpp.checkpoints.sources import load_weights
from tpp.models.architecture import Architecture, as_published, build_model
from tpp.plan import PruningPlan

IMAGE = {"googlenet": 64, "inception_v3": 96}
LAYERS = {
    "googlenet": ("inception3a.branch2.0.conv", "conv2.conv"),
    "inception_v3": ("Mixed_5b.branch5x5_1.conv", "Conv2d_2a_3x3.conv"),
}


@pytest.fixture(scope="module", params=sorted(IMAGE))
def published(request, tmp_path_factory):
    """A file with the names of the published one, and the network that torchvision makes of it."""
    name = request.param
    torch.manual_seed(0)
    model = models.get_model(
        name, weights=None, num_classes=7, aux_logits=True, init_weights=False, transform_input=True
    )
    model = model.eval()
    path = tmp_path_factory.mktemp("published") / f"{name}.pth"
    torch.save(model.state_dict(), path)
    return name, path, model


def images(name):
    side = IMAGE[name]
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1))


def test_a_published_file_computes_what_it_computes_in_torchvision(published, tmp_path):
    name, path, reference = published
    model = build_model(name, 7)
    assert not model.transform_input  # as torchvision builds it for training from scratch
    heads, assumed = load_weights(model, path)
    assert re.fullmatch(r"left out: (aux1, aux2|AuxLogits), auxiliary heads that .*", heads)
    assert assumed.startswith("transform_input is taken to be True")
    save_model(tmp_path / "ours", model)
    assert read_metadata(tmp_path / "ours").architecture.args == {"transform_input": True}
    x = images(name)
    with torch.no_grad():
        expected = reference(x)
        for found in (model.eval(), load_model(tmp_path / "ours")):
            assert torch.equal(found(x), expected)


def test_pruning_it_equals_zeroing_it(published, tmp_path):
    name, path, reference = published
    dense = read_dense(path, Architecture(name, 1000))
    plan = PruningPlan(
        {layer: reference.get_submodule(layer).out_channels for layer in LAYERS[name]},
        {layer: [0, 2, 3] for layer in LAYERS[name]},
    )
    write_pruned(dense, plan, tmp_path / "out")
    pruned, x = load_model(tmp_path / "out").double(), images(name).double()
    plain = build_model(name, 7, transform_input=True).double().eval()
    own = plain.state_dict()
    plain.load_state_dict({key: reference.state_dict()[key] for key in own})
    with torch.no_grad():
        expected = zeroed(plain, plan.pruned, x)(x)
        assert (pruned(x) - expected).abs().max() <= 1e-10 * expected.abs().max()


def test_who_says_otherwise_gets_it(published):
    name, path, reference = published
    model = build_model(name, 7, transform_input=False)
    (heads,) = load_weights(model, path)
    assert not model.transform_input and "auxiliary" in heads
    dense = read_dense(path, Architecture(name, 7, {"transform_input": False}))
    assert dense.model.architecture.args == {"transform_input": False}
    with_heads = build_model(name, 7, aux_logits=True, transform_input=True)
    assert load_weights(with_heads, path) == ()
    assert with_heads.state_dict().keys() == reference.state_dict().keys()


def test_these_are_all_that_torchvision_sets_with_weights():
    """What else its builders set with weights, they set without too, or is the heads'."""
    always = {"num_classes", "aux_logits", "init_weights", "groups", "width_per_group"}
    for name in models.list_models(module=models):
        source = inspect.getsource(inspect.unwrap(models.get_model_builder(name)))
        found = set(re.findall(r'_ovewrite_named_param\(kwargs, "(\w+)"', source)) - always
        added, _ = as_published(Architecture(name, 1000))
        assert found == set(added.args), name
