"""What tpp survey says, against counts from block diagrams and against the pruner itself."""

import json

import pytest
from networks import NETWORKS

from tpp import survey
from tpp.channels.removal import prune_model
from tpp.common.errors import UserError
from tpp.measure.counts import count
from tpp.models.architecture import Architecture, build_on_meta
from tpp.models.layers import prunable_layers
from tpp.plan import PruningPlan
from tpp.selection.selection import Selection
from tpp.selection.what_can_go import covering, what_can_go

# Depthwise convolutions, squeeze and excitation, channel shuffle, LayerNorms, padded shortcuts.
NAMES = ["mobilenet_v2", "regnet_y_400mf", "shufflenet_v2_x1_0", "convnext_tiny", "cifar_resnet20"]


@pytest.fixture(scope="module", params=NAMES)
def surveyed(request):
    name = request.param
    model = build_on_meta(Architecture(name, 10, {}))
    return name, model, what_can_go(model)


def test_every_layer_is_said_once(surveyed):
    name, model, found = surveyed
    said = [
        *(layer for one in (*found.alone, *found.coupled) for layer in one.layers),
        *found.along,
        *found.refused,
    ]
    assert sorted(said) == sorted(prunable_layers(model)) == sorted(found.layers)
    exact = [one for one in found.alone if one.inexact is None]
    assert len(exact) == NETWORKS[name][0]
    sets = [layer for one in found.coupled if one.inexact is None for layer in one.layers]
    # The table of networks counts what goes along with others among those that can.
    named = {layer for one in exact for layer in one.layers} | {*sets}
    along = [layer for layer, leaders in found.along.items() if named & {*leaders}]
    assert len(named) + len(along) == NETWORKS[name][1]


def test_the_patterns_choose_just_these_layers(surveyed):
    _, model, found = surveyed
    exact = {one.layers[0] for one in found.alone if one.inexact is None}
    chosen = Selection(ratios=found.patterns.ratios(0.5)).layers(model)
    assert {*chosen} == exact
    sets = {layer for one in found.coupled if one.inexact is None for layer in one.layers}
    ratios = found.coupled_patterns.ratios(0.5)
    chosen = Selection(ratios=ratios, coupled=True).layers(model)
    assert {*chosen} == exact | sets
    assert len(ratios) < 0.5 * len(exact | sets)


def test_what_is_behind_them_is_what_would_be_gone(surveyed):
    """Of n filters all but one go: what is left of what they take part in is one n-th."""
    name, model, found = surveyed
    some = [*found.alone[:2], *found.coupled[:1]] if name != "convnext_tiny" else found.alone[:2]
    for one in some:
        if one.groups > 1:
            continue
        gone = [*range(one.filters - 1)]
        plan = PruningPlan(dict.fromkeys(one.layers, one.filters), dict.fromkeys(one.layers, gone))
        left = count(prune_model(model, plan))
        for kind in ("macs", "parameters"):
            dense, behind = getattr(found.counts, kind), getattr(one, kind)
            # Where a set reads itself (a residual stream), less than one n-th is left.
            most = behind * (one.filters - 1) / one.filters
            assert most - 1e-6 <= dense - getattr(left, kind) <= behind


def test_patterns_of_a_few_names():
    layers = ["a.0.x", "a.1.x", "a.2.x", "a.1.y", "b.7", "b.8", "odd[1]"]
    found = covering([("a.0.x",), ("a.1.x",), ("a.2.x",), ("b.7",)], layers)
    assert found.ratios(0.5) == {"a.*.x": 0.5, "b.7": 0.5}
    # One that is spared takes a line, which is worth it here.
    found = covering([("a.0.x",), ("a.1.x",), ("b.7",), ("b.8",)], layers)
    assert found.ratios(0.5) == {"b.*": 0.5, "a.0.x": 0.5, "a.1.x": 0.5}
    assert covering([("odd[1]",)], layers).ratios(0.5) == {"odd[[]1]": 0.5}
    assert covering([], layers).ratios(0.5) == {}


def test_what_is_printed_and_written(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    survey.main(["--model", "cifar_resnet20", "--classes", "7", "--json", "s.json"])
    said = json.loads((tmp_path / "s.json").read_text())
    printed = capsys.readouterr().out
    assert said["network"] == {"name": "cifar_resnet20", "num_classes": 7, "args": {}}
    assert said["ratios"] == {"layer*.conv1": 0.5} and '    "layer*.conv1": 0.5\n' in printed
    assert "(at layer2.0)" in said["refused"]["layer2.0.conv2"]
    assert (
        f"{said['parameters']:,} parameters, {said['macs']:,} MACs for a 3x32x32 image" in printed
    )
    with pytest.raises(UserError, match="--overwrite"):
        survey.main(["--model", "cifar_resnet20", "--json", "s.json"])
    with pytest.raises(UserError, match="name a checkpoint, or a network with --model NAME"):
        survey.main([])
