"""The regulariser against METHOD's equations, applied to gradients by hand in float64."""

import copy

import pytest
import torch
from torch import nn

import tpp
from tpp import GrowthSchedule, PruningPlan, Regularizer
from tpp.models import build_model


class Net(nn.Module):
    """Conv with BN, conv with bias and no BN, linear with bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 5, 3, padding=1, bias=True)
        self.fc1 = nn.Linear(5 * 16, 7)
        self.fc2 = nn.Linear(7, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = self.conv2(x).relu()
        return self.fc2(self.fc1(x.flatten(1)).relu())


EXAMPLE = torch.zeros(1, 3, 4, 4, dtype=torch.float64)
PLAN = PruningPlan(
    {"conv1": 6, "conv2": 5, "fc1": 7}, {"conv1": [0, 4], "conv2": [1, 2, 3], "fc1": [6]}
)
NORMS = {"conv1": "bn1"}


def network() -> Net:
    torch.manual_seed(0)
    net = Net().double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return net


def gradients_by_hand(net: nn.Module, strength: float, gram_weight: float):
    """METHOD.md, section 2, term by term."""
    grads = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for layer, pruned in PLAN.pruned.items():
        weight = net.get_parameter(f"{layer}.weight").detach()
        W = weight.flatten(1)
        n = len(W)
        mask = torch.zeros(n, n, dtype=W.dtype)
        mask[pruned, :] = 1
        mask[:, pruned] = 1
        gram = (4 * gram_weight * strength / n**2) * (mask * (W @ W.T)) @ W
        grads[f"{layer}.weight"] += gram.view_as(weight)
        grads[f"{layer}.weight"][pruned] += strength * weight[pruned]
        vectors = [f"{layer}.bias"] if f"{layer}.bias" in grads else []
        if layer in NORMS:
            vectors += [f"{NORMS[layer]}.weight", f"{NORMS[layer]}.bias"]
        for name in vectors:
            grads[name][pruned] += strength * net.get_parameter(name).detach()[pruned]
    return grads


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_gradients_of_all_ranks_average_to_the_equations(world_size):
    growth = GrowthSchedule(0.1, 1.0, 2, stabilize_steps=1000)
    step = 7  # lambda = 0.1 * floor(7 / 2) = 0.3
    net = network()
    truth = gradients_by_hand(net, 0.3, 50.0)
    total = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for rank in range(world_size):
        replica = copy.deepcopy(net)
        regularizer = Regularizer(
            replica, PLAN, rank=rank, world_size=world_size, gram_weight=50.0,
            growth=growth, example_input=EXAMPLE,
        )  # fmt: skip
        penalty = regularizer.penalty(step)
        if penalty.requires_grad:
            penalty.backward()
        for name, parameter in replica.named_parameters():
            if parameter.grad is not None:
                total[name] += parameter.grad / world_size
    for name, gradient in truth.items():
        assert (total[name] - gradient).norm() <= 1e-10 * max(gradient.norm(), 1e-30), name


def test_no_penalty_before_the_first_update():
    regularizer = Regularizer(network(), PLAN, example_input=EXAMPLE)
    assert regularizer.penalty(0).item() == 0
    assert not regularizer.penalty(9).requires_grad
    assert regularizer.penalty(10).item() > 0


def test_layers_are_held_at_zero_and_nothing_else_is_touched():
    growth = GrowthSchedule(1.0, 1.0, 1, stabilize_steps=100, zero_out_interval=10)
    net = network()
    regularizer = Regularizer(net, PLAN, growth=growth, example_input=EXAMPLE)
    before = copy.deepcopy(net.state_dict())
    begin = growth.growth_steps
    regularizer.after_step(begin + 19)  # conv1 is number 0, conv2 number 1
    after = net.state_dict()
    for name in ("conv1.weight", "bn1.weight", "bn1.bias"):
        expected = before[name].clone()
        expected[PLAN.pruned["conv1"]] = 0
        assert torch.equal(after[name], expected), name
    for name in before:
        if not name.startswith(("conv1", "bn1")):
            assert torch.equal(after[name], before[name]), name
    regularizer.after_step(begin + 30)
    assert net.conv2.bias[PLAN.pruned["conv2"]].abs().max() == 0
    assert net.fc1.bias[PLAN.pruned["fc1"]].abs().max() == 0
    assert net.fc1.bias[0] != 0


def test_training_drives_correlations_down_and_ends_at_zero():
    growth = GrowthSchedule(0.05, 1.0, 2, stabilize_steps=250, zero_out_interval=5)
    net = network().float()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(0.3)
    regularizer = Regularizer(net, PLAN, growth=growth, example_input=EXAMPLE.float())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.001, momentum=0.9)
    first = regularizer.statistics()["conv1"]
    kept_before = net.conv1.weight[PLAN.kept("conv1")].detach().clone()
    step = 0
    while not regularizer.finished(step):
        optimizer.zero_grad()
        regularizer.penalty(step).backward() if step >= 2 else None
        optimizer.step()
        regularizer.after_step(step)
        step += 1
    last = regularizer.statistics()["conv1"]
    assert step == growth.total_steps
    assert last.pruned_magnitude == 0 and last.correlation == 0
    assert first.pruned_magnitude > 0.1 and first.correlation > 0.01
    # Without a task loss the kept filters only lose what they shared with the pruned ones.
    assert last.kept_magnitude > 0.5 * first.kept_magnitude
    assert net.conv1.weight[PLAN.kept("conv1")].norm() <= kept_before.norm()


def test_a_plan_for_another_model_is_refused():
    plan = PruningPlan({"conv1": 8}, {"conv1": [1]})
    with pytest.raises(tpp.UserError, match="conv1: 8 filters planned, model has 6"):
        Regularizer(network(), plan, example_input=EXAMPLE)
    with pytest.raises(tpp.UserError, match="conv9: 8 filters planned, model has no such layer"):
        Regularizer(network(), PruningPlan({"conv9": 8}, {"conv9": [1]}), example_input=EXAMPLE)


def test_too_short_a_stabilise_phase_is_refused():
    growth = GrowthSchedule(0.1, 1.0, 1, stabilize_steps=200, zero_out_interval=100)
    with pytest.raises(tpp.UserError, match=r"stabilize_steps \(K_s\) is 200"):
        Regularizer(network(), PLAN, growth=growth, example_input=EXAMPLE)


def test_state_of_another_plan_is_refused():
    net = network()
    state = Regularizer(net, PLAN, example_input=EXAMPLE).state_dict()
    other = PruningPlan(PLAN.filters, {**PLAN.pruned, "fc1": [5]})
    with pytest.raises(tpp.UserError, match="another set of filters"):
        Regularizer(net, other, example_input=EXAMPLE).load_state_dict(state)


def test_resnet_layers_get_their_own_batchnorms():
    torch.manual_seed(0)
    net = build_model("cifar_resnet8", 10)
    plan = tpp.select_filters(net, {"layer*.conv1": 0.5})
    assert list(plan.pruned) == ["layer1.0.conv1", "layer2.0.conv1", "layer3.0.conv1"]
    regularizer = Regularizer(net, plan)
    regularizer.penalty(10_000).backward()
    touched = {name for name, p in net.named_parameters() if p.grad is not None}
    assert touched == {
        f"layer{i}.0.{name}"
        for i in (1, 2, 3)
        for name in ("conv1.weight", "bn1.weight", "bn1.bias")
    }
