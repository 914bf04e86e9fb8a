"""Proximal policy optimisation with a dual clip (Ye et al. 2020), as ResiNet's code sets it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from tpp.common.settings import PositiveFloat, PositiveInt, Section
from train.graphs.episodes import Experience
from train.graphs.firegnn import Policy, Value
from train.graphs.imitation import BestPaths
from train.graphs.states import stacked

_Share = Annotated[float, Field(ge=0, le=1)]
_Positive = Annotated[float, Field(ge=0)]
_TINY = 1e-4  # below which advantages' deviation is taken for this


class PpoSection(Section):
    """How the policy is trained; defaults are those of the published command for BA-15.

    Attributes:
        steps: of the environments, over which learning rates and entropy fall to 0.
        environments: that act at once.
        batch: steps of one iteration, over all environments.
        epochs: passes over them.
        minibatch: steps of one optimiser step.
        lr, value_lr: of Adam for the policy and for the value.
        adam_epsilon: of both.
        clip: of the probabilities' ratio.
        dual_clip: the factor of a negative advantage beyond which the loss does not grow.
        value_clip: how far a value may go from the one before; null for the objective's scale.
        gradient_clip: the largest norm of the policy's gradient, and of the value's.
        discount, gae: gamma and lambda.
        entropy: weight of it, at the beginning.
        imitation: weight of self-imitation (``imitation.py``); 0, as published, for none.
        imitated: how many of the best episodes are kept for it.
    """

    steps: PositiveInt = 800_000
    environments: PositiveInt = 64
    batch: PositiveInt = 4096
    epochs: PositiveInt = 10
    minibatch: PositiveInt = 256
    lr: PositiveFloat = 7e-4
    value_lr: PositiveFloat = 7e-4
    adam_epsilon: PositiveFloat = 1e-5
    clip: PositiveFloat = 0.2
    dual_clip: Annotated[float, Field(gt=1)] = 10.0
    value_clip: PositiveFloat | None = None
    gradient_clip: PositiveFloat = 0.5
    discount: _Share = 0.99
    gae: _Share = 0.95
    entropy: _Positive = 0.01
    imitation: _Positive = 0.0
    imitated: PositiveInt = 8

    @property
    def horizon(self) -> int:
        """Steps of each environment in one iteration."""
        return -(-self.batch // self.environments)

    @property
    def iteration_steps(self) -> int:
        """Steps of one iteration, the batch in whole steps of all environments."""
        return self.horizon * self.environments

    @property
    def iterations(self) -> int:
        """Of the whole training."""
        return -(-self.steps // self.iteration_steps)

    def left(self, iteration: int) -> float:
        """The factor of learning rates and entropy in an iteration, counted from 0."""
        return max(0.0, 1 - iteration * self.iteration_steps / self.steps)


def advantages(experience: Experience, discount: float, gae: float) -> Tensor:
    """Generalised advantage estimates (T, B) (Schulman et al. 2016); no value beyond an end."""
    values = torch.cat([experience.values, experience.last_values.unsqueeze(0)])
    going = (~experience.ended).float()
    found = torch.zeros_like(experience.rewards)
    after = torch.zeros_like(experience.last_values)
    for time in reversed(range(len(found))):
        error = experience.rewards[time] + discount * going[time] * values[time + 1] - values[time]
        after = error + discount * gae * going[time] * after
        found[time] = after
    return found


def surrogate(ratio: Tensor, advantage: Tensor, clip: float, dual_clip: float) -> Tensor:
    """What is to rise, for each step: clipped from above, and from below at bad advantages."""
    clipped = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    return torch.where(advantage < 0, torch.maximum(clipped, dual_clip * advantage), clipped)


def value_loss(values: Tensor, before: Tensor, targets: Tensor, clip: float) -> Tensor:
    """Squared errors, each the larger one of a value's and of what is within ``clip`` of before."""
    near = before + (values - before).clamp(-clip, clip)
    return torch.maximum((values - targets).square(), (near - targets).square())


def make_optimizer(policy: Policy, value: Value, settings: PpoSection) -> torch.optim.Adam:
    """The two optimisers, as two groups of one Adam: it treats every tensor on its own."""
    groups: list[dict[str, Any]] = [
        {"params": list(policy.parameters()), "lr": settings.lr},
        {"params": list(value.parameters()), "lr": settings.value_lr},
    ]
    return torch.optim.Adam(groups, eps=settings.adam_epsilon)


@dataclass(frozen=True)
class Losses:
    """Means over an iteration's optimiser steps.

    Attributes:
        policy: the surrogate, negative.
        value: the clipped squared error.
        entropy: of the three actions together.
        imitation: the loss of self-imitation, without its weight.
        kl: how far the policy went from the one that acted: mean of r - 1 - log r.
        clipped: share of the ratios outside of the clip.
        gradient_norm: of the policy, before it is clipped.
    """

    policy: float
    value: float
    entropy: float
    imitation: float
    kl: float
    clipped: float
    gradient_norm: float


def update(
    policy: Policy,
    value: Value,
    optimizer: torch.optim.Optimizer,
    experience: Experience,
    settings: PpoSection,
    best: BestPaths,
    *,
    scale: float,
    left: float,
    generator: torch.Generator,
    pause: Callable[[], None] = lambda: None,
) -> Losses:
    """Train on one iteration's experience.

    Args:
        policy, value, optimizer: are changed.
        experience: by this policy.
        settings: of the whole training.
        best: what is imitated.
        scale: of the rewards, for the value's clip.
        left: factor of learning rates and entropy.
        generator: of the minibatches' order.
        pause: called before each optimiser step; may raise.
    """
    found = advantages(experience, settings.discount, settings.gae)
    targets = (found + experience.values).flatten()
    advantage, before = found.flatten(), experience.values.flatten()
    actions, acted = experience.actions.flatten(0, 1), experience.log_prob.flatten()
    value_clip = scale if settings.value_clip is None else settings.value_clip
    for group, rate in zip(optimizer.param_groups, (settings.lr, settings.value_lr), strict=True):
        group["lr"] = rate * left
    sums, count = torch.zeros(7), 0
    policy.train()
    value.train()
    for _ in range(settings.epochs):
        order = torch.randperm(len(targets), generator=generator)
        for part in order.split(settings.minibatch):
            pause()
            batch, index = stacked([experience.states[number] for number in part.tolist()])
            choice = policy(batch, index, actions[part])
            of_part = advantage[part]
            deviation = of_part.std(correction=0).clamp(min=_TINY)
            standard = (of_part - of_part.mean()) / deviation
            change = choice.log_prob - acted[part]
            ratio = change.exp()
            loss = -surrogate(ratio, standard, settings.clip, settings.dual_clip).mean()
            entropy = choice.entropy.mean()
            errors = value_loss(value(batch, index), before[part], targets[part], value_clip).mean()
            optimizer.zero_grad()
            again = loss.new_zeros(())
            if settings.imitation and best.kept:
                again = best.loss(policy, value)
            total = loss - settings.entropy * left * entropy + errors
            (total + settings.imitation * again).backward()
            norm = nn.utils.clip_grad_norm_(policy.parameters(), settings.gradient_clip)
            nn.utils.clip_grad_norm_(value.parameters(), settings.gradient_clip)
            optimizer.step()
            with torch.no_grad():
                kl = (ratio - 1 - change).mean()
                outside = ((ratio - 1).abs() > settings.clip).float().mean()
                sums += torch.stack([loss, errors, entropy, again, kl, outside, norm])
            count += 1
    policy.eval()
    value.eval()
    return Losses(*(sums / count).tolist())
