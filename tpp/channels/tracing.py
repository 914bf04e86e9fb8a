"""Following channels through a network: which positions of which tensors stand or fall together.

The network is run once, without memory and on one image, and every ATen operation on the way is
seen. Each dimension of each parameter gets *labels*, one for each position; an operation passes
its inputs' labels on and merges those that have to go at once. Operations that only move values
(views, permutations, slices) are run on the labels themselves, element-wise ones merge what they
combine, contractions tie a weight's columns to the channels that they read. There is one rule for
each such kind of operation and none for any kind of module or network.

Torch-Pruning's dependency graph (Fang et al., "DepGraph", CVPR 2023) has the same end.
docs/pruner.md has the cases in which it goes wrong, which are why it is not used here.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tpp.channels.labels import GroupKind, LabelStore
from tpp.channels.numbers import NumberTrace, same_draws
from tpp.channels.planes import Flow
from tpp.channels.rules import MOVES, POINTWISE, RULES, move, pointwise, tensors_in
from tpp.common.errors import UserError, reason_of
from tpp.models.architecture import meta_copy
from tpp.models.fitting import line_of, place_of, running_modules
from tpp.models.meta_runs import PlainMode, ShapesOnly


class DoesNotRunError(UserError):
    """A network does not run on a batch.

    Attributes:
        place: where in it.
        reason: what its code says.
    """

    def __init__(self, model: nn.Module, image: Tensor, place: str, error: Exception) -> None:
        self.place, self.reason = place, reason_of(error)
        shape = "x".join(map(str, image.shape))
        super().__init__(
            f"{type(model).__name__} does not run on an input of {shape}: {self.reason} "
            f"({place}); example_input must be what it expects"
        )


def trace_channels(
    model: nn.Module, example: Tensor, group_kinds: Mapping[str, GroupKind] | None = None
) -> tuple[LabelStore, NumberTrace]:
    """Run a network once; what that shows about its channels, and the numbers in it.

    Args:
        model: any network of images, on any device; left alone.
        example: a batch that it takes, (N, channels, height, width).
        group_kinds: what its convolutions in groups were before it was pruned, if it was, see
            :meth:`tpp.channels.labels.LabelStore.group_kind`.

    Raises:
        DoesNotRunError: the network does not run on such a batch, or not without memory.
        UserError: it gives no tensor.
    """
    copy = meta_copy(model).eval()
    running = running_modules(copy)
    store, numbers = LabelStore(copy, running, group_kinds or {}), NumberTrace(running)
    dtype = next((p.dtype for p in copy.parameters()), example.dtype)
    image = torch.empty(example.shape, device="meta", dtype=dtype)
    try:
        with (
            same_draws(),
            torch.inference_mode(False),
            torch.no_grad(),
            ShapesOnly(),
            _ChannelMode(store),
            numbers.watching(),
        ):
            out = copy(image)
    except UserError:
        raise
    except Exception as error:  # whatever a network's own code raises for an input it cannot use
        place = f"{place_of(running)}{line_of(error)}"
        raise DoesNotRunError(model, image, place, error) from None
    outputs = tensors_in(out)
    if not outputs:
        raise UserError(f"{type(model).__name__}: no tensor is found in the {type(out)} it gives")
    for tensor in outputs:
        store.freeze(store.flow(tensor), "are the network's output and must stay")
    store.close()
    return store, numbers


class _ChannelMode(PlainMode):
    """Sees every operation, and asks the rules what it does to the labels in a store."""

    def __init__(self, store: LabelStore) -> None:
        super().__init__()
        self._store = store

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        inputs, outputs = tensors_in((args, kwargs)), tensors_in(out)
        if any(map(self._store.knows, inputs)):
            flows = self._follow(func, args, kwargs, inputs, outputs)
            for tensor, flow in zip(outputs, flows, strict=False):
                self._store.set_flow(tensor, flow)
        return out

    def _follow(
        self,
        func: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        inputs: list[Tensor],
        outputs: list[Tensor],
    ) -> list[Flow]:
        """The labels of an operation's outputs."""
        name, store = func.overloadpacket.__name__, self._store
        rule = RULES.get(name)
        if rule is not None:
            return rule(store, args, kwargs, outputs)
        if name in MOVES:
            return move(store, func, args, kwargs, outputs)
        if torch.Tag.pointwise in func.tags or name in POINTWISE or name.endswith("_like"):
            return [pointwise(store, func, args, kwargs, outputs[0], inputs)]
        if not name.startswith("new_"):  # those make new tensors of a size that is written down
            for tensor in inputs:
                reason = f"reach {name}, which they are not followed through"
                store.freeze(store.flow(tensor), reason)
        return []
