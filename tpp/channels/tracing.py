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

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from tpp.channels.labels import Axis, EntryClasses, Partition
from tpp.channels.planes import (
    FIXED,
    Flow,
    Labels,
    along,
    compact_labels,
    distinct,
    plane_of,
    size_of,
    values_of,
    varying,
)
from tpp.common.errors import UserError
from tpp.models.architecture import meta_copy
from tpp.models.fitting import place_of, running_modules


class ChannelTrace(TorchDispatchMode):
    """What one run of a network shows about its channels.

    Attributes:
        axes: the labelled dimensions of all parameters and buffers that take part.
        partitions: the constraints that convolutions in groups make.
        norm_inputs: per BatchNorm (and the like) the labels of what it normalises.
        followers: of the labels that are added to each other the first, where these are of filters
            that only gate or filter others one by one, and go along with them: those of a
            squeeze-and-excitation, of a depthwise convolution.

    Args:
        model: any network of images, on any device; left alone.
        example: a batch that it takes, (N, channels, height, width).

    Raises:
        UserError: the network does not run on such a batch, or not without memory.
    """

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        super().__init__()
        self.partitions: list[Partition] = []
        self.norm_inputs: dict[str, Labels] = {}
        self.followers: set[int] = set()
        self._frozen = EntryClasses()  # all that has to go at once; notes say why it cannot
        self._added = EntryClasses()  # the same without what follows; notes are not used
        self._inexact: dict[int, str] = {}
        self._fresh(1)  # FIXED
        self._flows: Any = WeakIdKeyDictionary()
        copy = meta_copy(model).eval()
        self._where = running_modules(copy)
        self._names: Any = WeakIdKeyDictionary()
        for name, tensor in (
            *copy.named_parameters(remove_duplicate=False),
            *copy.named_buffers(remove_duplicate=False),
        ):
            self._names.setdefault(tensor, []).append(name)
        self._first_name = {name: names[0] for names in self._names.values() for name in names}
        self._bound: dict[str, list[Labels | None]] = {}
        self._grouped: dict[str, tuple[Labels, int]] = {}
        dtype = next((p.dtype for p in copy.parameters()), example.dtype)
        image = torch.empty_like(example, device="meta", dtype=dtype)
        with torch.inference_mode(False), torch.no_grad():
            out = _run(copy, image, self)
        if not _tensors(out):
            raise UserError(
                f"{type(model).__name__}: no tensor is found in the {type(out)} it gives"
            )
        for tensor in _tensors(out):
            self._freeze(self._flow(tensor), "are the network's output and must stay")
        del self._flows
        reasons = reversed(self._inexact.items())  # of several, the first on the way counts
        self._inexact = {self._frozen.find(label): reason for label, reason in reasons}

    @property
    def axes(self) -> list[Axis]:
        """The labelled dimensions, one entry for each of the tensor's names."""
        found = []
        for name, key in self._first_name.items():
            for dim, labels in enumerate(self._bound.get(key, ())):
                if labels is not None:
                    found.append(Axis(name, dim, labels))
            if key in self._grouped:
                labels, groups = self._grouped[key]
                found.append(Axis(name, 1, labels, groups))
        return found

    def rows(self, weight: str) -> Labels | None:
        """Labels of the filters of a weight; None if the network does not use it."""
        bound = self._bound.get(self._first_name.get(weight, ""))
        return None if bound is None else bound[0]

    def classes(self, labels: Labels) -> Labels:
        """For every label the class of all labels that have to go at once."""
        return self._frozen.roots(labels)

    def sources(self, labels: Labels) -> Labels:
        """The same without what goes along: labels that are added to each other."""
        return self._added.roots(labels)

    def why_frozen(self, label: int) -> str | None:
        """Why a label's class cannot go, None if it can."""
        return self._frozen.notes.get(self._frozen.find(label))

    def why_inexact(self, classes: Iterable[int]) -> str | None:
        """Why removing some classes is not the same as zeroing them, None if it is."""
        return next((self._inexact[c] for c in classes if c in self._inexact), None)

    # ---- labels ------------------------------------------------------------------------------

    def _fresh(self, count: int) -> Labels:
        start = len(self._frozen.parent)
        new = range(start, start + count)
        self._frozen.parent.extend(new)
        self._added.parent.extend(new)
        return np.arange(start, start + count)

    def _tie(self, first: Labels, second: Labels, *, follow: bool = False) -> None:
        """Merge labels pairwise; with ``follow`` the second's filters go along with the first's."""
        for a, b in zip(first.tolist(), second.tolist(), strict=True):
            if a == b:
                continue
            if FIXED in (a, b):
                self._freeze_label(
                    max(a, b), "are added to a padding of the channels or another fixed value"
                )
                continue
            self._frozen.union(a, b)
            a, b = self._added.find(a), self._added.find(b)
            if follow:
                self.followers.add(b)
            elif a != b:
                # Added to others, what went along with them has a say of its own.
                lasting = {a, b} <= self.followers
                self.followers -= {a, b}
                self._added.union(a, b)
                if lasting:
                    self.followers.add(self._added.find(a))

    def _freeze_label(self, label: int, reason: str) -> None:
        self._frozen.note(label, f"{reason} ({place_of(self._where)})")

    def _freeze(self, flow: Flow, reason: str) -> None:
        for plane in flow.planes:
            for label in plane.unique().tolist():
                if label != FIXED:
                    self._freeze_label(label, reason)

    def _warn(self, labels: Labels, reason: str) -> None:
        """Note that removing these channels is not the same as zeroing them."""
        for label in labels.tolist():
            if label != FIXED:
                self._inexact.setdefault(label, f"{reason} ({place_of(self._where)})")

    # ---- tensors -----------------------------------------------------------------------------

    def _key(self, tensor: Tensor) -> str | None:
        names = self._names.get(tensor)
        return names[0] if names else None

    def _flow(self, tensor: Any) -> Flow:
        """The labels of a tensor; those of a parameter are made when it is first used."""
        if not isinstance(tensor, Tensor):
            return Flow()
        if tensor in self._flows:
            return self._flows[tensor]
        key = self._key(tensor)
        if key is None:
            return Flow()
        bound = self._bound.setdefault(key, [None] * tensor.dim())
        planes = []
        for dim, size in enumerate(tensor.shape):
            if size > 1 and bound[dim] is None:
                bound[dim] = self._fresh(size)
            if size > 1:
                planes.append(plane_of(bound[dim], dim, tensor.shape))
        return Flow(tuple(planes), zero=False, weight=True)

    def _bind(self, tensor: Tensor | None, dim: int, labels: Labels) -> None:
        """Let a dimension of a parameter go with ``labels``."""
        if tensor is None or tensor.shape[dim] == 1:
            return
        key = self._key(tensor)
        if key is None or tensor in self._flows:  # computed, not stored
            own = along(self._flow(tensor), dim)
            if own is not None:
                self._tie(labels, own)
            else:
                self._freeze_all(labels, "meet values that the network computes")
            return
        bound = self._bound.setdefault(key, [None] * tensor.dim())
        old = bound[dim]
        if old is None:
            bound[dim] = labels
        else:
            self._tie(old, labels)

    def _freeze_all(self, labels: Labels, reason: str) -> None:
        for label in labels.tolist():
            if label != FIXED:
                self._freeze_label(label, reason)

    # ---- operations --------------------------------------------------------------------------

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        tensors = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
        if any(t in self._flows or self._key(t) is not None for t in tensors):
            flows = self._follow(func, args, kwargs, out, tensors)
            for tensor, flow in zip(_tensors(out), flows, strict=False):
                if flow.planes and self._key(tensor) is None:
                    compact = replace(flow, planes=tuple(map(compact_labels, flow.planes)))
                    self._flows[tensor] = compact
        return out

    def _follow(
        self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any, ins: list[Tensor]
    ) -> list[Flow]:
        """The labels of an operation's outputs."""
        name = func.overloadpacket.__name__
        from tpp.channels.rules import MOVES, POINTWISE, RULES

        rule = RULES.get(name)
        if rule is not None:
            return rule(self, args, kwargs, _tensors(out))
        if name in MOVES:
            return self._move(func, args, kwargs, _tensors(out))
        if torch.Tag.pointwise in func.tags or name in POINTWISE or name.endswith("_like"):
            return [self._pointwise(func, args, kwargs, _tensors(out)[0], ins)]
        if not name.startswith("new_"):  # those make new tensors of a size that is written down
            for tensor in ins:
                self._freeze(
                    self._flow(tensor), f"reach {name}, which they are not followed through"
                )
        return []

    def _move(
        self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], outs: list[Tensor]
    ) -> list[Flow]:
        """Run an operation that only moves values on the labels."""
        flow = self._flow(args[0])
        if func.overloadpacket.__name__ in ("view", "_unsafe_view"):
            func = torch.ops.aten.reshape.default  # a permuted plane may have to be copied
        planes: list[list[Tensor]] = [[] for _ in outs]
        for plane in flow.planes:
            positions = set(varying(plane))
            for part, moved in zip(planes, _tensors(func(plane, *args[1:], **kwargs)), strict=True):
                moved = compact_labels(moved)
                if len(varying(moved)) > len(positions):
                    self._freeze(Flow((plane,)), "reach a reshape that splits channels into parts")
                elif distinct(moved) < distinct(plane):
                    self._freeze(Flow((plane,)), "reach a slice of the channels")
                part.append(moved)
        return [replace(flow, planes=tuple(part)) for part in planes]

    def _pointwise(
        self,
        func: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        out: Tensor,
        ins: list[Tensor],
    ) -> Flow:
        """Merge what an element-wise operation combines."""
        flows = [self._flow(tensor) for tensor in ins]
        zero = self._stays_zero(func, args, kwargs)
        result: list[tuple[tuple[int, ...], Tensor]] = []
        # What is zero of itself comes first: what it is multiplied with goes along with it.
        for index in sorted(range(len(ins)), key=lambda i: not flows[i].zero):
            flow = flows[index]
            for plane in flow.planes:
                plane = plane.expand(out.shape)
                dims = varying(plane)
                same = next((other for key, other in result if key == dims), None)
                if same is not None:
                    first, second = values_of(same), values_of(plane)
                    self._tie(first, second, follow=zero and not flow.zero)
                    continue
                if any(set(key) & set(dims) for key, _ in result):
                    clash = Flow((plane, *(other for _, other in result)))
                    self._freeze(clash, "are combined with channels in another arrangement")
                result.append((dims, plane))
        for dims, plane in result:
            for tensor, flow in zip(ins, flows, strict=True):
                full = any(size_of(tensor, dim, out) > 1 for dim in dims)
                if full and not any(varying(p.expand(out.shape)) == dims for p in flow.planes):
                    reason = "are combined with a tensor whose size forward() fixes"
                    self._freeze(Flow((plane,)), reason)
        weight = all(flow.weight for flow in flows)
        return Flow(tuple(plane for _, plane in result), zero=zero, weight=weight)

    def _stays_zero(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether an element-wise operation gives 0 where its zero inputs are: tried out."""

        def stand_in(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            flow = self._flow(value)
            zero = flow.planes and flow.zero
            if value.is_floating_point():
                return torch.full((1,), 0.0 if zero else 0.37)
            return torch.full((1,), 0 if zero else 1, dtype=value.dtype)

        if func.overloadpacket.__name__ == "where":  # one try does not tell about both branches
            return False
        try:
            found = func(*tree_map(stand_in, tuple(args)), **tree_map(stand_in, dict(kwargs)))
        except (RuntimeError, TypeError, ValueError, NotImplementedError):
            return False
        return isinstance(found, Tensor) and not bool(found.any())

    # ---- rules, by operation -----------------------------------------------------------------

    def _same(self, args: Sequence[Any], _: Mapping[str, Any], outs: list[Tensor]) -> list[Flow]:
        """Copies, and changes of type or memory format."""
        return [self._flow(args[0])] if outs[0].shape == args[0].shape else []

    def _convolution(
        self, args: Sequence[Any], _: Mapping[str, Any], outs: list[Tensor]
    ) -> list[Flow]:
        x, weight, bias, *_rest, transposed, _padding, groups = args
        flow = self._flow(x)
        columns = self._channels_of(flow, x, 1)
        row_dim, column_dim = (1, 0) if transposed else (0, 1)
        if groups > 1 and (transposed or self._key(weight) is None):
            self._freeze_all(columns, "feed a transposed or computed convolution in groups")
            self._freeze(self._flow(weight), "are those of a convolution that is not followed")
            return []
        if not flow.zero:
            self._warn(columns, "are not zero where their filters are: an activation shifts them")
        depthwise = groups > 1 and weight.shape[:2] == (groups, 1)
        if groups == 1:
            self._bind(weight, column_dim, columns)
        elif weight.shape[1] > 1:
            self._bind_grouped(weight, columns, groups)
        elif not depthwise:
            self._freeze_all(columns, "feed a convolution with several filters for each channel")
        rows = self._rows(weight, row_dim)
        if rows is None:
            return []
        self._bind(bias, 0, rows)
        zero = True
        if depthwise:
            self._tie(columns, rows, follow=True)
            zero = flow.zero and bias is None
        elif groups > 1:
            self.partitions.append(Partition(rows, groups, self._where[-1]))
        return [Flow((plane_of(rows, 1, outs[0].shape),), zero=zero)]

    def _rows(self, weight: Tensor, dim: int) -> Labels | None:
        """Labels of a weight's filters, made if need be; None of a weight with one filter."""
        key = self._key(weight)
        if key is None:
            return along(self._flow(weight), dim)
        if weight.shape[dim] == 1:
            return None
        bound = self._bound.setdefault(key, [None] * weight.dim())
        labels = bound[dim]
        if labels is None:
            labels = bound[dim] = self._fresh(weight.shape[dim])
        return labels

    def _bind_grouped(self, weight: Tensor, columns: Labels, groups: int) -> None:
        key = self._key(weight)
        assert key is not None
        if key in self._grouped:
            self._tie(self._grouped[key][0], columns)
        else:
            self._grouped[key] = (columns, groups)
        self.partitions.append(Partition(columns, groups, self._where[-1]))

    def _channels_of(self, flow: Flow, x: Tensor, dim: int) -> Labels:
        """The labels along one dimension of an activation, FIXED where there are none."""
        labels = along(flow, dim)
        for plane in flow.planes:
            if varying(plane) != (dim,):
                self._freeze(Flow((plane,)), "reach a layer in an arrangement that it mixes")
        return np.zeros(x.shape[dim], np.int64) if labels is None else labels

    def _matmul(self, a: Tensor, b: Tensor, out: Tensor) -> Flow:
        """(..., M, K) times (..., K, N)."""
        left, right = self._flow(a), self._flow(b)
        dim_a, dim_b = a.dim() - 1, b.dim() - 2
        planes = []
        zero = True
        for flow, dim in ((left, dim_a), (right, dim_b)):
            for plane in flow.planes:
                dims = varying(plane)
                if len(dims) > 1:
                    self._freeze(Flow((plane,)), "reach a matrix product in several dimensions")
                elif dims != (dim,):
                    planes.append(plane.narrow(dim, 0, 1).expand(out.shape))
                    zero = zero and (flow.weight or flow.zero)
        inner, columns = along(left, dim_a), along(right, dim_b)
        for one, other in ((inner, columns), (columns, inner)):
            if one is not None and other is None:
                self._freeze_all(one, "meet values that cannot be narrowed in a matrix product")
        if inner is not None and columns is not None:
            # A weight's columns are no filters, and have no say in whether what they read is one
            # that goes along with others.
            if left.weight:
                self._tie(columns, inner, follow=True)
            else:
                self._tie(inner, columns, follow=right.weight)
            if not left.zero and not right.zero:
                reason = "are not zero where their filters are: an activation shifts them"
                self._warn(inner, reason)
        return Flow(tuple(planes), zero=zero)

    def _mm(self, args: Sequence[Any], _: Mapping[str, Any], outs: list[Tensor]) -> list[Flow]:
        return [self._matmul(args[0], args[1], outs[0])]

    def _addmm(self, args: Sequence[Any], _: Mapping[str, Any], outs: list[Tensor]) -> list[Flow]:
        bias, out = args[0], outs[0]
        flow = self._matmul(args[1], args[2], out)
        labels = along(flow, out.dim() - 1)
        if labels is not None:
            self._bind(bias, bias.dim() - 1, labels)
        return [flow]

    def _batch_norm(
        self, args: Sequence[Any], _: Mapping[str, Any], outs: list[Tensor]
    ) -> list[Flow]:
        x, weight = args[0], args[1]
        flow = self._flow(x)
        labels = along(flow, 1)
        for plane in flow.planes:
            if varying(plane) != (1,):
                self._warn(values_of(plane), "are normalised together")
        if labels is None:
            return [replace(flow, zero=False)]
        for tensor in args[1:5]:
            self._bind(tensor, 0, labels)
        stored = next((self._key(t) for t in args[1:5] if t is not None and self._key(t)), None)
        if stored is not None:
            self.norm_inputs.setdefault(stored.rpartition(".")[0], labels)
        return [replace(flow, zero=weight is not None)]

    def _layer_norm(
        self, args: Sequence[Any], _: Mapping[str, Any], outs: list[Tensor]
    ) -> list[Flow]:
        x, shape, weight, bias = args[:4]
        flow = self._flow(x)
        first = x.dim() - len(shape)
        for plane in flow.planes:
            dims = varying(plane)
            if len(dims) == 1 and dims[0] >= first:
                self._warn(values_of(plane), "are normalised together by a LayerNorm")
                for tensor in (weight, bias):
                    self._bind(tensor, dims[0] - first, values_of(plane))
            elif any(dim >= first for dim in dims):
                self._freeze(Flow((plane,)), "reach a LayerNorm in several dimensions")
        return [replace(flow, zero=weight is not None)]

    def _rms_norm(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], outs: list[Tensor]
    ) -> list[Flow]:
        return self._layer_norm((*args[:3], None), kwargs, outs)

    def _group_norm(
        self, args: Sequence[Any], _: Mapping[str, Any], outs: list[Tensor]
    ) -> list[Flow]:
        x, weight, bias, groups = args[0], args[1], args[2], args[6]
        flow = self._flow(x)
        labels = self._channels_of(flow, x, 1)
        if groups > 1:
            self._freeze_all(labels, f"reach a GroupNorm in {groups} groups")
        self._warn(labels, "are normalised together by a GroupNorm")
        for tensor in (weight, bias):
            self._bind(tensor, 0, labels)
        return [replace(flow, zero=weight is not None)]

    def _pool(self, args: Sequence[Any], _: Mapping[str, Any], outs: list[Tensor]) -> list[Flow]:
        """Pooling and resizing: over the last two dimensions, channel by channel."""
        x, out = args[0], outs[0]
        flow = self._flow(x)
        planes = []
        for plane in flow.planes:
            if any(dim >= x.dim() - 2 for dim in varying(plane)):
                self._freeze(Flow((plane,)), "are pooled over")
            else:
                planes.append(plane[..., :1, :1].expand(out.shape))
        return [replace(flow, planes=tuple(planes))] * len(outs)

    def _reduce(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], outs: list[Tensor]
    ) -> list[Flow]:
        """Means, sums and norms over some dimensions."""
        x, out = args[0], outs[0]
        lists = [a for a in (*args[1:], kwargs.get("dim")) if isinstance(a, list | tuple)]
        dims = {dim % x.dim() for dim in lists[0]} if lists and lists[0] else set(range(x.dim()))
        flow = self._flow(x)
        planes = []
        for plane in flow.planes:
            if dims & set(varying(plane)):
                self._warn(values_of(plane), "are averaged or summed over")
                continue
            for dim in sorted(dims, reverse=True):
                plane = plane.narrow(dim, 0, 1) if out.dim() == x.dim() else plane.select(dim, 0)
            planes.append(plane.expand(out.shape))
        return [replace(flow, planes=tuple(planes))] * len(outs)

    def _softmax(self, args: Sequence[Any], _: Mapping[str, Any], outs: list[Tensor]) -> list[Flow]:
        x, dim = args[0], args[1]
        flow = self._flow(x)
        for plane in flow.planes:
            if dim % x.dim() in varying(plane):
                self._freeze(Flow((plane,)), "reach a softmax over the channels")
        return [replace(flow, zero=False)]

    def _pad(self, args: Sequence[Any], _: Mapping[str, Any], outs: list[Tensor]) -> list[Flow]:
        x, pad = args[0], list(args[1])
        flow = self._flow(x)
        planes = []
        for plane in flow.planes:
            dims = varying(plane)
            sides = [pad[2 * (x.dim() - 1 - d) :][:2] for d in dims]
            if any(side < 0 for pair in sides for side in pair) or len(dims) > 1:
                self._freeze(Flow((plane,)), "reach a slice of the channels")
            elif sides and sides[0]:
                labels = F.pad(torch.from_numpy(values_of(plane)), sides[0], value=FIXED).numpy()
                planes.append(plane_of(labels, dims[0], outs[0].shape))
            else:
                planes += [plane_of(values_of(plane), dims[0], outs[0].shape)] if dims else []
        return [replace(flow, planes=tuple(planes))]

    def _cat(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], outs: list[Tensor]
    ) -> list[Flow]:
        tensors, out = args[0], outs[0]
        tensors = [t for t in tensors if not (t.dim() == 1 and t.numel() == 0 and out.dim() > 1)]
        dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.dim()
        return [self._concatenate(tensors, [self._flow(t) for t in tensors], dim, out)]

    def _stack(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], outs: list[Tensor]
    ) -> list[Flow]:
        out = outs[0]
        dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.dim()
        flows = [
            replace(flow, planes=tuple(plane.unsqueeze(dim) for plane in flow.planes))
            for flow in map(self._flow, args[0])
        ]
        return [self._concatenate([t.unsqueeze(dim) for t in args[0]], flows, dim, out)]

    def _concatenate(
        self, tensors: Sequence[Tensor], flows: list[Flow], dim: int, out: Tensor
    ) -> Flow:
        pieces = [along(flow, dim) for flow in flows]
        planes = []
        if any(piece is not None for piece in pieces):
            labels = np.concatenate(
                [
                    np.full(tensor.shape[dim], FIXED) if piece is None else piece
                    for tensor, piece in zip(tensors, pieces, strict=True)
                ]
            )
            planes.append(plane_of(labels, dim, out.shape))
        # Along the others the parts lie beside each other: what reads one reads all of them.
        beside: dict[int, list[Labels]] = {}
        for flow in flows:
            for plane in flow.planes:
                dims = varying(plane)
                if len(dims) > 1:
                    self._freeze(Flow((plane,)), "are concatenated in several dimensions")
                elif dims and dims != (dim,):
                    beside.setdefault(dims[0], []).append(values_of(plane))
        for other, parts in beside.items():
            for part in parts[1:]:
                self._tie(parts[0], part)
            if len(parts) < len(tensors):
                self._freeze_all(parts[0], "are concatenated with values of a fixed number")
            planes.append(plane_of(parts[0], other, out.shape))
        labelled = [flow for flow in flows if flow.planes]
        zero = all(flow.zero for flow in labelled)
        return Flow(tuple(planes), zero=zero, weight=all(f.weight for f in labelled))


def _run(model: nn.Module, image: Tensor, mode: TorchDispatchMode) -> Any:
    try:
        with mode:
            return model(image)
    except UserError:
        raise
    except Exception as error:  # whatever a network's own code raises for an input it cannot use
        shape = "x".join(map(str, image.shape))
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{type(model).__name__} does not run on an input of {shape}: {reason}; "
            "example_input must be what it expects"
        ) from None


def _tensors(out: Any) -> list[Tensor]:
    return [t for t in tree_iter(out) if isinstance(t, Tensor)]
