"""Which tensors lose what when a filter goes, worked out from the network's own graph."""

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tpp.errors import UserError
from tpp.models import example_input_for, meta_copy
from tpp.plan import PruningPlan


@dataclass(frozen=True)
class Slice:
    """What one tensor loses.

    Attributes:
        tensor: name in the model's ``state_dict``.
        dim: the dimension along which it shrinks.
        positions: int64, (filters, k): with filter i go the positions ``positions[i]``. k is 1
            except where channels are flattened into a Linear layer (H*W), or where a
            concatenation holds them more than once.
    """

    tensor: str
    dim: int
    positions: Tensor


@dataclass(frozen=True)
class LayerChannels:
    """Everything that goes with the filters of one layer.

    Attributes:
        layer: the layer's name.
        filters: its number of filters (output channels or neurons).
        weight: ``state_dict`` name of its weight; filter i is row i.
        bias: ``state_dict`` name of its bias, None if it has none.
        norms: names of the BatchNorm modules that normalise exactly these channels, in order. One
            that several layers feed is named with the first of them only.
        tied: the other layers asked for that lose the same filters, because they are added to or
            multiplied with these (or are a depthwise convolution of them).
        groups: parts of the filters, equal and in a row, that must each lose as many: the groups
            of a convolution in groups; 1 where any filters can go, as in a depthwise one.
        slices: all tensors that shrink: the layer's own, those of BatchNorms and depthwise
            convolutions on the way, and the consumers' input channels.
    """

    layer: str
    filters: int
    weight: str
    bias: str | None
    norms: tuple[str, ...]
    tied: tuple[str, ...]
    groups: int
    slices: tuple[Slice, ...]


def find_channels(
    model: nn.Module, layers: Iterable[str], *, example_input: Tensor | None = None
) -> dict[str, LayerChannels]:
    """Find what is removed together with the filters of ``layers``.

    The network is traced once, on a copy without memory, whatever device it is on; the model
    itself is left alone. Coupled tensors come from Torch-Pruning's dependency graph (Fang et
    al., "DepGraph", CVPR 2023).

    Args:
        model: any classifier of images.
        layers: names of Conv2d or Linear layers. Layers that are tied by an addition are found
            together or not at all: name all of them.
        example_input: a batch to trace with, (1, channels, height, width); by default what the
            model's architecture expects, see :func:`tpp.models.example_input_for`.

    Returns:
        One entry per layer, in the order of ``layers``.

    Raises:
        UserError: the model cannot be run on the input; there is no such layer; or its filters
            cannot go, because they feed an addition together with those of a layer that is not
            named, are the network's output, or reach an operation that cannot be narrowed.
    """
    layers = list(layers)
    if not layers:
        return {}
    modules = dict(model.named_modules())
    for layer in layers:
        _check_layer(layer, modules)
    if example_input is None:
        example_input = example_input_for(model)
    trace = _Trace(model, example_input, layers)
    return {layer: trace.channels(layer) for layer in layers}


def _check_layer(layer: str, modules: dict[str, nn.Module]) -> None:
    prunable = [name for name, m in modules.items() if isinstance(m, nn.Conv2d | nn.Linear)]
    if layer not in prunable:
        near = difflib.get_close_matches(layer, prunable, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {len(prunable)}"
        raise UserError(f"no Conv2d or Linear layer is called {layer!r}; {hint}")


def check_plan(plan: PruningPlan, channels: Mapping[str, LayerChannels]) -> None:
    """Check that what a plan removes can be removed.

    Raises:
        UserError: tied layers lose different filters, or the groups of a convolution lose
            different numbers of filters.
    """
    for layer in plan.active_layers:
        found = channels[layer]
        for other in found.tied:
            if plan.pruned[other] != plan.pruned[layer]:
                raise UserError(
                    f"plan: {layer} and {other} are tied and must lose the same filters"
                )
        per_group = found.filters // found.groups
        lost = Counter(index // per_group for index in plan.pruned[layer])
        if len(set(lost.values())) > 1 or len(lost) < found.groups:
            raise UserError(
                f"plan: {layer}: each of its {found.groups} groups must lose as many filters"
            )


class _Trace:
    """The dependency graph of one model, and the names of what is in it."""

    def __init__(self, model: nn.Module, example_input: Tensor, layers: list[str]) -> None:
        self.order = {layer: position for position, layer in enumerate(layers)}
        # The graph is read off autograd's, whatever mode the caller is in.
        with torch.inference_mode(False), torch.enable_grad():
            copy = meta_copy(model).requires_grad_()
            self.names = {module: name for name, module in copy.named_modules()}
            self.modules = {name: module for module, name in self.names.items()}
            self.shared = _shared_parameters(copy)
            dtype = next(copy.parameters()).dtype
            example = torch.empty_like(example_input, device="meta", dtype=dtype)
            try:
                self.graph = torch_pruning.DependencyGraph().build_dependency(
                    copy, example, forward_fn=_run, verbose=False
                )
            except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
                # Torch-Pruning stumbles over reshapes that it has no rule for.
                raise UserError(
                    f"{type(model).__name__}: its channels cannot be followed ({error!r})"
                ) from None

    def channels(self, layer: str) -> LayerChannels:
        """What goes with the filters of ``layer``."""
        module = self.modules[layer]
        if module not in self.graph.module2node:
            raise UserError(f"{layer}: not used by the network's forward pass")
        filters = module.weight.shape[0]
        pruner = self.graph.get_pruner_of_module(module)
        group = self.graph.get_pruning_group(module, pruner.prune_out_channels, range(filters))
        tied = self._check_group(layer, group)
        norms: list[str] = []
        slices: list[Slice] = []
        for item in group:
            target = item.dep.target.module
            if not isinstance(target, nn.Conv2d | nn.Linear | _BatchNorm):
                continue
            positions = self._positions(layer, item, filters)
            name = self.names[target]
            inputs = self.graph.is_in_channel_pruning_fn(item.dep.handler)
            slices += [Slice(t, dim, positions) for t, dim in _tensors(name, target, inputs)]
            if (
                isinstance(target, _BatchNorm)
                and target.num_features == filters
                and self._fed_by(item.dep.target, {layer, *tied}) == layer
            ):
                norms.append(name)
        for entry in slices:
            if entry.tensor in self.shared:
                raise UserError(f"{layer}: {entry.tensor} is shared with another layer")
        bias = f"{layer}.bias" if module.bias is not None else None
        groups = 1 if _is_depthwise(module) else getattr(module, "groups", 1)
        return LayerChannels(
            layer, filters, f"{layer}.weight", bias, tuple(norms), tied, groups, tuple(slices)
        )

    def _fed_by(self, norm: Any, layers: set[str]) -> str:
        """Of some tied layers the one whose filters a BatchNorm normalises; the first of several.

        Back from the BatchNorm to the nearest layers: an addition on the way leads to all that
        are added.
        """
        found, nodes, seen = set(), [norm], set()
        while nodes:
            node = nodes.pop()
            if node in seen:
                continue
            seen.add(node)
            name = self.names.get(node.module)
            if name in layers:
                found.add(name)
            elif not isinstance(node.module, nn.Conv2d | nn.Linear) or _is_depthwise(node.module):
                nodes += node.inputs
        return min(found, key=self.order.__getitem__)

    def _check_group(self, layer: str, group: Any) -> tuple[str, ...]:
        """The layers that lose the same filters; refuses a layer whose filters cannot go."""
        partners = []
        obstacle = None
        for item in group:
            node, handler = item.dep.target, item.dep.handler
            module = node.module
            propagates = self.graph.is_out_channel_pruning_fn(handler)
            if propagates and not node.outputs:
                raise UserError(f"{layer}: its filters are the network's output and must stay")
            if isinstance(module, nn.Conv2d | nn.Linear):
                name = self.names[module]
                in_groups = getattr(module, "groups", 1) > 1 and not _is_depthwise(module)
                if in_groups and name != layer:
                    raise UserError(
                        f"{layer}: feeds {name}, a convolution in {module.groups} groups that "
                        "cannot lose single channels"
                    )
                goes_along = _is_depthwise(module) and name not in self.order
                if propagates and name != layer and not goes_along:
                    partners.append(name)
            else:
                obstacle = obstacle or self._obstacle(node)
        missing = sorted(set(partners) - self.order.keys())
        if missing:
            raise UserError(
                f"{layer}: its filters are added to or multiplied with those of "
                f"{', '.join(missing)} and cannot be removed alone: prune all of these layers, "
                "by the same ratio, or none"
            )
        if obstacle:
            raise UserError(f"{layer}: its filters reach {obstacle}")
        return tuple(sorted(set(partners), key=self.order.__getitem__))

    def _obstacle(self, node: Any) -> str | None:
        """What keeps channels from being followed through ``node``, None if nothing does."""
        module, grad_fn = node.module, node.grad_fn
        if isinstance(module, nn.Parameter):
            return "a parameter that is used outside of any layer"
        if module in self.names and not isinstance(module, _BatchNorm):
            if isinstance(module, nn.PReLU) and module.num_parameters == 1:
                return None
            return f"{self.names[module]}, a {type(module).__name__}, which cannot be narrowed"
        if len(getattr(grad_fn, "_saved_self_sym_sizes", ())) > 4 and "View" in grad_fn.name():
            return "a reshape into more than four dimensions (a channel shuffle?)"
        if any(getattr(grad_fn, "_saved_pad", ())[4:]):
            return "a padding of the channels"
        return None

    def _positions(self, layer: str, item: Any, filters: int) -> Tensor:
        """The int64 (filters, k) positions of one group item, in filter order."""
        pairs = sorted(zip(item.root_idxs, item.idxs, strict=True))
        per_filter = len(pairs) // filters
        roots = torch.tensor([root for root, _ in pairs])
        if not torch.equal(roots, torch.arange(filters).repeat_interleave(per_filter)):
            name = self.names[item.dep.target.module]
            raise UserError(f"{layer}: its filters are split or mixed before they reach {name}")
        return torch.tensor([position for _, position in pairs]).view(filters, per_filter)


def _shared_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters that go by more than one name."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return {name for group in names.values() if len(group) > 1 for name in group}


def _run(model: nn.Module, example: Tensor) -> Any:
    try:
        return model(example)
    except (RuntimeError, ValueError, TypeError, AssertionError, IndexError) as error:
        shape = "x".join(map(str, example.shape))
        raise UserError(
            f"{type(model).__name__} does not run on an input of {shape}: {error}; "
            "example_input must be what it expects"
        ) from None


def _is_depthwise(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        and module.groups > 1
        and module.groups == module.in_channels == module.out_channels
    )


def _tensors(name: str, module: nn.Module, inputs: bool) -> list[tuple[str, int]]:
    """Names and dimensions of the tensors of ``module`` that have one entry per channel."""
    if inputs and isinstance(module, nn.Conv2d | nn.Linear) and not _is_depthwise(module):
        return [(f"{name}.weight", 1)]
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return [(f"{name}.{key}", 0) for key, tensor in tensors if tensor.dim() > 0]
