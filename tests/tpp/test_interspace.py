"""Interspace pruning against ordinary pruning, autograd and convolutions in two steps."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tpp
from tpp.common.errors import UserError
from tpp.masks import SparsifySection, hold_mask, select_mask
from tpp.methods.base import TrainingContext
from tpp.methods.interspace import Interspace, Settings
from tpp.models.architecture import Architecture, build_model, build_on_meta
from tpp.models.layers import prunable_layers
from tpp.selection.selection import Selection

HOW = {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2}


def network() -> nn.Module:
    torch.manual_seed(0)
    return build_model("cifar_resnet14", 4).double()


def begun(model, *, companion=None, gradients=None, **settings) -> Interspace:
    method = Interspace(Settings(**settings))
    method.modify(model, "finetune")
    context = TrainingContext(
        *("finetune", None, Selection(), 0, 1, torch.zeros(1, 3, 16, 16)),
        companion=lambda name: companion or {},
        first_gradients=gradients,
    )
    method.prepare(model, context)
    return method


def train(model: nn.Module, steps: int = 10) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    spared = [p for p in parameters if getattr(p, "spared", False)]
    decayed = [p for p in parameters if not getattr(p, "spared", False)]
    optimizer = torch.optim.SGD(
        [{"params": decayed}, {"params": spared, "weight_decay": 0.0}], **HOW
    )
    for step in range(steps):
        torch.manual_seed(step)
        images, labels = torch.randn(4, 3, 16, 16).double(), torch.randint(0, 4, (4,))
        optimizer.zero_grad()
        F.cross_entropy(model.train()(images), labels).backward()
        optimizer.step()


def held(layer: nn.Module):
    return layer.parametrizations["weight"]


def test_a_standard_basis_that_stays_is_pruning_of_weights_to_the_bit():
    model, plain = network(), network()
    method = begun(model, sparsity=0.8, basis="standard", train_basis=False)
    layers = [*prunable_layers(plain)]
    mask = select_mask(dict(plain.named_parameters()), layers, SparsifySection(sparsity=0.8))
    hold_mask(plain, mask)
    train(model)
    train(plain)
    method.restore(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    for key, value in model.state_dict().items():
        assert torch.equal(value, plain.state_dict()[key]), key


def test_an_orthonormal_basis_that_stays_trains_the_filters_themselves():
    model, plain = network(), network()
    begun(model, sparsity=0.0, train_basis=False)
    images = torch.randn(2, 3, 16, 16).double()
    torch.testing.assert_close(model.eval()(images), plain.eval()(images), rtol=1e-12, atol=1e-13)
    train(model, 30)
    train(plain, 30)
    for name, layer in prunable_layers(plain).items():
        found = model.get_submodule(name).weight
        torch.testing.assert_close(found, layer.weight, rtol=1e-10, atol=1e-12, msg=name)


def test_gradients_are_those_written_down():
    """dL/dlambda_n = nu <G, g_n>, dL/dg_n = sum lambda_n G, with G = dL/dh."""
    model = network()
    begun(model, sparsity=0.6)
    layer = model.layer2[0].conv1
    kept: list[Tensor] = []
    weight = layer.weight.detach().requires_grad_()
    images = torch.randn(3, layer.in_channels, 6, 6).double()
    F.conv2d(images, weight, padding=1).pow(3).sum().backward()
    F.conv2d(images, layer.weight, padding=1).pow(3).sum().backward()
    kept.append(weight.grad.flatten(2))
    coefficients, basis = held(layer).original0, held(layer).original1
    stays = held(layer)[0].stays
    masked = (coefficients * stays).detach().flatten(2)
    torch.testing.assert_close(
        coefficients.grad.flatten(2), (kept[0] @ basis.detach().T) * stays.flatten(2)
    )
    torch.testing.assert_close(basis.grad, torch.einsum("abn,abk->nk", masked, kept[0]))


@pytest.mark.parametrize(("stride", "padding"), [(1, 1), (2, 0), (2, 2)])
def test_a_convolution_in_two_steps_is_the_one_of_the_filters(stride, padding):
    model = network()
    begun(model, sparsity=0.5)
    layer = model.layer1[0].conv1
    basis, stays = held(layer).original1, held(layer)[0].stays
    masked = (held(layer).original0 * stays).flatten(2)
    images = torch.randn(2, layer.in_channels, 9, 9).double()
    how = {"stride": stride, "padding": padding}
    each = images.flatten(0, 1)[:, None]
    responses = F.conv2d(each, basis.view(-1, 1, 3, 3), **how).unflatten(0, images.shape[:2])
    in_two = torch.einsum("abn,ibnxy->iaxy", masked, responses)
    torch.testing.assert_close(in_two, F.conv2d(images, layer.weight, **how))


@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_bases_count_and_are_never_masked(sparsity):
    model = network()
    method = begun(model, sparsity=sparsity)
    layers = {name: held(layer) for name, layer in prunable_layers(model).items()}
    total = sum(of[0].stays.numel() for of in layers.values())
    left = sum(int(of[0].stays.sum()) for of in layers.values())
    bases = [of.original1 for of in layers.values() if hasattr(of, "original1")]
    assert len(bases) == 13 and all(basis.shape == (9, 9) for basis in bases)
    assert left + 81 * 13 == total - round(sparsity * total)
    assert method.scalars(0)["interspace_left"] == left + 81 * 13
    before = {name: of[0].stays.clone() for name, of in layers.items()}
    train(model)
    assert all(torch.equal(before[name], of[0].stays) for name, of in layers.items())
    method.restore(model)
    for name, layer in prunable_layers(model).items():
        stays, weight = before[name], layer.weight
        some = stays.flatten(2).any(2) if stays.dim() == 4 else None
        if some is None:
            assert not weight[~stays].any(), name
        else:
            slices = weight.flatten(2)
            assert not slices[~some].any(), name
            # A trained basis fills all positions of a kernel that has a coefficient left.
            assert slices[some].abs().gt(0).all(), name


@pytest.mark.parametrize("basis", ["random", "standard"])
def test_snip_keeps_what_the_loss_depends_on_most(basis):
    """abs(lambda dL/dlambda), with dL/dlambda = <dL/dh, g> of the plain network's weights."""
    model, plain = network(), network()
    images, labels = torch.randn(8, 3, 16, 16).double(), torch.arange(8) % 4
    asked: list[int] = []

    def first_gradients(tensors):
        asked.append(len(tensors))
        return torch.autograd.grad(F.cross_entropy(model.train()(images), labels), tensors)

    begun(model, sparsity=0.7, basis=basis, score="snip", gradients=first_gradients)
    layers = prunable_layers(plain)
    assert asked == [len(layers)]
    weights = [layer.weight for layer in layers.values()]
    slopes = torch.autograd.grad(F.cross_entropy(plain.train()(images), labels), weights)
    scores = []
    for name, weight, slope in zip(layers, weights, slopes, strict=True):
        of = held(model.get_submodule(name))
        if hasattr(of, "original1"):
            vectors = of.original1.detach()
            weight, slope = (values.flatten(2) @ vectors.T for values in (weight, slope))
        scores.append((weight * slope).detach().abs().flatten())
    stays = [held(model.get_submodule(name))[0].stays.flatten() for name in layers]
    kept, everything = torch.cat(stays), torch.cat(scores)
    assert kept.sum() == len(kept) - round(0.7 * len(kept)) - 13 * 81
    assert everything[kept].min() >= everything[~kept].max() * (1 - 1e-6)
    magnitudes = network()
    begun(magnitudes, sparsity=0.7, basis=basis)
    assert not torch.equal(stays[4], held(layers_of(magnitudes)[4])[0].stays.flatten())


def layers_of(model: nn.Module) -> list[nn.Module]:
    return [*prunable_layers(model).values()]


def test_an_element_of_the_basis_is_in_just_the_filters_that_have_its_coefficient():
    model = network()
    begun(model, sparsity=0.8)
    layer = model.layer3[0].conv2
    before = layer.weight.detach().clone()
    with torch.no_grad():
        held(layer).original1[4] += 1.0
    changed = (layer.weight != before).flatten(2).any(2)
    assert torch.equal(changed, held(layer)[0].stays.flatten(2)[..., 4])


def test_what_was_chosen_goes_on():
    """A stage that goes on has the coefficients as they are then, and the mask as it was."""
    model = network()
    begun(model, sparsity=0.7)
    train(model, 3)
    again = network()
    method = Interspace(Settings(sparsity=0.7))
    method.modify(again, "finetune")
    again.load_state_dict(model.state_dict())
    context = TrainingContext("finetune", None, Selection(), 0, 1, torch.zeros(1, 3, 16, 16))
    method.prepare(again, context)
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    twice = network()
    Interspace(Settings(sparsity=0.7)).modify(twice, "finetune")
    first = network()
    Interspace(Settings(sparsity=0.7)).modify(first, "finetune")
    assert torch.equal(held(first.conv1).original1, held(twice.conv1).original1), (
        "ranks draw the same basis"
    )


def test_channels_last_and_the_file(tmp_path: Path):
    model = network().float()
    method = begun(model, sparsity=0.6)
    model.to(memory_format=torch.channels_last)
    assert model.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 16, 16)
    logits = model.eval()(images)
    method.restore(model)
    assert torch.equal(model(images), logits)
    tpp.save_model(tmp_path / "m.safetensors", model)
    loaded = tpp.load_model(tmp_path / "m.safetensors")
    torch.testing.assert_close(loaded.eval()(images), logits, rtol=1e-5, atol=1e-5)


def test_in_other_stages_it_does_nothing():
    model = network()
    before = copy.deepcopy(model.state_dict())
    method = Interspace(Settings(sparsity=0.5))
    method.modify(model, "regularize")
    method.restore(model)
    assert list(model.state_dict()) == list(before) and method.scalars(0) == {}


@pytest.mark.parametrize(
    ("settings", "companion", "message"),
    [
        ({"sparsity": 0.995}, None, "the bases alone are 1,053 numbers"),
        ({"sparsity": 0.5}, {"conv1.weight": torch.ones(1)}, "masked weights"),
    ],
)
def test_mistakes(settings, companion, message):
    with pytest.raises(UserError, match=message):
        begun(network(), companion=companion, **settings)


def test_too_few_numbers_left_are_seen_before_anything_is_trained():
    model = build_on_meta(Architecture("cifar_resnet14", 4, {}))
    Interspace(Settings(sparsity=0.9)).check_network(model, "finetune")
    too_sparse = Interspace(Settings(sparsity=0.995))
    too_sparse.check_network(model, "regularize")
    with pytest.raises(UserError, match=r"^sparsity: .* the bases alone are 1,053 numbers"):
        too_sparse.check_network(model, "finetune")
