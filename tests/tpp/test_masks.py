"""Masks: which weights stay, counted one by one, and held by whatever optimiser."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

import tpp
from tpp.common.errors import UserError
from tpp.masks import SparsifySection, apply_mask, hold_mask, select_mask, sparsity_of
from tpp.measure.counts import count
from tpp.models.architecture import build_model
from tpp.models.layers import prunable_layers
from tpp.sparsify import main as sparsify


def network():
    torch.manual_seed(0)
    return build_model("cifar_resnet8", 4)


def chosen(model, before=None, **how):
    tensors = dict(model.named_parameters())
    return select_mask(tensors, [*prunable_layers(model)], SparsifySection(**how), before)


def zeros(mask):
    return sum(int((~stays).sum()) for stays in mask.values())


def size(mask):
    return sum(stays.numel() for stays in mask.values())


@given(
    st.lists(
        st.lists(st.integers(-3, 3), min_size=2, max_size=12),
        min_size=1,
        max_size=4,
    ),
    st.floats(0, 0.99),
)
@settings(max_examples=60, deadline=None)
def test_the_smallest_go_and_of_equals_those_that_come_first(rows, sparsity):
    """Against sorting all weights one by one."""
    tensors = {f"l{n}.weight": torch.tensor([row]).float() for n, row in enumerate(rows)}
    layers = [f"l{n}" for n in range(len(rows))]
    mask = select_mask(tensors, layers, SparsifySection(sparsity=sparsity))
    flat = [(abs(value), n, place) for n, row in enumerate(rows) for place, value in enumerate(row)]
    gone = sorted(flat)[: round(sparsity * len(flat))]
    expected = {(n, place) for _, n, place in gone}
    found = {
        (n, int(place))
        for n in range(len(rows))
        for place in (~mask[f"l{n}.weight"]).flatten().nonzero()
    }
    assert found == expected


@pytest.mark.parametrize("cycles", [1, 2, 3, 7])
def test_cycles_of_equal_fractions_come_to_the_sparsity(cycles):
    """p = 1 - (1-s)^(1/n) in each cycle: s up to one weight per cycle, masks nested (sheet, 1)."""
    fraction = 1 - (1 - 0.9) ** (1 / cycles)
    assert fraction == pytest.approx({1: 0.9, 2: 0.6837722, 3: 0.5358411}.get(cycles, fraction))
    model, mask = network(), None
    for cycle in range(1, cycles + 1):
        nested = mask
        mask = chosen(model, mask, fraction=fraction)
        wanted = size(mask) * (1 - (1 - fraction) ** cycle)
        assert abs(zeros(mask) - wanted) <= cycle
        if nested is not None:
            assert not any((mask[key] & ~nested[key]).any() for key in mask)


def test_a_share_of_each_layer_and_patterns_of_layers():
    model = network()
    mask = chosen(model, sparsity=0.25, scope="layer", layers=["layer*"], skip=["*.conv2"])
    assert set(mask) == {
        f"{layer}.weight"
        for layer in prunable_layers(model)
        if layer.startswith("layer") and not layer.endswith(".conv2")
    }
    for key, stays in mask.items():
        assert int((~stays).sum()) == round(0.25 * stays.numel()), key
        gone = model.get_parameter(key)[~stays].abs().max()
        assert gone <= model.get_parameter(key)[stays].abs().min()


def test_two_of_four_along_the_input_channels():
    model = network()
    mask = chosen(model, pattern="2:4")
    first = mask.pop("conv1.weight")  # three channels
    assert first.all()
    for key, stays in mask.items():
        weight = model.get_parameter(key)
        for group in range(0, weight.shape[1], 4):
            part, kept = weight[:, group : group + 4].abs(), stays[:, group : group + 4]
            assert (kept.sum(1) == 2).all(), key
            lowest = torch.where(kept, part, math.inf).amin(1)
            assert (lowest >= torch.where(kept, 0.0, part).amax(1)).all(), key
    equal = {"l.weight": torch.ones(1, 4)}
    ties = select_mask(equal, ["l"], SparsifySection(pattern="1:4"))
    assert ties["l.weight"].tolist() == [[False, False, False, True]]


def test_what_is_masked_stays_masked_and_counts():
    model = network()
    before = chosen(model, sparsity=0.6, layers=["layer1*"])
    mask = chosen(model, before, sparsity=0.5)
    assert not any((mask[key] & ~before[key]).any() for key in before)
    assert zeros(mask) == round(0.5 * size(mask))
    with pytest.raises(UserError, match="masked already"):
        chosen(model, mask, sparsity=0.4)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"sparsity": 0.5, "layers": ["lay.*"]}, r"layers: 'lay\.\*' matches no Conv2d"),
        ({"sparsity": 0.5, "skip": ["fc3"]}, "skip: 'fc3' matches no Conv2d"),
        ({"sparsity": 0.5, "skip": ["*"]}, "leaves no layer"),
    ],
)
def test_patterns_that_match_nothing(how, message):
    with pytest.raises(UserError, match=message):
        chosen(network(), **how)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({}, "exactly one of sparsity, fraction and pattern, and here is none"),
        ({"sparsity": 0.5, "fraction": 0.5}, "sparsity and fraction"),
        ({"sparsity": 1.0}, "less than 1"),
        ({"pattern": "4:2"}, "N < M"),
        ({"pattern": "24"}, "N:M"),
        ({"pattern": 124}, "in quotes"),  # 2:4 in YAML without
    ],
)
def test_settings_that_make_no_sense(how, message):
    with pytest.raises(ValidationError, match=message):
        SparsifySection(**how)


def test_weights_that_are_not_finite_have_no_order():
    model = network()
    model.layer1[0].conv1.weight.data[0, 0, 0, 0] = math.nan
    with pytest.raises(UserError, match=r"layer1\.0\.conv1\.weight: holds weights that are not"):
        chosen(model, sparsity=0.5)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_held_weights_stay_zero_and_the_others_train_as_behind_a_mask(name, channels_last):
    """Against a network whose forward pass multiplies by the mask, in float64."""
    model = network().double()
    mask = chosen(model, sparsity=0.8)
    behind = copy.deepcopy(model)
    if channels_last:
        model.to(memory_format=torch.channels_last)
    hold_mask(model, mask)

    def forward(images):
        masked = apply_mask(dict(behind.named_parameters()), mask)
        return torch.func.functional_call(behind, masked, (images,))

    with torch.no_grad():
        for key, stays in mask.items():
            behind.get_parameter(key).masked_fill_(~stays, 0)
    held, other = (OPTIMIZERS[name](net.parameters()) for net in (model, behind))
    for step in range(6):
        torch.manual_seed(step)
        images, labels = torch.randn(4, 3, 16, 16).double(), torch.randint(0, 4, (4,))
        for outputs, optimizer in ((model(images), held), (forward(images), other)):
            nn.functional.cross_entropy(outputs, labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter, behind.get_parameter(key), rtol=1e-9, atol=1e-12, msg=key
        )
        if key in mask:
            assert not parameter[~mask[key]].any() and parameter[mask[key]].all(), key
            for value in held.state[parameter].values():
                if value.dim():
                    assert not value[~mask[key]].any(), key


def test_a_gradient_that_is_not_finite_does_not_reach_masked_weights():
    layer = nn.Linear(3, 2)
    mask = {"weight": torch.tensor([[True, False, True], [False, True, True]])}
    hold_mask(layer, mask)
    (layer(torch.ones(1, 3)).sum() * math.inf).backward()
    assert not layer.weight.grad[~mask["weight"]].any()
    assert layer.weight.grad[mask["weight"]].isinf().all()


def test_nothing_masked_changes_nothing():
    model = network()
    mask = chosen(model, sparsity=0.0)
    assert all(stays.all() for stays in mask.values())
    before = copy.deepcopy(model.state_dict())
    hold_mask(model, mask)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("fault", ["name", "shape"])
def test_a_mask_of_another_network_is_named(fault):
    model = network()
    mask = chosen(model, sparsity=0.5)
    if fault == "name":
        mask["layer9.weight"] = mask["linear.weight"]
        message = r"the network has no layer9\.weight"
    else:
        mask["linear.weight"] = mask["linear.weight"][:2]
        message = r"mask: linear\.weight is 2x64, and the network's is 4x64"
    with pytest.raises(UserError, match=message):
        hold_mask(model, mask)


def test_what_is_left_is_counted_weight_by_weight():
    model = network()
    counts, mask = count(model), chosen(model, sparsity=0.9)
    left = sparsity_of(counts, mask)
    masked = zeros(mask)
    assert left.parameters == sum(p.numel() for p in model.parameters()) - masked
    assert left.sparsity == masked / size(mask) == pytest.approx(0.9, abs=1e-4)
    macs = 0
    for layer in counts.layers:
        stays = mask[f"{layer.name}.weight"]
        positions = layer.macs // stays.numel()  # where a weight is used
        macs += positions * int(stays.sum())
    assert left.macs == macs


def test_from_file_to_file_and_on_to_the_pruner(tmp_path, capsys):
    """Momentum is masked along, and the pruner cuts the mask with the weights."""
    model = network()
    momentum = {key: torch.ones_like(p) for key, p in model.named_parameters()}
    paths = [tmp_path / f"{name}.safetensors" for name in ("in", "out", "twice", "pruned")]
    tpp.save_model(paths[0], model, companions={"momentum_buffer": momentum})
    sparsify(["--checkpoint", str(paths[0]), "--output", str(paths[1]), "--sparsity", "0.5"])
    told = capsys.readouterr().out
    mask = chosen(model, sparsity=0.5)
    left = sparsity_of(count(model), mask)
    assert f"{left.parameters:,} parameters that are not masked" in told
    from tpp.checkpoints.model_file import read_checkpoint

    tensors, companions, info = read_checkpoint(paths[1])
    assert info.extra["stage"] == "sparsify"
    for key, stays in mask.items():
        assert torch.equal(companions["mask"][key].bool(), stays)
        assert torch.equal(tensors[key], model.get_parameter(key) * stays)
        assert torch.equal(companions["momentum_buffer"][key], stays.float())

    sparsify(["--checkpoint", str(paths[1]), "--output", str(paths[2]), "--fraction", "0.5"])
    _, companions, _ = read_checkpoint(paths[2])
    twice = companions["mask"]
    assert abs(zeros({k: m.bool() for k, m in twice.items()}) - 0.75 * size(mask)) <= 1

    plan = tpp.Selection({"layer*.conv1": 0.5}).select(tpp.load_model(paths[2]))
    tpp.prune_checkpoint(paths[2], plan, paths[3])
    tensors, companions, _ = read_checkpoint(paths[3])
    for key, stays in companions["mask"].items():
        assert stays.shape == tensors[key].shape
        assert not tensors[key][~stays.bool()].any()


def test_layers_of_which_nothing_is_left_are_named(tmp_path, capsys):
    tpp.save_model(tmp_path / "a.safetensors", network())
    arguments = [
        "--checkpoint",
        f"{tmp_path}/a.safetensors",
        "--output",
        f"{tmp_path}/b.safetensors",
    ]
    sparsify([*arguments, "--sparsity", "0.99999"])
    assert "note: no weight of " in capsys.readouterr().out
    sparsify([*arguments, "--sparsity", "0.9", "--scope", "layer", "--overwrite"])
    assert "note" not in capsys.readouterr().out


def test_mistakes_are_one_line(tmp_path):
    path = tmp_path / "in.safetensors"
    tpp.save_model(path, network())
    common = ["--checkpoint", str(path), "--output", str(tmp_path / "out.safetensors")]
    with pytest.raises(UserError, match=r"--sparsity: .*less than 1"):
        sparsify([*common, "--sparsity", "1.5"])
    with pytest.raises(UserError, match=r"in\.safetensors: layers: 'conv9' matches no"):
        sparsify([*common, "--sparsity", "0.5", "--layers", "conv9"])
    assert [file.name for file in tmp_path.iterdir()] == ["in.safetensors"]
