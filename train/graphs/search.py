"""Searches that a policy is put beside: greedy, beam search, simulated annealing."""

import heapq
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from train.graphs.graph import Graph
from train.graphs.states import State, States

# Scores of graphs come out of other sums, so that equal ones may differ in the last bits.
_EQUAL = 1e-9


@dataclass(frozen=True)
class Found:
    """Where a search ended.

    Attributes:
        score: the best F that it met.
        swaps: how many lead there.
        graph: that graph.
    """

    score: float
    swaps: int
    graph: Graph


def neighbours(states: States, state: State) -> Iterator[State]:
    """The states that one swap leads to."""
    for first, second in state.graph.swaps():
        yield states.of(state.graph.swapped(first, second))


def greedy(
    states: States, start: Graph, most: int, seed: int, pause: Callable[[], None] = lambda: None
) -> Found:
    """Take the best swap as long as one improves, at most so many; of equal ones any, by seed."""
    drawn = random.Random(seed)
    state = states.of(start)
    for swaps in range(most):
        pause()
        following = list(neighbours(states, state))
        best = max((one.score for one in following), default=-math.inf)
        if best <= state.score + _EQUAL:
            return Found(state.score, swaps, state.graph)
        state = drawn.choice([one for one in following if one.score >= best - _EQUAL])
    return Found(state.score, most, state.graph)


def beam(
    states: States, start: Graph, most: int, width: int, pause: Callable[[], None] = lambda: None
) -> Found:
    """Keep the ``width`` best graphs of each number of swaps; no graph comes twice.

    Args:
        states, start: what is searched.
        most: swaps.
        width: graphs kept.
        pause: called before each graph is looked at; may raise.
    """
    kept = [states.of(start)]
    seen = {start}
    found = Found(kept[0].score, 0, start)
    for swaps in range(1, most + 1):
        following: dict[Graph, State] = {}
        for state in kept:
            pause()
            for one in neighbours(states, state):
                if one.graph not in seen:
                    following[one.graph] = one
        kept = heapq.nlargest(width, following.values(), key=lambda one: one.score)
        if not kept:
            break
        seen.update(one.graph for one in kept)
        if kept[0].score > found.score + _EQUAL:
            found = Found(kept[0].score, swaps, kept[0].graph)
    return found


def annealing(
    states: States,
    start: Graph,
    steps: int,
    temperatures: tuple[float, float],
    seed: int,
    pause: Callable[[], None] = lambda: None,
) -> Found:
    """Try random swaps; a worse one is taken with probability exp(difference / temperature).

    There is no limit to the swaps that lead away from the start.

    Args:
        states, start: what is searched.
        steps: swaps to try.
        temperatures: of the first and the last step, in units of F; geometric in between.
        seed: of all draws.
        pause: called before each try; may raise.
    """
    drawn = random.Random(seed)
    hot, cold = temperatures
    state, swaps = states.of(start), 0
    found = Found(state.score, 0, start)
    for step in range(steps):
        pause()
        temperature = hot * (cold / hot) ** (step / max(steps - 1, 1))
        edges = state.graph.edges
        first, second = drawn.sample(edges, 2)
        if drawn.random() < 0.5:
            second = second[::-1]
        if not state.graph.may_swap(first, second):
            continue
        one = states.of(state.graph.swapped(first, second))
        if drawn.random() < math.exp(min((one.score - state.score) / temperature, 0.0)):
            state, swaps = one, swaps + 1
            if state.score > found.score + _EQUAL:
                found = Found(state.score, swaps, state.graph)
    return found
