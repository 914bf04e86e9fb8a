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
        rows: all filters of the matrix, a stretch of the weight's rows.
        filters: n of the layer, all groups together.
    """

    block: tuple[int, ...]
    others: tuple[int, ...]
    kept: tuple[int, ...]
    rows: range
    filters: int


class BlockBatch:
    """Blocks of one shape, from any number of weights, computed together.

    Args:
        blocks: for every weight its blocks; all of them with as many pruned filters in the block,
            elsewhere and kept.
    """

    def __init__(self, blocks: Mapping[str, Sequence[Block]]) -> None:
        self.names = list(blocks)
        every = [block for of_weight in blocks.values() for block in of_weight]
        self.filters = every[0].filters
        self.rows = len(every[0].rows)
        # A gram matrix's rows stand together in the weight: which of these stretches are needed.
        stretches = [[block.rows[0] // self.rows for block in of] for of in blocks.values()]
        all_of_them = list(range(self.filters // self.rows))
        self._stretches = [
            None if of == all_of_them else torch.tensor(of, dtype=torch.int64) for of in stretches
        ]
        self._block, self._kept, self._others = (
            torch.tensor([[row % self.rows for row in rows] for rows in of_kind]).long()
            for of_kind in zip(*((b.block, b.kept, b.others) for b in every), strict=True)
        )
        size, kept = self._block.shape[1], self._kept.shape[1]
        # The product of the whole matrix M o G with W has a block of zeros that could be left
        # out; below so many multiply-adds per weight, leaving it out costs more in copies.
        self.whole_product = self.rows**2 - size * (self.rows + kept) <= 64 * self.rows
        self._placed: dict[torch.device, _Indices] = {}

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

    def stack(self, weights: Sequence[Tensor]) -> Tensor:
        """The gram matrices' filters, (matrices, rows, d); a view if it is all of one weight."""
        indices = self.indices(weights[0].device)
        parts = []
        for weight, stretches in zip(weights, indices.stretches, strict=True):
            rows = _flat(weight).unflatten(0, (-1, self.rows))
            parts.append(rows if stretches is None else rows.index_select(0, stretches))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def unstack(self, grad: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of the weights from that of what :meth:`stack` made; zero elsewhere."""
        indices = self.indices(grad.device)
        counts = [self.filters // self.rows if of is None else len(of) for of in indices.stretches]
        result = []
        for weight, stretches, part in zip(
            weights, indices.stretches, grad.split(counts), strict=True
        ):
            if stretches is not None:
                whole = part.new_zeros(self.filters // self.rows, *part.shape[1:])
                part = whole.index_copy_(0, stretches, part)
            result.append(_unflat(part.flatten(0, 1), weight))
        return result

    def indices(self, device: torch.device) -> "_Indices":
        """Where blocks and kept filters stand in the stacked matrices, on ``device``."""
        if device not in self._placed:
            first = self.rows * torch.arange(len(self._block))[:, None]
            self._placed[device] = _Indices(
                stretches=[None if of is None else of.to(device) for of in self._stretches],
                columns=self._block.unsqueeze(2).to(device),
                block=(self._block + first).flatten().to(device),
                kept=(self._kept + first).flatten().to(device),
                others=(self._others + first).flatten().to(device),
                kept_columns=self._kept.unsqueeze(1).to(device),
                weight_of_column=torch.ones(len(self._kept), 1, self.rows)
                .scatter_(2, self._kept.unsqueeze(1), 2.0)
                .to(device),
            )
        return self._placed[device]


@dataclass(frozen=True)
class _Indices:
    """Of a batch of m gram matrices with blocks of b and k kept filters, on one device.

    Attributes:
        stretches: per weight which of its matrices are in the batch; None for all.
        columns: (m, b, 1) the block's filters, as columns of their matrix.
        block, kept, others: all blocks', kept and other filters, as rows of the stacked matrices.
        kept_columns: (m, 1, k) kept filters as columns.
        weight_of_column: (m, 1, rows) 2 for kept filters, 1 for pruned ones.
    """

    stretches: list[Tensor | None]
    columns: Tensor
    block: Tensor
    kept: Tensor
    others: Tensor
    kept_columns: Tensor
    weight_of_column: Tensor


class _BatchPenalty(torch.autograd.Function):
    """Gram penalty and filter decay of a batch of blocks, in one backward pass."""

    @staticmethod
    def forward(ctx: Any, batch: BlockBatch, *weights: Tensor) -> tuple[Tensor, Tensor]:
        indices = batch.indices(weights[0].device)
        W = batch.stack(weights)
        W_B = _select(W, indices.block)
        G_B = W_B @ W.mT
        # Of the weights' copies nothing is kept for backward: G is the smaller by far.
        ctx.save_for_backward(G_B, *weights)
        ctx.batch = batch
        value = (G_B.square() * indices.weight_of_column).sum() / batch.filters**2
        return value, 0.5 * W_B.square().sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_gram: Tensor, grad_decay: Tensor) -> tuple[Tensor | None, ...]:
        G_B, *weights = ctx.saved_tensors
        batch: BlockBatch = ctx.batch
        indices = batch.indices(G_B.device)
        # Called inside an autocast, a backward pass would be lowered as well.
        with torch.autocast(G_B.device.type, enabled=False):
            grad = _gradient(batch, indices, batch.stack(weights), G_B, grad_gram, grad_decay)
        return None, *batch.unstack(grad, weights)


def _gradient(
    batch: BlockBatch,
    indices: _Indices,
    W: Tensor,
    G_B: Tensor,
    grad_gram: Tensor,
    grad_decay: Tensor,
) -> Tensor:
    """Gradient of the stacked matrices ``W``, given that of gram penalty and filter decay."""
    M_B = G_B * (grad_gram * (4.0 / batch.filters**2))
    # The decay of filter i is one more multiple of filter i: it costs an entry, not a pass
    # over the weights.
    M_B.scatter_add_(2, indices.columns, grad_decay.to(M_B.dtype).expand(indices.columns.shape))
    M_BK = M_B.gather(2, indices.kept_columns.expand(-1, M_B.shape[1], -1))
    if batch.whole_product:
        M = M_B.new_zeros(len(W) * batch.rows, batch.rows)
        M.index_copy_(0, indices.block, M_B.flatten(0, 1))
        M_K = M_B.new_zeros(len(W), M_BK.shape[2], batch.rows)
        M_K.scatter_(2, indices.columns.mT.expand(-1, M_K.shape[1], -1), M_BK.mT)
        M.index_copy_(0, indices.kept, M_K.flatten(0, 1))
        grad = M.view(-1, batch.rows, batch.rows) @ W
    else:
        grad = torch.empty_like(W)
        rows = grad.view(-1, W.shape[2])
        rows.index_copy_(0, indices.block, (M_B @ W).flatten(0, 1))
        W_B = _select(W, indices.block)
        rows.index_copy_(0, indices.kept, (M_BK.mT @ W_B).flatten(0, 1))
        rows.index_fill_(0, indices.others, 0.0)
    return grad


def _select(W: Tensor, rows: Tensor) -> Tensor:
    """Rows of stacked matrices, equally many of each: (matrices, b, d)."""
    return W.flatten(0, 1).index_select(0, rows).view(len(W), -1, W.shape[2])


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
        entries[shape] = entries.get(shape, 0) + row_size * len(block.rows)
        if shape not in batches or entries[shape] > _BATCH_ENTRIES:
            batches.setdefault(shape, []).append({})
            entries[shape] = row_size * len(block.rows)
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
                rows=members,
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
