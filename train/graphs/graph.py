"""Undirected graphs as bit sets, and what is measured of them: attacks, resilience, efficiency.

Definitions are those of ResiNet's code (yangysc/ResiNet). A set of nodes is an integer whose bit
``i`` stands for node ``i``; graphs of some hundred nodes are quick that way.
"""

import random
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tpp.common.errors import UserError

Edge = tuple[int, int]
# BA-15 of the authors' code: for some nodes their neighbours of a higher id.
_BA15 = {
    0: (1, 2, 3, 4, 5, 6, 8, 9, 12),
    1: (2, 3, 7, 11),
    2: (4, 5, 10),
    5: (6, 10, 12),
    6: (7, 8, 13, 14),
    7: (9, 11),
    9: (14,),
    12: (13,),
}


def members(nodes: int) -> Iterator[int]:
    """The nodes of a set, rising."""
    while nodes:
        lowest = nodes & -nodes
        yield lowest.bit_length() - 1
        nodes ^= lowest


@dataclass(frozen=True)
class Graph:
    """A graph without loops; of each node the set of its neighbours.

    Two graphs are equal when the same pairs of nodes are joined: node ids count.
    """

    neighbours: tuple[int, ...]

    @classmethod
    def of_edges(cls, nodes: int, edges: Iterable[Edge]) -> "Graph":
        """Make a graph of so many nodes; an edge that is named twice is there once.

        Raises:
            ValueError: an edge is a loop, or of a node that is not there.
        """
        neighbours = [0] * nodes
        for u, v in edges:
            if u == v or not (0 <= u < nodes and 0 <= v < nodes):
                raise ValueError(f"no edge of a graph of {nodes} nodes: {u} {v}")
            neighbours[u] |= 1 << v
            neighbours[v] |= 1 << u
        return cls(tuple(neighbours))

    def __len__(self) -> int:
        return len(self.neighbours)

    @cached_property
    def edges(self) -> list[Edge]:
        """The edges (u < v), in lexicographic order."""
        return [(u, v) for u, near in enumerate(self.neighbours) for v in members(near >> u << u)]

    @property
    def degrees(self) -> list[int]:
        """Of each node."""
        return [near.bit_count() for near in self.neighbours]

    def adjacency(self) -> np.ndarray:
        """The matrix of 0 and 1, (N, N) float64."""
        matrix = np.zeros((len(self), len(self)))
        for u, v in self.edges:
            matrix[u, v] = matrix[v, u] = 1
        return matrix

    def without(self, node: int) -> "Graph":
        """This graph with no edge at a node, which keeps its id."""
        rest = ~(1 << node)
        near = [neighbours & rest for neighbours in self.neighbours]
        near[node] = 0
        return Graph(tuple(near))

    def blocked_by(self, edge: Edge) -> int:
        """The nodes that no second edge of a swap may have: both ends and all their neighbours."""
        u, v = edge
        return self.neighbours[u] | self.neighbours[v] | 1 << u | 1 << v

    def may_swap(self, first: Edge, second: Edge) -> bool:
        """Whether two edges may be swapped: four nodes, and no edge joins the two pairs.

        That is stricter than a simple graph needs; it is the rule of the authors' code.
        """
        u, v = second
        return not self.blocked_by(first) & (1 << u | 1 << v)

    def swapped(self, first: Edge, second: Edge) -> "Graph":
        """Edges (u1, v1), (u2, v2) replaced by (u1, u2), (v1, v2); all degrees stay.

        :meth:`may_swap` has to hold. ``swapped((u1, u2), (v1, v2))`` undoes it.
        """
        (u1, v1), (u2, v2) = first, second
        near = list(self.neighbours)
        near[u1] ^= 1 << v1 | 1 << u2
        near[v1] ^= 1 << u1 | 1 << v2
        near[u2] ^= 1 << v2 | 1 << u1
        near[v2] ^= 1 << u2 | 1 << v1
        return Graph(tuple(near))

    def swaps(self) -> Iterator[tuple[Edge, Edge]]:
        """Every swap once: two edges, the second one in either direction."""
        for position, first in enumerate(self.edges):
            blocked = self.blocked_by(first)
            for u, v in self.edges[position + 1 :]:
                if not blocked & (1 << u | 1 << v):
                    yield first, (u, v)
                    yield first, (v, u)


def ba15() -> Graph:
    """The graph of 15 nodes and 27 edges that the authors' code has inline."""
    return Graph.of_edges(15, [(u, v) for u, above in _BA15.items() for v in above])


def barabasi_albert(nodes: int, attached: int, seed: int) -> Graph:
    """Draw a graph by preferential attachment (Barabasi, Albert 1999).

    As networkx does it: from a star of ``attached + 1`` nodes on, each further node is joined to
    ``attached`` others, drawn in proportion to their degrees; so (nodes - attached) * attached
    edges.
    """
    drawn = random.Random(seed)
    edges = [(0, node) for node in range(1, attached + 1)]
    ends = [node for edge in edges for node in edge]
    for node in range(attached + 1, nodes):
        targets: set[int] = set()
        while len(targets) < attached:
            targets.add(drawn.choice(ends))
        for target in sorted(targets):
            edges.append((target, node))
            ends += (target, node)
    return Graph.of_edges(nodes, edges)


def parse_edges(text: str, source: str) -> Graph:
    """A graph from lines of two node ids each, from 0 on; what follows a # is a comment.

    Raises:
        UserError: a line is something else.
    """
    edges = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        ids = [int(word) for word in words if word.isdecimal() and len(word) < 6]
        if len(words) != 2 or len(ids) != 2 or ids[0] == ids[1]:
            raise UserError(f"{source}: line {number}: expected two different node ids from 0 on")
        edges.append((ids[0], ids[1]))
    nodes = max((max(edge) for edge in edges), default=-1) + 1
    return Graph.of_edges(nodes, edges)


def degree_attack(graph: Graph) -> list[int]:
    """All nodes in the order in which an attack removes them: of most edges left, lowest id.

    Degrees are those of the graph that is left.
    """
    degrees, left = graph.degrees, (1 << len(graph)) - 1
    order = []
    for _ in degrees:
        node = degrees.index(max(degrees))
        order.append(node)
        left ^= 1 << node
        for other in members(graph.neighbours[node] & left):
            degrees[other] -= 1
        degrees[node] = -1
    return order


def betweenness_attack(graph: Graph) -> list[int]:
    """As :func:`degree_attack`, by the betweenness in the graph that is left."""
    left = set(range(len(graph)))
    order = []
    while left:
        # Equal ones come out of other sums of fractions: rounded, the lowest id has its due.
        scores = {node: round(score, 9) for node, score in betweenness(graph).items()}
        node = min(left, key=lambda node: (-scores[node], node))
        order.append(node)
        left.remove(node)
        graph = graph.without(node)
    return order


ATTACKS = {"degree": degree_attack, "betweenness": betweenness_attack}


def betweenness(graph: Graph) -> dict[int, float]:
    """For each node the shortest paths through it, as shares of those of each pair (Brandes)."""
    scores = dict.fromkeys(range(len(graph)), 0.0)
    for source in range(len(graph)):
        distance, paths = {source: 0}, {source: 1}
        before: dict[int, list[int]] = {source: []}
        queue, reached = deque([source]), []
        while queue:
            node = queue.popleft()
            reached.append(node)
            for other in members(graph.neighbours[node]):
                if other not in distance:
                    distance[other], paths[other], before[other] = distance[node] + 1, 0, []
                    queue.append(other)
                if distance[other] == distance[node] + 1:
                    paths[other] += paths[node]
                    before[other].append(node)
        share = dict.fromkeys(reached, 0.0)
        for node in reversed(reached):
            for other in before[node]:
                share[other] += paths[other] / paths[node] * (1 + share[node])
            if node != source:
                scores[node] += share[node] / 2
    return scores


def resilience_sum(graph: Graph, order: list[int]) -> int:
    """R times N squared: nodes in the largest component, summed over the first N - 1 removals.

    Components are joined while the removed nodes come back, the last one first.
    """
    parents = list(range(len(graph)))
    sizes = [1] * len(graph)
    here, largest, total = 0, 0, 0
    for node in reversed(order[1:]):
        root, size = node, 1
        for other in members(graph.neighbours[node] & here):
            while parents[other] != other:
                parents[other] = parents[parents[other]]
                other = parents[other]
            if other != root:
                size += sizes[other]
                parents[other] = root
        sizes[root] = size
        here |= 1 << node
        largest = max(largest, size)
        total += largest
    return total


def distances(graph: Graph) -> np.ndarray:
    """Lengths of the shortest paths, (N, N) int64; -1 where there is none."""
    lengths = np.full((len(graph), len(graph)), -1)
    for source in range(len(graph)):
        seen = ring = 1 << source
        length = 0
        while ring:
            following = 0
            for node in members(ring):
                lengths[source, node] = length
                following |= graph.neighbours[node]
            ring = following & ~seen
            seen |= ring
            length += 1
    return lengths


def global_efficiency(graph: Graph) -> float:
    """The mean over all pairs of 1 / distance, 0 where there is no path."""
    lengths = distances(graph)
    pairs = len(graph) * (len(graph) - 1)
    return float((1 / lengths[lengths > 0]).sum()) / pairs if pairs else 0.0


def local_efficiency(graph: Graph) -> float:
    """The mean over all nodes of the global efficiency of their neighbours' own graph."""
    total = 0.0
    for near in graph.neighbours:
        nodes = list(members(near))
        ids = {node: number for number, node in enumerate(nodes)}
        inner = [
            (ids[node], ids[other])
            for node in nodes
            for other in members(graph.neighbours[node] & near)
        ]
        total += global_efficiency(Graph.of_edges(len(nodes), inner))
    return total / len(graph)


def algebraic_connectivity(graph: Graph) -> float:
    """The second smallest eigenvalue of the Laplacian."""
    adjacency = graph.adjacency()
    return float(np.linalg.eigvalsh(np.diag(adjacency.sum(0)) - adjacency)[1])
