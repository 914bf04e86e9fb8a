"""OrthConv: every convolution towards an orthogonal linear map (Wang et al., CVPR 2020).

The term is the one of the paper. TPP's public code calls the reference implementation with its
defaults, stride 2 and padding 1, for convolutions of all strides, which compares a filter with
copies of itself shifted by one pixel diagonally; the published rows may have been run so.
"""

from tpp.methods.orthogonal import OrthogonalTraining


class L1OrthConv(OrthogonalTraining):
    """Remove by L1 norm, then finetune with ``||Conv(K, K) - I_r0||`` in the loss."""

    name = "l1+orthconv"
    title = "L1 + OrthConv"
    form = "convolution"
    stage = "finetune"


class OrthConvL1(OrthogonalTraining):
    """Train the dense network on with ``||Conv(K, K) - I_r0||``, then remove by L1 norm."""

    name = "orthconv+l1"
    title = "OrthConv + L1"
    form = "convolution"
    stage = "regularize"
    picks = "after"
