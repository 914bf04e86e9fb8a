"""The methods on their own, against what they are said to do written out plainly."""

import copy
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tpp.channels.removal import prune_model
from tpp.common.errors import UserError
from tpp.methods import available_methods, base, method_class
from tpp.models.architecture import build_model, example_input_for
from tpp.models.layers import prunable_layers
from tpp.regularization.orthogonality import OrthogonalityPenalty
from tpp.selection.selection import Selection, select_filters

RATIOS = {"layer*.conv1": 0.5}
PRUNED = ["layer1.0.conv1", "layer2.0.conv1", "layer3.0.conv1"]
GREG2 = {
    "delta": 0.02,
    "tau": 0.1,
    "update_interval": 2,
    "stabilize_steps": 4,
    "pick_delta": 0.01,
    "pick_ceiling": 0.04,
}
PICKED_AFTER = 8  # four updates of 0.01, one every second step


def make(name: str, **settings: float) -> base.Method:
    method = method_class(name)
    return method(method.settings_type(**settings))


def network() -> nn.Module:
    torch.manual_seed(0)
    model = build_model("cifar_resnet8", 10).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # not all ones and zeros
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    for layer in PRUNED:  # norms so close that training decides which are the smallest
        weight = model.get_parameter(f"{layer}.weight").data
        wanted = torch.linspace(0.05, 0.0501, len(weight), dtype=weight.dtype)
        weight *= (wanted / weight.abs().mean((1, 2, 3))).view(-1, 1, 1, 1)
    return model


def context(model: nn.Module, method: base.Method, *, stage="regularize", rank=0, ranks=1):
    example = example_input_for(model)
    known = stage == "regularize" and method.picks == "before"
    return base.TrainingContext(
        stage=stage,
        plan=select_filters(model, RATIOS, example_input=example) if known else None,
        selection=Selection(RATIOS),
        rank=rank,
        world_size=ranks,
        example_input=example,
    )


def train(model, method, steps, *, start=0, momentum=None):
    """SGD with momentum on the method's terms and a task; returns the momentum buffers."""
    buffers = momentum or {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for step in range(start, steps):
        method.before_step(step)
        loss = task(model, step) + sum(method.loss_terms().values())
        descend(model, torch.autograd.grad(loss, list(model.parameters())), buffers)
        method.after_step(step)
    return buffers


def task(model: nn.Module, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(4, 3, 32, 32, generator=generator, dtype=torch.float64)
    return F.cross_entropy(model(images), torch.randint(10, (4,), generator=generator))


@torch.no_grad()
def descend(model, gradients, buffers, lr=0.01):
    for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
        buffers[name].mul_(0.9).add_(gradient)
        parameter.sub_(lr * buffers[name])


def test_there_are_the_rows_of_table_1_and_greg():
    titles = {name: method.title for name, method in available_methods().items()}
    # A method more is a file more, and no line here.
    assert (
        titles.items()
        >= {
            "scratch": "Scratch",
            "l1": "L1",
            "l1+orthp": "L1 + OrthP",
            "l1+kernorth": "L1 + KernOrth",
            "l1+orthconv": "L1 + OrthConv",
            "kernorth+l1": "KernOrth + L1",
            "orthconv+l1": "OrthConv + L1",
            "greg1": "GReg-1",
            "greg2": "GReg-2",
            "tpp": "TPP",
        }.items()
    )
    assert len(set(titles.values())) == len(titles), "a report could not tell them apart"
    with pytest.raises(UserError, match="did you mean 'l1\\+kernorth'"):
        method_class("l1+kernort")


@pytest.mark.parametrize("name", sorted(available_methods()))
def test_settings_know_no_other_key(name):
    if not any(
        field.is_required() for field in method_class(name).settings_type.model_fields.values()
    ):
        make(name)
    with pytest.raises(ValueError, match="Extra inputs are not permitted"):
        make(name, no_such_key=1)


def test_default_lengths_are_the_published_ones():
    assert make("tpp").steps() == make("greg1").steps() == 110_001
    # GReg-2: 1000 updates to 0.01, 9900 more to 1, and the stabilise phase.
    assert make("greg2").steps() == 10_000 + 99_000 + 10_000 + 1
    for name in ("scratch", "l1", "l1+orthp", "l1+kernorth", "orthconv+l1"):
        assert make(name).steps() is None


# OrthP


def test_orthp_restores_a_linear_networks_isometry_after_pruning():
    torch.manual_seed(0)
    model = build_model("mlp7_linear", 10)
    plan = select_filters(model, {"*": 0.9, "fc7": 0.0})
    pruned = prune_model(model, plan)
    method = make("l1+orthp")

    def singular_values():
        image = example_input_for(pruned)[0].double()
        jacobian = torch.autograd.functional.jacobian(
            lambda x: copy.deepcopy(pruned).double()(x[None])[0], image
        )
        return torch.linalg.svdvals(jacobian.flatten(1))

    assert singular_values().max() < 0.5
    assert method.after_removal(pruned, seed=0)
    torch.testing.assert_close(singular_values(), torch.ones(10).double(), rtol=1e-5, atol=1e-5)


def test_orthp_touches_weights_only():
    model = network()
    before = copy.deepcopy(model.state_dict())
    make("l1+orthp", gain=math.sqrt(2)).after_removal(model, seed=0)
    weights = {f"{name}.weight" for name in prunable_layers(model)}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name not in weights), name
    for layer in prunable_layers(model).values():
        values = torch.linalg.svdvals(layer.weight.detach().flatten(1))
        np.testing.assert_allclose(values, math.sqrt(2), rtol=1e-10)


# Orthogonality in the loss


@pytest.mark.parametrize(
    ("name", "form", "stage", "other"),
    [
        ("l1+kernorth", "kernel", "finetune", "regularize"),
        ("l1+orthconv", "convolution", "finetune", "regularize"),
        ("kernorth+l1", "kernel", "regularize", "finetune"),
        ("orthconv+l1", "convolution", "regularize", "finetune"),
    ],
)
def test_orthogonality_is_in_the_loss_of_one_stage(name, form, stage, other):
    model = network()
    method = make(name, strength=0.7, squared=True)
    assert (method.picks == "after") == (stage == "regularize")
    method.prepare(model, context(model, method, stage=other))
    assert method.loss_terms() == {}
    method.prepare(model, context(model, method, stage=stage))
    (term,) = method.loss_terms().values()
    truth = OrthogonalityPenalty(model, form, strength=0.7, squared=True)()
    assert term.item() == truth.item() > 0
    ranks = []
    for rank in range(3):
        method = make(name, strength=0.7, squared=True)
        method.prepare(model, context(model, method, stage=stage, rank=rank, ranks=3))
        ranks.append(method.loss_terms()["orthogonality"].item())
    assert np.mean(ranks) == pytest.approx(truth.item(), rel=1e-12)


# GReg-1


def test_greg1_decays_the_picked_filters_and_their_batchnorm_and_zeroes_nothing():
    model = network()
    method = make("greg1", delta=0.1, update_interval=1, stabilize_steps=5)
    plan = context(model, method).plan
    method.check(model, plan)
    method.prepare(model, context(model, method))
    before = copy.deepcopy(model.state_dict())
    parameters = dict(model.named_parameters())
    method.before_step(3)
    terms = method.loss_terms()
    assert list(terms) == ["decay"]
    found = torch.autograd.grad(terms["decay"], list(parameters.values()), materialize_grads=True)
    for (name, parameter), gradient in zip(parameters.items(), found, strict=True):
        truth = torch.zeros_like(parameter)
        layer = name.rpartition(".")[0].replace("bn1", "conv1")
        if layer in PRUNED:
            gone = plan.pruned[layer]
            truth[gone] = 0.3 * parameter.detach()[gone]
        torch.testing.assert_close(gradient, truth, rtol=1e-6, atol=1e-9, msg=name)
    for step in range(method.steps()):
        method.after_step(step)
    assert method.steps() == 16 and method.finished(16) and not method.finished(15)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


# GReg-2


def greg2_by_hand(model: nn.Module, steps: int):
    """GReg-2 in plain words: which filters it picks, and the network that it leaves behind."""
    buffers = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    gone: dict[str, list[int]] = {}
    for step in range(steps):
        loss = task(model, step)
        gradients = list(torch.autograd.grad(loss, list(model.parameters())))
        for i, (name, parameter) in enumerate(model.named_parameters()):
            layer = name.rpartition(".")[0].replace("bn1", "conv1")
            if layer not in PRUNED:
                continue
            decay = torch.zeros(len(parameter)).double()
            if step < PICKED_AFTER:
                decay[:] = 0.01 * (step // 2) if "conv" in name else 0.0
            else:  # 0.04 is two updates of 0.02, one every second step
                decay[gone[layer]] = min(0.1, 0.04 + 0.02 * ((step - PICKED_AFTER) // 2))
                if "conv" in name:
                    kept = [j for j in range(len(parameter)) if j not in gone[layer]]
                    decay[kept] = -1e-4
            shape = (-1, *[1] * (parameter.dim() - 1))
            gradients[i] = gradients[i] + decay.view(shape) * parameter.detach()
        descend(model, gradients, buffers)
        if step + 1 == PICKED_AFTER:
            for layer in PRUNED:
                norms = model.get_parameter(f"{layer}.weight").detach().abs().sum((1, 2, 3))
                order = sorted(range(len(norms)), key=lambda j: norms[j].item())
                gone[layer] = sorted(order[: len(norms) // 2])
    return gone


def test_greg2_against_plain_words():
    model, truth = network(), network()
    method = make("greg2", **GREG2)
    assert method.steps() == 8 + 6 + 4 + 1
    method.prepare(model, context(model, method))
    assert method.plan is None
    train(model, method, method.steps())
    gone = greg2_by_hand(truth, method.steps())
    assert method.plan.pruned == gone
    at_start = select_filters(network(), RATIOS).pruned
    assert gone != at_start, "with these settings the picking phase must change the choice"
    for name, tensor in truth.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("step", [5, 12])
def test_greg2s_ranks_add_up(step):
    model = network()
    whole = make("greg2", **GREG2)
    whole.prepare(model, context(model, whole))
    train(model, whole, step)
    state = json.loads(json.dumps(whole.state_dict()))
    assert (state["plan"] is None) == (step < PICKED_AFTER)
    parameters = list(model.parameters())
    whole.before_step(step)
    truth = torch.autograd.grad(
        sum(whole.loss_terms().values()), parameters, materialize_grads=True
    )
    mean = [torch.zeros_like(p) for p in parameters]
    for rank in range(5):  # more ranks than layers
        method = make("greg2", **GREG2)
        method.prepare(model, context(model, method, rank=rank, ranks=5))
        method.load_state_dict(state)
        method.before_step(step)
        share = sum(method.loss_terms().values())
        if share.requires_grad:
            found = torch.autograd.grad(share, parameters, materialize_grads=True)
            for total, part in zip(mean, found, strict=True):
                total += part / 5
    torch.testing.assert_close(mean, list(truth), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("stop", [5, PICKED_AFTER, 12])
def test_greg2_goes_on_from_its_state(stop):
    undisturbed = network()
    method = make("greg2", **GREG2)
    method.prepare(undisturbed, context(undisturbed, method))
    train(undisturbed, method, 16)

    model = network()
    first = make("greg2", **GREG2)
    first.prepare(model, context(model, first))
    momentum = train(model, first, stop)
    second = make("greg2", **GREG2)
    second.prepare(model, context(model, second))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    train(model, second, 16, start=stop, momentum=momentum)
    assert second.plan == method.plan
    for name, tensor in undisturbed.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_greg2_shows_lambda_growing_on_and_its_layers_once_picked():
    model = network()
    method = make("greg2", **GREG2)
    assert method.scalars(0) == {}
    method.prepare(model, context(model, method))
    assert method.statistics() == {}
    train(model, method, PICKED_AFTER)
    assert list(method.statistics()) == PRUNED
    strengths = [method.scalars(step)["lambda"] for step in range(method.steps())]
    assert strengths == sorted(strengths)
    assert strengths[PICKED_AFTER - 1] == pytest.approx(0.03)
    assert strengths[PICKED_AFTER] == pytest.approx(0.04)
    assert strengths[-1] == 0.1


def test_a_picking_ceiling_above_tau_is_a_mistake():
    with pytest.raises(ValueError, match=r"pick_ceiling \(0.5\) must not be above tau \(0.1\)"):
        make("greg2", tau=0.1, pick_ceiling=0.5)
