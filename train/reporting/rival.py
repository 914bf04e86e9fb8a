"""The rival of a pruned network: the dense one fed fewer pixels, which needs no training at all.

What it scores at as many multiply-accumulates, or in as much measured time, is interpolated
linearly between the two nearest sizes that were measured; beyond them nothing is said.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tpp.measure.curves import place_of_cost
from train.config.stage_kinds import stage_kind
from train.reporting.latency import Latency
from train.reporting.rows import RunRecord, SummaryRow, chain_of, network_rows
from train.run_folder.results import NetworkResult, Results, StageResult


class Measured(NamedTuple):
    """The dense network at one size of the images.

    Attributes:
        cost: what the size costs: multiply-accumulates of an image, or a batch's milliseconds.
        score: of the metric that leads.
        pixels: side of the images.
    """

    cost: float
    score: float
    pixels: int


class Between(NamedTuple):
    """A point of the dense network's curve.

    Attributes:
        score: interpolated.
        pixels: the two sizes that it lies between; both the same where it is one of them.
    """

    score: float
    pixels: tuple[int, int]


def interpolated(points: Sequence[Measured], cost: float) -> Between | None:
    """What the dense network scores at a cost; None beyond the sizes that were measured.

    Args:
        points: of the curve, in any order.
        cost: see :class:`Measured`, and :func:`tpp.measure.curves.place_of_cost`.
    """
    place = place_of_cost([(point.pixels, point.cost) for point in points], cost)
    if place is None:
        return None
    scores = {point.pixels: point.score for point in points}
    smaller, larger, share = place
    if share in (0, 1):  # at one of them
        side = larger if share else smaller
        return Between(scores[side], (side, side))
    score = scores[smaller] + share * (scores[larger] - scores[smaller])
    return Between(score, (smaller, larger))


def dense_curves(results: Results) -> dict[str | None, list[Measured]]:
    """The dense networks over multiply-accumulates, smallest size first, by where they are from.

    That is the stage that trained one; None for the starting weights.
    """
    found = {}
    side = results.image[-1] if results.image else None
    for origin, stage in _dense_stages(results).items():
        networks: list[tuple[int | None, NetworkResult]] = [(side, stage)]
        networks += [(size.image_size, size) for size in stage.sizes or ()]
        points = {
            pixels: Measured(network.macs, network.score, pixels)
            for pixels, network in networks
            if pixels is not None and network.macs is not None and network.score is not None
        }
        found[origin] = [points[pixels] for pixels in sorted(points)]
    return found


def _dense_stages(results: Results) -> dict[str | None, StageResult]:
    """Evaluations of dense networks at several sizes, by the stage that trained the network."""
    found: dict[str | None, StageResult] = {}
    dense = results.dense.macs if results.dense else None
    for stage in results.stages.values():
        if stage.sizes and stage.macs == dense:
            found.setdefault(_origin(results, stage.input), stage)
    return found


def _origin(results: Results, name: str | None) -> str | None:
    """The dense stage that a network comes from; None for the starting weights."""
    chain = chain_of(results.stages, name)
    return next(
        (of for of in reversed(chain) if stage_kind(results.stages[of].kind).is_dense), None
    )


@dataclass(frozen=True)
class Verdict:
    """A pruned network beside the dense one at equal cost.

    Attributes:
        row: the pruned network.
        cost: what is equal: multiply-accumulates, or milliseconds for a batch.
        batch: images in that; None for multiply-accumulates.
        rival: the dense network there; None where it was not measured around that cost.
    """

    row: SummaryRow
    cost: float
    batch: int | None
    rival: Between | None

    @property
    def gain(self) -> float | None:
        """The pruned network's score less the rival's."""
        if self.rival is None or self.row.score is None:
            return None
        return self.row.score - self.rival.score


def verdicts(run: RunRecord, latency: Latency | None = None) -> Iterator[Verdict]:
    """Every pruned network of a run beside the dense one, where that was measured at other sizes.

    Args:
        run: a run.
        latency: measured times; None for multiply-accumulates alone.
    """
    results = run.results
    curves = dense_curves(results)
    for row in network_rows(results):
        if row.stage is None or row.macs is None or row.score is None or row.speedup in (None, 1):
            continue
        curve = curves.get(_origin(results, row.stage))
        if not curve:
            continue
        yield Verdict(row, row.macs, None, interpolated(curve, row.macs))
        for batch in latency.batches if latency else ():
            assert latency is not None
            time = latency.milliseconds(batch, row.parameters, row.macs)
            dense = results.dense.parameters if results.dense else None
            timed = [
                Measured(taken, point.score, point.pixels)
                for point in curve
                if (taken := latency.milliseconds(batch, dense, point.cost)) is not None
            ]
            if time is not None:
                yield Verdict(row, time, batch, interpolated(timed, time))
