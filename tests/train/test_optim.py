"""The learning rate against PyTorch's own schedulers."""

from fractions import Fraction

import pytest
import timm
import torch
from pydantic import ValidationError
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, MultiStepLR, SequentialLR

from tpp.common.errors import UserError
from train.config.config import Config, steps_for
from train.config.optimizer import OptimizerSection
from train.loop.optim import check_optimizer, learning_rate, make_optimizer

STEPS_PER_EPOCH = 10


def torch_rates(make_scheduler, epochs: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = make_scheduler(optimizer)
    rates = []
    for _ in range(epochs * STEPS_PER_EPOCH):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def our_rates(epochs: int, **settings) -> list[float]:
    section = OptimizerSection(lr=0.1, **settings)
    return [
        learning_rate(section, step / STEPS_PER_EPOCH, epochs)
        for step in range(epochs * STEPS_PER_EPOCH)
    ]


def test_step_schedule():
    truth = torch_rates(lambda o: MultiStepLR(o, [30, 60], gamma=0.1), 9)
    assert our_rates(9, schedule="step", milestones=[3, 6]) == pytest.approx(truth)


def test_cosine_schedule():
    truth = torch_rates(lambda o: CosineAnnealingLR(o, 50), 5)
    assert our_rates(5, schedule="cosine") == pytest.approx(truth)


def test_warmup_is_linear_from_zero():
    truth = torch_rates(lambda o: LinearLR(o, start_factor=1e-12, total_iters=20), 4)
    assert our_rates(4, warmup_epochs=2.0) == pytest.approx(truth, abs=1e-9)


def test_constant_schedule():
    assert set(our_rates(2)) == {0.1}


def test_published_finetuning_schedule():
    section = OptimizerSection(lr=0.01, schedule="step", milestones=[30, 60, 75])
    rates = [learning_rate(section, epoch, 90) for epoch in (0, 29.9, 30, 60, 74.9, 75, 89.9)]
    assert rates == pytest.approx([1e-2, 1e-2, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5])


def test_optimizer_takes_the_settings_for_every_parameter():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    section = OptimizerSection(lr=0.3, momentum=0.8, weight_decay=0.02, nesterov=True)
    (group,) = make_optimizer(model, section).param_groups
    assert len(group["params"]) == 4
    assert [group[k] for k in ("lr", "momentum", "weight_decay", "nesterov")] == [
        0.3, 0.8, 0.02, True
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("epochs", "images", "batch", "steps"),
    [
        (1, 100, 10, 10),
        (1, 101, 10, 11),
        (0.5, 100, 10, 5),
        (90, 1_281_167, 256, 450_411),
        (0.001, 10, 5, 1),
    ],
)
def test_steps_cover_the_epochs(epochs, images, batch, steps):
    assert steps_for(epochs, images, batch) == steps


def test_cosine_to_a_floor():
    truth = torch_rates(lambda o: CosineAnnealingLR(o, 50, eta_min=0.02), 5)
    assert our_rates(5, schedule="cosine", min_lr=0.02) == pytest.approx(truth)


def test_warmup_before_the_cosine_is_torchvisions():
    """Its recipe: linear from a hundredth, then a cosine over what is left, to a floor."""

    def scheduler(optimizer):
        first = LinearLR(optimizer, start_factor=0.01, total_iters=20)
        then = CosineAnnealingLR(optimizer, T_max=40, eta_min=0.001)
        return SequentialLR(optimizer, [first, then], milestones=[20])

    settings = {"warmup_epochs": 2.0, "warmup_from": 0.01, "warmup_prefix": True}
    found = our_rates(6, schedule="cosine", min_lr=0.001, **settings)
    assert found == pytest.approx(torch_rates(scheduler, 6))


def test_milestones_after_the_warmup():
    rates = our_rates(
        6, schedule="step", milestones=[1, 2], warmup_epochs=2.0, warmup_prefix=True, min_lr=0.005
    )
    assert rates[20:] == pytest.approx([0.1] * 10 + [0.01] * 10 + [0.005] * 20)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"name": "adamv"}, "did you mean adam or "),
        ({"name": "AdamW"}, "no optimiser that can be used here"),
        ({"name": "fusedadam"}, "no optimiser that can be used here"),
        ({"name": "adahessian"}, "no optimiser that can be used here"),
        ({"name": "lookahead_adamw"}, "no optimiser that can be used here"),
        ({"name": "adamw", "momentum": 0.8}, "momentum: adamw has none; it has betas"),
        ({"name": "lars", "betas": [0.9, 0.99]}, "betas: lars has none; it has momentum"),
        ({"name": "adamw", "betas": [0.9]}, "betas: adamw has 2"),
        ({"name": "lion", "eps": 1e-8}, "eps: lion has none"),
        ({"name": "adamw", "nesterov": True}, "nesterov goes with sgd"),
        ({"name": "adamw", "args": {"lr": 1.0}}, "args.lr: not possible there"),
        ({"betas": [0.9, 0.99]}, "betas go with adamw"),
        ({"args": {"foreach": True}}, "args go with optimisers of timm"),
        ({"min_lr": 0.2}, "min_lr .0.2. must not be above lr"),
        ({"warmup_prefix": True}, "warmup_prefix goes with warmup_epochs"),
    ],
)
def test_what_does_not_go_together(settings, why):
    with pytest.raises(ValidationError, match=why):
        OptimizerSection(lr=0.1, **settings)


@pytest.mark.parametrize(
    ("settings", "split", "why"),
    [
        (
            {"name": "adafactorbv"},
            False,
            "k: adafactorbv: has a state that no checkpoint here can keep",
        ),
        ({"name": "adamw", "args": {"bata": 1}}, False, "k: adamw: .*bata"),
        ({"name": "lamb"}, True, "k.name: lamb looks at whole tensors"),
        ({"name": "muon"}, True, "k.name: muon looks at whole tensors"),
    ],
)
def test_what_a_trial_finds(settings, split, why):
    section = OptimizerSection(lr=0.1, **settings)
    with pytest.raises(UserError, match=why):
        check_optimizer(section, "k", split=split)


@pytest.mark.parametrize("name", ["adamw", "lamb", "lars", "nadam", "adan", "muon", "lion"])
def test_what_passes_the_trial(name):
    check_optimizer(OptimizerSection(name=name, lr=0.01), "k")


def test_optimisers_are_those_of_torch_and_timm():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    section = OptimizerSection(name="adamw", lr=0.3, betas=[0.8, 0.9], eps=1e-6, weight_decay=0.02)
    made = make_optimizer(model, section)
    assert type(made) is torch.optim.AdamW
    wanted = {"lr": 0.3, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.02}
    assert {key: made.param_groups[0][key] for key in wanted} == wanted
    assert type(make_optimizer(model, OptimizerSection(name="lamb", lr=1.0))) is timm.optim.Lamb


@pytest.mark.parametrize(
    ("name", "factor", "lr"),
    [("sgd", 4, 0.4), ("lars", 4, 0.4), ("adamw", 4, 0.2), ("lamb", 9, 0.3)],
)
def test_the_batch_rule_of_each_optimiser(name, factor, lr):
    section = OptimizerSection(name=name, lr=0.1, min_lr=0.01)
    larger = section.for_batch(Fraction(factor), warmup_epochs=5.0, stage_epochs=90)
    assert larger.lr == pytest.approx(lr) and larger.min_lr == pytest.approx(lr / 10)
    assert larger.warmup_from * larger.lr == pytest.approx(0.1), "from the reference's"


def test_the_batch_rule_refuses_what_nobody_knows(tiny_config):
    tiny_config["stages"]["finetune"]["optimizer"] |= {"name": "lion"}
    tiny_config["training"] |= {"batch": "reference", "reference_batch_size": 8}
    with pytest.raises(
        ValidationError, match=r"stages\.finetune\.optimizer\.name: how the learning"
    ):
        Config.model_validate(tiny_config)
    section = OptimizerSection(name="lion", lr=0.1)
    with pytest.raises(ValueError, match="rate of lion follows the batch is not known"):
        section.for_batch(Fraction(2), warmup_epochs=5.0, stage_epochs=90)
