"""Graphs of ResiNet: attacks, resilience, efficiency, swaps, against networkx and by hand."""

import random

import networkx
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tpp.common.errors import UserError
from train.graphs.graph import (
    Graph,
    algebraic_connectivity,
    ba15,
    barabasi_albert,
    betweenness,
    betweenness_attack,
    degree_attack,
    distances,
    global_efficiency,
    local_efficiency,
    parse_edges,
    resilience_sum,
)
from train.graphs.objective import ObjectiveSection
from train.graphs.search import annealing, beam, greedy
from train.graphs.states import States


@st.composite
def graphs(draw: st.DrawFn, most: int = 12) -> Graph:
    nodes = draw(st.integers(4, most))
    pairs = [(u, v) for v in range(nodes) for u in range(v)]
    chosen = draw(st.lists(st.sampled_from(pairs), unique=True, min_size=2))
    return Graph.of_edges(nodes, chosen)


def as_networkx(graph: Graph) -> networkx.Graph:
    other = networkx.empty_graph(len(graph))
    other.add_edges_from(graph.edges)
    return other


def attacked(graph: Graph, kind: str) -> tuple[list[int], int]:
    """Order and N * N * R, by the sheet's words: remove, measure, N - 1 times."""
    left, order, total = as_networkx(graph), [], 0
    for _ in range(len(graph)):
        if kind == "degree":
            scores = dict(left.degree)
        else:
            scores = networkx.betweenness_centrality(left, normalized=False)
        node = min(left, key=lambda one: (-round(scores[one], 9), one))
        order.append(node)
        left.remove_node(node)
        if left:
            total += max(map(len, networkx.connected_components(left)))
    return order, total


@settings(deadline=None, max_examples=60)
@given(graphs())
def test_measures_are_those_of_networkx(graph):
    other = as_networkx(graph)
    assert degree_attack(graph) == attacked(graph, "degree")[0]
    assert resilience_sum(graph, degree_attack(graph)) == attacked(graph, "degree")[1]
    assert betweenness_attack(graph) == attacked(graph, "betweenness")[0]
    expected = networkx.betweenness_centrality(other, normalized=False)
    assert betweenness(graph) == pytest.approx(expected)
    assert global_efficiency(graph) == pytest.approx(networkx.global_efficiency(other))
    assert local_efficiency(graph) == pytest.approx(networkx.local_efficiency(other))
    spectrum = networkx.laplacian_spectrum(other)
    assert algebraic_connectivity(graph) == pytest.approx(spectrum[1], abs=1e-8)
    lengths = dict(networkx.all_pairs_shortest_path_length(other))
    found = distances(graph)
    assert all(
        found[u, v] == lengths[u].get(v, -1) for u in range(len(graph)) for v in range(len(graph))
    )


@settings(deadline=None, max_examples=60)
@given(graphs(), st.integers(0, 2**31))
def test_swaps_keep_degrees_and_are_undone_by_the_reverse(graph, seed):
    drawn = random.Random(seed)
    swaps = list(graph.swaps())
    assume(swaps)
    first, second = drawn.choice(swaps)
    assert graph.may_swap(first, second) and graph.may_swap(second, first)
    other = graph.swapped(first, second)
    assert other.degrees == graph.degrees and len(other.edges) == len(graph.edges)
    expected = {frozenset(edge) for edge in graph.edges}
    expected -= {frozenset(first), frozenset(second)}
    expected |= {frozenset((first[0], second[0])), frozenset((first[1], second[1]))}
    assert {frozenset(edge) for edge in other.edges} == expected
    back = (first[0], second[0]), (first[1], second[1])
    assert other.may_swap(*back) and other.swapped(*back) == graph
    allowed = {
        (one, two)
        for position, one in enumerate(graph.edges)
        for edge in graph.edges[position + 1 :]
        for two in (edge, edge[::-1])
        if len({*one, *two}) == 4
        and not any(graph.neighbours[a] >> b & 1 for a in one for b in two)
    }
    assert set(swaps) == allowed


@pytest.mark.parametrize("nodes", [4, 7, 20])
def test_resilience_in_closed_form(nodes):
    pairs = [(u, v) for v in range(nodes) for u in range(v)]
    complete, star = Graph.of_edges(nodes, pairs), Graph.of_edges(nodes, pairs[:1])
    star = Graph.of_edges(nodes, [(2, node) for node in range(nodes) if node != 2])
    of = ObjectiveSection()
    assert of.score(complete, of.order(complete)) == pytest.approx((nodes - 1) / (2 * nodes))
    assert of.score(star, of.order(star)) == pytest.approx((nodes - 1) / nodes**2)


def test_ba15_has_the_known_values():
    graph = ba15()
    assert (len(graph), len(graph.edges)) == (15, 27)
    assert resilience_sum(graph, degree_attack(graph)) == 51
    assert resilience_sum(graph, betweenness_attack(graph)) == 55
    assert global_efficiency(graph) == pytest.approx(0.588889, abs=1e-6)
    assert local_efficiency(graph) == pytest.approx(0.517531, abs=1e-6)
    assert algebraic_connectivity(graph) == pytest.approx(1)
    directed = [*graph.edges, *(edge[::-1] for edge in graph.edges)]
    assert sum(graph.may_swap(a, b) for a in graph.edges for b in directed) == 232
    assert sum(any(graph.may_swap(a, b) for b in directed) for a in graph.edges) == 24
    assert sum(1 for _ in graph.swaps()) == 116


def test_the_objective_weighs_as_the_authors_code_does():
    graph = ba15()
    order = degree_attack(graph)
    r, ge, le = 51 / 225, global_efficiency(graph), local_efficiency(graph)
    for utility, expected in (("ge", 10 * (0.5 * r + 0.5 * ge / 10)), ("le", 5 * (r + le))):
        objective = ObjectiveSection(utility=utility, alpha=0.5)
        assert objective.score(graph, order) == pytest.approx(expected)
        assert objective.reward(0.2, 0.5) == pytest.approx(3)  # the scale enters twice
    assert ObjectiveSection(resilience="ac").score(graph, order) == pytest.approx(1)


def test_drawn_graphs_are_as_large_as_published_and_follow_from_the_seed():
    for nodes, edges in ((50, 96), (100, 196)):
        graph = barabasi_albert(nodes, 2, seed=3)
        assert (len(graph), len(graph.edges)) == (nodes, edges)
        assert networkx.is_connected(as_networkx(graph))
        assert graph == barabasi_albert(nodes, 2, seed=3) != barabasi_albert(nodes, 2, seed=4)


def test_edges_are_read_and_mistakes_named():
    assert parse_edges("0 1 # first\n\n2 1\n", "x").edges == [(0, 1), (1, 2)]
    for text in ("0 1\n1 1\n", "0 1\n1\n", "0 1\n-1 2\n", "0 1\na 2\n"):
        with pytest.raises(UserError, match="x: line 2: expected two different node ids"):
            parse_edges(text, "x")


def test_searches_find_what_they_are_known_to_find():
    states, start = States(ObjectiveSection(), 0), ba15()
    climbed = [greedy(states, start, 20, seed) for seed in range(12)]
    assert {round(225 * one.score) for one in climbed} <= {60, 65, 67}
    assert {60, 65} <= {round(225 * one.score) for one in climbed}
    assert climbed[0] == greedy(states, start, 20, 0)
    wide = beam(states, start, 4, 50)
    assert (round(225 * wide.score), wide.swaps) == (68, 4)
    cooled = annealing(states, start, 30_000, (0.01, 0.0005), 0)
    assert 225 * cooled.score > 65.5
    for one in (*climbed, wide, cooled):
        assert one.graph.degrees == start.degrees
        assert one.score == resilience_sum(one.graph, attacked(one.graph, "degree")[0]) / 225


def test_a_search_asks_whether_to_stop():
    states = States(ObjectiveSection(), 0)

    def refuse() -> None:
        raise InterruptedError

    for search in (
        lambda: greedy(states, ba15(), 20, 0, refuse),
        lambda: beam(states, ba15(), 3, 5, refuse),
        lambda: annealing(states, ba15(), 5, (0.1, 0.01), 0, refuse),
    ):
        with pytest.raises(InterruptedError):
            search()


def test_a_star_has_no_swap():
    assert list(Graph.of_edges(5, [(0, node) for node in range(1, 5)]).swaps()) == []
    assert np.array_equal(distances(Graph.of_edges(2, [])), [[0, -1], [-1, 0]])
