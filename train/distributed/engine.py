"""What does a training step over the ranks: DistributedDataParallel, or DeepSpeed's ZeRO.

Both train float32 weights, under autocast where the precision says so, and keep what resuming
needs in the same form: a run may go on with another engine, or another number of ranks.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer


def autocast_of(accelerator: Accelerator) -> contextlib.AbstractContextManager[Any]:
    """The run's precision, for what is computed as forward passes are."""
    types = {"bf16": torch.bfloat16, "fp16": torch.float16}
    # Under DeepSpeed Accelerate itself knows of none, see make_accelerator.
    bf16 = getattr(accelerator, "in_bf16", False)
    lower = torch.bfloat16 if bf16 else types.get(accelerator.mixed_precision)
    if lower is None:
        return contextlib.nullcontext()
    return torch.autocast(accelerator.device.type, lower)


def forward_pass(
    model: Callable[[Tensor], Any], accelerator: Accelerator
) -> Callable[[Tensor], Tensor]:
    """A network's forward pass in the run's precision, with outputs in float32 or more."""

    def forward(inputs: Tensor) -> Tensor:
        with autocast_of(accelerator):
            outputs = model(inputs)
        return outputs if outputs.dtype == torch.float64 else outputs.float()

    return forward


def distribute(network: nn.Module, accelerator: Accelerator) -> nn.Module:
    """A network under DistributedDataParallel, or itself where there is one rank.

    Gradients are views of the buckets that are reduced, rather than copied there and back. Running
    statistics stay each rank's own, and are not sent in every forward pass: no training forward
    pass reads them, and the main rank's, which are those that are evaluated and saved, are what
    they would be. Other buffers are sent, as something may read them.

    A static graph is not promised to DDP: where it looks for no unused parameters, that saves
    nothing after the first step.
    """
    if accelerator.num_processes == 1:
        return network
    own = [
        f"{name}.{buffer}" if name else buffer
        for name, module in network.named_modules()
        if isinstance(module, _NormBase)
        for buffer, _ in module.named_buffers(recurse=False)
    ]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(network, own)
    device = accelerator.device
    model = DistributedDataParallel(
        network,
        device_ids=None if device.type == "cpu" else [device.index],
        gradient_as_bucket_view=True,
    )
    settle_buckets(model)
    return model


class _SumOfParameters(nn.Module):
    """Reaches every parameter, in their order, and none of the network's hooks and buffers."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._reached = tuple(p for p in network.parameters() if p.requires_grad)

    def forward(self, total: Tensor) -> Tensor:
        # A chain, which autograd goes back along: the last parameter's gradient is the first one.
        for parameter in self._reached:
            total = total + parameter.sum()
        return total


def settle_buckets(model: DistributedDataParallel) -> None:
    """Have DDP arrange its buckets of gradients before the first step.

    By itself it arranges them anew after the first one. Where in a bucket a gradient lies decides
    in which order the ranks' values are added (from three ranks on, that is rounded differently),
    so the first step of a resumed process would differ from the same step of an undisturbed one.
    The arrangement is that of the parameters backwards; neither weights nor buffers nor random
    numbers change. To be called on all ranks.
    """
    network, with_buffers = model.module, model.broadcast_buffers
    model.module, model.broadcast_buffers = _SumOfParameters(network), False
    try:
        model(torch.zeros((), device=next(network.parameters()).device)).backward()
    finally:
        model.module, model.broadcast_buffers = network, with_buffers
    network.zero_grad(set_to_none=True)


def numbers_of(network: nn.Module, optimizer: Optimizer) -> list[int]:
    """Places among the network's parameters of the optimiser's, in the order of its groups."""
    places = {id(parameter): place for place, parameter in enumerate(network.parameters())}
    return [places[id(p)] for group in optimizer.param_groups for p in group["params"]]


def plain(value: Any) -> Any:
    """A setting of a group of parameters; of a tensor its number."""
    return value.item() if isinstance(value, Tensor) else value


def portable(state: Mapping[str, Any], numbers: Sequence[int]) -> dict[str, Any]:
    """An optimiser's state_dict in the one form of all engines and groups.

    Args:
        state: as ``torch.optim`` numbers it, through the groups.
        numbers: see :func:`numbers_of`.

    Returns:
        the state with parameters numbered as the network has them, so that their groups may
        differ, and numbers in place of the counts that some optimisers keep in their groups as
        tensors (they make tensors of them again). ``torch.optim`` takes it as it is.
    """
    groups = [
        {
            **{key: plain(value) for key, value in g.items()},
            "params": [numbers[number] for number in g["params"]],
        }
        for g in state["param_groups"]
    ]
    entries = {numbers[number]: own for number, own in state["state"].items()}
    return {"state": entries, "param_groups": groups}


# Settings of torch's optimisers that say how they compute, not what.
_WAYS = ("foreach", "fused", "capturable")


class Engine:
    """A network and its optimiser, on one process or under DistributedDataParallel.

    A step is any number of micro-batches, each with a forward pass inside :meth:`micro_batch` and
    a :meth:`backward`, then :meth:`gradient_norm`, and :meth:`step` or :meth:`drop`.

    Args:
        accelerator: the ranks.
        network: on its device; the same on all ranks.
        optimizer: over the network's parameters.
        clip: norm that the gradient is scaled down to where it is longer; None for no clipping.

    Attributes:
        model: what makes forward passes.
        saves_together: whether :meth:`state_dict` takes all ranks; otherwise any may ask.
    """

    saves_together = False

    def __init__(
        self,
        accelerator: Accelerator,
        network: nn.Module,
        optimizer: Optimizer,
        *,
        clip: float | None = None,
    ) -> None:
        self.accelerator, self._clip = accelerator, clip
        self._parameters = [p for p in network.parameters() if p.requires_grad]
        self._norm: Tensor | None = None
        self._rates: list[Tensor] | None = None
        self._numbers = numbers_of(network, optimizer)
        self.model, self._optimizer = self._prepare(network, optimizer)
        self._forward = forward_pass(self.model, accelerator)

    def _prepare(self, network: nn.Module, optimizer: Optimizer) -> tuple[Any, Any]:
        return distribute(network, self.accelerator), optimizer

    def set_learning_rate(self, lr: float) -> None:
        """The learning rate of the step to come, of which each group has its share."""
        for number, group in enumerate(self._optimizer.param_groups):
            rate = lr * group.get("lr_scale", 1.0)
            group["lr"] = rate if self._rates is None else self._rates[number].fill_(rate)

    def keep_rates_in_tensors(self) -> None:
        """Have learning rates where a recorded step reads them: in tensors that stay in place."""
        device = self._parameters[0].device
        self._rates = [torch.zeros((), device=device) for _ in self._optimizer.param_groups]

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """For what is computed as forward passes are."""
        return autocast_of(self.accelerator)

    def forward(self, inputs: Tensor) -> Tensor:
        """The network's outputs, in float32."""
        return self._forward(inputs)

    def micro_batch(self, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        """For a micro-batch's forward and backward pass; the last one's averages the gradients."""
        if last or not isinstance(self.model, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.model.no_sync()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of ``loss``, already divided by the number of micro-batches."""
        scaler = self.accelerator.scaler
        (loss if scaler is None else scaler.scale(loss)).backward()

    def gradient_norm(self) -> Tensor:
        """L2 norm over all parameters, as the optimiser gets the gradient, but before clipping."""
        if self.accelerator.scaler is not None:
            # What the optimiser gets, not what the scaler made of it.
            self.accelerator.scaler.unscale_(self._optimizer)
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        self._norm = torch.nn.utils.get_total_norm(gradients)
        return self._norm

    def step(self) -> None:
        """Clip, let the optimiser make its step, and forget the gradient."""
        self.update()
        self._optimizer.zero_grad(set_to_none=True)

    def update(self) -> None:
        """Clip, and let the optimiser make its step; the gradient stays."""
        if self._clip is not None and self._norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self._clip, self._norm)
        scaler = self.accelerator.scaler
        if scaler is None:
            self._optimizer.step()
        else:
            scaler.step(self._optimizer)
            scaler.update()

    def drop(self) -> None:
        """Forget the gradient without a step."""
        self._optimizer.zero_grad(set_to_none=True)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()

    def take_over(self, parameters: Sequence[nn.Parameter] | None) -> None:
        """Go on from the values that somebody has given to the network's ``parameters``."""

    def state_dict(self) -> dict[str, Any]:
        """The optimiser's state, see :func:`portable` and ``saves_together``."""
        return portable(self._optimizer.state_dict(), self._numbers)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a :meth:`state_dict` of any engine and number of ranks."""
        groups = self._optimizer.param_groups
        # How it computes is this device's, and not that on which the state was made.
        own = [{key: group[key] for key in _WAYS if key in group} for group in groups]
        self._optimizer.load_state_dict(state)
        for group, ways in zip(self._optimizer.param_groups, own, strict=True):
            group.update(ways)
