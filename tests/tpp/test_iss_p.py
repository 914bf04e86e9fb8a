"""Soft shrinkage step by step, in float64, against what can be written down."""

import itertools
from fractions import Fraction

import pytest
import torch
from torch import nn

from tpp.common.errors import UserError
from tpp.masks import SparsifySection, hold_mask, select_mask
from tpp.methods import method_class
from tpp.methods.base import TrainingContext
from tpp.selection.settings import PruningSection


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten())
    return model.append(nn.Linear(4 * 4 * 4, 5)).double()


LAYERS = ("0", "2", "4")


def issp(**settings):
    kind = method_class("iss_p")
    return kind(kind.settings_type(**settings))


def made(model, stage="regularize", **settings):
    method = issp(**settings)
    method.check_network(model, stage)
    example = torch.zeros(1, 3, 8, 8)
    context = TrainingContext(stage, None, PruningSection().selection(0), 0, 1, example)
    method.prepare(model, context)
    return method


def weights(model):
    return {f"{name}.weight": model.get_submodule(name).weight.detach() for name in LAYERS}


def snapshot(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def train(model, method, steps, *, optimizer=None, begin=0, seen=None):
    """Plain training with a method's hooks, as the loop has them."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(begin, begin + steps):
        torch.manual_seed(step)
        x, y = torch.randn(16, 3, 8, 8).double(), torch.randint(0, 5, (16,))
        method.before_step(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        method.after_step(step)
        if seen is not None:
            seen(step)
    return optimizer


def going(model, sparsity=0.9):
    """What ``sparsify`` masks of the same layers."""
    section = SparsifySection(sparsity=sparsity, scope="layer")
    mask = select_mask(weights(model), [*LAYERS], section)
    return {key: ~stays for key, stays in mask.items()}


def test_without_gradients_the_same_weights_shrink_by_alpha_each_step():
    model = network()
    method, before, gone = made(model, sparsity=0.9), snapshot(model), going(network())
    for step in range(7):
        method.before_step(step)
        changed = method.after_step(step)
        assert {id(p) for p in changed} == {id(model.get_submodule(n).weight) for n in LAYERS}
    for key, after in snapshot(model).items():
        if key not in gone:
            assert after.equal(before[key]), key
            continue
        small = gone[key]
        assert int(small.sum()) == round(0.9 * small.numel())
        assert after[~small].equal(before[key][~small]), key
        expected = 0.95**7 * before[key][small]
        torch.testing.assert_close(after[small], expected, rtol=2e-15, atol=0)


def test_alpha_one_is_plain_training_and_alpha_zero_leaves_so_many_zeros():
    plain, same, hard = network(), network(), network()
    none = made(plain, stage="finetune", sparsity=0.9)
    train(plain, none, 5)
    train(same, made(same, sparsity=0.9, alpha=1.0), 5)
    for key, value in snapshot(plain).items():
        assert value.equal(snapshot(same)[key]), key

    def count(step):
        for key, value in weights(hard).items():
            assert int((value == 0).sum()) == round(0.7 * value.numel()), (step, key)

    train(hard, made(hard, sparsity=0.7, alpha=0.0), 5, seen=count)


def test_adam_with_a_steady_gradient_settles_where_the_formula_says():
    layer = nn.Linear(10, 1, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.001] * 5 + [1.0] * 5]))
    method = made(nn.Sequential(layer), sparsity=0.5)
    lr = 2e-4
    optimizer = torch.optim.Adam(layer.parameters(), lr=lr, betas=(0.9, 0.99), eps=0)
    for step in range(800):
        method.before_step(step)
        layer.weight.grad = -torch.ones_like(layer.weight)
        layer.weight.grad[0, 5:] = 0
        optimizer.step()
        method.after_step(step)
    settled = layer.weight.detach()[0, :5]
    torch.testing.assert_close(settled, torch.full_like(settled, 19 * lr), rtol=1e-9, atol=0)


def test_a_weight_with_a_strong_gradient_climbs_back_and_is_then_trained_plainly():
    layer = nn.Linear(10, 1, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.arange(1, 11)[None] / 10)
    method = made(nn.Sequential(layer), sparsity=0.5)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    seen = [layer.weight[0, 0].item()]
    for step in range(30):
        method.before_step(step)
        layer.weight.grad = torch.zeros_like(layer.weight)
        layer.weight.grad[0, 0] = -1
        optimizer.step()
        method.after_step(step)
        seen.append(layer.weight[0, 0].item())
    shrunk = [after != pytest.approx(b + 0.1) for b, after in itertools.pairwise(seen)]
    free = shrunk.index(False)
    assert 2 < free < 10 and not any(shrunk[free:])
    # In its place another one is made smaller, and the same number in all.
    assert int(method._smallest(layer.weight.detach()).sum()) == 5
    assert layer.weight[0, 5].item() < 0.6


def test_zeroing_and_finetuning_keep_the_set_of_zeros_to_the_last_weight():
    model = network()
    optimizer = train(model, made(model, sparsity=0.9), 6)
    smallest = {
        key: made(network(), sparsity=0.9)._smallest(value) for key, value in weights(model).items()
    }
    gone = going(model)
    assert all(gone[key].equal(small) for key, small in smallest.items())
    hold_mask(model, {key: ~value for key, value in gone.items()})

    def compare(step):
        for key, value in weights(model).items():
            assert (value == 0).equal(gone[key]), (step, key)

    del optimizer  # its moments of masked weights would move them once more
    train(model, made(model, stage="finetune", sparsity=0.9), 5, begin=6, seen=compare)
    zeros = sum(int(value.sum()) for value in gone.values())
    total = sum(value.numel() for value in gone.values())
    assert zeros == sum(round(0.9 * value.numel()) for value in gone.values())
    assert zeros / total == pytest.approx(0.9, abs=1e-3)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.99])
def test_of_equals_the_first_go_as_sparsify_has_it(sparsity):
    model = network()
    numbers = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in weights(model).values():
            value.copy_(torch.randint(-2, 3, value.shape, generator=numbers))
        # A layer whose values do not lie in the order of their places.
        first = model[0].weight
        first.data = first.data.contiguous(memory_format=torch.channels_last)
    gone, method = going(model, sparsity), made(model, sparsity=sparsity)
    for key, value in weights(model).items():
        assert method._smallest(value).equal(gone[key]), key


def test_n_of_m_shrinks_what_the_pattern_leaves_out():
    model = network()
    before, method = snapshot(model), made(model, pattern="2:4", alpha=0.5)
    method.before_step(0)
    method.after_step(0)
    first, second = weights(model)["0.weight"], weights(model)["2.weight"]
    assert first.equal(before["0.weight"]), "4 does not divide three input channels"
    groups = before["2.weight"].abs().view(4, 2, 4, 3, 3)
    limit = groups.sort(dim=2).values[:, :, 1:2]
    factor = torch.where(groups <= limit, 0.5, 1.0).view_as(second)
    assert second.equal(factor * before["2.weight"])


def test_steps_that_are_left_out_shrink_nothing():
    model = network()
    method, before = made(model, sparsity=0.9), snapshot(model)
    assert method.after_step(0) is None
    method.before_step(1)
    assert method.after_step(2) is None
    assert all(value.equal(before[key]) for key, value in snapshot(model).items())


def test_of_one_image_alpha_is_the_same_whatever_the_batch():
    settings = issp(sparsity=0.9).settings
    assert settings.for_batch(Fraction(4)).alpha == pytest.approx(0.95**4)
    assert settings.for_batch(Fraction(1)).alpha == 0.95


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "sparsity: missing, such as 0.9; or pattern, such as '2:4'"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "one of sparsity and pattern, and here are both"),
        ({"pattern": "4:2"}, "must be N:M with N < M"),
        ({"sparsity": 0.5, "alpha": 1.5}, "alpha"),
        ({"sparsity": 0.5, "skip": ["tail"]}, "skip: 'tail' matches no Conv2d or Linear layer"),
    ],
)
def test_mistakes_are_one_line(settings, says):
    with pytest.raises((UserError, ValueError), match=says):
        made(network(), **settings)
