"""Graphs as a policy sees them: their filtration, its features, and which edges may be swapped."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from train.graphs.graph import Edge, Graph, distances, members
from train.graphs.objective import ObjectiveSection

POSITION, LENGTHS = 8, 6  # entries of a node's features, beside one flag
FEATURES = POSITION + LENGTHS + 1
_BASE = 10_000.0
# Graphs whose features are kept; a graph of 15 nodes has some kilobytes of them.
_MOST_KEPT = 20_000


@dataclass(frozen=True)
class Arrays:
    """A graph's filtration: the graph and what an attack leaves of it, node by node.

    Attributes:
        adjacency: (K + 1, N, N) float32; all zeros from where on no edge is left.
        features: (K + 1, N, 15) float32; zeros for nodes that are removed.
        present: (K + 1, N) bool, the nodes that are left.
        used: (K + 1,) bool, whether an edge is left.
        edges: (2 E, 2) int64: (u < v) in lexicographic order, then all of them as (v, u).
        there: (K + 1, E) bool, the edges that are left.
        first: (E,) bool, the edges for which there is a second one.
    """

    adjacency: np.ndarray
    features: np.ndarray
    present: np.ndarray
    used: np.ndarray
    edges: np.ndarray
    there: np.ndarray
    first: np.ndarray


@dataclass(frozen=True)
class Batch:
    """Different graphs of one size, stacked; attributes as those of :class:`Arrays`."""

    adjacency: Tensor
    features: Tensor
    present: Tensor
    used: Tensor
    edges: Tensor
    there: Tensor
    first: Tensor

    def __len__(self) -> int:
        return len(self.used)


class State:
    """A graph with its attack order and score; its arrays are computed once, when asked for."""

    def __init__(self, graph: Graph, objective: ObjectiveSection, filtration: int) -> None:
        self.graph = graph
        self.order = objective.order(graph)
        self.score = objective.score(graph, self.order)
        self._filtration = filtration
        self._arrays: Arrays | None = None

    @property
    def arrays(self) -> Arrays:
        """What the policy sees."""
        if self._arrays is None:
            self._arrays = arrays_of(self.graph, self.order, self._filtration)
        return self._arrays

    def edge(self, number: int) -> Edge:
        """An entry of the directed edge list."""
        edges = self.graph.edges
        if number < len(edges):
            return edges[number]
        u, v = edges[number - len(edges)]
        return v, u


class States:
    """The graphs met so far: each is scored, and looked at, once.

    Args:
        objective: gives attack order and score.
        filtration: removals that the policy looks at; ``full`` for all but one node.
    """

    def __init__(self, objective: ObjectiveSection, filtration: int | Literal["full"]) -> None:
        self.objective, self._filtration = objective, filtration
        self._known: dict[Graph, State] = {}

    def of(self, graph: Graph) -> State:
        """The state of a graph, the same object as long as it is kept."""
        state = self._known.get(graph)
        if state is None:
            if len(self._known) >= _MOST_KEPT:
                self._known.clear()
            most = len(graph) - 1
            removals = most if self._filtration == "full" else min(self._filtration, most)
            state = self._known[graph] = State(graph, self.objective, removals)
        return state


def arrays_of(graph: Graph, order: list[int], filtration: int) -> Arrays:
    """Look at a graph and at what is left after each of the first removals in ``order``.

    Features of a node (15): a sinusoidal encoding of its place in ``order`` (8); how many nodes
    are 0, 1, 2, 3, 4 edges away in the graph that is left, and further or not reached (6); whether
    it still has an edge when its turn comes (1).
    """
    nodes, edges = len(graph), graph.edges
    adjacency = np.zeros((filtration + 1, nodes, nodes), np.float32)
    features = np.zeros((filtration + 1, nodes, FEATURES), np.float32)
    present = np.zeros((filtration + 1, nodes), bool)
    used = np.zeros(filtration + 1, bool)
    ends = np.array(edges, np.int64).reshape(-1, 2)

    places = np.empty(nodes, np.int64)
    places[order] = np.arange(nodes)
    fixed = np.zeros((nodes, FEATURES), np.float32)
    fixed[:, :POSITION] = _encoded(places)
    left, alive = graph, (1 << nodes) - 1
    for node in order:
        alive ^= 1 << node
        fixed[node, -1] = bool(graph.neighbours[node] & alive)
    alive = (1 << nodes) - 1
    for step in range(filtration + 1):
        if step:
            alive ^= 1 << order[step - 1]
            left = left.without(order[step - 1])
        if not any(left.neighbours):
            break
        here = list(members(alive))
        used[step], present[step, here] = True, True
        adjacency[step] = left.adjacency()
        lengths = distances(left)[here][:, here]
        bins = np.where((lengths < 0) | (lengths >= LENGTHS), LENGTHS - 1, lengths)
        histogram = (bins[:, :, None] == np.arange(LENGTHS)).sum(1)
        features[step, here] = fixed[here]
        features[step, here, POSITION:-1] = histogram
    there = present[:, ends[:, 0]] & present[:, ends[:, 1]]
    return Arrays(
        adjacency=adjacency,
        features=features,
        present=present,
        used=used,
        edges=np.concatenate([ends, ends[:, ::-1]]),
        there=there & used[:, None],
        first=_first(graph),
    )


def _encoded(places: np.ndarray) -> np.ndarray:
    """Sines and cosines of places, (N, 8), in turn."""
    rates = np.exp(np.arange(0, POSITION, 2) * (-math.log(_BASE) / POSITION))
    angles = places[:, None] * rates
    return np.stack([np.sin(angles), np.cos(angles)], -1).reshape(len(places), POSITION)


def _first(graph: Graph) -> np.ndarray:
    pairs = [1 << u | 1 << v for u, v in graph.edges]
    blocked = [graph.blocked_by(edge) for edge in graph.edges]
    return np.array([any(not pair & nodes for pair in pairs) for nodes in blocked], bool)


def stacked(states: list[State]) -> tuple[Batch, Tensor]:
    """States as a batch in which each graph is there once.

    Returns:
        The batch, and of each state its number in it, (states,) int64.
    """
    numbers: dict[Graph, int] = {}
    index = [numbers.setdefault(state.graph, len(numbers)) for state in states]
    once: list[Any] = [None] * len(numbers)
    for state, number in zip(states, index, strict=True):
        once[number] = state.arrays
    fields = {
        name: torch.from_numpy(np.stack([getattr(arrays, name) for arrays in once]))
        for name in Arrays.__dataclass_fields__
    }
    return Batch(**fields), torch.tensor(index)
