"""KernOrth: every layer's weight matrix towards orthogonality (Xie et al., CVPR 2017)."""

from tpp.methods.orthogonal import OrthogonalTraining


class L1KernOrth(OrthogonalTraining):
    """Remove by L1 norm, then finetune with ``||W W^T - I||`` of all layers in the loss."""

    name = "l1+kernorth"
    title = "L1 + KernOrth"
    form = "kernel"
    stage = "finetune"


class KernOrthL1(OrthogonalTraining):
    """Train the dense network on with ``||W W^T - I||`` in the loss, then remove by L1 norm."""

    name = "kernorth+l1"
    title = "KernOrth + L1"
    form = "kernel"
    stage = "regularize"
    picks = "after"
