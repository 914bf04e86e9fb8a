"""The regulariser against a plain float64 reference that shares no code with it."""

import copy
import gc

import pytest
import reference
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import tpp
from tpp.models.architecture import build_model
from tpp.models.layers import prunable_layers
from tpp.plan import PruningPlan
from tpp.regularization.regularizer import Regularizer
from tpp.regularization.schedule import GrowthSchedule


class Net(nn.Module):
    """All that the regulariser must know what to do with.

    ``stem`` and ``project`` are added (tied), with a BatchNorm each; ``expand`` feeds the depthwise
    ``depthwise``; ``grouped`` is in groups, with bias and without BatchNorm; then linear layers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.expand, self.bn2 = nn.Conv2d(8, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False)
        self.bn3 = nn.BatchNorm2d(12)
        self.project, self.bn4 = nn.Conv2d(12, 8, 1, bias=True), nn.BatchNorm2d(8)
        self.mix = nn.Conv2d(8, 8, 1)
        self.grouped = nn.Conv2d(8, 12, 3, stride=2, groups=4)
        self.fc1, self.fc2 = nn.Linear(12 * 4, 7), nn.Linear(7, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn1(self.stem(x))
        y = self.bn2(self.expand(x)).relu()
        y = self.bn3(self.depthwise(y)).relu()
        x = (x + self.bn4(self.project(y))).relu()
        x = self.grouped(self.mix(x).relu()).relu()
        return self.fc2(self.fc1(x.flatten(1)).relu())


EXAMPLE = torch.zeros(1, 3, 6, 6, dtype=torch.float64)
PLAN = PruningPlan(
    {"stem": 8, "expand": 12, "depthwise": 12, "project": 8, "grouped": 12, "fc1": 7},
    {
        "stem": [0, 4, 5],
        "expand": [1, 2, 7, 11],
        "depthwise": [1, 2, 7, 11],
        "project": [0, 4, 5],
        "grouped": [0, 2, 3, 4, 7, 8, 9, 11],
        "fc1": [6],
    },
)
NORMS = {"stem": ["bn1"], "expand": ["bn2"], "depthwise": ["bn3"], "project": ["bn4"]}


def network() -> Net:
    torch.manual_seed(0)
    net = Net().double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.4 * torch.randn_like(parameter))
    return net


def regularizers(net: nn.Module, world_size: int, **settings) -> list[Regularizer]:
    return [
        Regularizer(net, PLAN, rank=rank, world_size=world_size, example_input=EXAMPLE, **settings)
        for rank in range(world_size)
    ]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 40])
def test_value_and_gradient_of_all_ranks_average_to_the_reference(world_size, channels_last):
    growth = GrowthSchedule(0.1, 1.0, 2, stabilize_steps=2000)
    step = 7
    net = network()
    truth = copy.deepcopy(net)
    strength = reference.growth(step, 0.1, 1.0, 2)
    assert strength == pytest.approx(0.3)
    expected = reference.penalty(truth, PLAN.pruned, NORMS, strength, 50.0)
    expected.backward()
    if channels_last:
        net.to(memory_format=torch.channels_last)
    value = 0.0
    for regularizer in regularizers(net, world_size, gram_weight=50.0, growth=growth):
        share = regularizer.penalty(step) / world_size
        value += share.item()
        if share.requires_grad:
            share.backward()
    assert value == pytest.approx(expected.item(), rel=1e-10)
    for (name, ours), theirs in zip(net.named_parameters(), truth.parameters(), strict=True):
        if theirs.grad is None or not theirs.grad.any():
            assert ours.grad is None or not ours.grad.any(), name
        else:
            assert (ours.grad - theirs.grad).norm() <= 1e-10 * theirs.grad.norm(), name


@pytest.mark.parametrize("world_size", [1, 3])
def test_without_the_gram_term_it_is_decay_alone(world_size):
    net = network()
    truth = copy.deepcopy(net)
    expected = reference.penalty(truth, PLAN.pruned, NORMS, 0.25, 0.0)
    expected.backward()
    value = 0.0
    growth = GrowthSchedule(0.25, 1.0, 2, stabilize_steps=2000)
    for regularizer in regularizers(net, world_size, gram_weight=0.0, growth=growth):
        share = regularizer.penalty(2) / world_size
        value += share.item()
        share.backward()
    assert value == pytest.approx(expected.item(), rel=1e-6)  # summed up in float32
    for (name, ours), theirs in zip(net.named_parameters(), truth.parameters(), strict=True):
        if theirs.grad is not None:
            gap = (ours.grad - theirs.grad).norm() if ours.grad is not None else theirs.grad.norm()
            assert gap <= 1e-6 * theirs.grad.norm(), name


def task_loss(net: nn.Module, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    dtype = next(net.parameters()).dtype
    images = torch.randn(16, 3, 6, 6, generator=generator, dtype=torch.float64).to(dtype)
    return F.cross_entropy(net(images), torch.randint(0, 4, (16,), generator=generator))


@pytest.mark.parametrize("world_size", [1, 3])
def test_weights_after_200_steps_are_those_of_the_reference(world_size):
    steps, delta, zero_out = 200, 0.02, 10
    start = network()
    truth = copy.deepcopy(start)
    reference.train(
        truth, task_loss, PLAN.pruned, NORMS, steps=steps, schedule=(delta, 1.0, 2, zero_out),
        gram_weight=5.0, lr=0.01, momentum=0.9, weight_decay=5e-4,
    )  # fmt: skip
    growth = GrowthSchedule(delta, 1.0, 2, stabilize_steps=100, zero_out_interval=zero_out)
    assert growth.growth_steps == 100
    net = copy.deepcopy(start)
    ranks = regularizers(net, world_size, gram_weight=5.0, growth=growth)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    for step in range(steps):
        optimizer.zero_grad()
        penalty = sum(rank.penalty(step) for rank in ranks) / world_size
        (task_loss(net, step) + penalty).backward()
        optimizer.step()
        ranks[0].after_step(step)
    for (name, ours), theirs in zip(net.named_parameters(), truth.parameters(), strict=True):
        assert (ours - theirs).norm() <= 1e-9 * theirs.norm(), name
        moved = (theirs - start.get_parameter(name)).norm()
        assert moved > 1e-3 * theirs.norm(), f"{name} did not move: nothing was compared"
    for layer, gone in PLAN.pruned.items():  # all have had their turn
        assert not net.get_submodule(layer).weight[gone].any(), layer
        assert net.get_submodule(layer).weight[PLAN.kept(layer)].abs().min() > 0, layer


class CountOps(TorchDispatchMode):
    """Counts what would be kernel launches on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(func.__name__)
        return func(*args, **(kwargs or {}))


def operations(net: nn.Module, ratio: float, pattern: str = "layer*.conv1") -> list[str]:
    regularizer = Regularizer(net, tpp.select_filters(net, {pattern: ratio}))
    regularizer.penalty(10_000).backward()  # indices reach their device
    with CountOps() as count:
        regularizer.penalty(10_000).backward()
    return count.ops


def test_the_number_of_operations_does_not_grow_with_the_filters():
    net = build_model("cifar_resnet8", 10)
    assert len(operations(net, 0.1)) == len(operations(net, 0.9))


def test_layers_of_one_shape_are_multiplied_together():
    few = operations(build_model("cifar_resnet20", 10), 0.5)
    many = operations(build_model("cifar_resnet56", 10), 0.5)
    # 9 and 27 layers; in either network those of one stage have one shape, but for the first.
    assert few.count("bmm.default") == many.count("bmm.default") == 2 * 5


def test_no_graph_is_kept_between_steps():
    def alive() -> int:
        return sum(type(o).__name__ == "_BatchPenaltyBackward" for o in gc.get_objects())

    regularizer = Regularizer(network(), PLAN, example_input=EXAMPLE)
    gc.collect()
    gc.disable()  # what only a collection would free is kept, too
    try:
        penalty = regularizer.penalty(100)
        assert alive() > 0
        penalty.backward()
        del penalty
        assert alive() == 0
    finally:
        gc.enable()


def twelve_steps(net: nn.Module, compiled: bool) -> None:
    growth = GrowthSchedule(0.02, 1.0, 2, stabilize_steps=100, zero_out_interval=10)
    regularizer = Regularizer(net, PLAN, growth=growth, example_input=EXAMPLE)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)

    def one_step(step: int, images: torch.Tensor, labels: torch.Tensor) -> None:
        loss = F.cross_entropy(net(images), labels) + regularizer.penalty(step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        regularizer.after_step(step)

    run = torch.compile(one_step, backend="eager") if compiled else one_step
    for step in range(12):
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(16, 3, 6, 6, generator=generator, dtype=torch.float64)
        run(step, images, torch.randint(0, 4, (16,), generator=generator))


def test_a_compiled_step_takes_the_same_path():
    plain, compiled = network(), network()
    twelve_steps(plain, compiled=False)
    twelve_steps(compiled, compiled=True)
    for name, truth in plain.named_parameters():
        assert not torch.equal(truth, network().get_parameter(name)), name
        ours = compiled.get_parameter(name)
        assert (ours - truth).norm() <= 1e-9 * truth.norm(), name


def test_no_penalty_before_the_first_update():
    net = network()
    regularizer = Regularizer(net, PLAN, example_input=EXAMPLE)
    assert regularizer.penalty(0).item() == 0
    regularizer.penalty(9).backward()
    assert all(parameter.grad is None for parameter in net.parameters())
    assert regularizer.penalty(10).item() > 0


def test_layers_are_held_at_zero_and_nothing_else_is_touched():
    growth = GrowthSchedule(1.0, 1.0, 1, stabilize_steps=100, zero_out_interval=10)
    net = network()
    regularizer = Regularizer(net, PLAN, growth=growth, example_input=EXAMPLE)
    before = copy.deepcopy(net.state_dict())
    begin = growth.growth_steps
    regularizer.after_step(begin + 69)  # fc1 is number 6 of the layers, stem number 0
    after = net.state_dict()
    zeroed = {"fc1"} ^ PLAN.pruned.keys()
    for layer in zeroed:
        vectors = [f"{norm}.{name}" for norm in NORMS.get(layer, []) for name in ("weight", "bias")]
        vectors += [f"{layer}.bias"] * (f"{layer}.bias" in before)
        for name in (f"{layer}.weight", *vectors):
            expected = before.pop(name).clone()
            expected[PLAN.pruned[layer]] = 0
            assert torch.equal(after[name], expected), name
    for name, untouched in before.items():
        assert torch.equal(after[name], untouched), name
    regularizer.after_step(begin + 70)
    assert net.fc1.bias[PLAN.pruned["fc1"]].abs().max() == 0
    assert net.fc1.bias[0] != 0


@pytest.mark.parametrize("gram_weight", [1000.0, 0.0])
def test_layers_at_zero_cost_nothing_and_the_ranks_share_the_rest(gram_weight):
    growth = GrowthSchedule(0.5, 1.0, 1, stabilize_steps=40, zero_out_interval=3)
    numbers = {name: number for number, name in enumerate(prunable_layers(network()))}
    ranks = [
        Regularizer(
            copy.deepcopy(network()),
            PLAN,
            rank=rank,
            world_size=3,
            gram_weight=gram_weight,
            growth=growth,
            example_input=EXAMPLE,
        )
        for rank in range(3)
    ]
    changes = []
    for step in range(growth.total_steps):
        changed = [regularizer.before_step(step) for regularizer in ranks]
        assert len(set(changed)) == 1  # all ranks at once, as all take part in collectives
        changes += [step] if changed[0] else []
        left = {
            layer: [] if growth.zeroed(numbers[layer], step - 1) else list(gone)
            for layer, gone in PLAN.pruned.items()
        }
        shared = {layer: [] for layer in left}
        for regularizer in ranks:
            for unit in regularizer.units:
                shared[unit.layer] += unit.rows
        assert {layer: sorted(rows) for layer, rows in shared.items()} == left
        costs = [sum(unit.cost for unit in regularizer.units) for regularizer in ranks]
        dearest = max((u.cost / len(u.rows) for r in ranks for u in r.units), default=0)
        assert max(costs) - sum(costs) / 3 <= dearest
        for regularizer in ranks:
            regularizer.after_step(step)
    # Lambda is above zero from step 1 on; a layer's turn comes after step 2 + 3 (number + 1).
    assert changes == [1, *(2 + 3 * (numbers[layer] + 1) + 1 for layer in PLAN.active_layers)]
    assert not any(regularizer.units for regularizer in ranks)
    assert ranks[0].growth.steps_until_zero(numbers["fc1"]) == changes[-1]
    resumed = Regularizer(
        network(), PLAN, rank=1, world_size=3, growth=growth, example_input=EXAMPLE
    )
    resumed.before_step(changes[3])
    assert {unit.layer for unit in resumed.units} <= {"project", "grouped", "fc1"}


def test_training_drives_correlations_down_and_ends_at_zero():
    growth = GrowthSchedule(0.05, 1.0, 2, stabilize_steps=250, zero_out_interval=5)
    net = network().float()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(0.75)
    regularizer = Regularizer(net, PLAN, growth=growth, example_input=EXAMPLE.float())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.001, momentum=0.9)
    first = regularizer.statistics()["stem"]
    kept_before = net.stem.weight[PLAN.kept("stem")].detach().clone()
    step = 0
    while not regularizer.finished(step):
        optimizer.zero_grad()
        regularizer.penalty(step).backward()
        optimizer.step()
        regularizer.after_step(step)
        step += 1
    last = regularizer.statistics()["stem"]
    assert step == growth.total_steps
    assert last.pruned_magnitude == 0 and last.correlation == 0
    assert first.pruned_magnitude > 0.1 and first.correlation > 0.01
    # Without a task loss the kept filters only lose what they shared with the pruned ones.
    assert last.kept_magnitude > 0.5 * first.kept_magnitude
    assert net.stem.weight[PLAN.kept("stem")].norm() <= kept_before.norm()


def test_a_plan_for_another_model_is_refused():
    plan = PruningPlan({"mix": 9}, {"mix": [1]})
    with pytest.raises(tpp.UserError, match="mix: 9 filters planned, model has 8"):
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
