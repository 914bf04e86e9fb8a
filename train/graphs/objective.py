"""What a rewiring is to raise: resilience under attack, alone or beside efficiency."""

from typing import Annotated, Literal

from pydantic import Field

from tpp.common.settings import PositiveFloat, Section
from train.graphs.graph import (
    ATTACKS,
    Graph,
    algebraic_connectivity,
    global_efficiency,
    local_efficiency,
    resilience_sum,
)

# The authors' code divides global efficiency by this.
_GLOBAL = 10.0


class ObjectiveSection(Section):
    """The score F of a graph, as ResiNet's code has it.

    Attributes:
        attack: which node goes first, of the graph that is left: of the highest ``degree`` or
            ``betweenness``, of equal ones the lowest id.
        resilience: ``r``, the nodes in the largest component over all removals as a share of
            N * N; or ``ac``, algebraic connectivity.
        utility: ``ge``, ``le``: global or local efficiency.
        alpha: the utility's share; with 0, F is the resilience alone and not scaled.
        scale: of resilience and utility where alpha is not 0, and of every reward.
    """

    attack: Literal["degree", "betweenness"] = "degree"
    resilience: Literal["r", "ac"] = "r"
    utility: Literal["ge", "le"] = "ge"
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.0
    scale: PositiveFloat = 10.0

    def order(self, graph: Graph) -> list[int]:
        """All nodes in the order of the attack."""
        return ATTACKS[self.attack](graph)

    def score(self, graph: Graph, order: list[int]) -> float:
        """F of a graph, given its :meth:`order`."""
        if self.resilience == "r":
            resilience = resilience_sum(graph, order) / len(graph) ** 2
        else:
            resilience = algebraic_connectivity(graph)
        if not self.alpha:
            return resilience
        if self.utility == "ge":
            utility = global_efficiency(graph) / _GLOBAL
        else:
            utility = local_efficiency(graph)
        return self.scale * ((1 - self.alpha) * resilience + self.alpha * utility)

    def reward(self, before: float, after: float) -> float:
        """Of a rewiring that led from one score to another."""
        return self.scale * (after - before)
