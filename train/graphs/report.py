"""What a run comes to: the policy's ends beside searches, in results.json and in the terminal."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, median
from typing import Literal

import torch
from rich.table import Table

from tpp.common.consoles import output_console
from tpp.common.files import write_whole
from tpp.common.settings import Section
from train.graphs.config import Config
from train.graphs.episodes import play
from train.graphs.firegnn import Policy
from train.graphs.graph import Edge, Graph
from train.graphs.search import Found, annealing, beam, greedy
from train.graphs.states import States
from train.graphs.training import Trained, seed_of
from train.run_folder.record import git_commit, versions


class Row(Section):
    """Where a policy or a search ended, over its runs.

    Attributes:
        name: what it is.
        runs: episodes or searches.
        score: the best F at which one ended.
        swaps: that lead there.
        median, mean, worst: of all ends.
        on_the_way: the best F that one met before its end; of a search that is its end.
        seconds: of all of them.
        edges: of the graph with ``score``.
    """

    name: str
    runs: int
    score: float
    swaps: int
    median: float
    mean: float
    worst: float
    on_the_way: float
    seconds: float
    edges: list[Edge]


class Results(Section):
    """The content of results.json.

    Attributes:
        start: F of the start graph.
        wall_seconds: that the training took.
        processor_seconds: of a core, among these.
        training_best: the best F that an episode of the training met.
        rows: the policy's, then the searches'.
    """

    name: str
    seed: int
    status: Literal["running", "stopped", "finished"]
    nodes: int
    edges: int
    start: float
    iterations: int = 0
    environment_steps: int = 0
    wall_seconds: float | None = None
    processor_seconds: float | None = None
    training_best: float | None = None
    training_best_edges: list[Edge] = []
    rows: list[Row] = []
    device: str
    versions: dict[str, str]
    git_commit: str | None = None


def results_of(
    config: Config,
    start: Graph,
    states: States,
    status: Literal["running", "stopped", "finished"],
    trained: Trained | None = None,
    rows: list[Row] | None = None,
) -> Results:
    """What is known of a run so far."""
    results = Results(
        name=config.name,
        seed=config.seed,
        status=status,
        nodes=len(start),
        edges=len(start.edges),
        start=states.of(start).score,
        device=f"CPU, {torch.get_num_threads()} thread(s)",
        versions=versions(),
        git_commit=git_commit(),
        rows=rows or [],
    )
    if trained is not None:
        results.iterations = trained.iterations
        results.environment_steps = trained.iterations * config.training.iteration_steps
        results.wall_seconds = round(trained.elapsed, 3)
        results.processor_seconds = round(trained.processor, 3)
        results.training_best, results.training_best_edges = trained.best_score, trained.best_edges
    return results


def write_results(results: Results, folder: Path) -> None:
    """Write results.json."""
    write_whole(folder / "results.json", json.dumps(results.model_dump(), indent=1) + "\n")


def policy_rows(
    config: Config, start: Graph, states: States, policy: Policy, pause: Callable[[], None]
) -> list[Row]:
    """The policy's ends: of its most probable actions, and of sampled episodes."""
    drawn = torch.Generator().manual_seed(seed_of(config.seed, "evaluation"))
    rows = []
    for name, episodes, generator in (
        ("policy, most probable", 1, None),
        ("policy, sampled", config.evaluation.episodes, drawn),
    ):
        began = time.perf_counter()
        played = play(
            states,
            start,
            policy,
            most=config.rewirings,
            episodes=episodes,
            generator=generator,
            pause=pause,
        )
        seconds = time.perf_counter() - began
        ends = [Found(one.end.score, one.swaps, one.end.graph) for one in played]
        on_the_way = max(one.best.score for one in played)
        rows.append(_row(name, ends, seconds, on_the_way))
    return rows


def search_rows(
    config: Config, start: Graph, states: States, pause: Callable[[], None]
) -> list[Row]:
    """The ends of the searches that the configuration asks for.

    Greedy and beam search may do as many swaps as the policy; annealing any number.
    """
    search, most = config.search, config.rewirings
    most_runs = max(search.greedy, search.annealing)
    seeds = [seed_of(config.seed, f"search {number}") for number in range(most_runs)]
    temperatures = search.hot, search.cold

    def climb(seed: int) -> Found:
        return greedy(states, start, most, seed, pause)

    def widen(width: int) -> Found:
        return beam(states, start, most, width, pause)

    def anneal(seed: int) -> Found:
        return annealing(states, start, search.annealing_steps, temperatures, seed, pause)

    ways: list[tuple[str, Callable[[int], Found], list[int]]] = [
        ("greedy search", climb, seeds[: search.greedy]),
        (f"beam search ({search.beam})", widen, [search.beam] if search.beam else []),
        ("simulated annealing", anneal, seeds[: search.annealing]),
    ]
    rows = []
    for name, way, of_runs in ways:
        if of_runs:
            began = time.perf_counter()
            found = [way(one) for one in of_runs]
            rows.append(_row(name, found, time.perf_counter() - began))
    return rows


def _row(name: str, ends: list[Found], seconds: float, on_the_way: float | None = None) -> Row:
    best = max(ends, key=lambda end: (end.score, -end.swaps))
    scores = [end.score for end in ends]
    return Row(
        name=name,
        runs=len(ends),
        score=best.score,
        swaps=best.swaps,
        median=median(scores),
        mean=fmean(scores),
        worst=min(scores),
        on_the_way=best.score if on_the_way is None else on_the_way,
        seconds=round(seconds, 3),
        edges=best.graph.edges,
    )


def show(results: Results, config: Config) -> None:
    """Print what a run came to."""
    # R is a sum of counts of nodes: as whole numbers it is easier to read.
    counts = config.objective.resilience == "r" and not config.objective.alpha
    unit = results.nodes**2 if counts else 1

    def said(score: float) -> str:
        return f"{score * unit:.2f}".removesuffix(".00") if counts else f"{score:.5f}"

    title = f"{results.name}: F at the ends" + (f", in 1/{unit}" if counts else "")
    table = Table(title=title, caption="met: the best on the way to an end")
    table.add_column("")
    for column in ("runs", "best", "swaps", "mean", "worst", "met", "s"):
        table.add_column(column, justify="right")
    table.add_row("start", "", said(results.start), *[""] * 5)
    for row in results.rows:
        table.add_row(
            row.name,
            str(row.runs),
            said(row.score),
            str(row.swaps),
            *map(said, (row.mean, row.worst, row.on_the_way)),
            f"{row.seconds:.1f}",
        )
    console = output_console(100)
    console.print(table)
    assert results.training_best is not None and results.wall_seconds is not None
    console.print(
        f"seed {results.seed}; trained for {results.environment_steps:,} steps in "
        f"{results.wall_seconds:.0f} s ({results.processor_seconds:.0f} s of a core), which met "
        f"{said(results.training_best)} at best",
        soft_wrap=True,
        highlight=False,
    )
