"""The regularised stage for any training loop: three calls a step."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tpp.channels import LayerChannels, find_channels
from tpp.errors import UserError
from tpp.penalty import block_penalty, entry_decay
from tpp.plan import PruningPlan
from tpp.schedule import GrowthSchedule
from tpp.selection import prunable_layers
from tpp.sharding import work_units


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

    Under data parallelism every rank computes its share of the penalty times ``world_size``, so
    that the averaging of gradients over ranks yields the exact sum; nothing else is communicated.
    With gradient accumulation add the penalty once per optimiser step, unscaled, to the last
    micro-batch's loss.

    Args:
        model: the network, not wrapped (the module inside DistributedDataParallel).
        plan: the filters to remove.
        rank: this process's rank.
        world_size: number of ranks over which gradients are averaged.
        gram_weight: weight of the gram penalty relative to the decay; 0 leaves the decay alone.
        growth: how lambda grows and when layers are zeroed.
        example_input: a batch to trace the network with, see :func:`tpp.select_filters`.

    Raises:
        UserError: the plan does not fit the model, a layer's filters cannot be removed, or the
            stabilise phase ends before the last layer is zeroed.
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
            if layer not in layers or layers[layer].weight.shape[0] != filters:
                found = layers[layer].weight.shape[0] if layer in layers else "no such layer"
                raise UserError(
                    f"plan does not fit the model: {layer}: {filters} filters planned, "
                    f"model has {found}"
                )
        self._model = model
        self._channels = find_channels(model, plan.active_layers, example_input=example_input)
        self._numbers = {layer: number for number, layer in enumerate(layers)}
        if plan.active_layers:
            self.growth.check_zero_out(max(self._numbers[name] for name in plan.active_layers))
        row_sizes = {name: layers[name].weight[0].numel() for name in plan.filters}
        self.units = work_units(plan, row_sizes, rank=rank, world_size=world_size)
        self._indices: dict[tuple[str, str, torch.device], Tensor] = {}

    def penalty_terms(self, step: int) -> dict[str, Tensor]:
        """The penalty of 0-based ``step`` in its parts, ``gram`` and ``decay``; each a scalar."""
        strength = self.growth.strength(step)
        device = next(self._model.parameters()).device
        gram = torch.zeros((), device=device)
        decay = torch.zeros((), device=device)
        if strength == 0.0:
            return {"gram": gram, "decay": decay}
        for unit in self.units:
            channels = self._channels[unit.layer]
            weight = self._model.get_parameter(channels.weight)
            block = self._index(unit.layer, "block", weight.device, unit.rows)
            kept = self._index(unit.layer, "kept", weight.device, self.plan.kept(unit.layer))
            unit_gram, unit_decay = block_penalty(weight, block, kept)
            gram = gram + unit_gram
            decay = decay + unit_decay
            for vector in self._vectors(channels):
                decay = decay + entry_decay(vector, block)
        scale = strength * self.world_size
        return {"gram": self.gram_weight * scale * gram, "decay": scale * decay}

    def penalty(self, step: int) -> Tensor:
        """This rank's share of the penalty at 0-based ``step``, times the number of ranks.

        A scalar to add to the task loss: ``lambda * (gram_weight * gram + decay)`` summed over
        layers, in float32 whatever the autocast.
        """
        terms = self.penalty_terms(step)
        return terms["gram"] + terms["decay"]

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Hold the layers whose turn has come at zero; call it after the optimiser's ``step``."""
        for layer in self.plan.active_layers:
            if self.growth.zeroed(self._numbers[layer], step):
                channels = self._channels[layer]
                weight = self._model.get_parameter(channels.weight)
                rows = self._index(layer, "pruned", weight.device, self.plan.pruned[layer])
                weight.index_fill_(0, rows, 0.0)
                for vector in self._vectors(channels):
                    vector.index_fill_(0, rows, 0.0)

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
        for layer in self.plan.active_layers:
            weight = self._model.get_parameter(self._channels[layer].weight)
            rows = weight.detach().flatten(1).float()
            pruned = rows[self._index(layer, "pruned", rows.device, self.plan.pruned[layer])]
            kept = rows[self._index(layer, "kept", rows.device, self.plan.kept(layer))]
            values = torch.stack(
                [pruned.abs().mean(), kept.abs().mean(), (pruned @ kept.T).square().mean()]
            )
            result[layer] = LayerStatistics(*values.tolist())
        return result

    def _vectors(self, channels: LayerChannels) -> list[Tensor]:
        """Bias, BN scale and BN shift: one entry per filter."""
        names = [channels.bias] if channels.bias else []
        for norm in channels.norms:
            module = self._model.get_submodule(norm)
            names += [f"{norm}.{name}" for name, _ in module.named_parameters(recurse=False)]
        return [self._model.get_parameter(name) for name in names]

    def _index(self, layer: str, kind: str, device: torch.device, rows: Any) -> Tensor:
        key = (layer, kind, device)
        if key not in self._indices:
            self._indices[key] = torch.tensor(list(rows), dtype=torch.int64, device=device)
        return self._indices[key]
