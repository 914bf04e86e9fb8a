"""FireGNN and the two networks on it: the policy that picks two edges, and the value.

Yang et al., "Learning to Boost Resilience of Complex Networks via Neural Edge Rewiring" (TMLR
2023), after the authors' code. All graphs of a batch have N nodes and E edges; K + 1 graphs of a
filtration go through the encoder side by side, those without an edge left out.

Inferred, as no source that could be read says it: how wide the recurrent layer of the jumping
knowledge is (``NetworkSection.jumping``), and the hidden layers of the two context networks.
"""

from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from tpp.common.settings import PositiveInt, Section
from train.graphs.states import FEATURES, Batch

_VALUE_HIDDEN = 256
_ACTIONS = 2  # of the first head: stop, go on


class NetworkSection(Section):
    """The policy's and the value's network.

    Attributes:
        hidden: width of all layers.
        layers: of the encoder; the first one's output is left out of the jumping knowledge.
        filtration: removals that the network looks at beside the graph itself; ``full`` for all
            but one node.
        norm: ``batch``, as published, over all nodes of a batch, in which a graph that is there
            twice counts once; with ``layer`` a graph's output does not depend on the other ones.
        jumping: width of each direction of the jumping knowledge's recurrent layer; null for
            half of ``hidden`` for each of its inputs, as in PyTorch Geometric.
    """

    hidden: PositiveInt = 64
    layers: Annotated[int, Field(ge=2)] = 5
    filtration: Annotated[int, Field(ge=0)] | Literal["full"] = "full"
    norm: Literal["batch", "layer"] = "batch"
    jumping: PositiveInt | None = None

    @property
    def jumping_width(self) -> int:
        """Of each direction."""
        return self.jumping or max(1, (self.layers - 1) * self.hidden // 2)


class _BatchNorm(nn.BatchNorm1d):
    """Batch normalisation over the nodes that are present; (G, N, h) to (G, N, h)."""

    def forward(self, input: Tensor, present: Tensor | None = None) -> Tensor:
        """Normalise; in training by the batch's own mean and variance."""
        assert present is not None
        if not self.training:
            return super().forward(input.flatten(0, 1)).view_as(input)
        return input.new_zeros(input.shape).masked_scatter(
            present, super().forward(input[present[..., 0]])
        )


class _LayerNorm(nn.LayerNorm):
    def forward(self, input: Tensor, present: Tensor | None = None) -> Tensor:
        """Normalise each node."""
        return super().forward(input)


def _norm(settings: NetworkSection) -> nn.Module:
    return (_BatchNorm if settings.norm == "batch" else _LayerNorm)(settings.hidden)


class _Gin(nn.Module):
    """One layer: sums of neighbours, a loop at each node and a learnt weight of its own."""

    def __init__(self, inputs: int, settings: NetworkSection, *, is_first: bool) -> None:
        super().__init__()
        hidden = settings.hidden
        self.epsilon = nn.Parameter(torch.zeros(()))
        self.inner, self.outer = nn.Linear(inputs, hidden), nn.Linear(hidden, hidden)
        self.inner_norm, self.norm = _norm(settings), _norm(settings)
        self.is_first = is_first
        if not is_first:  # GraphNorm
            self.mean_scale = nn.Parameter(torch.ones(hidden))
            self.scale = nn.Parameter(torch.ones(hidden))
            self.shift = nn.Parameter(torch.zeros(hidden))

    def forward(self, x: Tensor, adjacency: Tensor, present: Tensor, count: Tensor) -> Tensor:
        """Nodes' features (G, N, inputs) to (G, N, h); zeros for nodes that are not present."""
        # The loop is one neighbour more.
        x = torch.baddbmm(x * (2 + self.epsilon), adjacency, x)
        x = self.inner_norm(self.inner(x), present).relu()
        x = functional.selu(self.norm(self.outer(x), present))
        if self.is_first:
            return x * present
        x = functional.selu(x) * present
        x = (x - x.sum(1, keepdim=True) / count * self.mean_scale) * present
        variance = x.square().sum(1, keepdim=True) / count
        x = self.scale * x * (variance + 1e-5).rsqrt() + self.shift
        return functional.normalize(x, dim=-1) * present


class _Jumping(nn.Module):
    """Weighs layers for each node: a recurrent layer over them both ways, softmax, weighted sum."""

    def __init__(self, settings: NetworkSection) -> None:
        super().__init__()
        width = settings.jumping_width
        self.recurrent = nn.GRU(settings.hidden, width, batch_first=True, bidirectional=True)
        self.attention = nn.Linear(2 * width, 1)

    def forward(self, layers: list[Tensor]) -> Tensor:
        """Layers' outputs, each (..., h), to one (..., h) of length 1."""
        stacked = torch.stack(layers, -2)
        over_layers, _ = self.recurrent(stacked.flatten(0, -3))
        weights = self.attention(over_layers).softmax(-2).view(*stacked.shape[:-1], 1)
        return functional.normalize((weights * stacked).sum(-2), dim=-1)


class Encoded(NamedTuple):
    """What the encoder makes of a batch.

    Attributes:
        nodes: (G, N, h), of the filtration graphs that have an edge, batch by batch.
        graphs: (B, K + 1, h), their sums over the nodes; zeros where no edge is left.
        context: (B, h), the mean of these over the filtration graphs that have an edge.
    """

    nodes: Tensor
    graphs: Tensor
    context: Tensor


class Encoder(nn.Module):
    """A graph isomorphism network over the filtration."""

    def __init__(self, settings: NetworkSection) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            _Gin(settings.hidden if number else FEATURES, settings, is_first=not number)
            for number in range(settings.layers)
        )
        self.jumping = _Jumping(settings)

    def forward(self, batch: Batch) -> Encoded:
        """Embed all nodes and graphs of a batch."""
        used = batch.used
        x, adjacency = batch.features[used], batch.adjacency[used]
        present = batch.present[used].unsqueeze(-1)
        count = present.sum(1, keepdim=True)
        outputs = []
        for layer in self.layers:
            x = layer(x, adjacency, present, count)
            outputs.append(x)
        nodes = self.jumping(outputs[1:]) * present
        sums = nodes.sum(1)
        graphs = sums.new_zeros(*used.shape, sums.shape[-1])
        graphs[used] = sums
        context = graphs.sum(1) / used.sum(1, keepdim=True).clamp(min=1)
        return Encoded(nodes, graphs, context)


class _Head(nn.Module):
    """Scores each edge for a query: query . tanh(A [condition; edge])."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.gate, self.mix = nn.Linear(hidden, 1), nn.Linear(hidden, hidden)
        self.of_condition = nn.Linear(hidden, hidden)
        self.of_edge = nn.Linear(hidden, hidden, bias=False)

    def edges(self, encoded: Encoded, edges: Tensor, there: Tensor) -> Tensor:
        """A's part of each edge: (B, K + 1, n, h) over the filtration graphs to (B, n, h)."""
        gates = self.gate(encoded.graphs).sigmoid() * there  # (B, K + 1, n)
        # The sum over graphs of gate * (W edge + b), with W applied once.
        pooled = torch.einsum("bkn,bknh->bnh", gates, edges)
        mixed = functional.linear(pooled, self.mix.weight)
        return self.of_edge(mixed + gates.sum(1).unsqueeze(-1) * self.mix.bias)

    def forward(self, query: Tensor, condition: Tensor, edges: Tensor) -> Tensor:
        """Logits (S, n) for queries and conditions (S, h) and edges (S, n, h)."""
        hidden = (self.of_condition(condition).unsqueeze(1) + edges).tanh()
        return torch.bmm(hidden, query.unsqueeze(-1)).squeeze(-1)


class Choice(NamedTuple):
    """What a policy did, or is asked about.

    Attributes:
        actions: (S, 3) int64: 0 to stop or 1 to go on; the first edge, an entry of the first half
            of the directed edge list; the second edge, an entry of all of it.
        log_probs: (S, 3), each given the earlier ones; also where the first one says stop.
        entropy: (S,) of the three, the later ones given the earlier.
    """

    actions: Tensor
    log_probs: Tensor
    entropy: Tensor

    @property
    def log_prob(self) -> Tensor:
        """Of the three together, (S,)."""
        return self.log_probs.sum(-1)


class Policy(nn.Module):
    """Picks whether to go on, and the two edges of a swap, one given the other.

    Args:
        settings: its sizes.
    """

    def __init__(self, settings: NetworkSection) -> None:
        super().__init__()
        hidden = settings.hidden
        self.encoder = Encoder(settings)
        self.merge = nn.Linear(6 * hidden, hidden)
        self.go_on = _mlp(hidden, hidden, _ACTIONS)
        self.said = nn.Embedding(_ACTIONS, hidden)
        self.query = _mlp(2 * hidden, hidden, hidden)
        self.first, self.second = _Head(hidden), _Head(hidden)
        self.context = _mlp(3 * hidden, hidden, hidden)
        self.of_first = nn.Linear(hidden, hidden)
        self.condition = nn.Linear(2 * hidden, hidden)

    def forward(
        self,
        batch: Batch,
        index: Tensor,
        actions: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Choice:
        """Pick actions, or say how probable given ones are.

        Args:
            batch: different graphs.
            index: (S,) which of them each state is.
            actions: (S, 3); None to pick them.
            generator: of the draws; None for the most probable of each of the three.
        """
        encoded = self.encoder(batch)
        edges = self._edges(encoded, batch)
        half = batch.first.shape[1]
        there = batch.there
        both = torch.cat([there, there], -1)
        of_first = self.first.edges(encoded, edges[:, :, :half], there)[index]
        of_second = self.second.edges(encoded, edges, both)[index]
        context = encoded.context[index]
        picked: list[Choice] = []

        def pick(logits: Tensor) -> Tensor:
            number = len(picked)
            log_probs = logits.log_softmax(-1)
            if actions is not None:
                action = actions[:, number]
            elif generator is None:
                action = logits.argmax(-1)
            else:
                action = log_probs.exp().multinomial(1, generator=generator).squeeze(-1)
            log_prob = log_probs.gather(-1, action.unsqueeze(-1)).squeeze(-1)
            entropy = -(log_probs.exp() * log_probs).sum(-1)
            picked.append(Choice(action, log_prob, entropy))
            return action

        said = self.said(pick(self.go_on(context)))
        query = self.query(torch.cat([context, said], -1))
        logits = self.first(query, query, of_first)
        action = pick(masked(logits, batch.first[index]))

        edge = edges[:, 0][index, action]
        before = self.context(torch.cat([context, edge, said], -1))
        condition = self.condition(torch.cat([before, self.of_first(edge).tanh()], -1))
        logits = self.second(edge, condition, of_second)
        pick(masked(logits, second_allowed(batch, index, action)))
        return Choice(
            torch.stack([one.actions for one in picked], -1),
            torch.stack([one.log_probs for one in picked], -1),
            torch.stack([one.entropy for one in picked]).sum(0),
        )

    def _edges(self, encoded: Encoded, batch: Batch) -> Tensor:
        """Embeddings of all directed edges in all filtration graphs, (B, K + 1, 2 E, h).

        One linear layer of [min, max, mean, sum, u - v, u * v] of the ends' embeddings. Only
        u - v tells the directions apart, and min and max are (u + v -+ |u - v|) / 2.
        """
        used, half = batch.used, batch.first.shape[1]
        size, nodes = used.sum(1), batch.present.shape[-1]
        ends = batch.edges[:, :half].repeat_interleave(size, 0)  # (G, E, 2)
        rows = ends + nodes * torch.arange(len(ends)).view(-1, 1, 1)
        flat = encoded.nodes.flatten(0, 1)
        u, v = flat[rows[..., 0]], flat[rows[..., 1]]
        least, most, mean, total, difference, product = self.merge.weight.chunk(6, 1)
        weight = torch.cat([(least + most + mean) / 2 + total, (most - least) / 2, product], 1)
        apart = u - v
        inputs = torch.cat([u + v, apart.abs(), u * v], -1)
        same = functional.linear(inputs, weight, self.merge.bias)
        other = functional.linear(apart, difference)
        found = same.new_zeros(*used.shape, 2 * half, same.shape[-1])
        found[used] = torch.cat([same + other, same - other], 1)
        return found


class Value(nn.Module):
    """The expected return of a graph, by an encoder of its own.

    Args:
        settings: its sizes.
        divisor: of the output; N * N, as published, makes shares of R of counts of nodes.
    """

    def __init__(self, settings: NetworkSection, divisor: float) -> None:
        super().__init__()
        self.encoder = Encoder(settings)
        self.output = _mlp(settings.hidden, _VALUE_HIDDEN, 1)
        self._divisor = divisor

    def forward(self, batch: Batch, index: Tensor) -> Tensor:
        """Values (S,) of the states that ``index`` names in a batch."""
        return (self.output(self.encoder(batch).context).squeeze(-1) / self._divisor)[index]


def second_allowed(batch: Batch, index: Tensor, first: Tensor) -> Tensor:
    """Which directed edges may follow first edges: (S,) to (S, 2 E) bool.

    Both of its ends have to be apart from both of the first one's, and not joined with them.
    """
    edges, states = batch.edges[index], torch.arange(len(first))
    near = batch.adjacency[:, 0][index] > 0  # (S, N, N)
    ends = edges[states, first]  # (S, 2)
    blocked = near[states, ends[:, 0]] | near[states, ends[:, 1]]
    # An end of an edge is the other end's neighbour, so that both are blocked already.
    return ~(blocked.gather(1, edges[..., 0]) | blocked.gather(1, edges[..., 1]))


def masked(logits: Tensor, allowed: Tensor) -> Tensor:
    """Logits of which those that are not allowed have probability 0, unless none is."""
    return logits.masked_fill(~allowed, torch.finfo(logits.dtype).min)


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))
