"""Gates on channels: their terms, their estimator, and what is left without them."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tpp.channels.gates import gated_layers
from tpp.channels.removal import prune_model
from tpp.common.errors import UserError
from tpp.methods.base import TrainingContext
from tpp.methods.polarization import (
    Polarization,
    Settings,
    activation,
    polarization,
    staying,
    straight_through,
)
from tpp.models.architecture import Architecture, build_model, build_on_meta
from tpp.plan import PruningPlan
from tpp.selection.selection import Selection

HALF = Selection({"layer*.conv1": 0.5})
# The sheet's reading of the abstract.
OBVIOUS = {"slope": "identity", "aim": False, "spread": 0.0, "gradient": 1.0}
OBVIOUS |= {"start": 0.0, "end": 0.0}


def network(name="cifar_resnet8", seed=0) -> nn.Module:
    torch.manual_seed(seed)
    return build_model(name, 4).double()


def begun(
    model, selection=HALF, *, total=100, companion=None, side=16, average=None, **how
) -> Polarization:
    method = Polarization(Settings(**how))
    method.modify(model, "regularize")
    context = TrainingContext(
        *("regularize", None, selection, 0, 1, torch.zeros(1, 3, side, side)),
        total_steps=total,
        companion=lambda name: companion or {},
        average=average or (lambda seen: seen),
    )
    method.prepare(model, context)
    return method


def images(seed=1, number=6, side=16) -> torch.Tensor:
    return torch.randn(
        number, 3, side, side, generator=torch.Generator().manual_seed(seed)
    ).double()


# ---- terms -----------------------------------------------------------------------------------


@given(st.integers(1, 12), st.integers(1, 7), st.integers(0, 2**20))
@settings(max_examples=40, deadline=None)
def test_the_terms_are_variance_and_mean_with_their_gradients(number, width, seed):
    torch.manual_seed(seed)
    gates = (torch.rand(number, width).double() > 0.4).double().requires_grad_()
    means = gates.detach().mean(0)
    for term, truth in (
        (polarization(means, gates), gates.var(0, unbiased=False).mean()),
        (activation(means, gates), gates.mean()),
    ):
        torch.testing.assert_close(term, truth, rtol=1e-13, atol=1e-15)
        # Of the closed form in m, not of the variance, which is the same where gates are 0 or 1.
    m = gates.mean(0)
    truth = torch.autograd.grad((m * (1 - m)).mean(), gates)[0]
    found = torch.autograd.grad(polarization(means, gates), gates)[0]
    torch.testing.assert_close(found, truth, rtol=1e-13, atol=1e-16)
    by_hand = (1 - 2 * means) / (width * number)
    torch.testing.assert_close(found, by_hand.expand(number, width), rtol=1e-13, atol=1e-16)
    assert torch.autograd.grad(activation(means, gates), gates)[0].unique().numel() == 1


def test_the_polarising_term_is_zero_at_consensus_and_a_quarter_at_most():
    agreed = torch.tensor([0.0, 1.0, 1.0]).double()
    assert polarization(agreed, agreed.expand(5, 3)) == 0
    halves = torch.full((3,), 0.5).double()
    assert polarization(halves, torch.rand(4, 3).double()) == 0.25


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_the_mean_over_parts_of_a_batch_is_the_term_of_the_whole(parts):
    """So are ranks and micro-batches, as the means are those of all of them."""
    gates = (torch.rand(8, 5, generator=torch.Generator().manual_seed(3)) > 0.5).double()
    gates.requires_grad_()
    means = gates.detach().mean(0)
    m = gates.mean(0)
    truth = torch.autograd.grad((m * (1 - m)).mean(), gates)[0]
    terms = [polarization(means, part) for part in gates.chunk(parts)]
    found = torch.autograd.grad(sum(terms) / parts, gates)[0]
    torch.testing.assert_close(found, truth, rtol=1e-13, atol=1e-16)
    value = float(sum(terms).detach()) / parts
    assert value == pytest.approx(float((means * (1 - means)).mean()), abs=1e-15)


def test_the_straight_through_estimator():
    scores = torch.tensor([-2.0, -0.1, 0.0, 0.3, 4.0]).double().requires_grad_()
    hard = straight_through(scores)
    assert hard.tolist() == [0, 0, 0, 1, 1]  # exactly
    up = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]).double()
    (found,) = torch.autograd.grad(hard, scores, up)
    sigmoid = [1 / (1 + math.exp(-s)) for s in scores.tolist()]
    by_hand = [u * s * (1 - s) for u, s in zip(up.tolist(), sigmoid, strict=True)]
    assert found.tolist() == pytest.approx(by_hand, rel=1e-12)
    (found,) = torch.autograd.grad(straight_through(scores, "identity", 0.25), scores, up)
    assert found.tolist() == pytest.approx((up / 4).tolist(), rel=1e-12)


def test_how_many_stay():
    means = torch.tensor([0.2, 0.5, 0.9, 0.1, 0.4, 0.9])
    assert staying(means, 1, 1).tolist() == [False, True, True, False, False, True]
    assert staying(means, 1, 4).tolist() == [False, True, True, False, True, True]
    assert staying(means, 5, 1).tolist() == [True, True, True, False, True, True]
    assert staying(means, 1, 5).sum() == 5
    closed = staying(torch.zeros(4), 1, 1)
    assert closed.tolist() == [True, False, False, False], "a layer keeps a filter"


# ---- gates in a network ----------------------------------------------------------------------


def test_layers_that_are_added_up_have_no_gates():
    found = gated_layers(network())
    assert list(found) == [f"layer{n}.0.conv1" for n in (1, 2, 3)]
    method = Polarization(Settings())
    meta = build_on_meta(Architecture("cifar_resnet8", 4))
    with pytest.raises(UserError, match=r"layer1\.0\.conv2 cannot have gates: .* pruning\.skip"):
        method.check(meta, PruningPlan({"layer1.0.conv2": 16}, {"layer1.0.conv2": [0]}))
    method.check(meta, PruningPlan({"layer1.0.conv2": 16}, {"layer1.0.conv2": []}))


def test_open_gates_are_not_there_to_the_bit():
    plain, gated = network(), network()
    method = begun(gated, open=1e3, spread=0.0)
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    for model in (plain, gated):
        F.cross_entropy(model.train()(images()), labels).backward()
    method.after_step(0)
    truth = dict(plain.named_parameters())
    for name, parameter in gated.named_parameters():
        if ".gate." not in name:
            assert torch.equal(parameter.grad, truth[name].grad), name
    assert torch.equal(gated.eval()(images()), plain.eval()(images()))


def test_a_gate_is_a_function_of_its_layers_input():
    model = network()
    begun(model, open=0.0)
    block = model.layer2[0]
    seen = {}
    block.conv1.register_forward_pre_hook(lambda m, i: seen.update(x=i[0]))
    block.bn1.register_forward_hook(lambda m, i, o: seen.update(before=i[0], after=o))
    model.train()(images())
    gate = block.conv1.gate
    x = seen["x"].mean((2, 3))
    hidden = (x @ gate.first.T + gate.first_bias).clamp_min(0)
    opened = hidden @ gate.second.T + gate.second_bias > 0
    assert 0 < opened.double().mean() < 1
    normed = F.batch_norm(seen["before"], None, None, block.bn1.weight, block.bn1.bias, True)
    torch.testing.assert_close(seen["after"], normed * opened[:, :, None, None])


def test_in_other_stages_and_in_layers_that_lose_nothing_there_are_none():
    model = network()
    before = copy.deepcopy(model.state_dict())
    method = Polarization(Settings())
    method.modify(model, "finetune")
    method.restore(model)
    assert list(model.state_dict()) == list(before) and method.scalars(0) == {}
    assert method.plan is None and method.batch_terms((images(), images()), images()) == {}
    method = begun(model, Selection({"layer1.*.conv1": 0.5}))
    assert not any(p.requires_grad for p in model.layer2[0].conv1.gate.parameters())
    assert not model.layer2[0].bn1._forward_hooks
    assert all(p.requires_grad and p.spared for p in model.layer1[0].conv1.gate.parameters())


def fixed(model, selection, seed=0, **how):
    """Gates that are fixed at random."""
    method = begun(model, selection, fixed=0.5, total=2, end=0.5, **how)
    torch.manual_seed(seed)
    for gate in method._gates.values():
        gate.mean.copy_((torch.rand(len(gate.mean)) > 0.5).double())
    method.after_step(0)
    return method


@pytest.mark.parametrize(
    ("name", "side", "selection"),
    [
        ("cifar_resnet20", 16, HALF),
        ("cifar_vgg16_bn", 32, Selection({"features.*": 0.5})),
        # A depthwise convolution between, whose norm adds something to zeros.
        ("mobilenet_v2", 32, Selection({"features.[2-9].conv.0.0": 0.5})),
        # Channels that several norms read, beside those of other layers.
        ("densenet121", 32, Selection({"features.denseblock[12].*.conv?": 0.5})),
        ("timm:resnet50d", 64, Selection({"layer?.*.conv[12]": 0.5})),
    ],
)
def test_without_the_closed_channels_it_is_the_same_network(name, side, selection):
    model = network(name)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # such as a trained one has
            nn.init.normal_(module.bias, 0.1, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
    method = fixed(model, selection, side=side)
    assert len(method._gates) >= 8
    x = images(side=side)
    gated = model.eval()(x)
    gone = {f"{name}.gate" for name in method._gates}
    method.restore(model)
    assert not gone & {key for key, _ in model.named_modules()}
    assert not any("gate" in key for key in model.state_dict())
    rebuilt = network(name)
    assert list(model.state_dict()) == list(rebuilt.state_dict())
    torch.testing.assert_close(model(x), gated, rtol=1e-12, atol=1e-12)
    small = prune_model(model, method.plan, example_input=x[:1])
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    torch.testing.assert_close(small.eval()(x), gated, rtol=1e-11, atol=1e-11)


def test_fixed_gates_train_as_the_smaller_network_does():
    """Gradients and running statistics; the gates themselves have gradients, of zero."""
    model = network("cifar_resnet20")
    method = fixed(model, HALF)
    plan, labels = method.plan, torch.tensor([0, 1, 2, 3, 0, 1])
    other = network("cifar_resnet20")
    small = prune_model(other, plan)
    for one in (model, small):
        F.cross_entropy(one.train()(images()), labels).backward()
    terms = method.batch_terms((images(), labels), images())
    assert set(terms) == {"polarization", "activation"}
    for gate in method._gates.values():
        assert all(not p.grad.any() for p in gate.parameters())
    for name, parameter in small.named_parameters():
        truth = model.get_parameter(name).grad
        if "conv1" in name and name != "conv1.weight":
            truth = truth[plan.kept(name.removesuffix(".weight"))]
        elif "conv2" in name:
            truth = truth[:, plan.kept(name.replace("conv2.weight", "conv1"))]
        elif ".bn1" in name:
            truth = truth[plan.kept(name.rpartition(".bn1")[0] + ".conv1")]
        torch.testing.assert_close(parameter.grad, truth, rtol=1e-10, atol=1e-12)


def test_a_copy_has_gates_of_its_own():
    model = network()
    begun(model, open=0.0)
    other = copy.deepcopy(model)
    before = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for layer in gated_layers(network()):
            other.get_submodule(layer).gate.second_bias.fill_(-9)
    mine, its = model.train()(images()), other.train()(images())
    assert not torch.equal(mine, its)
    assert torch.equal(model(images()), mine)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


# ---- training --------------------------------------------------------------------------------


def toy(lr, total=60, **how) -> tuple[Polarization, dict[str, float], float]:
    """Four patterns under noise, 60 steps of a stage of ``total``."""
    torch.manual_seed(0)
    model = build_model("cifar_resnet8", 4)
    method = begun(model, total=total, activation=60.0, **how)
    patterns = torch.randn(4, 3, 8, 8)
    groups = [
        {"params": [p for p in model.parameters() if spared == getattr(p, "spared", False)]}
        | ({"weight_decay": 0.0} if spared else {})
        for spared in (False, True)
    ]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, weight_decay=5e-4)

    def batch():
        labels = torch.randint(0, 4, (32,))
        return patterns[labels] + 1.5 * torch.randn(32, 3, 8, 8), labels

    for step in range(60):
        x, labels = batch()
        method.before_step(step)
        outputs = model.train()(x)
        loss = F.cross_entropy(outputs, labels)
        loss = loss + sum(method.batch_terms((x, labels), outputs).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.after_step(step)
    x, labels = batch()
    right = (model(x).argmax(1) == labels).float().mean()  # with the gates as they train
    return method, method.scalars(total), float(right)


@pytest.mark.parametrize("lr", [0.1, 0.02])
def test_the_obvious_reading_closes_all_gates(lr):
    """At the higher learning rate their scores run away to what is no number."""
    method, _, _ = toy(lr, total=61, fixed=1.0, **OBVIOUS)
    for gate in method._gates.values():
        assert gate.values.numel() and not (gate.values > 0.5).any()


def test_what_was_changed_makes_it_train():
    method, seen, right = toy(0.02)
    assert 0.25 < seen["gates_stay"] < 0.75 and right > 0.8
    assert all(gate.stays.sum() > 1 for gate in method._gates.values())
    assert method.plan is not None


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_ranks_have_the_gradients_and_the_gates_of_one(accumulation):
    """With BatchNorm's running statistics, so that images do not know of each other."""
    x, labels = images(number=8), torch.tensor([0, 1, 2, 3] * 2)

    def rank(average, parts):
        model = network()
        method = begun(model, open=0.1, average=average, start=0.0, end=0.0, total=100)
        model.train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        for gate in method._gates.values():
            gate.mean.copy_(torch.linspace(0.1, 0.9, len(gate.mean)))
        method.before_step(1)
        for at in parts:
            outputs = model(x[at])
            loss = F.cross_entropy(outputs, labels[at])
            loss = loss + sum(method.batch_terms((x[at], labels[at]), outputs).values())
            (loss / len(parts)).backward()
        return model, method

    one, whole = rank(lambda seen: seen, [slice(0, 8)])
    whole.after_step(0)
    seen: list[torch.Tensor] = []

    def average(mine):
        assert any(torch.equal(mine, its) for its in seen)
        return sum(seen) / len(seen)

    size = 4 // accumulation
    cuts = [[slice(4 * r + size * a, 4 * r + size * (a + 1)) for a in range(accumulation)]
            for r in (0, 1)]  # fmt: skip
    ranks = [rank(average, parts) for parts in cuts]
    seen.extend(method._seen.clone() for _, method in ranks)
    for _, method in ranks:
        method.after_step(0)
    for (name, gate), *others in zip(
        whole._gates.items(), *(method._gates.values() for _, method in ranks), strict=True
    ):
        assert gate.mean.min() > 0 and gate.mean.max() < 1
        for other in others:
            torch.testing.assert_close(other.mean, gate.mean, rtol=1e-14, atol=1e-15)
            assert torch.equal(other.stays, gate.stays), name
        assert torch.equal(others[0].mean, others[1].mean), "to the bit among themselves"
    for name, parameter in one.named_parameters():
        found = sum(model.get_parameter(name).grad for model, _ in ranks) / 2
        torch.testing.assert_close(found, parameter.grad, rtol=1e-10, atol=1e-13)


def test_a_bad_step_and_one_that_is_left_out_leave_the_means():
    model = network()
    method = begun(model)
    before = [gate.mean.clone() for gate in method._gates.values()]
    method.after_step(0)
    model.train()(images() * math.nan)
    method.batch_terms((images(), images()), images())
    method.after_step(1)
    assert all(map(torch.equal, before, [gate.mean for gate in method._gates.values()]))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"start": 0.5}, "in this order"),
        ({"fixed": 0.0}, "greater than 0"),
        ({"slope": "steep"}, "'sigmoid' or 'identity'"),
        ({"gates": 3}, "Extra inputs"),
    ],
)
def test_settings_out_of_bounds(given, message):
    with pytest.raises(ValueError, match=message):
        Settings(**given)


def test_masked_weights_and_layers_without_norms_are_one_line():
    with pytest.raises(UserError, match="has masked weights"):
        begun(network(), companion={"conv1.weight": torch.ones(1)})
    torch.manual_seed(0)
    with pytest.raises(UserError, match="cannot have gates"):
        begun(build_model("plain_convnet", 4, depth=6, width=8), Selection({"layers.1": 0.5}))
