"""The learning rate against PyTorch's own schedulers."""

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, MultiStepLR

from train.config.config import steps_for
from train.config.optimizer import OptimizerSection
from train.loop.optim import learning_rate, make_optimizer

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
