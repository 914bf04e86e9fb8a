r"""Gates that open or close channels image by image, and learn to say the same for all images.

Zhi, Babbar, Liu, Sun, Silavong, Shi, Moran, "Consensus Sub-Network with Polarization
Regularization", one-pass training (arXiv:2302.10798). Only abstracts and a summary could be read:
small binary gates on the features, trained by a straight-through estimator in the one training run;
a polarising term that makes every gate agree over the images; a sparsity that the user sets; at
the end one static network, without gates and without finetuning. Everything more exact is inferred:

- a gate for each filter of a layer, from the layer's input averaged over positions by two linear
  layers, 1 where its score is above 0; it multiplies the channel behind its BatchNorm and before
  the activation, so that the closed channel is as good as removed;
- with m the share of images for which a gate is open, the terms

.. math:: \lambda_p \frac{1}{K} \sum_k m_k (1 - m_k), \qquad \lambda_a \frac{1}{K} \sum_k m_k

  of all K gates; a channel stays if its m is half or more.

Read like that (``slope: identity, aim: false, spread: 0, gradient: 1, start: 0, end: 0`` here)
training collapses: all gates close or their scores run away, and the network is at chance. A gate's
gradient sums over all positions of its channel, the straight-through slope bounds nothing, the
activation term pushes all gates down for as long as one is open, and all start alike. What was
changed:

- the slope is that of a sigmoid, which lets a gate rest that has decided;
- the gradient that comes from the task is ``gradient`` times as large, and gates have no weight
  decay;
- the biases start apart, most of them open;
- the activation term is :math:`\lambda_a (\frac{1}{K} \sum_k m_k - t)^2`, with t the share of all
  gated filters that ``pruning`` leaves: it pushes the less the nearer that is. Which layers lose
  how many is for the gates to find;
- both terms grow from 0 after the gates had time to part;
- m is the running mean of the last steps, over all ranks and micro-batches: the terms are then the
  same however a batch is cut up, and one collective per step does;
- the last part of the stage trains with the gates fixed at what most images said. BatchNorm's
  statistics are then those of the static network, and what the stage ends with is exactly what is
  left when the closed channels are removed. A layer keeps at least one filter.

A patent application, US 2024/0054346, is by the same authors: ask before you ship it.
"""

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from tpp.channels.channel_map import LayerChannels
from tpp.channels.gates import check_gates, close, gated_layers, hang_in, no_gates
from tpp.checkpoints.safetensors_files import sha256_of
from tpp.methods import base
from tpp.models.layers import prunable_layers
from tpp.plan import PruningPlan
from tpp.selection.criteria import floor_count, last_match
from tpp.selection.selection import same_on_all_ranks

# Of the running means: about the last ten steps.
_MEMORY = 0.8


class Settings(base.Settings):
    """The values are ours. How many filters of all go is said by ``pruning``; which layers lose how
    many is for the gates to find.

    Attributes:
        polarization: weight of the term that makes each gate say the same of all images.
        activation: weight of the term by which so many gates close as ``pruning`` asks for.
        start (share of the stage): when the terms begin to grow.
        end (share of the stage): when the terms have their full weights; not before ``start``.
        fixed (share of the stage): when the gates are fixed, and say the same for all images; not
            before ``end``.
        hidden: width of a gate's hidden layer.
        open: mean of the biases that gates start with; above 0 most of them are open.
        spread: standard deviation of these biases.
        gradient: factor of the task's gradient on its way to a gate.
        slope: slope of the straight-through estimator: that of a ``sigmoid`` or of the
            ``identity``.
        aim: whether the activation term is the square of how far the share of open gates is from
            its target; if not, it is that share.

    Example:
        {polarization: 2.0, activation: 10.0, start: 0.2, end: 0.5, fixed: 0.8, hidden: 16,
        open: 2.0, spread: 0.25, gradient: 0.5, slope: identity, aim: false}
    """

    polarization: Annotated[float, Field(ge=0)] = 4.0
    activation: Annotated[float, Field(ge=0)] = 20.0
    start: Annotated[float, Field(ge=0, le=1)] = 0.1
    end: Annotated[float, Field(ge=0, le=1)] = 0.4
    fixed: Annotated[float, Field(gt=0, le=1)] = 0.7
    hidden: Annotated[int, Field(ge=1)] = 8
    open: float = 1.0
    spread: Annotated[float, Field(ge=0)] = 0.5
    gradient: Annotated[float, Field(ge=0)] = 0.1
    slope: Literal["sigmoid", "identity"] = "sigmoid"
    aim: bool = True

    @model_validator(mode="after")
    def _in_order(self) -> "Settings":
        if not self.start <= self.end <= self.fixed:
            raise ValueError(
                f"start ({self.start:g}), end ({self.end:g}) and fixed ({self.fixed:g}) must be in "
                "this order"
            )
        return self

    def weight_at(self, step: int, total: int) -> float:
        """What both terms' weights are multiplied by in 0-based ``step`` of ``total`` steps."""
        begin, full = self.start * total, self.end * total
        if step >= full:
            return 1.0
        return max(0.0, (step - begin) / (full - begin))


class Polarization(base.Method):
    """Train gates beside the weights; the channels that end up closed are those to remove."""

    name = "polarization"
    title = "Polarization"
    settings_type: ClassVar[type[base.Settings]] = Settings
    picks = "during"
    faithful = False
    ends_pruned = True

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._found: dict[str, LayerChannels] = {}
        self._gates: dict[str, Gate] = {}
        self._hooks: list[Any] = []
        self._filters: dict[str, int] = {}
        self._least: dict[str, int] = {}
        self._multiple, self._steps, self._target = 1, 0, 0.0
        self._average: Callable[[Tensor], Tensor] = lambda values: values
        self._plan: PruningPlan | None = None

    @property
    def plan(self) -> PruningPlan | None:
        """The channels that are closed for all images; None as long as gates are not fixed."""
        return self._plan

    def check(self, model: nn.Module, plan: PruningPlan) -> None:
        """Raise UserError if a layer that is to lose filters cannot have gates."""
        check_gates(self.name, model, plan)

    def modify(self, model: nn.Module, stage: str) -> None:
        """Give every layer that can have them gates, if the stage is regularised."""
        if stage != "regularize":
            return
        self._found = gated_layers(model)
        for name in self._found:
            layer = cast(Any, model.get_submodule(name))
            layer.gate = Gate(layer.weight, self.settings)

    def restore(self, model: nn.Module) -> None:
        """Close channels by their BatchNorm's entries for good, and take the gates off.

        Where gates are fixed the network computes what it did with them, in evaluation mode.
        """
        for hook in self._hooks:
            hook.remove()
        for name, found in self._found.items():
            layer = cast(Any, model.get_submodule(name))
            close(model, found, layer.gate.stays)
            del layer.gate

    def refuses_mask(self, stage: str) -> str | None:
        """As in :class:`tpp.methods.base.Method`."""
        return "of filters that will go" if stage == "regularize" else None

    def prepare(self, model: nn.Module, context: base.TrainingContext) -> None:
        """Hang in the gates of the layers that are to lose filters.

        Raises:
            UserError: such a layer cannot have gates, or the stage's input has masked weights.
        """
        if context.stage != "regularize":
            return
        self.check_mask(context)
        assert context.total_steps is not None
        selection, example = context.selection, context.example_input
        names = selection.layers(model, example_input=example)
        plan = selection.select(model, example_input=example)
        if context.world_size > 1:
            plan = same_on_all_ranks(plan)
        self._filters, self._steps = dict(plan.filters), context.total_steps
        self._multiple, self._average = selection.round_to, context.average
        floors = last_match([*prunable_layers(model)], selection.floors, "floor")
        for name in self._found:
            layer = cast(Any, model.get_submodule(name))
            if name not in names:
                layer.gate.requires_grad_(False)
                continue
            self._gates[name] = layer.gate
            self._least[name] = floor_count(floors.get(name, 1), self._filters[name])
            self._hooks.append(layer.register_forward_pre_hook(_decide))
            self._hooks += hang_in(model, self._found[name], layer.gate)
        if missing := [name for name in names if name not in self._gates]:
            raise no_gates(self.name, missing[0])
        number = sum(self._filters[name] for name in names)
        going = sum(len(gone) for gone in plan.pruned.values())
        self._target = 1 - going / number if number else 0.0
        device = next(model.parameters()).device
        self._weight = torch.zeros((), device=device)
        self._seen = torch.zeros(number + 1, dtype=torch.float64, device=device)
        if self._gates and all(bool(gate.fixed) for gate in self._gates.values()):
            self._write_plan()  # the stage goes on behind that step

    def before_step(self, step: int) -> bool:
        """Write the terms' weight; the terms themselves stay what they are."""
        if self._gates:
            self._weight.fill_(self.settings.weight_at(step, self._steps))
        return False

    def batch_terms(self, batch: tuple[Tensor, Tensor], outputs: Tensor) -> dict[str, Tensor]:
        """Both terms; their gradient is that at the running means."""
        if not self._gates:
            return {}
        gates = list(self._gates.values())
        means = torch.cat([gate.mean for gate in gates])
        values = torch.cat([cast(Tensor, gate.values) for gate in gates], 1)
        self._seen[:-1] += values.detach().sum(0)
        self._seen[-1] += len(values)
        polarized, active = polarization(means, values), activation(means, values)
        if self.settings.aim:
            active = (active - self._target).square()
        for gate in gates:
            gate.values = None
        weight = self._weight
        return {
            "polarization": self.settings.polarization * weight * polarized,
            "activation": self.settings.activation * weight * active,
        }

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Take up what the gates said in the step, of all ranks; fix them when it is time."""
        if not self._gates or self._plan is not None:
            return
        seen = self._average(self._seen)
        means = (seen[:-1] / seen[-1]).split([len(gate.mean) for gate in self._gates.values()])
        ends = step + 1 >= self.settings.fixed * self._steps
        for (name, gate), mean in zip(self._gates.items(), means, strict=True):
            # Of no image in a step that is left out, and of no number in one that is bad.
            moved = gate.mean.lerp(mean.to(gate.mean.dtype), 1 - _MEMORY)
            gate.mean.copy_(torch.where(mean.isfinite(), moved, gate.mean))
            gate.stays.copy_(staying(gate.mean, self._least[name], self._multiple))
            gate.fixed.fill_(ends)
        self._seen.zero_()
        if ends:
            self._write_plan()

    def scalars(self, step: int) -> dict[str, float]:
        """Share of open gates, mean variance over the images, share of channels that would stay."""
        if not self._gates:
            return {}
        means = torch.cat([gate.mean for gate in self._gates.values()])
        stays = torch.cat([gate.stays for gate in self._gates.values()])
        return {
            "gates_open": float(means.mean()),
            "gates_variance": float((means * (1 - means)).mean()),
            "gates_stay": float(stays.float().mean()),
        }

    def state_dict(self) -> dict[str, Any]:
        """How many are to stay, which a budget may find otherwise later; the rest is in tensors."""
        return {"target": self._target}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up how many are to stay."""
        self._target = float(state["target"])

    def _write_plan(self) -> None:
        gone = {
            name: (~gate.stays).nonzero().flatten().tolist() for name, gate in self._gates.items()
        }
        self._plan = PruningPlan.from_indices(self._filters, gone)


class Gate(nn.Module):
    """The gates of one layer's filters.

    No layers of its own, whose weights would look like the network's.

    Args:
        weight: of the layer, (filters, inputs, ...), on the CPU or the meta device.
        settings: of the method.

    Attributes:
        mean: running mean of the gates over all images, (filters,).
        stays: which would stay if the stage ended now, bool; the gates in evaluation mode.
        fixed: whether the gates are ``stays`` in training as well.
        values: the gates of the batch, (n, filters), until the terms are made of them.
        factor: what channels are multiplied by, (n or 1, filters).
    """

    mean: Tensor
    stays: Tensor
    fixed: Tensor

    def __init__(self, weight: Tensor, settings: Settings) -> None:
        super().__init__()
        filters, inputs = weight.shape[:2]
        self._slope, self._gradient = settings.slope, settings.gradient
        first = torch.empty(settings.hidden, inputs)
        second, bias = torch.empty(filters, settings.hidden), torch.empty(filters)
        if weight.device.type != "meta":
            # By the weight itself: the same on all ranks, and however often a stage begins anew.
            seed = int(sha256_of(weight.detach().contiguous())[:14], 16)
            numbers = torch.Generator().manual_seed(seed)
            first.normal_(0, math.sqrt(2 / inputs), generator=numbers)
            second.normal_(0, 0.5 / math.sqrt(settings.hidden), generator=numbers)
            bias.normal_(settings.open, settings.spread, generator=numbers)
        like: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        self.first = nn.Parameter(first.to(**like))
        self.first_bias = nn.Parameter(torch.zeros(settings.hidden, **like))
        self.second = nn.Parameter(second.to(**like))
        self.second_bias = nn.Parameter(bias.to(**like))
        for parameter in self.parameters():
            cast(Any, parameter).spared = True
        self.register_buffer("mean", torch.ones(filters, **like))
        self.register_buffer("stays", torch.ones(filters, dtype=torch.bool, device=weight.device))
        self.register_buffer("fixed", torch.zeros((), dtype=torch.bool, device=weight.device))
        self.values: Tensor | None = None
        self.factor: Tensor | None = None

    def scores(self, features: Tensor) -> Tensor:
        """Of each image and filter, (n, filters), of a layer's input (n, inputs, ...)."""
        with torch.autocast(features.device.type, enabled=False):
            pooled = features.to(self.first.dtype)
            if pooled.dim() > 2:
                pooled = pooled.flatten(2).mean(2)
            hidden = F.relu(F.linear(pooled, self.first, self.first_bias))
            return F.linear(hidden, self.second, self.second_bias)

    def decide(self, features: Tensor) -> None:
        """Open and close for the images of a batch."""
        if not self.training:
            self.factor = self.stays[None]
            return
        scores = self.scores(features)
        # Where gates are fixed too they are computed, and have gradients, of zero: every rank waits
        # for those of all parameters.
        held = self.stays.to(scores.dtype)
        self.values = torch.where(self.fixed, held, straight_through(scores, self._slope))
        task = straight_through(scores, self._slope, self._gradient)
        self.factor = torch.where(self.fixed, held, task)


def straight_through(scores: Tensor, slope: str = "sigmoid", gradient: float = 1.0) -> Tensor:
    """1 where a score is above 0, else 0, with the gradient of a sigmoid or of the identity.

    Args:
        scores: of any shape.
        slope: ``sigmoid`` or ``identity``.
        gradient: what it is multiplied by.
    """
    soft = gradient * (torch.sigmoid(scores) if slope == "sigmoid" else scores)
    return (scores > 0).to(scores.dtype) + (soft - soft.detach())


def polarization(means: Tensor, gates: Tensor) -> Tensor:
    r"""Mean variance of gates over the images, :math:`\frac{1}{K} \sum_k m_k (1 - m_k)`.

    Its gradient goes to the gates of this batch, as if the mean of all images moved with them:
    :math:`(1 - 2 m_k) / (K n)` each. The mean of it over ranks and micro-batches is that of a
    batch of all of them.

    Args:
        means: m, (K,), over all images.
        gates: of the n images here, (n, K).
    """
    return (means * (1 - means)).mean() + _moving(((1 - 2 * means) * gates.mean(0)).mean())


def activation(means: Tensor, gates: Tensor) -> Tensor:
    r"""Share of open gates, :math:`\frac{1}{K} \sum_k m_k`, with its gradient likewise."""
    return means.mean() + _moving(gates.mean())


def staying(means: Tensor, least: int, multiple: int) -> Tensor:
    """Which filters stay, bool: those open for half of the images or more, and no fewer than asked.

    Where more have to stay than that, those of the largest means; the first ones of equals.

    Args:
        means: (filters,).
        least: number of filters that stay at least.
        multiple: their number is rounded up to a multiple of it.
    """
    number = (means >= 0.5).sum().clamp_min(least)
    number = -(-number // multiple) * multiple
    order = means.argsort(descending=True, stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(means), device=means.device)
    return places < number


def _moving(value: Tensor) -> Tensor:
    """Zero, with the gradient of ``value``."""
    return value - value.detach()


def _decide(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    # A function, which a copy of the network shares.
    cast(Any, layer).gate.decide(inputs[0])
