"""A short run of chaos.py: kills where they hurt most, on one rank and, beside it, on two."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import pytest
from chaos import Lane, Moment, Tally, chaos_run, undisturbed
from tiny_run import make_tiny_data


def one_rank(folder: Path, config: dict[str, Any]) -> Tally:
    lane = Lane(folder / "lane", config, 1, undisturbed(folder / "undisturbed", config, 1).record)
    lane.kill(Moment(r"dense/checkpoints/\.step-00000010\.\d+\.tmp", delay=0.003))
    # After the first there is hardly ever a checkpoint under way, which would forbid the damage.
    for done in ("regularize/checkpoints/step-00000015", "finetune/checkpoints/step-00000010"):
        if lane.kill(Moment(done)) and lane.damage(Random(3)):  # a bit of the weights
            break
    lane.kill(Moment(r"prune/\.model\.safetensors\..*"))
    lane.kill(Moment(r"prune/done\.json"))
    lane.finish()
    return lane.tally


def two_ranks(folder: Path, config: dict[str, Any]) -> Tally:
    lane = Lane(folder / "lane", config, 2, undisturbed(folder / "undisturbed", config, 2).record)
    lane.kill(Moment("dense/checkpoints/step-00000010", rank=1))
    lane.kill(Moment(r"regularize/checkpoints/\.step-00000010\.\d+\.tmp", delay=0.003))
    lane.finish()
    return lane.tally


@pytest.fixture(scope="module")
def tallies(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Tally]:
    """By number of ranks; both at once, as most of the time goes into imports."""
    folder = tmp_path_factory.mktemp("chaos")
    config = chaos_run(make_tiny_data(folder / "data"))
    with ThreadPoolExecutor() as pool:
        one = pool.submit(one_rank, folder / "one", config)
        two = pool.submit(two_ranks, folder / "two", config)
        return {1: one.result(), 2: two.result()}


@pytest.mark.parametrize(("ranks", "kills", "flips"), [(1, 4, 1), (2, 2, 0)])
def test_a_run_that_is_killed_ends_as_one_that_is_not(
    tallies: dict[int, Tally], ranks: int, kills: int, flips: int
) -> None:
    tally = tallies[ranks]
    assert tally.violations == []
    assert (tally.kills, tally.survived, tally.runs) == (kills, kills, 1)
    assert tally.flips == tally.found == flips
    assert tally.resumes
    assert tally.of_one_rank == (ranks > 1)
    assert tally.not_ended == 0
