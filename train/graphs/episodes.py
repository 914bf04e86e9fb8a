"""Episodes of rewiring: many at once, by a policy or as a policy is judged by them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from train.graphs.firegnn import Policy, Value
from train.graphs.graph import Graph
from train.graphs.imitation import Path
from train.graphs.states import State, States, stacked

STOP, GO_ON = 0, 1
# States at once where no gradients are computed.
_AT_ONCE = 256


@dataclass(frozen=True)
class Experience:
    """What one policy did in some environments over some steps.

    Attributes:
        states: those of the first step in all environments, then of the second, and so on.
        actions: (T, B, 3).
        log_prob, values, rewards: (T, B).
        ended: (T, B) bool, whether the episode was over with this step.
        last_values: (B,), of the states after the last step.
        ends: scores of the graphs at which episodes ended.
        returns: undiscounted, of the same episodes.
        best: the best state on the way.
        paths: of the same episodes, up to the best graph of each.
    """

    states: list[State]
    actions: Tensor
    log_prob: Tensor
    values: Tensor
    rewards: Tensor
    ended: Tensor
    last_values: Tensor
    ends: list[float]
    returns: list[float]
    best: State
    paths: list[Path]


def step(states: States, state: State, action: list[int]) -> tuple[State, bool]:
    """Do what a policy picked; returns the state after it, and whether the episode ends by it.

    To stop ends it, and so does a pair of edges that cannot be swapped: the graph stays.
    """
    said, first, second = action
    edges = state.edge(first), state.edge(second)
    if said == STOP or not state.graph.may_swap(*edges):
        return state, True
    return states.of(state.graph.swapped(*edges)), False


@torch.no_grad()
def act(
    policy: Policy, now: list[State], generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Actions (B, 3) and their log probabilities (B,) in these states."""
    batch, index = stacked(now)
    choice = policy(batch, index, generator=generator)
    return choice.actions, choice.log_prob


@torch.no_grad()
def collect(
    states: States,
    start: Graph,
    policy: Policy,
    value: Value,
    *,
    environments: int,
    steps: int,
    most: int,
    generator: torch.Generator,
    pause: Callable[[], None] = lambda: None,
) -> Experience:
    """Let a policy act in all environments at once, from the start graph on.

    Args:
        states: scores and features.
        start: of every episode.
        policy, value: in evaluation mode.
        environments: B.
        steps: T, in each of them; where an episode ends, the next one begins.
        most: rewirings in an episode.
        generator: of the draws.
        pause: called before each step; may raise.
    """
    now = [states.of(start)] * environments
    gained = [0.0] * environments
    done: list[list[tuple[int, int, int]]] = [[] for _ in now]
    highest = [Path(now[0].score, ())] * environments
    seen: list[State] = []
    columns: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = []
    ends: list[float] = []
    returns: list[float] = []
    paths: list[Path] = []
    best = now[0]
    for _ in range(steps):
        pause()
        actions, log_prob = act(policy, now, generator)
        values = _values(value, now)
        rewards, ended = torch.zeros(environments), torch.zeros(environments, dtype=torch.bool)
        seen += now
        now = list(now)
        for number, action in enumerate(actions.tolist()):
            after, over = step(states, now[number], action)
            reward = states.objective.reward(now[number].score, after.score)
            rewards[number] = reward
            gained[number] += reward
            done[number].append((action[0], action[1], action[2]))
            now[number] = after
            if after.score > best.score:
                best = after
            if after.score > highest[number].score:
                highest[number] = Path(after.score, tuple(done[number]))
            if over or len(done[number]) == most:
                ended[number] = True
                ends.append(after.score)
                returns.append(gained[number])
                paths.append(highest[number])
                now[number], done[number], gained[number] = states.of(start), [], 0.0
                highest[number] = Path(now[number].score, ())
        columns.append((actions, log_prob, values, rewards, ended))
    actions, log_prob, values, rewards, ended = map(torch.stack, zip(*columns, strict=True))
    last = _values(value, now)
    return Experience(
        seen, actions, log_prob, values, rewards, ended, last, ends, returns, best, paths
    )


def _values(value: Value, now: list[State]) -> Tensor:
    return value(*stacked(now))


@dataclass(frozen=True)
class Episode:
    """One episode from the start graph on.

    Attributes:
        end: the state at which it ended.
        swaps: rewirings that it did.
        best: the best state on the way.
    """

    end: State
    swaps: int
    best: State


@torch.no_grad()
def play(
    states: States,
    start: Graph,
    policy: Policy,
    *,
    most: int,
    episodes: int = 1,
    generator: torch.Generator | None = None,
    pause: Callable[[], None] = lambda: None,
) -> list[Episode]:
    """Play whole episodes; with no generator the most probable action of each step."""
    now = [states.of(start)] * episodes
    best, swaps, going = list(now), [0] * episodes, list(range(episodes))
    for _ in range(most):
        following = []
        for begin in range(0, len(going), _AT_ONCE):
            pause()
            these = going[begin : begin + _AT_ONCE]
            actions, _ = act(policy, [now[number] for number in these], generator)
            for number, action in zip(these, actions.tolist(), strict=True):
                now[number], over = step(states, now[number], action)
                if not over:
                    swaps[number] += 1
                    following.append(number)
                if now[number].score > best[number].score:
                    best[number] = now[number]
        going = following
    return [Episode(*one) for one in zip(now, swaps, best, strict=True)]
