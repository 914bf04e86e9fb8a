"""Filters of each layer before and after pruning, from the plans of a run."""

from collections.abc import Iterator
from typing import NamedTuple

from tpp.methods import available_methods
from train.config.stage_kinds import stage_kind
from train.reporting.rows import RunRecord, chain_of


class LayerCounts(NamedTuple):
    """The layers of one pruned network.

    Attributes:
        network: what a reader calls it.
        done: False for filters that are yet to be removed.
        before, after: number of filters by layer, in the order of the network; layers of which
            nothing could go are not there.
    """

    network: str
    done: bool
    before: dict[str, int]
    after: dict[str, int]


def layer_counts(run: RunRecord) -> Iterator[LayerCounts]:
    """The layers of the network at the end of each branch that is pruned, or is to be."""
    inputs = {stage.input for stage in run.stages.values()}
    seen = set()
    for end in run.stages:
        if end in inputs:
            continue
        chain = [name for name in chain_of(run.stages, end) if name in run.plans]
        removing = [
            name
            for name in chain
            if stage_kind(run.stages[name].kind).removes and name in run.results.stages
        ]
        # Without a prune stage the method itself takes out what it planned.
        planned = removing or chain[-1:]
        if not planned or tuple(planned) in seen:
            continue
        seen.add(tuple(planned))
        before: dict[str, int] = {}
        after: dict[str, int] = {}
        for name in planned:
            plan = run.plans[name]
            for layer, filters in plan.filters.items():
                before.setdefault(layer, filters)
                after[layer] = filters - len(plan.pruned[layer])
        last = run.stages[planned[-1]]
        method = available_methods().get(last.method or "")
        by_itself = method is not None and method.ends_pruned and planned[-1] in run.results.stages
        yield LayerCounts(last.title or planned[-1], bool(removing) or by_itself, before, after)
