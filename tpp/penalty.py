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

A convolution in groups is a dense one whose filters are zero outside their own group's inputs, so
filters of different groups never correlate: each group is a gram matrix of its own, and a filter
of a depthwise convolution is only correlated with itself.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Larger matrices than this many entries are multiplied one by one: each keeps any device busy, and
# a copy of several of them side by side would only take memory.
_BATCH_ENTRIES = 2**21


@dataclass(frozen=True)
class Block:
    """Pruned filters of one gram matrix that are penalised at once.

    A layer has one gram matrix; a convolution in groups has one per group.

    Attributes:
        block: the pruned filters B of this block, as rows of the layer's weight.
        others: the matrix's other pruned filters, which belong to other blocks.
        kept: the matrix's kept filters K.
        filters: n of the layer, all groups together.
    """

    block: tuple[int, ...]
    others: tuple[int, ...]
    kept: tuple[int, ...]
    filters: int

    @property
    def order(self) -> tuple[int, ...]:
        """All rows of the gram matrix, the block's first and the kept ones last."""
        return (*self.block, *self.others, *self.kept)


class BlockBatch:
    """Blocks of one shape, from any number of weights, computed together.

    Args:
        blocks: for every weight its blocks; all of them with as many pruned filters in the block,
            elsewhere and kept.
    """

    def __init__(self, blocks: Mapping[str, Sequence[Block]]) -> None:
        self.names = list(blocks)
        first = blocks[self.names[0]][0]
        self.size, self.rows = len(first.block), len(first.order)
        self.first_kept = self.rows - len(first.kept)
        self.filters = first.filters
        self._orders = [
            torch.tensor([row for block in blocks[name] for row in block.order], dtype=torch.int64)
            for name in self.names
        ]
        # Where all of a weight's rows are there, putting them back is a gather as well.
        self._inverses = [
            order.argsort() if len(order) == self.filters else None for order in self._orders
        ]
        self._placed: dict[torch.device, tuple[list[Tensor], list[Tensor | None]]] = {}

    def penalty(self, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Gram penalty and filter decay of the blocks.

        The gradients of blocks that partition the pruned set add up to the gradient of the whole.
        (The gradient of a single block is its share of that sum, not the derivative of the block's
        own value: entries of G between two blocks are charged to the row's owner.)

        Args:
            weights: (n, ...) each, in the order of ``names``, with the same number of entries per
                filter; computed in float32, or in float64 if that is what they are, whatever the
                autocast.

        Returns:
            Two scalars: the blocks' share of ``1/n^2 * sum G_ij^2`` and ``1/2 * sum w^2`` over
            their filters, whose gradient is the filter decay ``w``.
        """
        with torch.autocast(weights[0].device.type, enabled=False):
            exact = (torch.float32, torch.float64)
            weights = [w if w.dtype in exact else w.float() for w in weights]
            return _BatchPenalty.apply(self, *weights)

    def gather(self, weights: Sequence[Tensor]) -> Tensor:
        """The gram matrices' filters, in each the block's first, kept ones last: (m, rows, d)."""
        orders, _ = self._indices(weights[0].device)
        parts = [
            _flat(weight).index_select(0, order)
            for weight, order in zip(weights, orders, strict=True)
        ]
        rows = parts[0] if len(parts) == 1 else torch.cat(parts)
        return rows.view(-1, self.rows, rows.shape[1])

    def scatter(self, rows: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
        """What :meth:`gather` took, back where it was in every weight; zero elsewhere."""
        orders, inverses = self._indices(rows.device)
        parts = rows.flatten(0, 1).split([len(order) for order in orders])
        result = []
        for weight, part, order, inverse in zip(weights, parts, orders, inverses, strict=True):
            if inverse is not None:
                flat = part.index_select(0, inverse)
            else:
                flat = part.new_zeros(weight.shape[0], part.shape[1]).index_copy_(0, order, part)
            result.append(_unflat(flat, weight))
        return result

    def _indices(self, device: torch.device) -> tuple[list[Tensor], list[Tensor | None]]:
        if device not in self._placed:
            self._placed[device] = (
                [order.to(device) for order in self._orders],
                [None if inverse is None else inverse.to(device) for inverse in self._inverses],
            )
        return self._placed[device]


class _BatchPenalty(torch.autograd.Function):
    """Gram penalty and filter decay of a batch of blocks, in one backward pass."""

    @staticmethod
    def forward(ctx: Any, batch: BlockBatch, *weights: Tensor) -> tuple[Tensor, Tensor]:
        rows = batch.gather(weights)
        block = rows[:, : batch.size]
        gram = block @ rows.mT
        # The rows are gathered once more in backward rather than kept: G is the smaller by far.
        ctx.save_for_backward(gram, *weights)
        ctx.batch = batch
        # 2 * (kept columns) + 1 * (pruned columns) = (all columns) + (kept columns)
        kept = gram[:, :, batch.first_kept :]
        value = (gram.square().sum() + kept.square().sum()) / batch.filters**2
        return value, 0.5 * block.square().sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_gram: Tensor, grad_decay: Tensor) -> tuple[Tensor | None, ...]:
        gram, *weights = ctx.saved_tensors
        batch = ctx.batch
        rows = batch.gather(weights)
        block = rows[:, : batch.size]
        factors = gram * (grad_gram * (4.0 / batch.filters**2))
        # The decay of row i is one more multiple of row i: it costs a diagonal, not a pass over W.
        factors.diagonal(dim1=1, dim2=2).add_(grad_decay)
        grad = torch.empty_like(rows)
        torch.bmm(factors, rows, out=grad[:, : batch.size])
        grad[:, batch.size : batch.first_kept] = 0.0
        kept = factors[:, :, batch.first_kept :].mT
        torch.bmm(kept, block, out=grad[:, batch.first_kept :])
        return None, *batch.scatter(grad, weights)


def make_batches(
    blocks: Iterable[tuple[str, Block]], row_sizes: Mapping[str, int]
) -> list[BlockBatch]:
    """Put blocks of one shape together, as long as they are small.

    Args:
        blocks: a weight's name and one of its blocks, each.
        row_sizes: entries per filter of every weight.
    """
    batches: dict[Any, list[dict[str, list[Block]]]] = {}
    entries: dict[Any, int] = {}
    for name, block in blocks:
        row_size = row_sizes[name]
        shape = (row_size, len(block.block), len(block.others), len(block.kept), block.filters)
        entries[shape] = entries.get(shape, 0) + row_size * len(block.order)
        if shape not in batches or entries[shape] > _BATCH_ENTRIES:
            batches.setdefault(shape, []).append({})
            entries[shape] = row_size * len(block.order)
        batches[shape][-1].setdefault(name, []).append(block)
    return [BlockBatch(batch) for of_shape in batches.values() for batch in of_shape]


def layer_blocks(
    filters: int, pruned: Sequence[int], groups: int = 1, owned: Collection[int] | None = None
) -> list[Block]:
    """The blocks of one layer: one for each of its gram matrices that owns pruned filters.

    Args:
        filters: n.
        pruned: indices of the filters that will go.
        groups: of the convolution.
        owned: the pruned filters that are penalised here; by default all.
    """
    per_group = filters // groups
    gone, owned = set(pruned), set(pruned if owned is None else owned)
    blocks = []
    for group in sorted({row // per_group for row in owned}):
        members = range(group * per_group, (group + 1) * per_group)
        blocks.append(
            Block(
                block=tuple(row for row in members if row in owned),
                others=tuple(row for row in members if row in gone and row not in owned),
                kept=tuple(row for row in members if row not in gone),
                filters=filters,
            )
        )
    return blocks


def gram_penalty(weight: Tensor, pruned: Sequence[int], *, groups: int = 1) -> Tensor:
    """Mean squared correlation of the filters that will go with all others (TPP's penalty).

    Args:
        weight: (n, ...) weight of a Conv2d or Linear layer.
        pruned: indices of the filters that will go, each once.
        groups: of the convolution; filters of different groups see different inputs and do not
            correlate.

    Returns:
        Scalar ``1/n^2 * sum (W W^T)_ij^2`` over all ordered pairs with i or j in ``pruned``,
        without gram_weight and lambda; differentiable once with respect to ``weight``.

    Source: Wang & Fu, ICLR 2023, eq. 3.
    """
    blocks = layer_blocks(weight.shape[0], pruned, groups)
    total = weight.new_zeros((), dtype=torch.promote_types(weight.dtype, torch.float32))
    for batch in make_batches([("", block) for block in blocks], {"": weight[0].numel()}):
        total = total + batch.penalty([weight])[0]
    # Nothing pruned costs nothing, and has a gradient all the same: zero.
    return total if blocks else total + 0.0 * weight.sum()


def entry_decay(vectors: Sequence[Tensor], masks: Tensor) -> Tensor:
    """``1/2 * sum v_i^2`` over chosen entries of biases and of BatchNorms' scales and shifts.

    Args:
        vectors: any number of one-dimensional tensors.
        masks: 1 for the chosen entries and 0 for the others, of all vectors one after the other.

    Returns:
        A scalar; its gradient is the decay ``v_i`` of exactly those entries.
    """
    exact = [v if v.dtype == torch.float64 else v.float() for v in vectors]
    return 0.5 * (torch.cat(exact) * masks).square().sum()


def _flat(weight: Tensor) -> Tensor:
    """The filters as rows, without a copy: their entries in the order they have in memory."""
    if _is_channels_last(weight):
        return weight.permute(0, 2, 3, 1).flatten(1)
    return weight.flatten(1)


def _unflat(rows: Tensor, weight: Tensor) -> Tensor:
    """Rows in the shape and the memory format of ``weight``."""
    if _is_channels_last(weight):
        n, channels, height, width = weight.shape
        return rows.view(n, height, width, channels).permute(0, 3, 1, 2)
    return rows.view(weight.shape)


def _is_channels_last(weight: Tensor) -> bool:
    return (
        weight.dim() == 4
        and not weight.is_contiguous()
        and weight.is_contiguous(memory_format=torch.channels_last)
    )
