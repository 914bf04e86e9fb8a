"""Scores of filters by what they give: the mean of their outputs after ReLU, while training."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tpp.channels.channel_map import LayerChannels, find_channels


class MeanActivations:
    r"""The mean over images and positions of what each filter of some layers gives, after ReLU.

    .. math:: s_j = mean_{n, x, y} max(0, a_{njxy})

    a is the output of the layer's BatchNorm where it has one, else its own: activations need not
    be modules. Values are kept on the device, and are the same on all ranks once a step is
    counted; micro-batches count alike.

    Args:
        model: on its device; gets a hook for each layer.
        layers: names of Conv2d or Linear layers.
        average: mean over the ranks.
        example_input: to trace the network with.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Iterable[str],
        average: Callable[[Tensor], Tensor],
        *,
        example_input: Tensor | None = None,
    ) -> None:
        channels = find_channels(model, layers, coupled=True, example_input=example_input)
        self._average = average
        self._filters = {layer: found.filters for layer, found in channels.items()}
        self._seen: dict[str, Tensor] = {}
        self._handles = [_watch(model, found, self._seen) for found in channels.values()]
        weight = next(model.parameters())
        dtype = torch.promote_types(weight.dtype, torch.float32)
        # Sums over a step, and over the steps counted; the last element is how many there were.
        size = sum(self._filters.values()) + 1
        self._step = torch.zeros(size, dtype=dtype, device=weight.device)
        self._total = torch.zeros(size, dtype=torch.float64, device=weight.device)

    def add(self) -> None:
        """Take up a micro-batch, after its forward pass in training mode."""
        self._step.add_(torch.cat([*(self._seen.pop(name) for name in self._filters), self._one()]))

    def count(self, *, keep: bool = True) -> None:
        """Take up a step, if there was one and its values are finite; on all ranks together.

        Args:
            keep: whether it is one of those that are to be averaged.
        """
        if keep:
            means = self._average(self._step / self._step[-1])
            self._total += torch.where(means.isfinite().all(), means, 0)
        self._step.zero_()

    @property
    def steps(self) -> int:
        """How many steps were taken up; waits for the device."""
        return int(self._total[-1])

    def scores(self) -> dict[str, Tensor]:
        """Per layer the means of its filters, (n,), float64; of one step at least."""
        means = (self._total[:-1] / self._total[-1]).split([*self._filters.values()])
        return dict(zip(self._filters, means, strict=True))

    def forget(self) -> None:
        """Begin anew."""
        self._total.zero_()

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def state_dict(self) -> dict[str, Any]:
        """The sums; JSON-ready, and exact."""
        *sums, steps = self._total.tolist()
        return {"steps": int(steps), "sums": sums} if steps else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` returned, of the same layers."""
        self._total.zero_()
        if state:
            values = torch.tensor([*state["sums"], state["steps"]], dtype=torch.float64)
            self._total.copy_(values)

    def _one(self) -> Tensor:
        return torch.ones_like(self._step[-1:])


def _watch(model: nn.Module, channels: LayerChannels, seen: dict[str, Tensor]) -> RemovableHandle:
    """Have the means of every pass in training mode put where they are looked for."""
    layer, norms = channels.layer, channels.norms
    watched = model.get_submodule(norms[0].module if norms else layer)
    features = 1 if norms or isinstance(watched, nn.Conv2d) else -1
    positions = norms[0].positions.to(next(model.parameters()).device) if norms else None

    # A function, which copies of the network share, and so know that they are not meant: a bound
    # method would be copied with all that it holds.
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if module is not watched or not module.training:
            return
        values = output.detach()
        dtype = torch.promote_types(values.dtype, torch.float32)
        others = [axis for axis in range(values.dim()) if axis != features % values.dim()]
        means = values.relu().mean(others, dtype=dtype)
        seen[layer] = means if positions is None else means[positions].mean(1)

    return watched.register_forward_hook(hook)
