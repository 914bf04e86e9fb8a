import json

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

import tpp
from tpp.models.architecture import build_model
from tpp.plan import PruningPlan
from tpp.selection.criteria import layer_ratios, pruned_count


@st.composite
def plans(draw):
    names = draw(st.lists(st.text("abc.123", min_size=1, max_size=8), unique=True, max_size=5))
    filters = {name: draw(st.integers(1, 40)) for name in names}
    return PruningPlan.from_indices(
        filters,
        {n: draw(st.sets(st.integers(0, c - 1), max_size=c - 1)) for n, c in filters.items()},
    )


@given(plan=plans())
def test_a_plan_survives_its_file(plan, tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    plan.save(path)
    assert PruningPlan.load(path) == plan
    for layer, count in plan.filters.items():
        assert sorted(plan.kept(layer) + plan.pruned[layer]) == list(range(count))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"filters": 4, "pruned": [4]}, "conv: indices must be in 0..3, not 4"),
        ({"filters": 4, "pruned": [-1]}, "conv: indices must be in 0..3, not -1"),
        ({"filters": 4, "pruned": [1, 1]}, "conv: indices must be sorted, without repeats"),
        ({"filters": 4, "pruned": [2, 1]}, "conv: indices must be sorted, without repeats"),
        ({"filters": 2, "pruned": [0, 1]}, "conv: at least one of 2 filters must stay"),
        ({"filters": 4, "pruned": [True]}, "conv: indices must be whole numbers"),
        ({"filters": 4, "pruned": ["0"]}, "conv: indices must be whole numbers"),
        ({"filters": 4}, 'conv: expected {"filters": N, "pruned": [...]}'),
    ],
)
def test_a_bad_plan_is_refused_with_file_and_layer(tmp_path, entry, message):
    path = tmp_path / "plan.json"
    path.write_text(
        json.dumps({"format": "tpp-pruning-plan", "version": 1, "layers": {"conv": entry}})
    )
    with pytest.raises(tpp.UserError) as error:
        PruningPlan.load(path)
    assert str(error.value).startswith(str(path))
    assert message in str(error.value)


@pytest.mark.parametrize("content", ["", "[]", '{"layers": {}}', "\x00"])
def test_a_file_that_is_no_plan_is_refused(tmp_path, content):
    path = tmp_path / "plan.json"
    path.write_text(content)
    with pytest.raises(tpp.UserError, match=str(path)):
        PruningPlan.load(path)


@given(st.integers(1, 2048), st.integers(0, 9999))
@example(100, 700)  # 0.07 * 100 is 7.000000000000001 in binary floats
def test_pruned_count_is_the_ceiling_of_the_decimal_product(filters, ten_thousandths):
    count = pruned_count(ten_thousandths / 10_000, filters)
    assert count == min(-(-ten_thousandths * filters // 10_000), filters - 1)


def network() -> nn.Sequential:
    """Two convolutions and a classifier."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    )


def test_the_smallest_l1_norms_go():
    model = network()
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        for filter_, scale in enumerate([5, 1, 3, -0.5, 2, 4]):
            model[0].weight[filter_] *= scale
    plan = tpp.select_filters(model, {"0": 0.5}, example_input=torch.zeros(1, 3, 8, 8))
    assert plan.pruned == {"0": [1, 3, 4]}  # |1|, |-0.5| and |2| of 5 1 3 0.5 2 4
    assert plan.filters == {"0": 6}


def test_the_last_pattern_that_matches_wins():
    ratios = layer_ratios(network(), {"*": 0.5, "5": 0.0, "[02]": 0.25, "2": 0.75})
    assert ratios == {"0": 0.25, "2": 0.75, "5": 0.0}


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(tpp.UserError, match="'conv\\*' matches no Conv2d or Linear layer"):
        layer_ratios(network(), {"conv*": 0.5})


def test_the_output_layer_cannot_be_pruned():
    with pytest.raises(tpp.UserError, match="5"):
        tpp.select_filters(network(), {"5": 0.5}, example_input=torch.zeros(1, 3, 8, 8))


STREAM = ("layer2.0.conv2", "layer2.0.downsample.0", "layer2.1.conv2")


def test_tied_layers_lose_the_lowest_sums_of_scores():
    torch.manual_seed(0)
    model = build_model("resnet18", 10)
    weights = [model.get_submodule(layer).weight.detach() for layer in STREAM]
    sums = sum(weight.abs().flatten(1).mean(1) for weight in weights)
    expected = sorted(sums.argsort()[: 128 // 4].tolist())
    plan = tpp.select_filters(model, dict.fromkeys(STREAM, 0.25))
    assert plan.pruned == dict.fromkeys(STREAM, expected)
    alone = weights[0].abs().flatten(1).mean(1).argsort()[:32]
    assert sorted(alone.tolist()) != expected


def test_tied_layers_need_one_ratio():
    ratios = {**dict.fromkeys(STREAM, 0.25), STREAM[2]: 0.5}
    message = r"layer2\.0\.conv2 and layer2\.1\.conv2 are tied .* same ratio, not 0\.25 and 0\.5"
    with pytest.raises(tpp.UserError, match=message):
        tpp.select_filters(build_model("resnet18", 10), ratios)


def test_every_group_of_a_convolution_loses_as_many():
    torch.manual_seed(0)
    model = build_model("resnext50_32x4d", 10)
    scores = model.layer1[0].conv2.weight.detach().abs().flatten(1).mean(1).view(32, 4)
    pruned = tpp.select_filters(model, {"layer1.0.conv2": 0.3}).pruned["layer1.0.conv2"]
    assert len(pruned) == 64  # ceil(0.3 * 4) of each group of 4
    for group in range(32):
        lowest = scores[group].argsort()[:2] + 4 * group
        assert set(lowest.tolist()) == {i for i in pruned if i // 4 == group}


def test_scores_of_ones_own():
    scores = {"0": torch.tensor([3.0, 1.0, 2.0, 9.0, 0.0, 5.0])}
    example = torch.zeros(1, 3, 8, 8)
    plan = tpp.select_filters(network(), {"0": 0.5}, example_input=example, scores=scores)
    assert plan.pruned == {"0": [1, 2, 4]}
