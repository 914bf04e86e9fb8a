"""What each kind of operation does to the labels of its inputs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from tpp.channels.planes import Flow
from tpp.channels.tracing import ChannelTrace

_Rule = Callable[[ChannelTrace, Sequence[Any], Mapping[str, Any], list[Tensor]], list[Flow]]
_T = ChannelTrace
RULES: dict[str, _Rule] = {
    **dict.fromkeys(
        ("clone", "alias", "detach", "_to_copy", "contiguous", "as_strided_", "lift_fresh"),
        _T._same,
    ),
    "convolution": _T._convolution,
    **dict.fromkeys(("mm", "bmm"), _T._mm),
    **dict.fromkeys(("addmm", "baddbmm"), _T._addmm),
    **dict.fromkeys(
        (
            "native_batch_norm",
            "_native_batch_norm_legit",
            "_native_batch_norm_legit_no_training",
            "cudnn_batch_norm",
        ),
        _T._batch_norm,
    ),
    "native_layer_norm": _T._layer_norm,
    "_fused_rms_norm": _T._rms_norm,
    "native_group_norm": _T._group_norm,
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
        _T._pool,
    ),
    **dict.fromkeys(("mean", "sum", "amax", "amin", "var", "linalg_vector_norm"), _T._reduce),
    **dict.fromkeys(("_softmax", "_safe_softmax", "_log_softmax"), _T._softmax),
    "constant_pad_nd": _T._pad,
    "cat": _T._cat,
    "stack": _T._stack,
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
