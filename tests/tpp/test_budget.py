"""Budgets: met exactly, by the filters that a plain loop takes, and checked on real networks."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tpp
from tpp.channels.removal import prune_model
from tpp.channels.survey import survey_channels
from tpp.measure.counts import Counts, count
from tpp.measure.timing import LatencySettings, Timing
from tpp.models.architecture import build_model, meta_copy
from tpp.models.layers import prunable_layers
from tpp.plan import PruningPlan
from tpp.selection.budget import Budget, WidthCost, Widths, meet, parse_count
from tpp.selection.criteria import l1_scores
from tpp.selection.selection import Selection

EXAMPLE = torch.zeros(1, 3, 8, 8)


class Net(nn.Module):
    """Convolutions of different sizes, two of them added up, one in groups, and two Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1, bias=False)
        self.wide = nn.Conv2d(12, 30, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(30)
        self.grouped = nn.Conv2d(30, 24, 3, padding=1, groups=2, bias=False)
        self.back = nn.Conv2d(24, 12, 1, bias=False)
        self.hidden = nn.Linear(12 * 16, 40)
        self.head = nn.Linear(40, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = F.relu(self.norm(self.wide(x)))
        x = x + self.back(F.relu(self.grouped(y)))
        x = F.max_pool2d(F.relu(x), 2)
        return self.head(F.relu(self.hidden(x.flatten(1))))


def network() -> Net:
    torch.manual_seed(1)
    return Net()


NET = network()
DENSE = count(NET, example_input=EXAMPLE)


def select(net: nn.Module = NET, **options) -> PruningPlan:
    return tpp.select_filters(net, **{"example_input": EXAMPLE, **options})


def counts_after(plan: PruningPlan, net: nn.Module = NET, example: Tensor = EXAMPLE) -> Counts:
    return count(prune_model(meta_copy(net), plan, example_input=example), example_input=example)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("10M", 10_000_000),
        ("2.0G", 2_000_000_000),
        ("1.5k", 1500),
        (" 3 K ", 3000),
        ("2.0e9", 2_000_000_000),
        ("1e+3", 1000),
        (7, 7),
        (2.5e6, 2_500_000),
        (2e16, 20_000_000_000_000_000),
        ("0.3G", 300_000_000),  # 0.3 * 1e9 is 3e8 only in decimals
    ],
)
def test_counts_as_people_write_them(text, number):
    assert parse_count(text) == number


@pytest.mark.parametrize("text", ["", "M", "ten", "-3", "0", "0.2", "1T", "1m", "nan", "1e", True])
def test_what_is_no_count(text):
    with pytest.raises(tpp.UserError, match="is no number above 0 such as 2000000, 2e6, 2M"):
        parse_count(text)


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        (
            "flops",
            1,
            "budget: 'flops' is none of speedup, macs, parameters, latency_ms, latency_speedup",
        ),
        ("speedup", 0.5, "budget: speedup must be at least 1, not 0.5"),
        ("macs", 0, "budget: macs must be a number above 0, not 0"),
        ("latency_ms", float("nan"), "budget: latency_ms must be a number above 0, not nan"),
        ("parameters", "10M", "budget: parameters must be a number above 0, not '10M'"),
    ],
)
def test_a_budget_that_makes_no_sense(kind, value, message):
    with pytest.raises(tpp.UserError, match=f"^{message}$"):
        Budget(kind, value)


def test_only_a_latency_is_measured():
    with pytest.raises(tpp.UserError, match="speedup takes no conditions of measuring"):
        Budget("speedup", 2, LatencySettings())


def test_limits_take_the_decimal_that_was_written():
    assert Budget("speedup", 1.1).limit(110) == 100
    assert Budget("speedup", 3).limit(100) == 33
    assert Budget("macs", 100.5).limit(1) == 100


@settings(max_examples=25, deadline=None)
@given(shares=st.lists(st.floats(0, 1), min_size=5, max_size=5))
def test_costs_are_those_of_the_pruned_network(shares):
    units = Selection(coupled=True, budget=Budget("macs", 1))._candidates(NET, EXAMPLE).units
    assert [unit.layers for unit in units] == [
        ("stem", "back"),
        ("wide",),
        ("grouped",),
        ("hidden",),
    ]
    removed = torch.tensor(
        [round(share * unit.most) for share, unit in zip(shares, units, strict=False)]
    )
    pruned = {}
    for unit, number in zip(units, removed.tolist(), strict=True):
        gone = [i for i in range(unit.filters) if i % unit.per_group < number]
        pruned |= dict.fromkeys(unit.layers, gone)
    filters = {name: len(layer.weight) for name, layer in prunable_layers(NET).items()}
    after = counts_after(PruningPlan.from_indices(filters, pruned))
    assert WidthCost.of_macs(NET, DENSE, units).one(removed) == after.macs
    assert WidthCost.of_parameters(NET, DENSE, units).one(removed) == after.parameters


def taken_by_hand(kind: str, limit: int) -> dict[str, list[int]]:
    """One filter (of every group) after another, by score over the mean, until a network fits."""
    survey = survey_channels(NET, coupled=True, example_input=EXAMPLE)
    units = [["stem", "back"], ["wide"], ["grouped"], ["hidden"]]
    groups = {layer: survey.channels[layer].groups for unit in units for layer in unit}
    entries = []
    for number, unit in enumerate(units):
        total = sum(l1_scores(NET.get_submodule(layer).weight).double() for layer in unit)
        relative = (total / total.mean()).tolist()
        parts, size = groups[unit[0]], len(relative) // groups[unit[0]]
        orders = [
            sorted(range(part * size, (part + 1) * size), key=relative.__getitem__)
            for part in range(parts)
        ]
        for rank, together in enumerate(zip(*orders, strict=True)):
            if rank < size * 9 // 10:
                score = sum(relative[i] for i in together) / parts
                entries.append((score, number, rank, together))
    filters = {layer: len(NET.get_submodule(layer).weight) for unit in units for layer in unit}
    pruned: dict[str, list[int]] = {layer: [] for layer in filters}
    for _, number, _, together in sorted(entries):
        for layer in units[number]:
            pruned[layer] = sorted([*pruned[layer], *together])
        network_order = {name: filters[name] for name in prunable_layers(NET) if name in filters}
        plan = PruningPlan.from_indices(network_order, pruned)
        if getattr(counts_after(plan), kind) <= limit:
            return plan.pruned
    raise AssertionError("the budget is out of reach")


@pytest.mark.parametrize(
    ("budget", "kind", "limit"),
    [
        (Budget("macs", 0.6 * DENSE.macs), "macs", int(0.6 * DENSE.macs)),
        (Budget("speedup", 4), "macs", DENSE.macs // 4),
        (Budget("parameters", 0.3 * DENSE.parameters), "parameters", int(0.3 * DENSE.parameters)),
    ],
)
def test_the_lowest_of_all_layers_go_as_in_a_loop(budget, kind, limit, monkeypatch):
    # The step that a tiny network is refined by afterwards has a test of its own.
    monkeypatch.setattr(
        "tpp.selection.budget._come_closer", lambda cost, widths, removed, limit: removed
    )
    assert select(budget=budget, coupled=True).pruned == taken_by_hand(kind, limit)


SPEEDUPS = [Budget("speedup", value) for value in (1.5, 2, 3)]


@pytest.mark.parametrize(
    ("name", "coupled", "parameters", "macs"),
    [
        ("cifar_resnet56", False, 400_000, 80e6),
        ("resnet18", False, 6e6, 1e9),
        ("resnet18", True, 5e6, 0.6e9),
        ("resnet50", False, 12e6, 2.5e9),
        ("resnet50", True, 10e6, 1.5e9),
        ("mobilenet_v2", False, 2.2e6, 180e6),
        ("mobilenet_v2", True, 1.5e6, 90e6),
        ("vgg16_bn", False, 60e6, 9e9),
    ],
)
def test_budgets_are_met_to_one_per_cent(name, coupled, parameters, macs):
    torch.manual_seed(0)
    model = build_model(name, 10 if "cifar" in name else 1000)
    dense, weights = count(model), meta_copy(model)
    scores = {layer: l1_scores(module.weight) for layer, module in prunable_layers(model).items()}
    speedups = SPEEDUPS[1:2] if coupled or name == "resnet50" else SPEEDUPS
    for budget in (*speedups, Budget("parameters", parameters), Budget("macs", macs)):
        plan = tpp.select_filters(weights, budget=budget, coupled=coupled, scores=scores)
        after = count(prune_model(weights, plan))
        if budget.kind == "speedup":
            assert budget.value <= dense.macs / after.macs <= 1.01 * budget.value, budget
        else:
            assert 0.99 * budget.value <= getattr(after, budget.kind) <= budget.value, budget


@pytest.mark.parametrize("round_to", [8, 16])
def test_a_budget_met_with_rounded_widths(round_to):
    torch.manual_seed(0)
    model = build_model("resnet50", 1000)
    dense = count(model)
    plan = tpp.select_filters(model, budget=Budget("speedup", 2), round_to=round_to)
    assert all(len(plan.kept(layer)) % round_to == 0 for layer in plan.filters)
    assert 2 <= dense.macs / count(prune_model(meta_copy(model), plan)).macs <= 2.02


@pytest.mark.parametrize("try_all", [True, False])
@pytest.mark.parametrize("round_to", [1, 4, 6, 8])
def test_where_steps_are_coarse_against_all_widths_that_there_are(round_to, try_all, monkeypatch):
    if not try_all:
        monkeypatch.setattr("tpp.selection.budget._MOST_TRIED", 0)
    selection = Selection(coupled=True, round_to=round_to, budget=Budget("macs", 1))
    units = selection._candidates(NET, EXAMPLE).units
    widths, cost = Widths(units), WidthCost.of_macs(NET, DENSE, units)
    levels = []
    for unit in units:
        kept = [unit.filters - gone * unit.groups for gone in range(unit.most + 1)]
        levels.append([gone for gone, n in enumerate(kept) if n % round_to == 0 or gone == 0])
    every = torch.tensor(list(itertools.product(*levels))).T
    costs = cost(every)
    order = torch.cat([torch.full((unit.most,), i) for i, unit in enumerate(units)])
    for share in (0.83, 0.69, 0.53, 0.33, 0.2):
        limit = max(int(share * DENSE.macs), int(costs.min()))
        removed = meet(cost, widths, order, limit)
        found = cost.one(removed)
        assert (every == removed[:, None]).all(0).any() and found <= limit
        if not try_all:  # two layers at a time are
            every_two = every[:, (every != removed[:, None]).sum(0) <= 2]
            costs = cost(every_two)
        best = int(costs[costs <= limit].max())
        assert 101 * found >= 100 * limit or found == best, share
        costs = cost(every)


def test_ratios_are_ceilings_and_say_which_layers_take_part():
    plan = select(ratios={"wide": 0.5, "hidden": 0.3}, budget=Budget("speedup", 1.2))
    assert list(plan.filters) == ["wide", "hidden"]
    assert len(plan.pruned["wide"]) <= 15 and len(plan.pruned["hidden"]) <= 12
    assert DENSE.macs / counts_after(plan).macs >= 1.2
    with pytest.raises(tpp.UserError, match=r"speedup of 9x cannot be met: .* is 1\.\d{4}x$"):
        select(ratios={"wide": 0.5, "hidden": 0.3}, budget=Budget("speedup", 9))


@pytest.mark.parametrize(
    ("budget", "counted"),
    [
        (Budget("speedup", 99), lambda after: f"{DENSE.macs / after.macs:.4f}x"),
        (Budget("macs", 100), lambda after: f"{after.macs:,}"),
        (Budget("parameters", 100), lambda after: f"{after.parameters:,}"),
    ],
)
def test_what_cannot_be_met_names_the_best(budget, counted):
    options = {"skip": ["hidden"], "floors": {"wide": 0.5}, "round_to": 2}
    most = Selection(budget=budget, **options).ceiling(NET, example_input=EXAMPLE)
    assert len(most.kept("wide")) == 16 and "hidden" not in most.filters
    with pytest.raises(tpp.UserError, match="cannot be met") as error:
        select(budget=budget, **options)
    assert str(error.value).endswith(f"is {counted(counts_after(most))}")


def test_a_budget_that_the_dense_network_meets_takes_nothing():
    assert select(budget=Budget("macs", 1e12)).active_layers == []
    assert select(budget=Budget("speedup", 1)).active_layers == []


class Clock:
    """A clock whose networks take a microsecond per thousand multiply-accumulates."""

    def __init__(self) -> None:
        self.measured: list[int] = []

    def __call__(self, network: nn.Module) -> float:
        self.measured.append(count(network, example_input=EXAMPLE).macs)
        return self.measured[-1] * 1e-9


@pytest.mark.parametrize("share", [0.9, 0.5, 0.2])
def test_a_latency_is_met_by_about_the_least_pruned_network(share):
    clock, wanted = Clock(), share * DENSE.macs
    selection = Selection(budget=Budget("latency_ms", wanted * 1e-6), coupled=True)
    plan = selection.select(NET, example_input=EXAMPLE, clock=clock)
    assert clock.measured[0] == DENSE.macs
    assert len(clock.measured) == 8
    after = counts_after(plan).macs
    assert after == max(macs for macs in clock.measured if macs <= wanted)
    # Six halvings of what lies between the dense and the smallest network, and one filter's step.
    between = DENSE.macs - clock.measured[1]
    assert wanted - after < between / 64 + 0.02 * DENSE.macs


def test_a_measured_speedup_is_a_share_of_what_the_dense_network_takes():
    share = Selection(budget=Budget("latency_speedup", 2.5), coupled=True)
    absolute = Selection(budget=Budget("latency_ms", DENSE.macs * 1e-6 / 2.5), coupled=True)
    one, other = (
        selection.select(NET, example_input=EXAMPLE, clock=Clock())
        for selection in (share, absolute)
    )
    assert one.pruned == other.pruned and one.active_layers


def test_networks_that_are_measured_alone_are_not_noted(recwarn):
    """Of seven that are thrown away it would be said how far from zero they are."""
    budget = Budget("latency_ms", 0.5 * DENSE.macs * 1e-6)
    Selection(budget=budget).select(NET, example_input=EXAMPLE, clock=Clock())
    assert [str(found.message) for found in recwarn] == []


def test_a_machine_that_becomes_slower_changes_no_measured_speedup(monkeypatch):
    seen: list[float] = []

    def slowing(networks, settings, *, example_input):
        seen.append(1.5 ** len(seen))
        macs = {
            name: count(network, example_input=EXAMPLE).macs for name, network in networks.items()
        }
        return {name: Timing([seen[-1] * 1e-9 * number]) for name, number in macs.items()}

    monkeypatch.setattr(tpp.measure.timing, "measure", slowing)
    selection = Selection(budget=Budget("latency_speedup", 2), coupled=True)
    plan = selection.select(NET, example_input=EXAMPLE)
    quiet = selection.select(NET, example_input=EXAMPLE, clock=Clock())
    assert plan.pruned == quiet.pruned and plan.active_layers and len(seen) == 8


def test_a_latency_that_the_dense_network_meets_is_measured_once():
    clock = Clock()
    budget = Budget("latency_ms", 2e-6 * DENSE.macs)
    plan = Selection(budget=budget).select(NET, example_input=EXAMPLE, clock=clock)
    assert plan.active_layers == [] and clock.measured == [DENSE.macs]


def test_a_latency_out_of_reach_names_the_fastest_network():
    clock = Clock()
    selection = Selection(budget=Budget("latency_ms", 1e-6))
    with pytest.raises(tpp.UserError, match="1e-06 ms per batch cannot be met") as error:
        selection.select(NET, example_input=EXAMPLE, clock=clock)
    dense, fastest = clock.measured
    assert str(error.value).endswith(
        f"takes {fastest * 1e-6:.4g} ms, {dense / fastest:.3g}x as fast as the dense one"
    )
    budget = Budget("latency_speedup", 1000)
    with pytest.raises(tpp.UserError, match="a measured speedup of 1000x cannot be met"):
        Selection(budget=budget).select(NET, example_input=EXAMPLE, clock=clock)


def test_a_latency_on_the_real_clock():
    budget = Budget("latency_ms", 60_000, LatencySettings(repeats=2, warmup=0))
    assert select(budget=budget).active_layers == []
    budget = Budget("latency_ms", 1e-9, LatencySettings(repeats=2, warmup=0, batch=2))
    with pytest.raises(tpp.UserError, match="the fastest network measured takes"):
        select(budget=budget)
