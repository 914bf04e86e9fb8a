"""STAMP: masks from a set of images, what they are expected to cost, and what is left of them."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tpp.channels.gates import gated_layers
from tpp.channels.removal import prune_model
from tpp.common.errors import UserError
from tpp.measure.counts import count
from tpp.methods.base import TrainingContext
from tpp.methods.stamp import STAMP, Encoder, Settings, budget_of, concrete, noise_of
from tpp.models.architecture import build_model
from tpp.plan import PruningPlan
from tpp.selection.selection import Selection

HALF = Selection({"layer*.conv1": 0.5})
LABELS = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])


def network(name="cifar_resnet8", seed=0) -> nn.Module:
    torch.manual_seed(seed)
    model = build_model(name, 4).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # such as a trained one has
            nn.init.normal_(module.bias, 0.1, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model


def begun(
    model, stage="regularize", selection=HALF, *, total=100, side=16, companion=None, rank=0,
    ranks=1, average=None, episode=None, **how,
) -> STAMP:  # fmt: skip
    how = {"set_size": 6, "width": 5, "hidden": 4, "refresh": 4} | how
    method = STAMP(Settings(**how))
    method.modify(model, stage)
    context = TrainingContext(
        *(stage, None, selection, rank, ranks, torch.zeros(1, 3, side, side)),
        total_steps=total,
        episode_steps=episode,
        companion=lambda name: (companion or {}).get(name, {}),
        average=average or (lambda seen: seen),
    )
    method.prepare(model, context)
    return method


def images(seed=1, number=8, side=16) -> torch.Tensor:
    return torch.randn(
        number, 3, side, side, generator=torch.Generator().manual_seed(seed)
    ).double()


def step_of(model, method, step, x, *, parts=1):
    """Loss and gradients of a step in micro-batches, which the method is then told of."""
    method.before_step(step)
    labels = LABELS[: len(x)]
    total = 0.0
    for some, known in zip(x.chunk(parts), labels.chunk(parts), strict=True):
        outputs = model.train()(some)
        loss = F.cross_entropy(outputs, known)
        loss = (loss + sum(method.batch_terms((some, known), outputs).values())) / parts
        loss.backward()
        total += float(loss.detach())
    method.after_step(step)
    return total


def masks(method) -> torch.Tensor:
    return torch.cat([gate.factor[0].detach() for gate in method._gates.values()])


def scores(method) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat(list(method._scores().values()))


# ---- the set ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mean", "attention"])
def test_the_encoding_knows_no_order_and_no_repetition(kind):
    torch.manual_seed(0)
    weight, values = torch.randn(4, 7).double(), torch.randn(6, 7).double()

    def encoding(rows, size):
        encoder = Encoder(weight, Settings(encoder=kind, set_size=size))
        encoder.images[: len(rows)] = rows
        encoder.images[len(rows) :] = 1e3  # of nobody
        encoder.number.fill_(len(rows))
        return encoder.encode()

    first = encoding(values, 6)
    assert first.std() > 0.05
    for other in (values[torch.randperm(6)], values.repeat(2, 1)):
        torch.testing.assert_close(encoding(other, 15), first, rtol=0, atol=1e-12)
    assert (encoding(values[:5], 6) - first).abs().max() > 1e-3
    assert not encoding(values[:0], 6).any()


@pytest.mark.parametrize("kind", ["mean", "attention"])
def test_the_set_in_another_order_gives_the_same_masks_and_other_images_do_not(kind):
    def found(x):
        model = network()
        method = begun(model, encoder=kind, set_size=8)
        step_of(model, method, 0, x)
        return scores(method)

    x = images()
    order = torch.tensor([3, 1, 7, 0, 6, 2, 5, 4])
    torch.testing.assert_close(found(x[order]), found(x), rtol=0, atol=1e-12)
    assert (found(images(2) * 2 + 1) - found(x)).abs().max() > 1e-3


@pytest.mark.parametrize(("ranks", "parts"), [(1, 2), (1, 4), (2, 1), (2, 2), (4, 1)])
def test_ranks_and_micro_batches_gather_the_set_of_one(ranks, parts):
    """With BatchNorm's running statistics, so that images do not know of each other."""
    x = images()

    def told(rank, of, cuts, average):
        model = network()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval = module.train = lambda mode=True: None  # type: ignore[method-assign]
                module.training = False
        method = begun(model, rank=rank, ranks=of, average=average, set_size=7)
        method.before_step(0)
        for some in x[rank::of].chunk(cuts):
            method.batch_terms((some, LABELS), model.train()(some))
        return method

    whole = told(0, 1, 1, lambda seen: seen)
    whole.after_step(0)
    assert whole._encoder.number == 7 and whole._encoder.images.std() > 0
    seen = []
    everyone = [told(r, ranks, parts, lambda mine: sum(seen) / len(seen)) for r in range(ranks)]
    seen += [torch.cat([m._set.flatten(), m._means]) for m in everyone]
    for method in everyone:
        method.after_step(0)
        found, truth = method._encoder, whole._encoder
        torch.testing.assert_close(found.images, truth.images, rtol=1e-13, atol=1e-13)
        assert found.number == 7
        assert torch.equal(scores(method), scores(everyone[0])), "to the bit among themselves"
        torch.testing.assert_close(scores(method), scores(whole), rtol=0, atol=1e-12)


def test_a_bad_step_and_one_that_is_left_out_leave_the_set():
    model = network()
    method = begun(model)
    step_of(model, method, 0, images())
    before = scores(method)
    method.after_step(4)
    step_of(model, method, 8, images() * math.nan)
    assert torch.equal(scores(method), before)
    step_of(model, method, 12, images(5))
    assert not torch.equal(scores(method), before)


# ---- masks -----------------------------------------------------------------------------------


def test_noise_is_a_function_of_seed_and_step():
    assert torch.equal(noise_of(3, 7, 9), noise_of(3, 7, 9))
    assert not torch.equal(noise_of(3, 7, 9), noise_of(3, 8, 9))
    assert not torch.equal(noise_of(3, 7, 9), noise_of(4, 7, 9))


def test_relaxed_masks_come_to_hard_ones_as_the_temperature_falls():
    torch.manual_seed(0)
    a, u = torch.randn(200).double(), torch.rand(200).double()
    limit = (u.log() - (1 - u).log() + a > 0).double()
    assert 0.2 < limit.mean() < 0.8
    error = [float((concrete(a, u, tau) - limit).abs().mean()) for tau in (1, 0.1, 1e-2, 1e-4)]
    assert error == sorted(error, reverse=True) and error[-1] < 1e-6
    assert torch.equal(concrete(a, u, 0.7, hard=True), limit)
    # The share of open ones is the keep probability, whatever the temperature.
    u = (torch.arange(10_000).double() + 0.5) / 10_000
    opened = float(concrete(torch.tensor(0.8).double(), u, 0.3, hard=True).mean())
    assert opened == pytest.approx(1 / (1 + math.exp(-0.8)), abs=1e-4)


def test_hard_masks_have_the_gradient_of_relaxed_ones():
    a = torch.tensor([-1.0, 0.2, 3.0]).double().requires_grad_()
    u, up = torch.tensor([0.4, 0.5, 0.9]).double(), torch.tensor([1.0, 2.0, 3.0]).double()
    found = [torch.autograd.grad(concrete(a, u, 0.5, hard=h), a, up)[0] for h in (False, True)]
    assert torch.equal(*found) and found[0].all()


@pytest.mark.parametrize("stage", ["dense", "regularize"])
def test_open_masks_are_not_there_to_the_bit(stage):
    """In the steps of the set, and in evaluation."""
    plain, masked = network(), network()
    method = begun(masked, stage)
    F.cross_entropy(plain.train()(images()), LABELS).backward()
    step_of(masked, method, 0, images())
    truth = dict(plain.named_parameters())
    for name, parameter in masked.named_parameters():
        if ".gate." not in name and ".encoder." not in name:
            assert torch.equal(parameter.grad, truth[name].grad), name
        else:
            assert parameter.spared and not parameter.grad.any(), name
    assert torch.equal(masked.eval()(images()), plain.eval()(images()))
    step_of(masked, method, 1, images())
    assert 0 < masks(method).mean() < 1 and {*masks(method).tolist()} == {0.0, 1.0}


def test_the_gradient_of_the_generator_is_that_of_finite_differences():
    model = network()
    method = begun(model, hard=False, encoder="attention", budget=3.0, open=0.3)
    step_of(model, method, 0, images())
    x = images(3)

    def loss():
        method.before_step(1)
        outputs = model.train()(x)
        return F.cross_entropy(outputs, LABELS) + method.batch_terms((x, LABELS), outputs)["budget"]

    model.zero_grad()
    loss().backward()
    parts = [method._encoder, *method._gates.values()]
    checked = 0
    for part in parts:
        for name, parameter in part.named_parameters():
            assert parameter.grad.any(), name
            place = int(parameter.grad.abs().argmax())
            by_hand = []
            for change in (1e-5, -2e-5):
                with torch.no_grad():
                    parameter.view(-1)[place] += change
                    by_hand.append(float(loss()))
            with torch.no_grad():
                parameter.view(-1)[place] += 1e-5
            slope = (by_hand[0] - by_hand[1]) / 2e-5
            assert slope == pytest.approx(float(parameter.grad.view(-1)[place]), rel=1e-5), name
            checked += 1
    assert checked == 3 + 3 * 4


def test_the_tasks_gradient_can_be_made_smaller_and_the_budgets_stays():
    def gradients(**how):
        model = network()
        method = begun(model, hard=False, **how)
        step_of(model, method, 0, images())
        model.zero_grad()
        step_of(model, method, 1, images())
        return torch.cat([gate.second_bias.grad for gate in method._gates.values()])

    none, some, all_ = (gradients(gradient=g) for g in (0.0, 0.25, 1.0))
    torch.testing.assert_close(some - none, 0.25 * (all_ - none))
    assert none.any() and not torch.allclose(none, all_)
    assert not gradients(gradient=0.0, budget=0.0).any()


# ---- what it is expected to cost -------------------------------------------------------------

MODEL = network("cifar_resnet14")
FOUND = gated_layers(MODEL)
EXAMPLE = torch.zeros(1, 3, 32, 32)
COST = budget_of(MODEL, list(FOUND.values()), EXAMPLE)
FILTERS = {name: found.filters for name, found in FOUND.items()}


@given(st.lists(st.floats(0, 1), min_size=len(FOUND), max_size=len(FOUND)), st.integers(0, 2**20))
@settings(max_examples=8, deadline=None)
def test_omega_is_the_counted_share_of_what_masks_touch(shares, seed):
    assert COST.share(torch.zeros(len(FOUND))) == 1
    gone = {n: int(share * (FILTERS[n] - 1)) for n, share in zip(FOUND, shares, strict=True)}
    plan = PruningPlan.from_indices(FILTERS, {n: [*range(k)] for n, k in gone.items()})
    dense, small = count(MODEL), count(prune_model(MODEL, plan))
    touched = {t.tensor.removesuffix(".weight") for f in FOUND.values() for t in f.slices}

    def macs(counts):
        return sum(layer.macs for layer in counts.layers if layer.name in touched)

    share = float(COST.share(torch.tensor([*gone.values()])))
    assert share == pytest.approx(macs(small) / macs(dense), rel=1e-12)
    # By the formula, for any probabilities; and it rises with each of them.
    torch.manual_seed(seed)
    p = {name: torch.rand(n).double() for name, n in FILTERS.items()}
    sizes = {layer.name: layer.macs for layer in dense.layers}
    by_hand = sum(
        sizes[name] * p[name].mean() + sizes[name.replace("conv1", "conv2")] * p[name].mean()
        for name in FOUND
    )
    by_hand = by_hand / macs(dense)
    going = torch.stack([(1 - of).sum() for of in p.values()]).requires_grad_()
    found = COST.share(going)
    torch.testing.assert_close(found, by_hand, rtol=1e-12, atol=0)
    assert (torch.autograd.grad(found, going)[0] < 0).all()


def test_layers_that_follow_each_other_count_by_both_of_their_sides():
    torch.manual_seed(0)
    model = build_model("cifar_vgg16_bn", 4)
    found = [f for name, f in gated_layers(model).items() if name in ("features.0", "features.3")]
    cost = budget_of(model, found, EXAMPLE)
    macs = {layer.name: layer.macs for layer in count(model).layers}
    p, q = 0.25, 0.5
    first, second, third = (macs[f"features.{n}"] for n in (0, 3, 7))
    by_hand = (first * p + second * p * q + third * q) / (first + second + third)
    gone = torch.tensor([(1 - p) * 64, (1 - q) * 64])
    assert float(cost.share(gone)) == pytest.approx(by_hand, rel=1e-12)


def test_the_term_is_its_distance_from_the_target():
    model = network()
    method = begun(model, "dense", budget=7.0, target=0.3, episode=3)
    step_of(model, method, 0, images())
    method.before_step(1)
    outputs = model.train()(images())
    (term,) = method.batch_terms((images(), LABELS), outputs).values()
    share = method.scalars(1)["macs_expected"]
    assert float(term.detach()) == pytest.approx(7 * (share - 0.3) ** 2, rel=1e-9)
    # In the other stage it is what pruning leaves.
    method = begun(network())
    assert method._target == pytest.approx(0.5, rel=1e-12)
    method.load_state_dict({"target": 0.4})
    assert method.state_dict() == {"target": 0.4}


# ---- the end ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "side", "selection"),
    [
        ("cifar_resnet14", 16, Selection({"layer*.conv1": 0.7}, round_to=2)),
        ("cifar_vgg16_bn", 32, Selection({"features.*": 0.99})),
    ],
)
def test_without_the_masked_filters_it_is_the_same_network(name, side, selection):
    model = network(name)
    method = begun(model, selection=selection, side=side, total=2, fixed=1.0)
    x = images(side=side)
    step_of(model, method, 0, x)
    assert method.plan is None
    with torch.no_grad():
        step_scores = {name: a.clone() for name, a in method._scores().items()}
        for parameter in model.parameters():
            parameter.grad = None
    step_of(model, method, 1, x)
    plan = method.plan
    wanted = selection.select(network(name), example_input=x[:1])
    for layer, gone in plan.pruned.items():
        assert len(gone) == len(wanted.pruned[layer]) < plan.filters[layer], "exactly, never all"
        order = step_scores[layer].argsort(stable=True)
        assert {*gone} == {*order[: len(gone)].tolist()}, "the lowest"
    masked = model.eval()(x)
    method.restore(model)
    assert list(model.state_dict()) == list(network(name).state_dict())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    torch.testing.assert_close(model(x), masked, rtol=1e-12, atol=1e-12)
    small = prune_model(model, plan, example_input=x[:1])
    torch.testing.assert_close(small.eval()(x), masked, rtol=1e-10, atol=1e-10)


def test_fixed_masks_hold_in_training_and_the_generator_has_gradients_of_zero():
    model = network()
    method = begun(model, total=2, fixed=0.5)
    step_of(model, method, 0, images())
    kept = torch.cat([gate.stays for gate in method._gates.values()])
    model.zero_grad()
    step_of(model, method, 1, images())
    assert torch.equal(masks(method), kept.double()) and kept.sum() == 56
    for gate in method._gates.values():
        assert all(not p.grad.any() for p in gate.parameters())
    # So does a stage that goes on behind that step.
    again = begun_again = network()
    other = STAMP(method.settings)
    other.modify(again, "regularize")
    begun_again.load_state_dict(model.state_dict())
    other.prepare(again, method._context)
    assert other.plan == method.plan


def test_a_copy_has_masks_of_its_own():
    model = network()
    method = begun(model)
    step_of(model, method, 0, images())
    method.before_step(1)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for layer in gated_layers(network()):
            other.get_submodule(layer).gate.second_bias.fill_(-99)
    mine, its = model.train()(images()), other.train()(images())
    assert not torch.equal(mine, its)
    assert torch.equal(model(images()), mine)


# ---- from one data set to another ------------------------------------------------------------


def test_the_generator_goes_on_and_what_comes_after_does_not_begin_with_it_again():
    model = network()
    method = begun(model, "dense", episode=3)
    with torch.no_grad():
        for parameter in method._parameters(model).values():
            parameter.add_(0.25)
    kept = {name: {n: t.clone() for n, t in m.items()} for name, m in method.keeps(model).items()}
    assert kept.keys() == {"generator"} and len(kept["generator"]) == 2 + 3 * 4
    method.restore(model)
    other = network(seed=1)
    method = begun(other, companion=kept)
    for name, tensor in method._parameters(other).items():
        assert torch.equal(tensor, kept["generator"][name]), name
    assert method.keeps(other) == {}
    with torch.no_grad():
        for parameter in method._parameters(other).values():
            parameter.zero_()
    method._take_up(kept["generator"])
    assert not any(tensor.any() for tensor in method._parameters(other).values())
    with pytest.raises(UserError, match=r"generator of another shape .*width"):
        begun(network(), companion=kept, width=6)


def test_layers_that_lose_nothing_have_no_masks():
    model = network()
    method = begun(model, selection=Selection({"layer1.*.conv1": 0.5}))
    assert [*method._gates] == ["layer1.0.conv1"]
    assert not any(p.requires_grad for p in model.layer2[0].conv1.gate.parameters())
    assert not model.layer2[0].bn1._forward_hooks
    model = network()
    method = STAMP(Settings())
    method.modify(model, "finetune")
    method.restore(model)
    assert method.scalars(0) == {} and method.batch_terms((images(), LABELS), images()) == {}


def test_what_it_cannot_do_is_one_line():
    with pytest.raises(UserError, match="has masked weights"):
        begun(network(), companion={"mask": {"conv1.weight": torch.ones(1)}})
    with pytest.raises(UserError, match=r"layer1\.0\.conv2 cannot have gates"):
        STAMP(Settings()).check(
            network(), PruningPlan({"layer1.0.conv2": 16}, {"layer1.0.conv2": [0]})
        )
    with pytest.raises(UserError, match="use 2 or more"):
        begun(network(), "dense", episode=1)
    torch.manual_seed(0)
    with pytest.raises(UserError, match="name: stamp masks filters"):
        STAMP(Settings()).check_network(build_model("plain_mlp", 4, depth=3, width=4), "dense")
    with pytest.raises(UserError, match="name: stamp reads what the classifier reads"):
        STAMP(Settings()).check_network(build_model("edsr", None, scale=2), "dense")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"refresh": 1}, "greater than or equal to 2"),
        ({"tau": 0.0}, "greater than 0"),
        ({"encoder": "median"}, "'mean' or 'attention'"),
        ({"target": 1.5}, "less than or equal to 1"),
        ({"gates": 3}, "Extra inputs"),
    ],
)
def test_settings_out_of_bounds(wrong, message):
    with pytest.raises(ValueError, match=message):
        Settings(**wrong)
