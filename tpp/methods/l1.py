"""L1: remove the filters with the smallest L1 norms at once, then finetune (Li et al. 2017)."""

from tpp.methods.base import Method


class L1(Method):
    """Remove the filters with the smallest L1 norms at once (Li et al., ICLR 2017).

    The default hooks are all there is to it.
    """

    name = "l1"
    title = "L1"
