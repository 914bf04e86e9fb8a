"""Linear over-parameterisation: its identities, in float64."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from tpp.channels.removal import prune_model
from tpp.common.errors import UserError
from tpp.measure.counts import count
from tpp.methods import base
from tpp.methods.linear_overparam import (
    Factors,
    LinearOverparam,
    Settings,
    similarities,
    similarity_loss,
)
from tpp.models.architecture import build_model, example_input_for
from tpp.models.layers import prunable_layers
from tpp.selection.selection import Selection, select_filters
from train.config.optimizer import OptimizerSection
from train.loop.optim import parameter_groups

EXACT = {"rtol": 1e-12, "atol": 2e-14}


def dense_network() -> nn.Module:
    torch.manual_seed(0)
    return build_model("cifar_resnet8", 10).double()


def pruned_network() -> nn.Module:
    model = dense_network()
    return prune_model(model, select_filters(model, {"layer*.conv1": 0.8})).double()


def method_of(**settings) -> LinearOverparam:
    return LinearOverparam(Settings(**settings))


def expanded(model: nn.Module, **settings) -> tuple[nn.Module, LinearOverparam]:
    model, method = copy.deepcopy(model), method_of(**settings)
    method.modify(model, "finetune")
    return model, method


def prepare(model, method, *, dense=None, stage="finetune", mask=None, rank=0, ranks=1):
    dense = (dense or dense_network()).eval().requires_grad_(False)
    context = base.TrainingContext(
        stage=stage,
        plan=None,
        selection=Selection({}),
        rank=rank,
        world_size=ranks,
        example_input=example_input_for(model).double(),
        dense=lambda: dense,
        companion=lambda name: mask or {},
    )
    method.prepare(model, context)
    return dense


def images(seed: int, n: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    numbers = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n, 3, 16, 16, generator=numbers, dtype=torch.float64),
        torch.randint(10, (n,), generator=numbers),
    )


def train(model, steps, *, lr=0.02, method=None, weight_decay=5e-3) -> None:
    """SGD with the groups that a stage makes, and Nesterov's momentum."""
    settings = OptimizerSection(lr=lr, weight_decay=weight_decay)
    optimizer = torch.optim.SGD(
        parameter_groups(model, settings),
        lr=lr,
        momentum=0.9,
        nesterov=True,
        weight_decay=weight_decay,
    )
    for step in range(steps):
        batch = images(step)
        optimizer.zero_grad()
        outputs = model.train()(batch[0])
        loss = F.cross_entropy(outputs, batch[1])
        if method is not None:
            terms = method.batch_terms(batch, outputs) | method.loss_terms()
            loss = loss + sum(terms.values())
        loss.backward()
        optimizer.step()


def distance(one: nn.Module, other: nn.Module) -> float:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    return max((ours[k].double() - theirs[k].double()).abs().max().item() for k in ours)


# The product


@pytest.mark.parametrize("excess", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(5, 3, 3, 3), (4, 6, 1, 1), (7, 2, 5, 3), (10, 4)])
def test_factors_multiply_out_to_the_weight(shape, excess):
    torch.manual_seed(1)
    weight = torch.randn(shape, dtype=torch.float64)
    factors = Factors(3, excess)
    inner, middle, outer = factors.right_inverse(weight)
    n, m = shape[:2]
    assert inner.shape == (3 * m, m) and outer.shape == (n, 3 * n)
    assert middle.shape == (3 * n, 3 * m, *shape[2:])
    torch.testing.assert_close(inner.T @ inner, torch.eye(m).double(), **EXACT)
    torch.testing.assert_close(outer @ outer.T, torch.eye(n).double(), **EXACT)
    truth = torch.einsum("op,pq...,qi->oi...", outer, middle, inner)
    torch.testing.assert_close(truth, weight, **EXACT)
    torch.testing.assert_close(factors(inner, middle, outer), weight, **EXACT)
    # What multiplies to zero is as large as it is said to be.
    size = middle.norm() ** 2 - weight.norm() ** 2
    assert size.clamp_min(0).sqrt().item() == pytest.approx(excess * weight.norm().item(), abs=1e-6)
    again = factors.right_inverse(weight.clone())
    assert all(a.equal(b) for a, b in zip((inner, middle, outer), again, strict=True))


@pytest.mark.parametrize("stride", [1, 2])
def test_one_convolution_with_the_product_is_three(stride):
    """Outputs and all gradients, against 1x1, k x k with stride and padding, 1x1."""
    torch.manual_seed(2)
    factors = Factors(2, 1.0)
    parts = factors.right_inverse(torch.randn(5, 3, 3, 3, dtype=torch.float64))
    inner, middle, outer = (part.requires_grad_() for part in parts)
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    found = F.conv2d(x, factors(inner, middle, outer), stride=stride, padding=1)
    y = F.conv2d(F.conv2d(x, inner[..., None, None]), middle, stride=stride, padding=1)
    truth = F.conv2d(y, outer[..., None, None])
    torch.testing.assert_close(found, truth, **EXACT)
    cotangent = torch.randn_like(truth)
    torch.testing.assert_close(
        *(torch.autograd.grad(out, [inner, middle, outer], cotangent) for out in (found, truth)),
        **EXACT,
    )


def test_the_product_is_float32_under_autocast_and_keeps_the_memory_format():
    weight = torch.randn(6, 4, 3, 3)
    factors = Factors(2, 1.0)
    inner, middle, outer = factors.right_inverse(weight)
    plain = factors(inner, middle, outer)
    assert plain.is_contiguous()
    torch.testing.assert_close(plain, weight, rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert factors(inner, middle, outer).equal(plain)
    last = factors(inner, middle.to(memory_format=torch.channels_last), outer)
    assert last.is_contiguous(memory_format=torch.channels_last) and not last.is_contiguous()
    assert last.equal(plain)
    assert factors(*(f.bfloat16() for f in (inner, middle, outer))).dtype == torch.bfloat16


# The network


def test_an_expanded_network_is_the_pruned_one_until_it_is_trained():
    pruned = pruned_network()
    model, method = expanded(pruned, expansion=2)
    assert all(parametrize.is_parametrized(layer) for layer in prunable_layers(model).values())
    assert sum(p.numel() for p in model.parameters()) > 4 * sum(
        p.numel() for p in pruned.parameters()
    )
    x = images(0)[0]
    torch.testing.assert_close(model.eval()(x), pruned.eval()(x), **EXACT)
    method.restore(model)
    assert distance(model, pruned) < 5e-15


@pytest.mark.parametrize("channels_last", [False, True])
def test_contracted_it_is_what_was_trained_in_the_pruned_networks_shape(channels_last):
    pruned = pruned_network().float()
    model, method = expanded(pruned)
    if channels_last:
        model.to(memory_format=torch.channels_last)
    x = images(9)[0].float()
    for step in range(3):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        F.cross_entropy(model.train()(images(step)[0].float()), images(step)[1]).backward()
        optimizer.step()
    with torch.no_grad():
        before = model.eval()(x)
        method.restore(model)
        assert model(x).equal(before), "bit for bit"
    assert distance(model, pruned) > 1e-3
    assert [*model.state_dict()] == [*pruned.state_dict()]
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in pruned.named_parameters()]
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())
    assert [type(m) for m in model.modules()] == [type(m) for m in pruned.modules()]
    assert count(model) == count(pruned)
    for (name, one), other in zip(
        model.state_dict().items(), pruned.state_dict().values(), strict=True
    ):
        assert one.shape == other.shape, name


def test_grouped_layers_and_those_not_named_stay():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Linear(8, 2))
    method = method_of()
    method.modify(model, "finetune")
    assert [parametrize.is_parametrized(layer) for layer in model] == [True, False, True]
    method.restore(model)
    some = method_of(layers=["2"])
    some.modify(model, "finetune")
    assert [parametrize.is_parametrized(layer) for layer in model] == [False, False, True]
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    tied[2].weight = tied[0].weight
    method_of().modify(tied, "finetune")
    assert [parametrize.is_parametrized(layer) for layer in tied] == [False, True, False]
    with pytest.raises(UserError, match=r"layers: '1' is of no convolution without groups"):
        method_of(layers=["*", "1"]).check_network(copy.deepcopy(model), "finetune")


@pytest.mark.parametrize("stage", ["regularize", "prune"])
def test_no_other_stage_is_changed(stage):
    model, method = pruned_network(), method_of(similarity=1.0)
    before = copy.deepcopy(model)
    method.modify(model, stage)
    prepare(model, method, stage=stage)
    assert distance(model, before) == 0
    assert method.batch_terms(images(0), torch.zeros(4, 10)) == {}


# Trajectories


@pytest.mark.parametrize("excess", [0.0, 1.0])
def test_with_the_outer_factors_frozen_it_is_plain_finetuning(excess):
    pruned = pruned_network()
    model, method = expanded(pruned, expansion=2, excess=excess)
    for name, parameter in model.named_parameters():
        if name.endswith(("original0", "original2")):
            parameter.requires_grad_(False)
    train(model, 12)
    train(pruned, 12)
    method.restore(model)
    assert distance(model, pruned) < 1e-12


@pytest.mark.parametrize("excess", [0.0, 1.0])
def test_first_step_is_that_of_the_weight_and_two_terms_more(excess):
    r"""-lr (G + sum_j (O M)_k (O M)_j^T G_j + sum_j G_j (M I)_j^T (M I)_k), written down."""
    torch.manual_seed(3)
    layer = nn.Conv2d(3, 5, 3, padding=1, bias=False).double()
    x, cotangent = torch.randn(2, 3, 6, 6).double(), torch.randn(2, 5, 6, 6).double()
    weight = layer.weight.detach().clone()
    (gradient,) = torch.autograd.grad(layer(x), layer.weight, cotangent)
    method = method_of(expansion=2, excess=excess)
    method.modify(nn.Sequential(layer), "finetune")
    factors = list(layer.parametrizations.weight.parameters())
    inner, middle, outer = (f.detach().clone() for f in factors)
    lr = 1e-7
    torch.optim.SGD(factors, lr=lr).zero_grad()
    layer(x).backward(cotangent)
    torch.optim.SGD(factors, lr=lr).step()
    om = torch.einsum("op,pqxy->oqxy", outer, middle)
    mi = torch.einsum("pqxy,qi->pixy", middle, inner)
    through_inner = torch.einsum("oqxy,aqij,abij->obxy", om, om, gradient)
    through_outer = torch.einsum("abjl,pbjl,pcxy->acxy", gradient, mi, mi)
    truth = gradient + through_inner + through_outer
    torch.testing.assert_close(
        (weight - layer.weight.detach()) / lr, truth, rtol=1e-5, atol=1e-5 * truth.abs().max()
    )


def test_weight_decay_of_the_products_is_that_of_plain_finetuning():
    """With the outer factors frozen; the ranks' shares are one whole, the optimiser's is off."""
    pruned = pruned_network()
    model, method = expanded(pruned, expansion=2, weight_decay=5e-3)
    prepare(model, method)
    groups = parameter_groups(model, OptimizerSection(lr=0.1, weight_decay=5e-3))
    decays = {name: g["weight_decay"] for g in groups for name in g["param_names"]}
    assert {decays[name] for name in decays if "original" in name} == {0.0}
    assert decays["bn1.weight"] == decays["linear.bias"] == 5e-3
    (whole,) = method.loss_terms().values()
    weights = [layer.weight for layer in prunable_layers(pruned).values()]
    assert whole.item() == pytest.approx(2.5e-3 * sum(w.square().sum().item() for w in weights))
    shares = []
    for rank in range(12):  # more than there are layers
        other = method_of(weight_decay=5e-3)
        other._layers = method._layers
        prepare(model, other, rank=rank, ranks=12)
        shares.append(other.loss_terms()["decay"].item() / 12)
    assert sum(shares) == pytest.approx(whole.item(), rel=1e-12) and shares.count(0.0) > 0
    for name, parameter in model.named_parameters():
        if name.endswith(("original0", "original2")):
            parameter.requires_grad_(False)
    train(model, 8, method=method)
    train(pruned, 8)
    method.restore(model)
    assert distance(model, pruned) < 1e-12


def trained(excess: float, expansion: int) -> nn.Module:
    model, method = expanded(pruned_network(), expansion=expansion, excess=excess)
    train(model, 8)
    method.restore(model)
    return model


def test_without_excess_sgd_knows_no_expansion():
    """All gradients lie in the span of the outer factors: r = 3 trains as r = 1 does."""
    one = trained(0.0, 1)
    assert distance(trained(0.0, 3), one) < 1e-10
    assert distance(trained(1.0, 3), one) > 1e-3
    plain = pruned_network()
    train(plain, 8)
    assert distance(plain, one) > 1e-3


# Similarities


def test_similarity_loss_against_the_formula_and_its_invariances():
    torch.manual_seed(4)
    features = torch.randn(6, 5, 4, 4).double()
    other = torch.randn(6, 3, 2, 2).double()

    def loss(one, two):
        return similarity_loss(similarities(one), similarities(two)).item()

    g, h = (torch.einsum("ia,ja->ij", f.flatten(1), f.flatten(1)) for f in (features, other))
    truth = (g / g.norm(dim=1, keepdim=True) - h / h.norm(dim=1, keepdim=True)).norm() ** 2 / 36
    assert loss(features, other) == pytest.approx(truth.item(), rel=1e-12)
    assert truth > 1e-3
    assert loss(features, features) == 0
    wider = torch.linalg.qr(torch.randn(9, 5).double()).Q  # orthonormal, into a wider layer
    mixed = 300 * torch.einsum("pc,ncxy->npxy", wider, features)
    assert loss(mixed, features) < 1e-30
    assert loss(1e-9 * features, other) == pytest.approx(truth.item(), rel=1e-12)
    places = torch.randperm(6)
    assert loss(features[places], other[places]) == pytest.approx(truth.item(), rel=1e-12)
    # The features' size that is divided by has no part in the gradient.
    leaf = features.clone().requires_grad_()
    (found,) = torch.autograd.grad(similarity_loss(similarities(leaf), similarities(other)), leaf)
    rows = leaf.flatten(1)
    plain = (F.normalize(rows @ rows.T, dim=1) - h / h.norm(dim=1, keepdim=True)).square().mean()
    torch.testing.assert_close(found, torch.autograd.grad(plain, leaf)[0], **EXACT)
    assert similarities(torch.zeros(2, 3)).equal(torch.zeros(2, 2))


@pytest.mark.parametrize("expand", [True, False])
def test_the_term_is_the_sum_over_the_layers_of_each_micro_batch(expand):
    model, method = expanded(pruned_network(), similarity=7.0, expand=expand, layers=["layer*"])
    assert any("original1" in name for name, _ in model.named_parameters()) == expand
    teacher = prepare(model, method)
    weights = copy.deepcopy(teacher.state_dict())
    for batch in (images(1), images(2, n=3)):
        outputs = model.train()(batch[0])
        model.eval()(images(5)[0])  # what an evaluation leaves behind is not looked at
        model.train()
        (term,) = method.batch_terms(batch, outputs).values()
        assert not method._mine and not method._its, "a graph that nobody needs"
        truth, its = 0.0, copy.deepcopy(teacher)
        names = [n for n, _ in prunable_layers(copy.deepcopy(teacher)).items() if "layer" in n]
        seen: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        plain = copy.deepcopy(model)
        for network, name in itertools.product((plain, its), names):
            network.get_submodule(name).register_forward_hook(_appending(seen[name]))
        plain(batch[0]), its(batch[0])
        for mine, dense in seen.values():
            truth += similarity_loss(similarities(mine), similarities(dense)).item()
        assert len(seen) == 6 and term.item() == pytest.approx(7.0 * truth, rel=1e-9)
    term.backward()
    inner = model.layer1[0].conv1.parametrizations.weight.original0 if expand else None
    assert inner is None or inner.grad.any()
    assert not teacher.training
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(t.equal(weights[name]) for name, t in teacher.state_dict().items())


def _appending(outputs):
    return lambda module, x, y: outputs.append(y.detach())


def test_it_pulls_the_network_towards_its_teacher():
    finals = []
    for similarity in (1e-6, 300.0):
        model, method = expanded(pruned_network(), similarity=similarity)
        prepare(model, method)
        train(model, 10, method=method, lr=0.01)
        batch = images(3)
        outputs = model.train()(batch[0])
        finals.append(method.batch_terms(batch, outputs)["similarity"].item() / similarity)
        method.restore(model)
        assert distance(model, pruned_network()) > 0
    assert finals[1] < 0.7 * finals[0]


def test_outputs_changed_in_place_and_layers_of_no_single_image():
    torch.manual_seed(0)

    class Windows(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, width, 3)
            self.relu = nn.ReLU(inplace=True)
            self.twice = nn.Linear(width, width)
            self.windows = nn.Linear(width, 2)
            self.unused = nn.Linear(2, 2)

        def forward(self, x):
            x = self.relu(self.conv(x)).mean(3).movedim(1, 2)
            return self.windows(self.twice(self.twice(x)).flatten(0, 1)).view(len(x), -1)

    model, dense = Windows(4).double(), Windows(8).double()
    method = method_of(similarity=1.0)
    method.modify(model, "finetune")
    model.input_size = (3, 8, 8)
    context = base.TrainingContext(
        "finetune", None, Selection({}), 0, 1, torch.zeros(1, 3, 8, 8).double(),
        dense=lambda: dense.eval().requires_grad_(False),
    )  # fmt: skip
    method.prepare(model, context)
    x = torch.randn(4, 3, 8, 8).double()
    outputs = model.train()(x)
    term = method.batch_terms((x, torch.zeros(4).long()), outputs)["similarity"]
    (term + outputs.mean()).backward()
    truth = similarity_loss(similarities(model.conv(x)), similarities(dense.conv(x)))
    assert term.item() == pytest.approx(truth.item(), rel=1e-12)
    none = method_of(similarity=1.0, layers=["twice", "unused"])
    fresh = Windows(4).double()
    none.modify(fresh, "finetune")
    with pytest.raises(UserError, match="similarity: none of the layers"):
        none.prepare(fresh, context)


def test_masked_weights_are_refused_where_they_would_not_stay_masked():
    mask = {"conv1.weight": torch.ones(1)}
    model, method = expanded(pruned_network())
    with pytest.raises(UserError, match=r"masked weights.*use expand: false"):
        prepare(model, method, mask=mask)
    model, method = expanded(pruned_network(), expand=False)
    prepare(model, method, mask=mask)


def test_averaged_factors_are_contracted_as_the_trained_ones_are():
    """As a stage does it: a fresh method on an empty network, which then takes the tensors up."""
    model, method = expanded(pruned_network())
    train(model, 2)
    other, fresh = pruned_network(), method_of()
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.zero_()
    fresh.modify(other, "finetune")
    other.load_state_dict(model.state_dict())
    fresh.restore(other)
    method.restore(model)
    assert distance(other, model) == 0
