"""FireGNN, its policy and value, and PPO: what the formulas say of them."""

import itertools
import math
import random
from typing import Any

import networkx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from train.graphs import firegnn
from train.graphs.episodes import GO_ON, STOP, Experience, collect, play, step
from train.graphs.firegnn import Encoder, NetworkSection, Policy, Value, second_allowed
from train.graphs.graph import Graph, ba15, degree_attack
from train.graphs.imitation import BestPaths, Path
from train.graphs.objective import ObjectiveSection
from train.graphs.ppo import (
    PpoSection,
    advantages,
    make_optimizer,
    surrogate,
    update,
    value_loss,
)
from train.graphs.states import Batch, State, States, arrays_of, stacked

OBJECTIVE = ObjectiveSection()


def network(**changed: Any) -> NetworkSection:
    return NetworkSection(**{"hidden": 8, "filtration": 2, "jumping": 4, **changed})


def policy_of(settings: NetworkSection, seed: int = 0) -> Policy:
    torch.manual_seed(seed)
    return Policy(settings).double().eval()


def walked(number: int, filtration: int = 2, seed: int = 0) -> list[State]:
    """States on a random way from BA-15."""
    drawn, states, graph = random.Random(seed), States(OBJECTIVE, filtration), ba15()
    found = []
    for _ in range(number):
        graph = graph.swapped(*drawn.choice(list(graph.swaps())))
        found.append(states.of(graph))
    return found


def double(batch: Batch) -> Batch:
    fields = dict(vars(batch))
    return Batch(**fields | {name: fields[name].double() for name in ("adjacency", "features")})


def test_features_are_those_of_the_sheet():
    graph = ba15()
    order = degree_attack(graph)
    arrays = arrays_of(graph, order, 14)
    left = networkx.empty_graph(15)
    left.add_edges_from(graph.edges)
    isolated: set[int] = set()
    alone = left.copy()
    for node in order:
        isolated |= {one for one, degree in alone.degree if not degree}
        alone.remove_node(node)
    for number in range(15):
        if not left.number_of_edges():
            assert not arrays.used[number] and not arrays.features[number].any()
            break
        assert arrays.used[number]
        lengths = dict(networkx.all_pairs_shortest_path_length(left))
        for node in left:
            place = order.index(node)
            angles = [place / 10_000 ** (2 * half / 8) for half in range(4)]
            encoded = [f(angle) for angle in angles for f in (math.sin, math.cos)]
            counts = [0] * 6
            for other in left:
                counts[min(lengths[node].get(other, 5), 5)] += 1
            expected = [*encoded, *counts, float(node not in isolated)]
            assert arrays.features[number, node].tolist() == pytest.approx(expected, abs=1e-6)
        gone = [node for node in range(15) if node not in left]
        assert not arrays.features[number, gone].any() and not arrays.present[number, gone].any()
        edges = [graph.edges[k] for k in range(27) if arrays.there[number, k]]
        assert edges == sorted(tuple(sorted(edge)) for edge in left.edges)
        left.remove_node(order[number])
    assert number < 14  # BA-15 runs out of edges before it runs out of nodes
    assert arrays.edges[:27].tolist() == [list(edge) for edge in graph.edges]
    assert arrays.edges[27:].tolist() == [[v, u] for u, v in graph.edges]


def test_masks_are_the_environments_own():
    states = walked(5)
    batch, index = stacked(states)
    for number, state in enumerate(states):
        edges = [state.edge(k) for k in range(54)]
        allowed = [[state.graph.may_swap(one, two) for two in edges] for one in edges[:27]]
        assert batch.first[index[number]].tolist() == [any(row) for row in allowed]
        found = second_allowed(batch, index[number].expand(27), torch.arange(27))
        assert found.tolist() == allowed


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_relabelling_nodes_permutes_logits(norm, monkeypatch):
    """The attack's order goes along: of nodes alike, it takes the lowest id."""
    policy = policy_of(network(norm=norm, filtration=14))
    # Edges are read from the lower id to the higher one, and u - v knows it: pairs are swapped
    # that leave most edges as they were.
    new = list(range(15))
    for one, other in ((3, 5), (8, 11), (13, 14)):
        new[one], new[other] = other, one
    graph = ba15()
    other_graph = Graph.of_edges(15, [(new[u], new[v]) for u, v in graph.edges])
    states = State(graph, OBJECTIVE, 14), State(other_graph, OBJECTIVE, 14)
    moved_order = [new[node] for node in degree_attack(graph)]
    states[1]._arrays = arrays_of(other_graph, moved_order, 14)
    numbers = {states[1].edge(number): number for number in range(54)}
    moved = []
    for number in range(54):
        u, v = states[0].edge(number)
        moved.append(numbers[new[u], new[v]])
    same_way = [number for number in range(27) if moved[number] < 27]
    assert len(same_way) > 20 and moved != list(range(54))
    for number in same_way:
        found = []
        for state, picked in zip(states, (number, moved[number]), strict=True):
            seen: list[Tensor] = []
            monkeypatch.setattr(firegnn, "masked", lambda x, _, seen=seen: seen.append(x) or x)
            batch, index = stacked([state])
            policy(double(batch), index, torch.tensor([[GO_ON, picked, 0]]))
            found.append(seen)
        first, second = zip(*found, strict=True)
        torch.testing.assert_close(first[0][0, same_way], first[1][0, [moved[k] for k in same_way]])
        torch.testing.assert_close(second[0][0], second[1][0, moved])


def test_what_is_not_allowed_has_probability_zero():
    policy = policy_of(network())
    states = walked(6)
    batch, index = stacked(states)
    batch = double(batch)
    for first in range(27):
        actions = torch.tensor([[GO_ON, first, second] for second in range(54)])
        for number, state in enumerate(states):
            one = index[number].expand(54)
            probability = policy(batch, one, actions).log_prob.exp().tolist()
            for second, found in enumerate(probability):
                allowed = state.graph.may_swap(state.edge(first), state.edge(second))
                assert (found > 0) == allowed


def test_probabilities_sum_to_one_and_the_entropy_is_theirs():
    policy = policy_of(network())
    (state,) = walked(1)
    batch, index = stacked([state])
    batch = double(batch)
    every = torch.tensor(list(itertools.product((STOP, GO_ON), range(27), range(54))))
    choice = policy(batch, index.expand(len(every)), every)
    probability = choice.log_prob.exp()
    assert float(probability.detach().sum()) == pytest.approx(1)
    # Of the joint distribution: the mean over actions of the entropies along the way.
    joint = -(probability * choice.log_prob.clamp(min=-1e4)).sum()
    assert float((probability * choice.entropy).sum()) == pytest.approx(float(joint))


def test_actions_are_drawn_as_often_as_they_are_probable():
    policy = policy_of(network()).float()
    (state,) = walked(1)
    batch, index = stacked([state])
    drawn = torch.Generator().manual_seed(0)
    picked = policy(batch, index.expand(20_000), generator=drawn)
    counts: dict[tuple[int, ...], int] = {}
    for action in picked.actions.tolist():
        counts[tuple(action)] = counts.get(tuple(action), 0) + 1
    often = sorted(counts, key=lambda action: -counts[action])[:20]
    asked = policy(batch, index.expand(20), torch.tensor(often))
    expected = (asked.log_prob.exp() * 20_000).tolist()
    for action, count in zip(often, expected, strict=True):
        assert abs(counts[action] - count) < 5 * math.sqrt(count) + 1
    best = policy(batch, index)
    said = policy(batch, index, best.actions)
    torch.testing.assert_close(best.log_prob, said.log_prob)


def test_equal_graphs_in_a_batch_are_one_and_each_state_finds_its_own():
    policy, states = policy_of(network(norm="layer")), walked(3)
    batch, index = stacked([states[0], states[1], states[0], states[2]])
    assert len(batch) == 3 and index.tolist() == [0, 1, 0, 2]
    actions = torch.tensor([[1, 0, 0]] * 4)
    together = policy(double(batch), index, actions).log_prob
    for place, state in enumerate((states[0], states[1], states[0], states[2])):
        alone, one = stacked([state])
        torch.testing.assert_close(
            policy(double(alone), one, actions[:1]).log_prob[0], together[place]
        )


def test_graphs_of_one_colouring_are_one_to_the_encoder_without_features():
    """Two triangles and a hexagon: no message passing tells them apart."""
    triangles = Graph.of_edges(6, [(0, 1), (1, 2), (0, 2), (3, 4), (4, 5), (3, 5)])
    ring = Graph.of_edges(6, [(node, (node + 1) % 6) for node in range(6)])
    path = Graph.of_edges(6, [(node, node + 1) for node in range(5)] + [(1, 5)])
    batch, _ = stacked([State(graph, OBJECTIVE, 0) for graph in (triangles, ring, path)])
    torch.manual_seed(0)
    encoder = Encoder(network(filtration=0)).double().eval()
    plain = double(Batch(**{**vars(batch), "features": torch.ones_like(batch.features)}))
    found = encoder(plain).context
    torch.testing.assert_close(found[0], found[1])
    assert not torch.allclose(found[0], found[2])
    seen = encoder(double(batch)).context
    assert not torch.allclose(seen[0], seen[1])


def test_edges_are_one_linear_layer_of_six_parts():
    policy = policy_of(network())
    batch, _ = stacked(walked(3))
    batch = double(batch)
    encoded = policy.encoder(batch)
    found = policy._edges(encoded, batch)
    places = {(int(b), int(k)): number for number, (b, k) in enumerate(batch.used.nonzero())}
    for (graph, k), number in places.items():
        u, v = encoded.nodes[number][batch.edges[graph].T]
        parts = [torch.minimum(u, v), torch.maximum(u, v), (u + v) / 2, u + v, u - v, u * v]
        torch.testing.assert_close(found[graph, k], policy.merge(torch.cat(parts, -1)))


def test_a_head_pools_over_the_filtration_as_the_formula_says():
    policy = policy_of(network())
    batch, index = stacked(walked(2, filtration=4))
    batch = double(batch)
    encoded = policy.encoder(batch)
    edges, head = policy._edges(encoded, batch), policy.first
    found = head.edges(encoded, edges[:, :, :27], batch.there)
    for graph, number in itertools.product(range(2), range(27)):
        m = torch.zeros(8, dtype=torch.float64)
        for k in range(5):
            if batch.there[graph, k, number]:
                m = m + head.gate(encoded.graphs[graph, k]).sigmoid() * head.mix(
                    edges[graph, k, number]
                )
        torch.testing.assert_close(found[graph, number], head.of_edge(m))
    query = torch.randn(2, 8, dtype=torch.float64)
    logits = head(query, query, found[index])
    expected = (query.unsqueeze(1) * (head.of_condition(query).unsqueeze(1) + found).tanh()).sum(-1)
    torch.testing.assert_close(logits, expected)


def test_batch_norm_is_over_the_nodes_that_are_present():
    norm = firegnn._BatchNorm(3)
    x, present = torch.randn(4, 5, 3), torch.rand(4, 5, 1) > 0.4
    found = norm(x, present)
    plain = nn.BatchNorm1d(3)
    rows = present[..., 0]
    torch.testing.assert_close(found[rows], plain(x[rows]))
    torch.testing.assert_close(norm.running_var, plain.running_var)
    torch.testing.assert_close(norm.eval()(x, present)[rows], plain.eval()(x[rows]))


def test_a_stop_and_an_impossible_pair_end_an_episode_without_reward():
    states = States(OBJECTIVE, 0)
    start = states.of(ba15())
    first, second = next(
        (a, b)
        for a, b in itertools.product(range(27), range(54))
        if start.graph.may_swap(start.edge(a), start.edge(b))
    )
    after, over = step(states, start, [GO_ON, first, second])
    assert not over and after.graph == start.graph.swapped(start.edge(first), start.edge(second))
    assert step(states, start, [STOP, first, second]) == (start, True)
    assert step(states, start, [GO_ON, first, first]) == (start, True)


def test_rewards_telescope_and_nothing_but_edges_changes():
    states, start = States(OBJECTIVE, 1), ba15()
    policy, value = policy_of(network()).float(), Value(network(), 225.0).eval()
    with torch.no_grad():
        policy.go_on[-1].bias.copy_(torch.tensor([0.0, 3.0]))  # longer episodes
    drawn = torch.Generator().manual_seed(0)
    found = collect(
        states, start, policy, value, environments=6, steps=25, most=10, generator=drawn
    )
    began = states.of(start).score
    assert found.returns == pytest.approx([10 * (end - began) for end in found.ends])
    assert len(found.ends) == int(found.ended.sum()) > 12
    for state in found.states:
        assert state.graph.degrees == start.degrees
    # No episode is longer than it may be, and after each end the next one begins.
    for number in range(6):
        length = 0
        for time in range(25):
            if length == 0:
                assert found.states[time * 6 + number].graph == start
            length += 1
            assert length <= 10
            length = 0 if found.ended[time, number] else length
    assert found.best.score >= max(found.ends)


def test_many_episodes_are_each_what_it_would_be_alone():
    states, policy = States(OBJECTIVE, 1), policy_of(network(norm="layer")).float()
    one, two = (play(states, ba15(), policy, most=6, episodes=n)[0] for n in (1, 3))
    assert one == two and one.swaps <= 6
    drawn = torch.Generator().manual_seed(1)
    played = play(states, ba15(), policy, most=6, episodes=40, generator=drawn)
    assert len({episode.end.graph for episode in played}) > 5
    assert all(episode.best.score >= episode.end.score for episode in played)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.floats(0, 1), st.floats(0, 1))
def test_advantages_are_the_sums_of_the_definition(seed, discount, gae):
    torch.manual_seed(seed)
    values, rewards, last = torch.randn(7, 3), torch.randn(7, 3), torch.randn(3)
    ended = torch.rand(7, 3) < 0.3
    actions = torch.zeros(7, 3, 3, dtype=torch.int64)
    experience = Experience(
        [], actions, values, values, rewards, ended, last, [], [], walked(1)[0], []
    )
    found = advantages(experience, discount, gae)
    for number, begin in itertools.product(range(3), range(7)):
        total, weight = 0.0, 1.0
        for time in range(begin, 7):
            after = float(values[time + 1, number] if time < 6 else last[number])
            after = 0.0 if ended[time, number] else after
            error = float(rewards[time, number]) + discount * after - float(values[time, number])
            total += weight * error
            weight *= discount * gae
            if ended[time, number]:
                break
        assert float(found[begin, number]) == pytest.approx(total, abs=1e-4)


def test_the_surrogate_is_clipped_on_both_sides():
    ratio = torch.tensor([0.5, 1.0, 1.5, 0.5, 1.5, 30.0])
    advantage = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    found = surrogate(ratio, advantage, 0.2, 10.0)
    assert found.tolist() == pytest.approx([0.5, 1.0, 1.2, -0.8, -1.5, -10.0])


def test_a_value_far_from_the_one_before_is_no_better_for_it():
    values, before = torch.tensor([0.0, 3.0, 1.0]), torch.tensor([0.0, 0.0, 0.0])
    found = value_loss(values, before, torch.tensor([1.0, 3.0, 1.0]), clip=2.0)
    assert found.tolist() == pytest.approx([1.0, 1.0, 0.0])


def test_an_update_makes_good_actions_likelier_and_values_truer():
    states = States(OBJECTIVE, 1)
    sizes = network(filtration=1, norm="layer")
    torch.manual_seed(0)
    policy, value = Policy(sizes).eval(), Value(sizes, 1.0).eval()
    settings = PpoSection(
        steps=10**6,
        environments=8,
        batch=64,
        minibatch=32,
        epochs=4,
        lr=3e-3,
        value_lr=3e-3,
        entropy=0.0,
    )
    drawn = torch.Generator().manual_seed(0)
    seen = collect(states, ba15(), policy, value, environments=8, steps=8, most=20, generator=drawn)
    batch, index = stacked(seen.states)
    actions = seen.actions.flatten(0, 1)
    advantage = advantages(seen, settings.discount, settings.gae).flatten()
    targets = advantage + seen.values.flatten()

    def looked() -> tuple[float, float]:
        with torch.no_grad():
            change = policy(batch, index, actions).log_prob - seen.log_prob.flatten()
            error = (value(batch, index) - targets).square().mean()
        standard = (advantage - advantage.mean()) / advantage.std()
        return float((change * standard).mean()), float(error)

    before = looked()
    optimizer = make_optimizer(policy, value, settings)
    losses = update(
        policy,
        value,
        optimizer,
        seen,
        settings,
        BestPaths(states, ba15(), 0, 1.0),
        scale=10.0,
        left=0.5,
        generator=drawn,
    )
    after = looked()
    assert before[0] == pytest.approx(0, abs=1e-5) and after[0] > 0.01
    assert after[1] < before[1]
    assert [group["lr"] for group in optimizer.param_groups] == [1.5e-3, 1.5e-3]
    assert losses.kl > 0 and 0 < losses.entropy < math.log(2 * 27 * 54)


def test_defaults_are_the_published_settings():
    settings = PpoSection()
    assert settings.iterations == 196 and settings.iteration_steps == 4096
    assert (settings.left(0), settings.left(98)) == (1, pytest.approx(0.49824))
    assert (settings.clip, settings.dual_clip, settings.discount, settings.gae) == (
        0.2, 10.0, 0.99, 0.95,
    )  # fmt: skip
    assert NetworkSection().jumping_width == 128


def test_the_best_paths_are_kept_and_imitated():
    states, start = States(OBJECTIVE, 1), ba15()
    policy, value = policy_of(network()).float(), Value(network(), 225.0).eval()
    drawn = torch.Generator().manual_seed(0)
    seen = collect(states, start, policy, value, environments=16, steps=20, most=5, generator=drawn)
    assert max(path.score for path in seen.paths) == seen.best.score
    kept = BestPaths(states, start, 3, 0.9)
    kept.offer(seen.paths)
    first = [path.score for path in kept.kept]
    scores = sorted({path.score for path in seen.paths}, reverse=True)
    assert first == sorted(first, reverse=True) and first[0] == scores[0] and len(first) == 3
    ends = set()
    for path in kept.kept:
        state = states.of(start)
        for action in path.actions:
            state, over = step(states, state, list(action))
            assert not over
        assert state.score == path.score
        ends.add(state.graph)
    assert len(ends) == 3
    kept.offer([Path(path.score, path.actions) for path in seen.paths])
    assert [path.score for path in kept.kept] == first

    with torch.no_grad():
        value.output[-1].bias += 0.3 * 225  # above what some steps have before them
    # One path, by hand: each step's return above the value, times -log p; of a stop p(stop).
    kept.kept = kept.kept[:1]
    (path,) = kept.kept
    walked = [states.of(start)]
    for action in path.actions:
        walked.append(step(states, walked[-1], list(action))[0])
    total, above = 0.0, []
    for place, state in enumerate(walked):
        gained = [10 * (b.score - a.score) for a, b in itertools.pairwise(walked[place:])]
        returned = sum(0.9**later * reward for later, reward in enumerate(gained))
        batch, index = stacked([state])
        above.append(returned - float(value(batch, index)))
        weight = max(above[-1], 0)
        action = path.actions[place] if place < len(path.actions) else (STOP, 0, 0)
        log_probs = policy(batch, index, torch.tensor([action])).log_probs[0]
        total -= weight * float(log_probs[0] if action[0] == STOP else log_probs.sum())
    assert min(above) < 0 < max(above)
    assert float(kept.loss(policy, value)) == pytest.approx(total / len(walked), rel=1e-4)
