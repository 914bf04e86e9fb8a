"""The most score within a time: against all widths that there are, and counted by hand."""

import contextlib
import ctypes
import itertools
import json
import os
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tpp
from tpp.channels.removal import prune_model
from tpp.common.consoles import without_native_output
from tpp.measure.layer_times import LayerShape, LayerTimes, layer_shapes, time_layer
from tpp.measure.onnx_runtime import Runtime, layer_session
from tpp.measure.timing import LatencySettings, measure
from tpp.models.layers import prunable_layers
from tpp.selection.budget import Budget, Widths
from tpp.selection.criteria import l1_scores
from tpp.selection.knapsack import Costs, Knapsack, costs_of, most_worth, thinned
from tpp.selection.selection import Selection
from tpp.selection.settings import BudgetSection

EXAMPLE = torch.zeros(1, 3, 8, 8)
QUICK = LatencySettings(repeats=3, warmup=0)


class Net(nn.Module):
    """A chain, groups, a residual stream with a depthwise convolution, a Linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.wide = nn.Conv2d(12, 24, 3, padding=1, stride=2)
        self.also = nn.Conv2d(12, 24, 1, stride=2)
        self.grouped = nn.Conv2d(24, 12, 3, padding=1, groups=3, bias=False)
        self.back = nn.Conv2d(12, 12, 1, bias=False)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False)
        self.hidden = nn.Linear(12, 20)
        self.head = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.grouped(F.relu(self.wide(x) + self.also(x))))
        x = F.relu(x + self.back(x))
        return self.head(F.relu(self.hidden(self.depthwise(x).mean((2, 3)))))


torch.manual_seed(0)
NET = Net()
SELECTION = Selection(coupled=True, budget=Budget("latency_ms", 1.0, QUICK, "unused.json"))
CANDIDATES = SELECTION._candidates(NET, EXAMPLE)


def stepped(shape: LayerShape, conditions: LatencySettings) -> float:
    """A machine that computes 4 channels at a time, each layer of which begins slowly."""
    rows, columns = -(-shape.outputs // shape.groups // 4), -(-shape.inputs // shape.groups // 4)
    work = shape.groups * rows * columns * max(1, len(shape.kernel) * 4)
    return 1e-6 * (7 + work + len(shape.size))


def seconds_of(network: nn.Module) -> float:
    shapes = layer_shapes(network, EXAMPLE).values()
    return sum(stepped(shape, QUICK) for shape in itertools.chain(*shapes))


@settings(max_examples=8, deadline=None)
@given(
    shares=st.lists(st.floats(0, 1), min_size=9, max_size=9),
    stays=st.sampled_from(["hidden", "wide", "none"]),
)
def test_the_table_adds_up_to_the_layers_of_the_pruned_network(shares, stays):
    candidates = CANDIDATES.without({stays})
    units = candidates.units
    levels = thinned(Widths(units), units)
    costs = costs_of(NET, units, levels, LayerTimes(QUICK, measure=stepped), EXAMPLE)
    at = [round(share * (len(gone) - 1)) for share, gone in zip(shares, levels, strict=False)]
    removed = torch.tensor([gone[place] for gone, place in zip(levels, at, strict=True)])
    orders = [torch.arange(unit.filters).view(unit.groups, -1) for unit in units]
    with pytest.warns(tpp.common.errors.Note) if removed.any() else contextlib.nullcontext():
        pruned = prune_model(NET, candidates.plan(orders, removed), example_input=EXAMPLE)
    assert abs(costs.total(at) - 1e9 * seconds_of(pruned)) < 50
    assert costs.single and (costs.fixed > 0) == (stays == "hidden")


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    share=st.floats(0, 1.1),
)
def test_the_most_of_all_that_there_are(seed, sizes, share):
    random = np.random.default_rng(seed)
    values = [np.sort(random.uniform(-1, 5, size))[::-1] for size in sizes]
    single = {n: random.integers(0, 9000, size) for n, size in enumerate(sizes) if n % 2}
    pairs = {
        (one, other): random.integers(0, 9000, (sizes[one], sizes[other]))
        for one, other in itertools.combinations(range(len(sizes)), 2)
        if random.random() < 0.7
    }
    costs = Costs(500, single, pairs)
    every = [*itertools.product(*map(range, sizes))]
    times = [costs.total(at) for at in every]
    limit = round(min(times) + share * (max(times) - min(times))) - (share == 0)
    fitting = [at for at, time in zip(every, times, strict=True) if time <= limit]
    found = most_worth(values, costs, limit)
    if not fitting:
        assert found is None
        return
    assert found is not None and costs.total(found) <= limit

    def kept(at) -> float:
        return sum(value[place] for value, place in zip(values, at, strict=True))

    assert kept(found) >= max(map(kept, fitting)) - 1e-4


def kept_score(plan: tpp.PruningPlan) -> float:
    total = 0.0
    for unit in CANDIDATES.units:
        scores = sum(l1_scores(NET.get_parameter(f"{layer}.weight")) for layer in unit.layers)
        total += float(scores[plan.kept(unit.layers[0])].sum() / scores.mean())
    return total


@pytest.mark.parametrize("share", [0.85, 0.65, 0.5])
def test_it_meets_the_time_and_keeps_more_than_a_count_does(share, tmp_path, monkeypatch):
    monkeypatch.setattr("tpp.measure.layer_times.time_layer", stepped)
    limit = 1000 * share * seconds_of(NET)
    plans = {}
    for table in (None, str(tmp_path / "times.json")):
        budget = Budget("latency_ms", limit, QUICK, table)
        plan = Selection(coupled=True, budget=budget).select(
            NET, example_input=EXAMPLE, clock=seconds_of
        )
        assert 1000 * seconds_of(prune_model(NET, plan, example_input=EXAMPLE)) <= limit
        plans[table] = kept_score(plan)
    by_count, by_table = plans.values()
    assert by_table >= by_count
    assert share != 0.65 or by_table > 1.01 * by_count


def test_out_of_reach_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("tpp.measure.layer_times.time_layer", stepped)
    budget = Budget("latency_ms", 1e-6, QUICK, str(tmp_path / "times.json"))
    with pytest.raises(tpp.UserError, match="1e-06 ms per batch cannot be met"):
        Selection(budget=budget).select(NET, example_input=EXAMPLE, clock=seconds_of)


def test_limits_hold(tmp_path, monkeypatch):
    monkeypatch.setattr("tpp.measure.layer_times.time_layer", stepped)
    budget = Budget("latency_speedup", 1.3, QUICK, str(tmp_path / "times.json"))
    selection = Selection(
        coupled=True, budget=budget, round_to=4, floors={"wide": 16}, skip=["hidden"]
    )
    plan = selection.select(NET, example_input=EXAMPLE, clock=seconds_of)
    assert plan.active_layers and "hidden" not in plan.active_layers
    assert all(len(plan.kept(layer)) % 4 == 0 for layer in plan.filters)
    assert len(plan.kept("wide")) >= 16


def test_times_are_kept_in_a_file_and_measured_once(tmp_path):
    file, asked = tmp_path / "new" / "times.json", []

    def noted(shape, conditions):
        asked.append(shape)
        return stepped(shape, conditions)

    shapes = [*itertools.chain(*layer_shapes(NET, EXAMPLE).values())]
    assert len(shapes) == 8
    first = LayerTimes(QUICK, file, noted)
    first.take([*shapes, *shapes])
    assert asked == shapes and len({*shapes}) == 8
    again = LayerTimes(QUICK, file, noted)
    again.take(shapes)
    assert len(asked) == 8
    assert all(abs(again.seconds(s) - first.seconds(s)) < 1e-12 for s in shapes)
    content = json.loads(file.read_text())
    assert content["on"]["torch"] == torch.__version__ and content["settings"]["batch"] == 1
    # How often is nothing to the times themselves; all else is.
    LayerTimes(LatencySettings(repeats=9), file)
    for other, message in (
        (LatencySettings(batch=2), "its times are of batch 1, and 2 is wanted"),
        (LatencySettings(backend="onnxruntime"), "its times are of backend 'torch', and"),
    ):
        with pytest.raises(tpp.UserError, match=message):
            LayerTimes(other, file)
    for text, message in (
        ("{}", "holds no layers' times"),
        ("no", "times.json"),
        (json.dumps({**content, "milliseconds": {"a": "b"}}), "are no numbers"),
        (json.dumps({**content, "version": 9}), "version 9, expected 1"),
        (json.dumps({**content, "on": {"machine": "other"}}), "its times are of machine 'other'"),
        (
            json.dumps({**content, "on": {**content["on"], "processor": "other"}}),
            "its times are of processor 'other'",
        ),
    ):
        file.write_text(text)
        with pytest.raises(tpp.UserError, match=message) as error:
            LayerTimes(QUICK, file)
        assert "\n" not in str(error.value)


LAYERS = [
    nn.Conv2d(6, 8, 3, stride=2, padding=1),
    nn.Conv2d(6, 8, (1, 3), padding="same", groups=2, bias=False),
    nn.Conv2d(6, 6, 3, groups=6, dilation=2, padding=(2, 1)),
    nn.Linear(6, 4),
    nn.Linear(6, 4, bias=False),
]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_a_layer_in_onnxruntime_is_that_layer(layer):
    """A shape makes such a layer again, and onnxruntime computes the same with it."""
    pytest.importorskip("onnxruntime")
    images = torch.randn(2, 6, 9, 7) if isinstance(layer, nn.Conv2d) else torch.randn(2, 6)
    (shape,) = layer_shapes(nn.Sequential(layer), images[:1])["0"]
    twin = shape.layer()
    twin.load_state_dict(layer.state_dict())
    assert shape.images(2).shape == images.shape
    found = layer_session(twin, images, Runtime(threads=1))()[0]
    torch.testing.assert_close(torch.from_numpy(found), layer(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_a_wider_layer_takes_longer_on_the_real_clock(backend):
    pytest.importorskip("onnxruntime")
    conditions = LatencySettings(backend=backend, repeats=15, warmup=2, threads=1)
    narrow = LayerShape(8, 8, (16, 16), 1, (3, 3), (1, 1), (1, 1), (1, 1))
    assert time_layer(narrow.with_widths(256, 256), conditions) > 4 * time_layer(narrow, conditions)


def test_networks_are_timed_in_onnxruntime():
    pytest.importorskip("onnxruntime")
    conditions = LatencySettings(backend="onnxruntime", repeats=3, warmup=0, batch=2, threads=1)
    found = measure({"net": NET}, conditions, example_input=torch.zeros(1, 3, 8, 8))["net"]
    assert len(found.seconds) == 3 and min(found.seconds) > 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dtype": "bf16"}, "backend onnxruntime on cpu: precision must be fp32, not bf16"),
        (
            {"dtype": "bf16", "device": "cuda"},
            "backend onnxruntime on cuda: precision must be fp32 or fp16, not bf16",
        ),
        ({"compile": True}, "backend onnxruntime: networks run as they are; leave compile out"),
        ({"channels_last": True}, "backend onnxruntime: .*; leave channels_last out"),
        ({"backend": "tensorrt"}, "backend tensorrt: runs on a GPU alone: device cuda"),
    ],
)
def test_what_onnxruntime_is_not_asked_for(changes, said):
    with pytest.raises(tpp.UserError, match=said):
        LatencySettings(**{"backend": "onnxruntime", **changes})


def test_an_onnxruntime_without_the_provider_is_no_backend():
    """It would quietly run on the CPU."""
    pytest.importorskip("onnxruntime")
    for backend, provider in (("onnxruntime", "CUDA"), ("tensorrt", "Tensorrt")):
        runtime = Runtime(backend, "cuda")
        said = (
            f"backend {backend}: the onnxruntime that is installed has no "
            f"{provider}ExecutionProvider "
        )
        with pytest.raises(tpp.UserError, match=re.escape(said)) as error:
            runtime.check_packages()
        assert str(error.value).endswith("pip install onnxruntime-gpu")
    Runtime().check_packages()


def test_a_table_goes_with_a_latency_alone():
    with pytest.raises(tpp.UserError, match="speedup takes no table of layers' times"):
        Budget("speedup", 2, table="t.json")
    with pytest.raises(ValueError, match="table goes with latency_ms and latency_speedup only"):
        BudgetSection(speedup=2.0, table="t.json")
    budget = BudgetSection(latency_ms=3.0, table="t.json", backend="onnxruntime").budget()
    assert budget == Budget("latency_ms", 3.0, LatencySettings(backend="onnxruntime"), "t.json")


def test_what_the_solver_prints_is_left_out(capfd):
    """As HiGHS does for some tasks: into C's own buffer, or at once."""
    libc = ctypes.CDLL(None)
    print("before")
    with without_native_output():
        libc.puts(b"into the buffer")
        os.write(1, b"at once\n")
    libc.puts(b"after")
    libc.fflush(None)
    assert capfd.readouterr().out.split() == ["before", "after"]


def test_a_knapsack_of_nothing_keeps_all():
    units = CANDIDATES.units
    worth = [torch.arange(1.0, unit.per_group + 1) for unit in units]
    knapsack = Knapsack(
        NET, units, Widths(units), worth, LayerTimes(QUICK, measure=stepped), EXAMPLE
    )
    assert knapsack.least < knapsack.dense == round(1e9 * seconds_of(NET))
    assert knapsack.within(knapsack.dense).tolist() == [0] * len(units)
    half = knapsack.within((knapsack.least + knapsack.dense) // 2)
    assert knapsack.nanoseconds(half) <= (knapsack.least + knapsack.dense) // 2
    assert knapsack.within(0).tolist() == [unit.most for unit in units]
    assert {*prunable_layers(NET)} >= {layer for unit in units for layer in unit.layers}
