"""Filters that go while a network trains: how many, which, at what cost."""

import copy
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tpp.channels.removal import prune_model
from tpp.common.errors import UserError
from tpp.measure.counts import count
from tpp.methods.base import TrainingContext
from tpp.methods.while_training import Settings, WhileTraining
from tpp.models.architecture import Architecture, build_model, build_on_meta
from tpp.models.layers import prunable_layers
from tpp.plan import PruningPlan
from tpp.selection.activation import MeanActivations
from tpp.selection.budget import Budget
from tpp.selection.selection import Selection

TOTAL = 100


def network(seed=0):
    torch.manual_seed(seed)
    return build_model("cifar_resnet8", 4).double()


def method_of(model, selection, state=None, **how):
    method = WhileTraining(Settings(**how))
    method.prepare(
        model,
        TrainingContext(
            "regularize", None, selection, 0, 1, torch.zeros(1, 3, 16, 16), total_steps=TOTAL
        ),
    )
    if state is not None:
        method.load_state_dict(state)
    return method


def removals(selection, *, train=lambda model, step: None, **how):
    """Every removal of a stage as the stage makes it: (step, plan, model before, method)."""
    model, found = network(), []
    method = method_of(model, selection, **how)
    for step in range(1, TOTAL + 1):
        train(model, step)
        plan = method.shrink(step)
        if plan is not None:
            found.append((step, plan, model, method))
            state = method.state_dict()
            model = prune_model(model, plan)
            method = method_of(model, selection, state, **how)
    return model, method, found


@given(
    st.floats(0.05, 0.95),
    st.integers(1, 12),
    st.floats(0, 0.5),
    st.floats(0.55, 1),
)
@settings(max_examples=12, deadline=None)
def test_after_every_event_so_many_have_gone(ratio, events, start, end):
    selection = Selection({"layer*.conv1": ratio})
    in_the_end = selection.select(network())
    dense = {name: len(layer.weight) for name, layer in prunable_layers(network()).items()}
    small, method, found = removals(selection, events=events, start=start, end=end)
    at = [max(1, round(TOTAL * (start + (end - start) * t / events))) for t in range(1, events + 1)]
    assert {step for step, *_ in found} <= {*at}
    for step, plan, before, _ in found:
        event = sum(moment <= step for moment in at)
        for layer, gone in in_the_end.pruned.items():
            left = len(before.get_submodule(layer).weight) - len(plan.pruned.get(layer, ()))
            assert dense[layer] - left == len(gone) * event // events, layer
    for layer, gone in in_the_end.pruned.items():
        assert len(small.get_submodule(layer).weight) == dense[layer] - len(gone)
    assert method.plan.filters == in_the_end.filters
    assert {n: len(gone) for n, gone in method.plan.pruned.items()} == {
        n: len(gone) for n, gone in in_the_end.pruned.items()
    }


def shake(model, step):
    """Other weights in every step, so that every event has others to choose from."""
    torch.manual_seed(step)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter) * parameter.std()


def test_the_smallest_of_those_that_are_left_go():
    """Plans nest, and the plan of the dense network names the very filters."""
    dense = network()
    _, method, found = removals(Selection({"layer*.conv1": 0.7}), train=shake, events=5)
    assert len(found) == 5
    left = {
        layer: list(range(len(dense.get_submodule(layer).weight))) for layer in method.plan.filters
    }
    for _, plan, before, _ in found:
        for layer, gone in plan.pruned.items():
            size = before.get_submodule(layer).weight.detach().abs().flatten(1).sum(1)
            stays = [n for n in range(len(size)) if n not in gone]
            assert size[gone].max() <= size[stays].min()
            left[layer] = [left[layer][n] for n in stays]
    for layer, gone in method.plan.pruned.items():
        assert sorted({*range(method.plan.filters[layer])} - {*left[layer]}) == sorted(gone)


def test_random_filters_are_others_at_each_event_and_the_same_again():
    selection = Selection({"layer*.conv1": 0.7}, criterion="random", seed=3)
    _, one, found = removals(selection, events=4)
    _, other, _ = removals(selection, events=4)
    assert one.plan == other.plan
    _, another, _ = removals(Selection({"layer*.conv1": 0.7}, criterion="random", seed=4), events=4)
    assert another.plan != one.plan
    assert len({tuple(plan.pruned["layer3.0.conv1"]) for _, plan, *_ in found}) > 1


def brute_force(values):
    """Mean over images and positions after ReLU, channel by channel; (n, c, ...) or (n, c)."""
    return [
        sum(max(0.0, x) for x in values[:, channel].flatten().tolist()) / values[:, channel].numel()
        for channel in range(values.shape[1])
    ]


class Chain(nn.Module):
    """A layer without BatchNorm, one whose BatchNorm sees two layers' channels, and a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = (nn.Conv2d(3, 4, 3, padding=1) for _ in range(2))
        self.norm, self.last = nn.BatchNorm2d(8), nn.Conv2d(8, 5, 3)
        self.hidden, self.head = nn.Linear(5, 6), nn.Linear(6, 4)

    def forward(self, x):
        x = nn.functional.relu(self.norm(torch.cat([self.one(x), self.other(x)], 1)))
        x = nn.functional.relu(self.last(x)).mean((2, 3))
        return self.head(nn.functional.relu(self.hidden(x)))


def test_means_of_activations_are_those_of_a_loop():
    torch.manual_seed(0)
    model = Chain().double()
    outputs: dict[str, list[torch.Tensor]] = {name: [] for name in ("norm", "last", "hidden")}
    for name, found in outputs.items():
        model.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, found=found: found.append(output.detach())
        )
    layers = ["one", "other", "last", "hidden"]
    example = torch.zeros(1, 3, 8, 8)
    watched = MeanActivations(model, layers, lambda values: values, example_input=example)
    truth = {layer: [] for layer in layers}
    for step in range(4):
        for _ in range(2):
            images = torch.randn(3, 3, 8, 8).double() + step
            model.train()(images)
            watched.add()
            if step in (1, 2):
                norm = outputs["norm"][-1]
                for layer, values in (
                    *(("one", norm[:, :4]), ("other", norm[:, 4:])),
                    *((name, outputs[name][-1]) for name in ("last", "hidden")),
                ):
                    truth[layer].append(brute_force(values))
            model.eval()(images)  # an evaluation between steps does not count
        watched.count(keep=step > 0)
        if step == 2:
            state = json.loads(json.dumps(watched.state_dict()))
            watched.count()  # a step that was left out, without a pass
            model.train()(images * math.nan)  # and a bad one
            watched.add()
            watched.count()
            found = watched.scores()
    assert state["steps"] == 2 and watched.steps == 3
    for layer in layers:
        expected = torch.tensor(truth[layer], dtype=torch.float64).mean(0)
        torch.testing.assert_close(found[layer], expected, rtol=1e-12, atol=1e-14, msg=layer)
    watched.load_state_dict(state)
    assert all(values.equal(found[layer]) for layer, values in watched.scores().items())
    watched.forget()
    assert watched.state_dict() == {}
    watched.remove()
    model.train()(images)
    with pytest.raises(KeyError):
        watched.add()


def test_the_least_active_since_the_last_event_go():
    """Also where a state is taken up between events, and the same to the bit."""
    selection = Selection({"layer*.conv1": 0.7}, criterion="bn_scale")
    how = {"criterion": "activation", "events": 3, "start": 0.1, "end": 0.4}
    model, plans = network(), []
    method, taken_up = method_of(model, selection, **how), None
    seen: dict[str, list[list[float]]] = {}

    def listen(model):
        for name in ("layer1.0", "layer2.0", "layer3.0"):
            found = seen[f"{name}.conv1"] = []

            def note(module, inputs, output, found=found):
                if module.training:
                    found.append(brute_force(output))

            model.get_submodule(f"{name}.bn1").register_forward_hook(note)

    listen(model)
    for step in range(45):
        torch.manual_seed(step)
        if step == 10:  # the first interval begins
            listen(model)
        for _ in range(2):
            model.train()(torch.randn(2, 3, 8, 8).double() * (1 + step % 3))
            for each in (method, taken_up):
                if each is not None:
                    assert each.batch_terms((None, None), None) == {}
        for each in (method, taken_up):
            if each is not None:
                each.before_step(step)
                each.after_step(step)
        plan = method.shrink(step + 1)
        if taken_up is not None:
            assert taken_up.shrink(step + 1) == plan
            assert taken_up.state_dict() == method.state_dict()
            taken_up = None
        if plan is None:
            if step == 28:  # one step before the second event
                state = json.loads(json.dumps(method.state_dict()))
                assert state["activations"]["steps"] == 9
                taken_up = method_of(model, selection, state, **how)
            continue
        plans.append((step + 1, plan))
        for layer, gone in plan.pruned.items():
            means = torch.tensor(seen[layer]).mean(0)
            assert sorted(gone) == sorted(means.argsort()[: len(gone)].tolist()), (step, layer)
        state = json.loads(json.dumps(method.state_dict()))
        assert state["activations"] == {}
        model = prune_model(model, plan)
        listen(model)
        method = method_of(model, selection, state, **how)
    assert [step for step, _ in plans] == [20, 30, 40]
    assert len(model.layer3[0].conv1.weight) == 64 - math.ceil(0.7 * 64)
    assert not method.before_step(45) and method.batch_terms((None, None), None) == {}


def test_an_event_waits_for_a_step_that_can_be_used():
    model = network()
    how = {"criterion": "activation", "events": 1, "start": 0.1, "end": 0.2}
    method = method_of(model, Selection({"layer*.conv1": 0.5}), **how)
    for step in range(22):
        if step == 21:
            model.train()(torch.randn(2, 3, 8, 8).double())
            method.batch_terms((None, None), None)
        method.after_step(step)
        plan = method.shrink(step + 1)
        assert (plan is not None) == (step == 21)
    assert method.before_step(22), "what was captured of its terms is of no more use"


def test_how_many_go_does_not_depend_on_when_it_was_saved():
    """By a budget that is the weights' affair: they are those of the first event on every rank."""
    selection = Selection(budget=Budget("speedup", 1.5))
    plans = []
    for saved in (False, True):
        model = network()
        method = method_of(model, selection, events=1, start=0.0, end=0.1)
        if saved:
            assert method.state_dict() == {}
        shake(model, 3)
        plans.append(method.shrink(10))
    assert plans[0] == plans[1]


def test_before_the_first_event_nothing_has_gone():
    method = method_of(network(), Selection({"layer*.conv1": 0.5}), events=2, start=0.2, end=0.6)
    assert method.shrink(39) is None and method.plan is None
    assert method.shrink(40) is not None and method.plan is not None
    finetuning = WhileTraining(Settings())
    finetuning.prepare(network(), TrainingContext("finetune", None, Selection(), 0, 1, None))
    assert finetuning.shrink(50) is None and finetuning.state_dict() == {}


def test_the_cost_is_that_of_counted_networks():
    """Against networks pruned to the widths between events, and a VGG's closed form."""
    model = build_on_meta(Architecture("cifar_resnet20", 10, {}))
    plan = Selection({"layer*.conv1": 0.5}).select(
        model,
        scores={n: torch.arange(len(m.weight), 0, -1) for n, m in prunable_layers(model).items()},
    )
    found = WhileTraining(Settings(events=3, start=0.1, end=0.7)).training_cost(model, plan)
    macs = []
    for event in range(4):
        some = {n: gone[: len(gone) * event // 3] for n, gone in plan.pruned.items()}
        macs.append(count(prune_model(model, PruningPlan(plan.filters, some))).macs)
    truth = (0.3 * macs[0] + 0.2 * macs[1] + 0.2 * macs[2] + 0.3 * macs[3]) / macs[0]
    assert found == pytest.approx(truth)

    # A plain chain: the first layer costs 1 - a, inner ones (1 - a)^2, what reads the last 1 - a.
    chain = nn.Sequential(*(nn.Conv2d(10, 10, 1, bias=False) for _ in range(4)), nn.Flatten())
    model, example = nn.Sequential(chain, nn.Linear(10, 2, bias=False)), torch.zeros(1, 10, 1, 1)
    plan = PruningPlan({f"0.{n}": 10 for n in range(3)}, {f"0.{n}": [0, 1, 2, 3] for n in range(3)})
    assert count(model, example_input=example).macs == 420
    small = count(prune_model(model, plan, example_input=example), example_input=example).macs
    assert small == 200 * 0.6 + 200 * 0.6**2 + 20


def test_masked_weights_are_refused():
    method = WhileTraining(Settings())
    context = TrainingContext(
        *("regularize", None, Selection(), 0, 1, torch.zeros(1, 3, 16, 16)),
        companion=lambda name: {"conv1.weight": torch.ones(1)},
    )
    with pytest.raises(UserError, match="masked weights"):
        method.prepare(network(), context)


def test_removing_at_once_is_masking_to_the_end():
    """In float64, with momentum, Nesterov and weight decay, running statistics included."""
    selection = Selection({"layer*.conv1": 0.6})
    dense = network()
    masked, small = copy.deepcopy(dense), copy.deepcopy(dense)
    how = {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2}
    optimizers = [torch.optim.SGD(net.parameters(), **how) for net in (masked, small)]
    method = method_of(small, selection, events=3, start=0.0, end=0.6)
    gone: dict[str, list[int]] = {}

    def hold_at_zero():
        with torch.no_grad():
            for layer, rows in gone.items():
                norm = layer.replace("conv1", "bn1")
                for key in (f"{layer}.weight", f"{norm}.weight", f"{norm}.bias"):
                    masked.get_parameter(key)[rows] = 0

    for step in range(1, 13):
        torch.manual_seed(step)
        images, labels = torch.randn(8, 3, 16, 16).double(), torch.randint(0, 4, (8,))
        for net, optimizer in zip((masked, small), optimizers, strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net.train()(images), labels).backward()
            optimizer.step()
        hold_at_zero()
        plan = method.shrink(step * TOTAL // 12)
        if plan is None:
            continue
        before = {
            name: optimizers[1].state[p]["momentum_buffer"] for name, p in small.named_parameters()
        }
        state, momentum = method.state_dict(), copy.deepcopy(small)
        momentum.load_state_dict(before, strict=False)
        pruned, cut = prune_model(small, plan), prune_model(momentum, plan)
        small = pruned
        optimizers[1] = torch.optim.SGD(small.parameters(), **how)
        for (_, parameter), (_, buffer) in zip(
            small.named_parameters(), cut.named_parameters(), strict=True
        ):
            optimizers[1].state[parameter]["momentum_buffer"] = buffer.detach().clone()
        method = method_of(small, selection, state, events=3, start=0.0, end=0.6)
        gone = method.plan.pruned
        hold_at_zero()
    assert len(small.layer3[0].conv1.weight) == 64 - math.ceil(0.6 * 64)
    truth = prune_model(masked, method.plan)
    for (name, values), (_, expected) in zip(
        small.state_dict().items(), truth.state_dict().items(), strict=True
    ):
        torch.testing.assert_close(values, expected, rtol=1e-11, atol=1e-12, msg=name)
