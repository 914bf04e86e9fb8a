"""Criteria beside magnitudes: against loops, gates of autograd in float64, and Torch-Pruning."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
import torch_pruning
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tpp
from tpp.channels.channel_map import find_channels
from tpp.channels.survey import survey_channels
from tpp.models.architecture import build_model
from tpp.models.layers import prunable_layers
from tpp.prune import _OF_IMAGES
from tpp.selection.criteria import (
    NEED_IMAGES,
    differentiable_twice,
    fpgm_scores,
    group_norm_scores,
    hessian_scores,
    loss_gradients,
    taylor_scores,
)
from tpp.selection.selection import Selection, tied_sets

EXAMPLE = torch.zeros(1, 3, 8, 8)
IMAGES = [torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(n)) for n in range(3)]
LABELS = [torch.tensor([0, 1, 2, 3, 4, n]) for n in range(3)]


class Net(nn.Module):
    """All kinds of neighbours: groups, tied layers, a depthwise convolution, a bare one, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.grouped = nn.Conv2d(12, 12, 3, padding=1, groups=3, bias=False)
        self.grouped_bn = nn.BatchNorm2d(12)
        self.tied1 = nn.Conv2d(12, 8, 1, bias=False)
        self.tied1_bn = nn.BatchNorm2d(8)
        self.tied2 = nn.Conv2d(8, 8, 3, padding=1)
        self.tied2_bn = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.bare = nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.grouped_bn(self.grouped(x)))
        x = F.relu(self.tied1_bn(self.tied1(x)))
        x = F.relu(x + self.tied2_bn(self.tied2(x)))
        x = F.relu(self.bare(self.depthwise(x)))
        return self.head(F.adaptive_avg_pool2d(x, 2).flatten(1))


UNITS = {"stem": [], "grouped": ["grouped_bn"], "tied1": ["tied1_bn", "tied2_bn"], "bare": []}


def network(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    net = Net().double().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.weight, module.bias, module.running_mean):
                nn.init.uniform_(values, -1, 1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return net


def members_of(net: nn.Module, example: Tensor = EXAMPLE):
    channels = survey_channels(net, coupled=True, example_input=example).channels
    return {together[0]: [channels[name] for name in together] for together in tied_sets(channels)}


def gradients(model: nn.Module, parameters, batches: int):
    for images, labels in itertools.islice(zip(IMAGES, LABELS, strict=True), batches):
        loss = F.cross_entropy(model(images.double()), labels)
        yield torch.autograd.grad(loss, [model.get_parameter(name) for name in parameters])


def gated_loss(net: nn.Module, gates: dict[str, Tensor], batch: int) -> Tensor:
    """The loss with the outputs of some modules multiplied by gates, (channels,)."""
    handles = [
        net.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, gate=gate: output * gate[:, None, None]
        )
        for name, gate in gates.items()
    ]
    try:
        return F.cross_entropy(net(IMAGES[batch].double()), LABELS[batch])
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("unit", UNITS)
def test_taylor_is_the_squared_derivative_by_a_gate(unit):
    """One gate on all that goes with a filter, behind its BatchNorm; autograd differentiates it."""
    net = network()
    members = members_of(net)[unit]
    filters = members[0].filters
    expected = torch.zeros(filters, dtype=torch.float64)
    for batch in range(3):
        gate = torch.ones(filters, dtype=torch.float64, requires_grad=True)
        loss = gated_loss(net, dict.fromkeys(UNITS[unit] or [unit], gate), batch)
        expected += torch.autograd.grad(loss, gate)[0] ** 2 / 3
    (found,) = taylor_scores(net, [members], gradients, 3)
    assert expected.min() >= 0 and expected.max() > 0
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


def test_taylor_is_the_change_of_the_loss_to_first_order():
    """What the loss loses as one filter is faded out a little, by no derivative at all."""
    net, step = network(), 1e-5
    (found,) = taylor_scores(net, [members_of(net)["tied1"]], gradients, 1)
    for number in range(8):
        gate = torch.ones(8, dtype=torch.float64)
        changes = []
        for sign in (1, -1):
            gate[number] = 1 + sign * step
            with torch.no_grad():
                changes.append(gated_loss(net, dict.fromkeys(UNITS["tied1"], gate), 0))
        change = (changes[0] - changes[1]) / (2 * step)
        assert math.isclose(change**2, found[number], rel_tol=1e-5, abs_tol=1e-12)


def test_taylor_averages_squares_and_not_gradients():
    net = network()
    members = [members_of(net)["grouped"]]
    together = taylor_scores(net, members, gradients, 3)[0]
    one = taylor_scores(net, members, gradients, 1)[0]
    assert not torch.allclose(together, one)

    def opposite(model, parameters, batches):
        first = [*next(gradients(model, parameters, 1))]
        yield first
        yield [-gradient for gradient in first]

    torch.testing.assert_close(taylor_scores(net, members, opposite, 2)[0], one)


def test_taylor_without_images_is_one_line():
    with pytest.raises(tpp.UserError, match=r"^criterion taylor: needs training images; give"):
        tpp.select_filters(network(), {"bare": 0.5}, criterion="taylor", example_input=EXAMPLE)
    for scores in (taylor_scores, hessian_scores):
        with pytest.raises(tpp.UserError, match="there are no images"):
            scores(network(), [members_of(network())["bare"]], lambda *asked: iter(()), 3)


class TwoTied(nn.Module):
    """Two layers whose filters are added."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 2, padding=1)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        both = self.one(x) + self.two(x)[..., 1:, 1:]
        return self.head(both.sigmoid().mean((2, 3)))


@pytest.mark.parametrize("unit", ["one", "bare"])
def test_hessian_is_the_mean_curvature_of_the_exact_hessian(unit):
    """Beside autograd's whole matrix: for the signs that were drawn, and on average over many."""
    torch.manual_seed(0)
    net = network() if unit == "bare" else TwoTied().double()
    members = members_of(net)[unit]
    names = [found.weight for found in members]
    assert len(names) == (1 if unit == "bare" else 2)
    weights = [net.get_parameter(name).detach() for name in names]
    sizes, filters = [weight.numel() for weight in weights], members[0].filters

    def loss_of(flat: Tensor, batch: int) -> Tensor:
        parts = flat.split(sizes)
        given = {n: p.view_as(w) for n, p, w in zip(names, parts, weights, strict=True)}
        outputs = torch.func.functional_call(net, given, IMAGES[batch].double())
        return F.cross_entropy(outputs, LABELS[batch])

    flat = torch.cat([weight.flatten() for weight in weights])
    exact = [
        torch.autograd.functional.hessian(lambda w, b=b: loss_of(w, b), flat, vectorize=True)
        for b in (0, 1)
    ]
    drawn = []

    def true(model, parameters, batches, along):
        assert parameters == names
        tensors = [model.get_parameter(name) for name in parameters]
        for batch in range(batches):
            drawn.append(along(batch, tensors))
            loss = F.cross_entropy(model(IMAGES[batch].double()), LABELS[batch])
            yield loss_gradients(loss, tensors, drawn[-1])

    def by_matrix(model, parameters, batches, along):
        for batch in range(batches):
            signs = torch.cat([part.flatten() for part in along(batch, weights)])
            products = (exact[0] @ signs).split(sizes)
            yield [p.view_as(w) for p, w in zip(products, weights, strict=True)]

    def of_filters(values: Tensor) -> Tensor:
        return sum(part.view(filters, -1).sum(1) for part in values.split(sizes))

    each = sum(sizes) // filters
    scale = of_filters(flat.square()) / (2 * each)
    (found,) = hessian_scores(net, [members], true, 2, seed=1)
    signs = [torch.cat([part.flatten() for part in of_batch]) for of_batch in drawn]
    assert all((part.abs() == 1).all() for part in signs) and not signs[0].equal(signs[1])
    curved = sum(of_filters(v * (h @ v)) for v, h in zip(signs, exact, strict=True)) / 2
    torch.testing.assert_close(found, scale * curved, rtol=1e-9, atol=1e-15)

    (mean,) = hessian_scores(net, [members], by_matrix, 300)
    rest = exact[0] - exact[0].diag().diag()
    deviation = (2 * of_filters(rest.square().sum(1)) / 300).sqrt()
    assert (mean - scale * of_filters(exact[0].diag())).abs().le(6 * scale * deviation).all()
    assert (
        hessian_scores(net, [members], by_matrix, 3, seed=2)[0]
        .ne(hessian_scores(net, [members], by_matrix, 3, seed=3)[0])
        .any()
    )


def test_hessian_of_attention_and_of_a_loss_that_is_linear():
    """Fused attention cannot be differentiated twice; what is linear has no curvature."""
    assert _OF_IMAGES == NEED_IMAGES
    weight = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    with differentiable_twice(asked=True):
        attended = F.scaled_dot_product_attention(weight, weight, weight)
        found = loss_gradients(attended.square().sum(), [weight], [torch.ones_like(weight)])
    assert found[0].abs().max() > 0
    (none,) = loss_gradients(weight.sum(), [weight], [torch.ones_like(weight)])
    assert not none.any()


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(st.integers(2, 12), st.integers(1, 4), st.integers(1, 3)),
    seed=st.integers(0, 9),
)
def test_fpgm_against_a_double_loop(shape, seed):
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    rows = weight.double().flatten(1).tolist()
    expected = [sum(math.dist(row, other) for other in rows) for row in rows]
    torch.testing.assert_close(
        fpgm_scores(weight), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-6
    )


def test_fpgm_of_many_filters_and_of_groups(monkeypatch):
    weight = torch.randn(60, 3, 3, 3, generator=torch.Generator().manual_seed(0)).double()
    whole = fpgm_scores(weight)
    monkeypatch.setattr("tpp.selection.criteria._ROWS", 7)
    torch.testing.assert_close(fpgm_scores(weight), whole)
    parts = torch.cat([fpgm_scores(part) for part in weight.chunk(3)])
    torch.testing.assert_close(fpgm_scores(weight, 3), parts)
    assert fpgm_scores(weight, 60).eq(0).all()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), factor=st.floats(0.01, 100), shift=st.floats(-10, 10))
def test_fpgm_goes_along_with_moves_and_scales_and_orders(seed, factor, shift):
    """Distances do not know of a shift of all filters, which magnitudes do."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(9, 2, 3, 3, generator=generator, dtype=torch.float64)
    order = torch.randperm(9, generator=generator)
    offset = shift * torch.randn(2, 3, 3, generator=generator, dtype=torch.float64)
    scores = fpgm_scores(weight)
    torch.testing.assert_close(fpgm_scores(weight + offset), scores, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fpgm_scores(factor * weight), factor * scores, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(fpgm_scores(weight[order]), scores[order], rtol=1e-6, atol=1e-6)
    turned = weight.flip(0, 3) if seed % 2 else weight.transpose(2, 3)
    expected = scores.flip(0) if seed % 2 else scores
    torch.testing.assert_close(fpgm_scores(turned), expected, rtol=1e-6, atol=1e-6)


def norm_by_marking(net: nn.Module, members, number: int) -> float:
    """The weights that go with a filter are marked one by one, whatever lists they stand in."""
    marked = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in net.named_parameters()}
    for entry in (entry for found in members for entry in found.slices):
        if entry.tensor not in marked or entry.tensor.endswith("bias"):
            continue
        mark = marked[entry.tensor]
        for place in entry.positions[number].tolist():
            if entry.groups == 1:
                mark.select(entry.dim, place).fill_(True)
            else:  # the rows of one group alone read this channel
                group, column = divmod(place, mark.shape[1])
                mark.chunk(entry.groups)[group][:, column] = True
    return math.sqrt(
        sum((w * w).item() for name, m in marked.items() for w in net.get_parameter(name)[m])
    )


@pytest.mark.parametrize("unit", UNITS)
def test_group_norm_against_weights_marked_one_by_one(unit):
    net = network()
    members = members_of(net)[unit]
    expected = [norm_by_marking(net, members, n) for n in range(members[0].filters)]
    found = group_norm_scores(net, members)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_group_norm_against_torch_pruning(name):
    """DepGraph's own code, of all layers in which no weight stands in two lists."""
    torch.manual_seed(0)
    model, example = build_model(name, 10).eval(), torch.zeros(1, 3, 224, 224)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    graph = torch_pruning.DependencyGraph().build_dependency(model, example)
    score = torch_pruning.importance.GroupMagnitudeImportance(
        p=2, group_reduction="sum", normalizer=None
    )
    units = {**members_of(model, example)}
    compared = 0
    for layer, members in [*units.items()][:12]:
        group = graph.get_pruning_group(
            model.get_submodule(layer),
            torch_pruning.prune_linear_out_channels
            if isinstance(model.get_submodule(layer), nn.Linear)
            else torch_pruning.prune_conv_out_channels,
            idxs=[*range(members[0].filters)],
        )
        expected = score(group)
        for found in members:  # it leaves depthwise convolutions out
            for entry in found.slices:
                module, _, kind = entry.tensor.rpartition(".")
                if kind == "weight" and getattr(model.get_submodule(module), "groups", 1) > 1:
                    expected = expected + model.get_parameter(entry.tensor).square().sum((1, 2, 3))
        torch.testing.assert_close(
            group_norm_scores(model, members).square().float(), expected, rtol=1e-4, atol=1e-4
        )
        compared += len(members) > 1 or layer.startswith("features")
    assert compared


def test_group_norm_sees_what_reads_a_filter():
    net = network()
    with torch.no_grad():
        net.depthwise.weight[:, :] = 1.0
        net.bare.weight[:, 3] *= 100
    assert int(group_norm_scores(net, members_of(net)["tied1"]).argmax()) == 3
    net.head.weight.data[:, 4 * 2 : 4 * 3] *= 100  # the four positions of channel 2
    assert int(group_norm_scores(net, members_of(net)["bare"]).argmax()) == 2


@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 50), factor=st.floats(0.1, 10))
@pytest.mark.parametrize("criterion", ["fpgm", "group_norm"])
def test_a_scale_of_all_scores_changes_no_plan(criterion, seed, factor):
    """Filters compete by score over the mean of their layer, with a budget as well."""
    net = network(seed)
    options = {"example_input": EXAMPLE}
    budget = tpp.selection.budget.Budget("speedup", 1.5)
    selection = Selection(criterion=criterion, coupled=True, budget=budget, gradients=gradients)
    plan = selection.select(net, **options)
    totals = selection._totals(net, selection._candidates(net, EXAMPLE), None)
    scores = {layer: torch.zeros(len(m.weight)) for layer, m in prunable_layers(net).items()}
    for layers, total in totals.items():
        scores[layers[0]] = factor * total
    assert selection.select(net, **options, scores=scores) == plan
    assert plan.active_layers


def test_taylor_compares_layers_by_the_loss_itself(monkeypatch):
    """With a budget the lowest of all filters go, one of every group at a time."""
    net = network()
    # A tiny network is refined afterwards, which has a test of its own.
    monkeypatch.setattr(
        "tpp.selection.budget._come_closer", lambda cost, widths, removed, limit: removed
    )
    budget = tpp.selection.budget.Budget("speedup", 1.5)
    selection = Selection(criterion="taylor", coupled=True, budget=budget, gradients=gradients)
    plan = selection.select(net, example_input=EXAMPLE)

    def tenfold(*asked):
        for found in gradients(*asked):
            yield [10 * gradient for gradient in found]

    larger = Selection(criterion="taylor", coupled=True, budget=budget, gradients=tenfold)
    assert larger.select(net, example_input=EXAMPLE) == plan
    candidates = selection._candidates(net, EXAMPLE)
    highest, lowest = [], []
    for unit in candidates.units:
        members = [candidates.channels[layer] for layer in unit.layers]
        (scores,) = taylor_scores(net, [members], gradients, 50)
        together = scores.view(unit.groups, -1).sort(1).values.sum(0)
        gone = len(plan.pruned[unit.layers[0]]) // unit.groups
        highest += together[:gone].tolist()
        lowest += together[gone : unit.most].tolist()
    assert max(highest) <= min(lowest) and len(highest) > 5


@pytest.mark.parametrize("criterion", ["fpgm", "group_norm", "taylor"])
def test_the_lowest_go(criterion):
    net, gone = network(), {}
    plan = tpp.select_filters(
        net, {"bare": 0.5}, criterion=criterion, example_input=EXAMPLE, gradients=gradients
    )
    (found,) = find_channels(net, ["bare"], example_input=EXAMPLE).values()
    gone["fpgm"] = fpgm_scores(net.bare.weight)
    gone["group_norm"] = group_norm_scores(net, [found])
    gone["taylor"] = taylor_scores(net, [[found]], gradients, 50)[0]
    scores = gone[criterion].tolist()
    assert plan.pruned["bare"] == sorted(sorted(range(6), key=scores.__getitem__)[:3])


def test_nothing_of_the_network_changes():
    net = network()
    before = copy.deepcopy(net.state_dict())
    for criterion in ("fpgm", "group_norm", "taylor"):
        tpp.select_filters(
            net,
            {"*": 0.2},
            criterion=criterion,
            example_input=EXAMPLE,
            gradients=gradients,
            skip=["head"],
        )
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())
