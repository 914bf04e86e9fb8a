"""The regularised stage for any training loop: three calls a step."""

import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tpp.channels.channel_map import LayerChannels, check_plan, find_channels
from tpp.common.errors import UserError
from tpp.models.layers import layer_sizes, prunable_layers
from tpp.plan import PruningPlan
from tpp.regularization.backward import watch_backward
from tpp.regularization.gram import BlockBatch, entry_decay, layer_blocks, make_batches
from tpp.regularization.schedule import GrowthSchedule
from tpp.regularization.sharding import work_units


@dataclass(frozen=True)
class LayerStatistics:
    """What a person watches to see TPP at work in one layer.

    Attributes:
        pruned_magnitude: mean absolute weight of the filters that will go.
        kept_magnitude: mean absolute weight of the filters that stay.
        correlation: mean of (w_i . w_j)^2 over filters i that go and j that stay.
    """

    pruned_magnitude: float
    kept_magnitude: float
    correlation: float


class Regularizer:
    """Drives the filters of a plan, and all that ties others to them, to zero.

    In a training loop of your own::

        regularizer = tpp.Regularizer(model, plan, rank=rank, world_size=world_size)
        ...
        (loss + regularizer.penalty(step)).backward()
        optimizer.step()
        regularizer.after_step(step)

    from step 0 on until :meth:`finished`, after ``growth.total_steps`` steps: only then are all
    filters of the plan at zero, and their removal changes nothing. The default ``growth`` is the
    published one, of 110,001 steps.

    Under data parallelism every rank computes its share of the penalty times ``world_size``, so
    that the averaging of gradients over ranks yields the exact sum; nothing else is communicated.
    With gradient accumulation add the penalty once per optimiser step, to the last micro-batch's
    loss: unscaled, or times the number of micro-batches where the engine divides every loss by it
    (DeepSpeed, Accelerate; docs/distributed.md).

    Args:
        model: the network, not wrapped (the module inside DistributedDataParallel).
        plan: the filters to remove.
        rank: this process's rank.
        world_size: number of ranks over which gradients are averaged.
        gram_weight: weight of the gram penalty relative to the decay; 0 leaves the decay alone.
        growth: how lambda grows and when layers are zeroed.
        example_input: a batch to trace the network with, see :func:`tpp.select_filters`.

    Raises:
        UserError: the plan does not fit the model, a layer's filters cannot be removed, the
            stabilise phase ends before the last layer is zeroed, or weights are split over ranks
            (ZeRO stage 3, FSDP).
    """

    def __init__(
        self,
        model: nn.Module,
        plan: PruningPlan,
        *,
        rank: int = 0,
        world_size: int = 1,
        gram_weight: float = 1000.0,
        growth: GrowthSchedule | None = None,
        example_input: Tensor | None = None,
    ) -> None:
        if not 0 <= rank < world_size:
            raise UserError(f"rank must be in 0..{world_size - 1}, not {rank}")
        self.plan = plan
        self.growth = growth or GrowthSchedule()
        self.gram_weight = gram_weight
        self.world_size = world_size
        layers = prunable_layers(model)
        for layer, filters in plan.filters.items():
            if layer in layers:
                _check_whole(layer, layers[layer])
            if layer not in layers or layers[layer].weight.shape[0] != filters:
                found = layers[layer].weight.shape[0] if layer in layers else "no such layer"
                raise UserError(
                    f"plan does not fit the model: {layer}: {filters} filters planned, "
                    f"model has {found}"
                )
        self._model = model
        active = plan.active_layers
        channels = find_channels(model, active, example_input=example_input)
        check_plan(plan, channels)
        numbers = {layer: number for number, layer in enumerate(layers)}
        self._numbers = {layer: numbers[layer] for layer in active}
        if active:
            self.growth.check_zero_out(max(self._numbers.values()))
        self._layers = {layer: layers[layer] for layer in active}
        self._vectors = {
            layer: list(_entries(model, layers[layer], channels[layer])) for layer in active
        }
        self._rank = rank
        self._row_sizes, self._groups = layer_sizes(model, plan)
        self._indices: dict[tuple[str, str, torch.device], Tensor] = {}
        self._scales, self._is_growing = torch.zeros(2), False
        self._share_out(at_zero=())

    def _share_out(self, at_zero: Collection[str]) -> None:
        """Give each rank its part of the penalty on the layers that are not yet held at zero.

        That of the others is zero, and so is its gradient.
        """
        self._at_zero = frozenset(at_zero)
        plan, row_sizes, groups = self.plan, self._row_sizes, self._groups
        left = PruningPlan(
            plan.filters,
            {layer: [] if layer in self._at_zero else gone for layer, gone in plan.pruned.items()},
        )
        self.units = work_units(
            left, row_sizes, rank=self._rank, world_size=self.world_size, groups=groups
        )
        blocks = [
            (unit.layer, block)
            for unit in self.units
            for block in layer_blocks(
                plan.filters[unit.layer], plan.pruned[unit.layer], groups[unit.layer], unit.rows
            )
        ]
        # Without the gram penalty there is nothing but decay, and nothing to multiply.
        self._batches: list[BlockBatch] = (
            make_batches(blocks, row_sizes) if self.gram_weight else []
        )
        self._entry_mask = _mask(
            [
                (entries.length, entries.of(unit.rows))
                for unit in self.units
                for entries in self._vectors[unit.layer]
            ]
        )
        for key in [key for key in self._indices if key[1] == "owned"]:
            del self._indices[key]

    # torch.compiler.disable would import the compiler now, this does so when it is called.
    @torch._disable_dynamo
    def before_step(self, step: int) -> bool:
        """Write the factors of 0-based ``step`` into tensors, for :meth:`loss_terms` to read.

        Layers that :meth:`after_step` of the step before has held at zero are left out, and what is
        left is shared out among the ranks anew: their penalty and its gradient are exactly zero.

        Returns:
            Whether :meth:`loss_terms` computes other terms than before.
        """
        for layer, module in self._layers.items():
            _check_whole(layer, module)
        strength = self.growth.strength(step)
        changed = self._is_growing != (strength > 0.0)
        self._is_growing = strength > 0.0
        # By the step alone, so that a resumed run adds up in the same order.
        at_zero = {n for n, number in self._numbers.items() if self.growth.zeroed(number, step - 1)}
        if at_zero != self._at_zero:
            self._share_out(at_zero)
            changed = True
        self._scales = factors_for(self._model, self._scales)
        scale = strength * self.world_size
        self._scales[0].fill_(self.gram_weight * scale)
        self._scales[1].fill_(scale)
        return changed

    @torch._disable_dynamo
    def loss_terms(self) -> dict[str, Tensor]:
        """The penalty of the step that :meth:`before_step` was told, in its parts.

        ``gram`` and ``decay``, each a scalar; nothing in them depends on the step but through
        tensors, as long as ``before_step`` says so.
        """
        if not self._is_growing:
            zero = _nothing(self._scales.device)
            return {"gram": zero, "decay": zero}
        gram, decay = self._sums()
        return {"gram": self._scales[0] * gram, "decay": self._scales[1] * decay}

    def _sums(self) -> tuple[Tensor, Tensor]:
        """This rank's share of the gram mean squares and of half the squared weights."""
        device = next(self._model.parameters()).device
        if not self.units:
            return _nothing(device), _nothing(device)
        gram = torch.zeros((), device=device)
        decay = torch.zeros((), device=device)
        if not self._batches:
            for unit in self.units:
                rows = self._index(unit.layer, "owned", device)
                decay = decay + 0.5 * self._weight(unit.layer)[rows].float().square().sum()
        for batch in self._batches:
            weights = [self._weight(name) for name in batch.names]
            batch_gram, batch_decay = batch.penalty(weights)
            gram = gram + batch_gram
            decay = decay + batch_decay
        vectors = [entries.vector for unit in self.units for entries in self._vectors[unit.layer]]
        if vectors:
            self._entry_mask = self._entry_mask.to(device)
            decay = decay + entry_decay(vectors, self._entry_mask)
        return gram, decay

    def penalty(self, step: int) -> Tensor:
        """This rank's share of the penalty at 0-based ``step``, times the number of ranks.

        A scalar to add to the task loss: ``lambda * (gram_weight * gram + decay)`` summed over
        layers, in float32 whatever the autocast.

        Raises:
            UserError: the weights have been split over ranks since (ZeRO stage 3, FSDP). Its
                backward pass raises one where DeepSpeed would count it otherwise.
        """
        self.before_step(step)
        terms = self.loss_terms()
        return self._watched(terms["gram"] + terms["decay"])

    @torch._disable_dynamo
    def _watched(self, penalty: Tensor) -> Tensor:
        if "deepspeed" not in sys.modules:
            return penalty
        vectors = [entries.vector for of in self._vectors.values() for entries in of]
        weights = [self._weight(layer) for layer in self._layers]
        return watch_backward(penalty, self._model, [*weights, *vectors])

    @torch._disable_dynamo
    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Hold the layers whose turn has come at zero; call it after the optimiser's ``step``."""
        for layer, number in self._numbers.items():
            if self.growth.zeroed(number, step):
                weight = self._weight(layer)
                rows = self._index(layer, "pruned", weight.device)
                weight.index_fill_(0, rows, 0.0)
                for number, entries in enumerate(self._vectors[layer]):
                    places = self._index(layer, f"entries {number}", weight.device)
                    entries.vector.index_fill_(0, places, 0.0)

    def finished(self, step: int) -> bool:
        """Whether ``step`` steps are all that the stage needs."""
        return step >= self.growth.total_steps

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must have again: the plan. All else follows from the step."""
        return {"plan": self.plan.to_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Check that a resumed run regularises the same filters.

        Raises:
            UserError: the saved plan is another one.
        """
        if PruningPlan.from_dict(state["plan"]) != self.plan:
            raise UserError("the checkpoint to resume from regularises another set of filters")

    @torch.no_grad()
    def statistics(self) -> dict[str, LayerStatistics]:
        """Magnitudes and correlations per pruned layer, for monitoring."""
        result = {}
        for layer in self._layers:
            rows = self._weight(layer).detach().flatten(1).float()
            pruned = rows[self._index(layer, "pruned", rows.device)]
            kept = rows[self._index(layer, "kept", rows.device)]
            values = torch.stack(
                [pruned.abs().mean(), kept.abs().mean(), (pruned @ kept.T).square().mean()]
            )
            result[layer] = LayerStatistics(*values.tolist())
        return result

    def _weight(self, layer: str) -> Tensor:
        return self._layers[layer].weight

    def _index(self, layer: str, kind: str, device: torch.device) -> Tensor:
        key = (layer, kind, device)
        if key not in self._indices:
            rows: Sequence[int]
            if kind == "kept":
                rows = self.plan.kept(layer)
            elif kind == "owned":
                rows = next((unit.rows for unit in self.units if unit.layer == layer), ())
            else:
                rows = self.plan.pruned[layer]
            if kind.startswith("entries"):
                rows = self._vectors[layer][int(kind.split()[1])].of(rows)
            self._indices[key] = torch.tensor(rows, dtype=torch.int64, device=device)
        return self._indices[key]


@dataclass(frozen=True)
class _Entries:
    """The entries of a bias, or of a BatchNorm's scale or shift, that belong to a layer's filters.

    The vector is looked up in its module each time, as engines may replace it.
    """

    module: nn.Module
    name: str
    positions: Tensor | None  # (filters, k); None: entry i is filter i's

    @property
    def vector(self) -> Tensor:
        return getattr(self.module, self.name)

    @property
    def length(self) -> int:
        return len(self.vector)

    def of(self, filters: Sequence[int]) -> Sequence[int]:
        """Where the entries of some filters stand."""
        if self.positions is None:
            return filters
        return self.positions[list(filters)].flatten().tolist()


def _entries(model: nn.Module, layer: nn.Module, channels: LayerChannels) -> Iterator[_Entries]:
    if channels.bias is not None:
        yield _Entries(layer, "bias", None)
    for norm in channels.norms:
        module = model.get_submodule(norm.module)
        for name, _ in module.named_parameters(recurse=False):
            yield _Entries(module, name, norm.positions)


def _nothing(device: torch.device) -> Tensor:
    """A penalty of nothing, which has a backward pass all the same."""
    return torch.zeros((), device=device, requires_grad=True)


def factors_for(model: nn.Module, factors: Tensor) -> Tensor:
    """Factors of terms of the weights, on their device and in their type, float32 at least."""
    weight = next(model.parameters())
    return factors.to(weight.device, torch.promote_types(weight.dtype, torch.float32))


def _mask(parts: Iterable[tuple[int, Iterable[int]]]) -> Tensor:
    """Ones at chosen positions of vectors laid one after the other: (length, positions) each."""
    masks = [torch.zeros(0)]
    for length, positions in parts:
        mask = torch.zeros(length)
        mask[list(positions)] = 1.0
        masks.append(mask)
    return torch.cat(masks)


def _check_whole(layer: str, module: nn.Conv2d | nn.Linear) -> None:
    """Refuse a weight of which this rank holds but a part."""
    # Where nobody has imported it, which takes as long as a third of torch, there is no DTensor.
    tensor = sys.modules.get("torch.distributed.tensor")
    weight = getattr(module, "weight", None)
    split = tensor is not None and isinstance(weight, tensor.DTensor)
    if weight is None or split or weight.dim() < 2 or weight.numel() == 0:
        raise UserError(
            f"{layer}: its weight is split over ranks (ZeRO stage 3 or FSDP), and the penalty "
            "needs whole filters; use DistributedDataParallel or ZeRO stage 0, 1 or 2"
        )
