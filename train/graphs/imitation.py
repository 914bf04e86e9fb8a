"""Self-imitation (Oh et al. 2018): episodes that went well are learnt from again. Not ResiNet's.

PPO on one graph soon stops at the first hill that it climbs. What it has met beyond, by chance,
is kept: the actions up to the best graph of an episode, and a stop there.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from train.graphs.firegnn import Policy, Value
from train.graphs.graph import Graph
from train.graphs.states import State, States, stacked

Action = tuple[int, int, int]


@dataclass(frozen=True)
class Path:
    """The actions that lead from the start graph to one with such a score."""

    score: float
    actions: tuple[Action, ...]


class BestPaths:
    """The best paths so far, no two of them to one graph.

    Args:
        states, start: where paths begin.
        most: how many are kept.
        discount: of the returns.
    """

    def __init__(self, states: States, start: Graph, most: int, discount: float) -> None:
        self._states, self._start, self._most, self._discount = states, start, most, discount
        self.kept: list[Path] = []

    def offer(self, paths: Iterable[Path]) -> None:
        """Take up those that are among the best: of a higher score, of equal ones the shorter."""
        if not self._most:
            return
        least = self.kept[-1].score if len(self.kept) == self._most else 0.0
        found: dict[Graph, Path] = {}
        new = [path for path in paths if path.score >= least]
        for path in sorted((*self.kept, *new), key=lambda path: (-path.score, len(path.actions))):
            found.setdefault(self._walk(path)[-1].graph, path)
        self.kept = list(found.values())[: self._most]

    def loss(self, policy: Policy, value: Value) -> Tensor:
        """The mean over their steps of -log p, weighed by how far the return is above the value."""
        seen, actions, returns = [], [], []
        for path in self.kept:
            walked = self._walk(path)
            following = 0.0
            for place in reversed(range(len(walked))):
                seen.append(walked[place])
                if place < len(path.actions):
                    actions.append(path.actions[place])
                    reward = self._states.objective.reward(
                        walked[place].score, walked[place + 1].score
                    )
                    following = reward + self._discount * following
                else:
                    actions.append((0, 0, 0))
                returns.append(following)
        batch, index = stacked(seen)
        done = torch.tensor(actions)
        with torch.no_grad():
            weights = (torch.tensor(returns) - value(batch, index)).clamp(min=0)
        log_probs = policy(batch, index, done).log_probs
        # To stop is all that matters of a stop, whichever edges go with it.
        log_prob = torch.where(done[:, 0] == 0, log_probs[:, 0], log_probs.sum(-1))
        return -(weights * log_prob).mean()

    def _walk(self, path: Path) -> list[State]:
        """The states of a path, from the start to its best graph."""
        walked = [self._states.of(self._start)]
        for _, first, second in path.actions:
            state = walked[-1]
            after = state.graph.swapped(state.edge(first), state.edge(second))
            walked.append(self._states.of(after))
        return walked
