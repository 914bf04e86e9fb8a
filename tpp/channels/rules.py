"""What each kind of operation does to the labels of its inputs.

A rule gets the store, the operation's arguments and its outputs, and returns the labels of the
outputs. Operations that are in no table here end what their inputs may do, see
:mod:`tpp.channels.tracing`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_iter, tree_map

from tpp.channels.labels import LabelStore
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


def tensors_in(values: Any) -> list[Tensor]:
    """The tensors in nested containers, such as an operation's outputs, in order."""
    return [t for t in tree_iter(values) if isinstance(t, Tensor)]


def move(
    store: LabelStore, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], outs: list[Tensor]
) -> list[Flow]:
    """Run an operation that only moves values on the labels."""
    flow = store.flow(args[0])
    if func.overloadpacket.__name__ in ("view", "_unsafe_view"):
        func = torch.ops.aten.reshape.default  # a permuted plane may have to be copied
    planes: list[list[Tensor]] = [[] for _ in outs]
    for plane in flow.planes:
        positions = set(varying(plane))
        for part, moved in zip(planes, tensors_in(func(plane, *args[1:], **kwargs)), strict=True):
            moved = compact_labels(moved)
            if len(varying(moved)) > len(positions):
                store.freeze(Flow((plane,)), "reach a reshape that splits channels into parts")
            elif _may_lose(func, plane, moved) and distinct(moved) < distinct(plane):
                store.freeze(Flow((plane,)), "reach a slice of the channels")
            part.append(moved)
    return [replace(flow, planes=tuple(part)) for part in planes]


def _may_lose(func: Any, plane: Tensor, moved: Tensor) -> bool:
    """Whether labels may be missing after a move; counting them takes long where there are many."""
    same = len(values_of(moved)) == len(values_of(plane))
    return not same or func.overloadpacket.__name__ == "unfold"  # whose windows may overlap


def pointwise(
    store: LabelStore,
    func: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    out: Tensor,
    ins: list[Tensor],
) -> Flow:
    """Merge what an element-wise operation combines."""
    flows = [store.flow(tensor) for tensor in ins]
    zero = _stays_zero(store, func, args, kwargs)
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
                store.tie(first, second, follow=zero and not flow.zero)
                continue
            if any(set(key) & set(dims) for key, _ in result):
                clash = Flow((plane, *(other for _, other in result)))
                store.freeze(clash, "are combined with channels in another arrangement")
            result.append((dims, plane))
    for dims, plane in result:
        for tensor, flow in zip(ins, flows, strict=True):
            full = any(size_of(tensor, dim, out) > 1 for dim in dims)
            if full and not any(varying(p.expand(out.shape)) == dims for p in flow.planes):
                reason = "are combined with a tensor whose size forward() fixes"
                store.freeze(Flow((plane,)), reason)
    weight = all(flow.weight for flow in flows)
    return Flow(tuple(plane for _, plane in result), zero=zero, weight=weight)


def _stays_zero(
    store: LabelStore, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> bool:
    """Whether an element-wise operation gives 0 where its zero inputs are: tried out."""

    def stand_in(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        flow = store.flow(value)
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


def _same(
    store: LabelStore, args: Sequence[Any], _: Mapping[str, Any], outs: list[Tensor]
) -> list[Flow]:
    """Copies, and changes of type or memory format."""
    return [store.flow(args[0])] if outs[0].shape == args[0].shape else []


def _convolution(
    store: LabelStore, args: Sequence[Any], _: Mapping[str, Any], outs: list[Tensor]
) -> list[Flow]:
    x, weight, bias, *_rest, transposed, _padding, groups = args
    flow = store.flow(x)
    columns = _channels_of(store, flow, x, 1)
    row_dim, column_dim = (1, 0) if transposed else (0, 1)
    if groups > 1 and (transposed or store.name_of(weight) is None):
        store.freeze_labels(columns, "feed a transposed or computed convolution in groups")
        store.freeze(store.flow(weight), "are those of a convolution that is not followed")
        return []
    if not flow.zero:
        store.warn(columns, "are not zero where their filters are: an activation shifts them")
    kind = store.group_kind(weight, groups) if groups > 1 else None
    if kind is None:
        store.bind(weight, column_dim, columns)
    elif kind == "grouped":
        store.bind_grouped(weight, columns, groups)
    elif kind == "multiplied":
        store.freeze_labels(columns, "feed a convolution with several filters for each channel")
    rows = store.filters_of(weight, row_dim)
    if rows is None:
        return []
    store.bind(bias, 0, rows)
    zero = True
    if kind == "depthwise":
        store.tie(columns, rows, follow=True)
        zero = flow.zero and bias is None
    elif kind:
        store.add_partition(rows, groups)
    return [Flow((plane_of(rows, 1, outs[0].shape),), zero=zero)]


def _channels_of(store: LabelStore, flow: Flow, x: Tensor, dim: int) -> Labels:
    """The labels along one dimension of an activation, FIXED where there are none."""
    labels = along(flow, dim)
    for plane in flow.planes:
        if varying(plane) != (dim,):
            store.freeze(Flow((plane,)), "reach a layer in an arrangement that it mixes")
    return np.zeros(x.shape[dim], np.int64) if labels is None else labels


def _matmul(store: LabelStore, a: Tensor, b: Tensor, out: Tensor) -> Flow:
    """(..., M, K) times (..., K, N)."""
    left, right = store.flow(a), store.flow(b)
    dim_a, dim_b = a.dim() - 1, b.dim() - 2
    planes = []
    zero = True
    for flow, dim in ((left, dim_a), (right, dim_b)):
        for plane in flow.planes:
            dims = varying(plane)
            if len(dims) > 1:
                store.freeze(Flow((plane,)), "reach a matrix product in several dimensions")
            elif dims != (dim,):
                planes.append(plane.narrow(dim, 0, 1).expand(out.shape))
                zero = zero and (flow.weight or flow.zero)
    inner, columns = along(left, dim_a), along(right, dim_b)
    for one, other in ((inner, columns), (columns, inner)):
        if one is not None and other is None:
            store.freeze_labels(one, "meet values that cannot be narrowed in a matrix product")
    if inner is not None and columns is not None:
        # A weight's columns are no filters, and have no say in whether what they read is one
        # that goes along with others.
        if left.weight:
            store.tie(columns, inner, follow=True)
        else:
            store.tie(inner, columns, follow=right.weight)
        if not left.zero and not right.zero:
            reason = "are not zero where their filters are: an activation shifts them"
            store.warn(inner, reason)
    return Flow(tuple(planes), zero=zero)


def _mm(
    store: LabelStore, args: Sequence[Any], _: Mapping[str, Any], outs: list[Tensor]
) -> list[Flow]:
    return [_matmul(store, args[0], args[1], outs[0])]


def _addmm(
    store: LabelStore, args: Sequence[Any], _: Mapping[str, Any], outs: list[Tensor]
) -> list[Flow]:
    bias, out = args[0], outs[0]
    flow = _matmul(store, args[1], args[2], out)
    labels = along(flow, out.dim() - 1)
    if labels is not None:
        store.bind(bias, bias.dim() - 1, labels)
    return [flow]


def _batch_norm(
    store: LabelStore, args: Sequence[Any], _: Mapping[str, Any], outs: list[Tensor]
) -> list[Flow]:
    x, weight = args[0], args[1]
    flow = store.flow(x)
    labels = along(flow, 1)
    for plane in flow.planes:
        if varying(plane) != (1,):
            store.warn(values_of(plane), "are normalised together")
    if labels is None:
        return [replace(flow, zero=False)]
    for tensor in args[1:5]:
        store.bind(tensor, 0, labels)
    store.add_norm(args[1:5], labels)
    return [replace(flow, zero=weight is not None)]


def _layer_norm(
    store: LabelStore, args: Sequence[Any], _: Mapping[str, Any], outs: list[Tensor]
) -> list[Flow]:
    x, shape, weight, bias = args[:4]
    flow = store.flow(x)
    first = x.dim() - len(shape)
    for plane in flow.planes:
        dims = varying(plane)
        if len(dims) == 1 and dims[0] >= first:
            store.warn(values_of(plane), "are normalised together by a LayerNorm")
            for tensor in (weight, bias):
                store.bind(tensor, dims[0] - first, values_of(plane))
        elif any(dim >= first for dim in dims):
            store.freeze(Flow((plane,)), "reach a LayerNorm in several dimensions")
    return [replace(flow, zero=weight is not None)]


def _rms_norm(
    store: LabelStore, args: Sequence[Any], kwargs: Mapping[str, Any], outs: list[Tensor]
) -> list[Flow]:
    return _layer_norm(store, (*args[:3], None), kwargs, outs)


def _group_norm(
    store: LabelStore, args: Sequence[Any], _: Mapping[str, Any], outs: list[Tensor]
) -> list[Flow]:
    x, weight, bias, groups = args[0], args[1], args[2], args[6]
    flow = store.flow(x)
    labels = _channels_of(store, flow, x, 1)
    if groups > 1:
        store.freeze_labels(labels, f"reach a GroupNorm in {groups} groups")
    store.warn(labels, "are normalised together by a GroupNorm")
    for tensor in (weight, bias):
        store.bind(tensor, 0, labels)
    return [replace(flow, zero=weight is not None)]


def _pool(
    store: LabelStore, args: Sequence[Any], _: Mapping[str, Any], outs: list[Tensor]
) -> list[Flow]:
    """Pooling and resizing: over the last two dimensions, channel by channel."""
    x, out = args[0], outs[0]
    flow = store.flow(x)
    planes = []
    for plane in flow.planes:
        if any(dim >= x.dim() - 2 for dim in varying(plane)):
            store.freeze(Flow((plane,)), "are pooled over")
        else:
            planes.append(plane[..., :1, :1].expand(out.shape))
    return [replace(flow, planes=tuple(planes))] * len(outs)


def _reduce(
    store: LabelStore, args: Sequence[Any], kwargs: Mapping[str, Any], outs: list[Tensor]
) -> list[Flow]:
    """Means and extremes over some dimensions: of what is zero, too."""
    return _over(store, args, kwargs, outs, zeros_count=True)


def _sum(
    store: LabelStore, args: Sequence[Any], kwargs: Mapping[str, Any], outs: list[Tensor]
) -> list[Flow]:
    """Sums and norms over some dimensions, to which a zero adds nothing."""
    order = args[1] if len(args) > 1 and isinstance(args[1], int | float) else 1
    return _over(store, args, kwargs, outs, zeros_count=order <= 0)


def _over(
    store: LabelStore,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    outs: list[Tensor],
    *,
    zeros_count: bool,
) -> list[Flow]:
    x, out = args[0], outs[0]
    lists = [a for a in (*args[1:], kwargs.get("dim")) if isinstance(a, list | tuple)]
    dims = {dim % x.dim() for dim in lists[0]} if lists and lists[0] else set(range(x.dim()))
    flow = store.flow(x)
    planes = []
    for plane in flow.planes:
        if dims & set(varying(plane)):
            if zeros_count or not flow.zero:
                store.warn(values_of(plane), "are averaged or summed over")
            continue
        for dim in sorted(dims, reverse=True):
            plane = plane.narrow(dim, 0, 1) if out.dim() == x.dim() else plane.select(dim, 0)
        planes.append(plane.expand(out.shape))
    return [replace(flow, planes=tuple(planes))] * len(outs)


def _softmax(
    store: LabelStore, args: Sequence[Any], _: Mapping[str, Any], outs: list[Tensor]
) -> list[Flow]:
    x, dim = args[0], args[1]
    flow = store.flow(x)
    for plane in flow.planes:
        if dim % x.dim() in varying(plane):
            store.freeze(Flow((plane,)), "reach a softmax over the channels")
    return [replace(flow, zero=False)]


def _pad(
    store: LabelStore, args: Sequence[Any], _: Mapping[str, Any], outs: list[Tensor]
) -> list[Flow]:
    x, pad = args[0], list(args[1])
    flow = store.flow(x)
    planes = []
    for plane in flow.planes:
        dims = varying(plane)
        sides = [pad[2 * (x.dim() - 1 - d) :][:2] for d in dims]
        if any(side < 0 for pair in sides for side in pair) or len(dims) > 1:
            store.freeze(Flow((plane,)), "reach a slice of the channels")
        elif sides and sides[0]:
            labels = F.pad(torch.from_numpy(values_of(plane)), sides[0], value=FIXED).numpy()
            planes.append(plane_of(labels, dims[0], outs[0].shape))
        else:
            planes += [plane_of(values_of(plane), dims[0], outs[0].shape)] if dims else []
    return [replace(flow, planes=tuple(planes))]


def _cat(
    store: LabelStore, args: Sequence[Any], kwargs: Mapping[str, Any], outs: list[Tensor]
) -> list[Flow]:
    tensors, out = args[0], outs[0]
    tensors = [t for t in tensors if not (t.dim() == 1 and t.numel() == 0 and out.dim() > 1)]
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.dim()
    return [_concatenate(store, tensors, [store.flow(t) for t in tensors], dim, out)]


def _stack(
    store: LabelStore, args: Sequence[Any], kwargs: Mapping[str, Any], outs: list[Tensor]
) -> list[Flow]:
    out = outs[0]
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.dim()
    flows = [
        replace(flow, planes=tuple(plane.unsqueeze(dim) for plane in flow.planes))
        for flow in map(store.flow, args[0])
    ]
    return [_concatenate(store, [t.unsqueeze(dim) for t in args[0]], flows, dim, out)]


def _concatenate(
    store: LabelStore, tensors: Sequence[Tensor], flows: list[Flow], dim: int, out: Tensor
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
                store.freeze(Flow((plane,)), "are concatenated in several dimensions")
            elif dims and dims != (dim,):
                beside.setdefault(dims[0], []).append(values_of(plane))
    for other, parts in beside.items():
        for part in parts[1:]:
            store.tie(parts[0], part)
        if len(parts) < len(tensors):
            store.freeze_labels(parts[0], "are concatenated with values of a fixed number")
        planes.append(plane_of(parts[0], other, out.shape))
    labelled = [flow for flow in flows if flow.planes]
    zero = all(flow.zero for flow in labelled)
    return Flow(tuple(planes), zero=zero, weight=all(f.weight for f in labelled))


Rule = Callable[[LabelStore, Sequence[Any], Mapping[str, Any], list[Tensor]], list[Flow]]
# Operations that leave values where they are.
COPIES = {"clone", "alias", "detach", "_to_copy", "contiguous", "as_strided_", "lift_fresh"}
RULES: dict[str, Rule] = {
    **dict.fromkeys(COPIES, _same),
    "convolution": _convolution,
    **dict.fromkeys(("mm", "bmm"), _mm),
    **dict.fromkeys(("addmm", "baddbmm"), _addmm),
    **dict.fromkeys(
        (
            "native_batch_norm",
            "_native_batch_norm_legit",
            "_native_batch_norm_legit_no_training",
            "cudnn_batch_norm",
        ),
        _batch_norm,
    ),
    "native_layer_norm": _layer_norm,
    "_fused_rms_norm": _rms_norm,
    "native_group_norm": _group_norm,
    **dict.fromkeys(
        (
            "max_pool2d_with_indices",
            "avg_pool2d",
            "_adaptive_avg_pool2d",
            "adaptive_max_pool2d",
            "upsample_nearest2d",
            "upsample_bilinear2d",
            "upsample_bicubic2d",
        ),
        _pool,
    ),
    **dict.fromkeys(("mean", "amax", "amin", "var"), _reduce),
    **dict.fromkeys(("sum", "linalg_vector_norm"), _sum),
    **dict.fromkeys(("_softmax", "_safe_softmax", "_log_softmax"), _softmax),
    "constant_pad_nd": _pad,
    "cat": _cat,
    "stack": _stack,
}
# Operations that move values and do nothing else; the first argument is what they move.
MOVES = {
    "expand",
    "flip",
    "permute",
    "roll",
    "select",
    "slice",
    "split",
    "split_with_sizes",
    "squeeze",
    "t",
    "transpose",
    "unbind",
    "unfold",
    "unsqueeze",
    "view",
    "_unsafe_view",
}
# Element-wise operations that PyTorch does not mark as such.
POINTWISE = {
    "hardswish",
    "hardswish_",
    "hardsigmoid_",
    "hardtanh_",
    "leaky_relu_",
    "elu_",
    "mish_",
    "threshold_",
    "copy_",
    "prelu",
    "_prelu_kernel",
    "rsub",
}
