"""How many filters of which layers go, and which: properties, and loops written out plainly."""

import copy
import math
import socket

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tpp
from tpp.methods import method_class
from tpp.methods.base import TrainingContext
from tpp.models.architecture import build_model
from tpp.plan import PruningPlan
from tpp.selection.budget import Budget
from tpp.selection.criteria import CRITERIA, loss_gradients, pruned_count, random_scores
from tpp.selection.selection import Selection, same_on_all_ranks

EXAMPLE = torch.zeros(1, 3, 8, 8)


class Net(nn.Module):
    """A stem, a convolution in three groups, one alone, two tied ones and a depthwise, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.grouped = nn.Conv2d(12, 24, 3, padding=1, groups=3)
        self.grouped_bn = nn.BatchNorm2d(24)
        self.alone = nn.Conv2d(24, 20, 3, padding=1)
        self.alone_bn = nn.BatchNorm2d(20)
        self.tied1 = nn.Conv2d(20, 16, 1)
        self.tied1_bn = nn.BatchNorm2d(16)
        self.tied2 = nn.Conv2d(16, 16, 1)
        self.tied2_bn = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.bare = nn.Conv2d(16, 7, 1)
        self.head = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.grouped_bn(self.grouped(x)))
        x = F.relu(self.alone_bn(self.alone(x)))
        x = F.relu(self.tied1_bn(self.tied1(x)))
        x = F.relu(x + self.tied2_bn(self.tied2(x)))
        x = F.relu(self.bare(self.depthwise(x)))
        return self.head(x.mean((2, 3)))


FILTERS = {"grouped": 24, "alone": 20, "tied1": 16, "tied2": 16, "bare": 7}
GROUPS = {"grouped": 3}


def network() -> Net:
    torch.manual_seed(0)
    net = Net()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -1, 1)
    return net


NET = network()


def gradients(model: nn.Module, parameters, batches: int, along=None):
    """Of the cross entropy of two batches of noise."""
    model = copy.deepcopy(model).eval()
    for seed in range(min(batches, 2)):
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(4, 3, 8, 8, generator=generator)
        loss = F.cross_entropy(model(images), torch.arange(4))
        tensors = [model.get_parameter(name) for name in parameters]
        yield loss_gradients(loss, tensors, None if along is None else along(seed, tensors))


def select(ratios=None, net: nn.Module = NET, **options) -> tpp.PruningPlan:
    options = {"gradients": gradients, **options}
    return tpp.select_filters(net, ratios, example_input=EXAMPLE, **options)


def smallest_allowed(kept: int, layer: str, round_to: int) -> int:
    """The first number from ``kept`` on that rounding and the groups allow, or all filters."""
    for number in range(kept, FILTERS[layer]):
        if number % round_to == 0 and number % GROUPS.get(layer, 1) == 0:
            return number
    return FILTERS[layer]


hundredths = st.integers(0, 99).map(lambda number: number / 100)
floors = st.one_of(st.integers(1, 30), st.integers(1, 100).map(lambda number: number / 100))


@settings(max_examples=60, deadline=None)
@given(
    ratios=st.fixed_dictionaries({name: hundredths for name in ("grouped", "alone", "tied*")}),
    round_to=st.integers(1, 12),
    floors=st.dictionaries(st.sampled_from(["grouped", "alone", "tied2", "[agt]*"]), floors),
    skip=st.sets(st.sampled_from(["grouped", "alone"])),
)
def test_counts_are_ratios_then_floors_then_rounding(ratios, round_to, floors, skip):
    plan = select(ratios, round_to=round_to, floors=floors, skip=sorted(skip))
    for layer in ("grouped", "alone", "tied1"):
        ratio = ratios["tied*" if layer == "tied1" else layer]
        filters, groups = FILTERS[layer], GROUPS.get(layer, 1)
        gone = groups * min(
            -(-round(100 * ratio) * (filters // groups) // 100), filters // groups - 1
        )
        stay = 0
        for member in ("tied1", "tied2") if layer == "tied1" else (layer,):
            match = [value for name, value in floors.items() if name in (member, "[agt]*")]
            if match:
                floor = match[-1]
                share = -(-round(100 * floor) * filters // 100)
                stay = max(stay, min(floor if isinstance(floor, int) else share, filters))
        expected = smallest_allowed(max(filters - gone, stay), layer, round_to)
        if layer in skip:
            expected = filters
        assert len(plan.kept(layer)) == expected, layer
    assert plan.pruned["tied1"] == plan.pruned["tied2"]
    per_group = [sum(i // 8 == group for i in plan.pruned["grouped"]) for group in range(3)]
    assert len(set(per_group)) == 1


@settings(max_examples=40, deadline=None)
@given(
    lower=hundredths,
    higher=hundredths,
    round_to=st.integers(1, 9),
    criterion=st.sampled_from(CRITERIA),
)
def test_a_higher_ratio_takes_more_of_the_same(lower, higher, round_to, criterion):
    lower, higher = sorted((lower, higher))
    options = {"round_to": round_to, "criterion": criterion}
    few = select({"[agt]*": lower}, **options)
    many = select({"[agt]*": higher}, **options)
    for layer, gone in few.pruned.items():
        assert set(gone) <= set(many.pruned[layer])


def scores_by_hand(layer: str, criterion: str) -> list[float]:
    rows = NET.get_parameter(f"{layer}.weight").detach().flatten(1).tolist()
    if criterion == "bn_scale":
        return [abs(value) for value in NET.get_parameter(f"{layer}_bn.weight").tolist()]
    if criterion == "l2":
        return [math.sqrt(sum(w * w for w in row) / len(row)) for row in rows]
    sign = -1 if criterion == "largest" else 1
    return [sign * sum(abs(w) for w in row) / len(row) for row in rows]


@pytest.mark.parametrize("criterion", ["l1", "l2", "bn_scale", "largest"])
def test_criteria_against_a_loop(criterion):
    plan = select({"grouped": 0.5, "alone": 0.35, "tied*": 0.25}, criterion=criterion)
    alone = scores_by_hand("alone", criterion)
    assert plan.pruned["alone"] == sorted(sorted(range(20), key=alone.__getitem__)[:7])
    grouped = scores_by_hand("grouped", criterion)
    expected = []
    for group in range(3):
        expected += sorted(range(8 * group, 8 * group + 8), key=grouped.__getitem__)[:4]
    assert plan.pruned["grouped"] == sorted(expected)
    first, second = (scores_by_hand(layer, criterion) for layer in ("tied1", "tied2"))
    sums = [a + b for a, b in zip(first, second, strict=True)]
    assert plan.pruned["tied1"] == sorted(sorted(range(16), key=sums.__getitem__)[:4])


def test_the_criteria_choose_differently():
    net = network()
    net.tied1.weight.data *= 5  # it reads them: else their scales are most of a group's norm
    plans = [
        select({"alone": 0.5}, net, criterion=criterion).pruned["alone"] for criterion in CRITERIA
    ]
    assert len({tuple(plan) for plan in plans}) == len(CRITERIA)
    assert not {*plans[CRITERIA.index("largest")]} & {*plans[CRITERIA.index("l1")]}


def test_random_depends_on_seed_and_layer_alone():
    both = select({"alone": 0.5, "grouped": 0.5}, criterion="random", seed=3)
    torch.manual_seed(99)
    alone = select({"alone": 0.5}, criterion="random", seed=3)
    assert alone.pruned["alone"] == both.pruned["alone"]
    assert alone != select({"alone": 0.5}, criterion="random", seed=4)
    values = random_scores("a", 4000, 0)
    assert not torch.equal(values, random_scores("b", 4000, 0))
    assert abs(values.mean() - 0.5) < 0.02 and values.min() >= 0 and values.max() < 1


def test_bn_scale_needs_a_norm_of_the_layers_own():
    with pytest.raises(tpp.UserError, match="bn_scale: bare has no BatchNorm with a scale"):
        select({"bare": 0.5}, criterion="bn_scale")
    net = network()
    net.alone_bn = nn.BatchNorm2d(20, affine=False)
    with pytest.raises(tpp.UserError, match="bn_scale: alone has no BatchNorm with a scale"):
        select({"alone": 0.5}, net, criterion="bn_scale")


def test_coupled_takes_the_partners_along():
    with pytest.raises(tpp.UserError, match="tied2"):
        select({"tied1": 0.5})
    plan = select({"tied1": 0.5, "alone": 0.2}, coupled=True)
    named = select({"tied*": 0.5, "alone": 0.2})
    assert plan.pruned["tied1"] == named.pruned["tied1"]
    assert plan.pruned["tied2"] == plan.pruned["tied1"] and len(plan.pruned["tied1"]) == 8
    assert [layer for layer in plan.filters if layer != "depthwise"] == ["alone", "tied1", "tied2"]
    with pytest.raises(tpp.UserError, match=r"need the same ratio, not 0\.5 and 0\.25"):
        select({"tied1": 0.5, "tied2": 0.25}, coupled=True)


@pytest.mark.parametrize("skip", ["tied2", "depthwise"])
def test_what_is_tied_to_a_skipped_layer_stays(skip):
    plan = select({"tied1": 0.5, "alone": 0.5}, coupled=True, skip=[skip])
    assert plan.active_layers == ["alone"]


def test_floors_match_last_and_hold_for_a_budget_too():
    plan = select({"alone": 0.9, "grouped": 0.9}, floors={"*": 0.5, "al*": 7})
    assert {layer: len(plan.kept(layer)) for layer in plan.filters} == {"grouped": 12, "alone": 7}
    options = {"budget": Budget("macs", 150_000), "skip": ["stem", "bare", "tied*"]}
    kept = len(select(**options).kept("alone"))
    assert len(select(**options, floors={"alone": kept + 2}).kept("alone")) >= kept + 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"floors": {"conv*": 3}}, r"floor pattern 'conv\*' matches no Conv2d or Linear layer"),
        ({"skip": ["conv*"]}, r"skip pattern 'conv\*' matches no Conv2d or Linear layer"),
        ({"skip": "alone"}, "skip must be a list of patterns, not 'alone'"),
        ({"floors": {"alone": 0}}, "floor of 'alone' must be a whole number of filters from 1"),
        ({"floors": {"alone": 1.5}}, r"floor of 'alone' must be .* a share in \(0, 1\], not 1.5"),
        ({"floors": {"alone": math.nan}}, "floor of 'alone' must be"),
        ({"floors": {"alone": "2"}}, "floor of 'alone' must be a number, not '2'"),
        ({"round_to": 0}, "round_to must be at least 1, not 0"),
        ({"round_to": 2.0}, "round_to must be a whole number, not 2.0"),
        ({"criterion": "l3"}, "criterion: 'l3' is none of l1, l2, .*; did you mean 'l"),
        ({"scores": {}}, "scores: alone: expected one number for each of 20 filters"),
        ({"scores": {"alone": torch.zeros(3)}}, "scores: alone: expected one number"),
        ({"scores": {"alone": torch.full((20,), math.nan)}}, "alone: the scores .* not finite"),
    ],
)
def test_mistakes_are_one_line(options, message):
    with pytest.raises(tpp.UserError, match=message) as error:
        select({"alone": 0.5}, **options)
    assert "\n" not in str(error.value)


def test_without_ratios_or_budget_nothing_goes():
    assert select() == tpp.PruningPlan({}, {})


def test_layers_are_those_that_may_lose_filters():
    example = {"example_input": EXAMPLE}
    ratios = {"[agt]*": 0.5, "alone": 0.0}
    assert Selection(ratios).layers(NET, **example) == ["grouped", "tied1", "tied2"]
    by_budget = Selection(budget=Budget("speedup", 1.5), skip=["alone"]).layers(NET, **example)
    assert "grouped" in by_budget and "bare" in by_budget
    assert not {"alone", "head", "tied1"} & {*by_budget}
    assert {"tied1", "tied2"} <= {
        *Selection(budget=Budget("speedup", 1.5), coupled=True).layers(NET, **example)
    }


def test_a_budget_alone_keeps_a_tenth_of_each_layer():
    ceiling = Selection(budget=Budget("speedup", 1.5), round_to=1).ceiling(
        NET, example_input=EXAMPLE
    )
    kept = {layer: len(ceiling.kept(layer)) for layer in ceiling.active_layers}
    # A tenth of 4 and of 8 in each group, of 20, and of 7, rounded up.
    assert kept == {"stem": 3, "grouped": 3, "alone": 2, "bare": 1}
    lower = Selection(budget=Budget("speedup", 1.5), floors={"alone": 1})
    assert len(lower.ceiling(NET, example_input=EXAMPLE).kept("alone")) == 1
    ratios = Selection({"alone": 0.45}, budget=Budget("speedup", 1.5))
    ceiling = ratios.ceiling(NET, example_input=EXAMPLE)
    assert ceiling.active_layers == ["alone"]
    assert len(ceiling.pruned["alone"]) == pruned_count(0.45, 20)


class DepthwiseFirst(nn.Module):
    """The depthwise convolution comes first by name and second in the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8, bias=False)
        self.source = nn.Conv2d(3, 8, 3, bias=False)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.depthwise(self.source(x))).mean((2, 3)))


def test_a_depthwise_convolution_competes_with_its_source_once():
    torch.manual_seed(0)
    net = DepthwiseFirst()
    plan = select(net=net, coupled=True, budget=Budget("speedup", 1.6))
    assert list(plan.filters) == ["source"]
    alone = select({"source": len(plan.pruned["source"]) / 8}, net)
    assert plan.pruned == alone.pruned and alone.active_layers == ["source"]


def test_greg2_decays_the_layers_of_its_selection_and_picks_by_it():
    torch.manual_seed(0)
    model = build_model("cifar_resnet8", 10)
    greg2 = method_class("greg2")
    method = greg2(
        greg2.settings_type(pick_delta=0.1, pick_ceiling=0.1, update_interval=1, delta=0.1)
    )
    selection = Selection(budget=Budget("speedup", 1.5), skip=["layer1*", "conv1"], round_to=4)
    example = torch.zeros(1, 3, 32, 32)
    method.prepare(
        model, TrainingContext("regularize", None, selection, 0, 1, example_input=example)
    )
    layers = ["layer2.0.conv1", "layer3.0.conv1"]
    method.before_step(0)
    (decay,) = method.loss_terms().values()
    decay.backward()
    decayed = [name for name, p in model.named_parameters() if p.grad is not None]
    assert decayed in ([], [f"{layer}.weight" for layer in layers])
    method.after_step(0)
    assert method.plan == selection.select(model, example_input=example)
    assert method.plan.active_layers == layers
    assert all(len(method.plan.kept(layer)) % 4 == 0 for layer in layers)


def keep_rank_0s_plan(rank: int, port: int, folder: str) -> None:
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    plan = PruningPlan({"layer": 4}, {"layer": [rank]})
    same_on_all_ranks(plan).save(f"{folder}/{rank}.json")
    dist.destroy_process_group()


@pytest.mark.processes
def test_all_ranks_take_rank_0s_plan(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(keep_rank_0s_plan, (port, str(tmp_path)), nprocs=2)
    for rank in range(2):
        assert PruningPlan.load(tmp_path / f"{rank}.json").pruned == {"layer": [0]}


def test_selection_is_what_select_filters_says():
    options = {"criterion": "l2", "round_to": 3, "floors": {"alone": 9}, "skip": ("bare",)}
    selection = Selection({"[ab]*": 0.7}, **options)
    assert selection.select(NET, example_input=EXAMPLE) == select({"[ab]*": 0.7}, **options)
