"""The penalty on the filters that will go, with its gradient in closed form.

For a layer with weight W (n filters, flattened to n x d), pruned set P and kept set K, TPP
penalises every entry of the gram matrix G = W W^T in a row or column of P (Wang & Fu 2023,
eq. 3)::

    gram  = 1/n^2 * sum of G_ij^2 over pairs (i, j) with i in P or j in P
          = 1/n^2 * sum over i in P of (2 * sum_{j in K} G_ij^2 + sum_{j in P} G_ij^2)

whose gradient is 4/n^2 * (M o G) W with M_ij = 1 where i in P or j in P. Only the rows G_P are
ever formed, so the kept-kept block, the larger part of G, costs nothing.

The sum over i in P is what is shared out among ranks: a block B of pruned rows contributes its
rows to the value, and to the gradient the rows B (G_B W) and what B asks of the kept filters
(G_BK^T W_B). Over blocks that partition P, both add up to the whole exactly.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _BlockPenalty(torch.autograd.Function):
    """Gram penalty and filter decay of one block of pruned filters, in one backward pass."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, block: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        W = weight.flatten(1)
        W_B = W.index_select(0, block)
        G_B = W_B @ W.T
        G_BK = G_B.index_select(1, kept)
        ctx.save_for_backward(W, W_B, G_B, G_BK, block, kept)
        ctx.shape = weight.shape
        # 2 * (kept columns) + 1 * (pruned columns) = (all columns) + (kept columns)
        gram = (G_B.square().sum() + G_BK.square().sum()) / W.shape[0] ** 2
        return gram, 0.5 * W_B.square().sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_gram: Tensor, grad_decay: Tensor) -> tuple[Tensor, None, None]:
        W, W_B, G_B, G_BK, block, kept = ctx.saved_tensors
        scale = grad_gram * (4.0 / W.shape[0] ** 2)
        grad = torch.zeros_like(W)
        grad.index_copy_(0, kept, scale * (G_BK.T @ W_B))
        grad.index_copy_(0, block, scale * (G_B @ W) + grad_decay * W_B)
        return grad.view(ctx.shape), None, None


def block_penalty(weight: Tensor, block: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Gram penalty and filter decay of one block of a layer's pruned filters.

    The gradients of blocks that partition the pruned set add up to the gradient of the whole.
    (The gradient of a single block is its share of that sum, not the derivative of the block's
    own value: entries of G between two blocks are charged to the row's owner.)

    Args:
        weight: (n, ...) filters; computed in float32, or in float64 if that is what it is,
            whatever the autocast.
        block: (b,) int64 indices of the pruned filters of this block.
        kept: (k,) int64 indices of all kept filters of the layer.

    Returns:
        Two scalars: the block's share of ``1/n^2 * sum G_ij^2`` and ``1/2 * sum w^2`` over the
        block's filters, whose gradient is the filter decay ``w``.
    """
    with torch.autocast(weight.device.type, enabled=False):
        if weight.dtype not in (torch.float32, torch.float64):
            weight = weight.float()
        return _BlockPenalty.apply(weight, block, kept)


def gram_penalty(weight: Tensor, pruned: Sequence[int]) -> Tensor:
    """Mean squared correlation of the filters that will go with all others (TPP's penalty).

    Args:
        weight: (n, ...) weight of a Conv2d or Linear layer.
        pruned: indices of the filters that will go, each once.

    Returns:
        Scalar ``1/n^2 * sum (W W^T)_ij^2`` over all ordered pairs with i or j in ``pruned``,
        without gram_weight and lambda; differentiable once with respect to ``weight``.

    Source: Wang & Fu, ICLR 2023, eq. 3.
    """
    gone = torch.zeros(weight.shape[0], dtype=torch.bool, device=weight.device)
    gone[list(pruned)] = True
    gram, _ = block_penalty(weight, gone.nonzero().flatten(), (~gone).nonzero().flatten())
    return gram


def entry_decay(vector: Tensor, block: Tensor) -> Tensor:
    """``1/2 * sum v_i^2`` over the entries ``block`` of a bias or of a BatchNorm's scale or shift.

    Its gradient is the decay ``v_i`` of exactly those entries.
    """
    return 0.5 * vector.index_select(0, block).square().sum()
