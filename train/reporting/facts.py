"""What a run is, in words: network, data set, method, date, machine, ranks."""

import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from tpp.common.errors import UserError
from tpp.selection.budget import BUDGET_KINDS, BudgetKind, parse_count
from train.config.stage_kinds import stage_kind
from train.reporting.rows import RunRecord, labels_of, method_title, network_rows

_MOST_NAMED = 4
_BUDGET, _RATIOS = "Pruning budget", "Ratios"
_IN_WORDS: dict[BudgetKind, str] = {
    "speedup": "{}x fewer MACs",
    "macs": "at most {} MACs",
    "parameters": "at most {} parameters",
    "latency_ms": "at most {} ms",
    "latency_speedup": "{}x as fast as measured",
}


def facts_of(run: RunRecord) -> dict[str, str]:
    """What is to be known of a run at first sight; what it does not say is left out."""
    results = run.results
    found = {
        "Network": results.model,
        "Data set": _data(run),
        "Method": ", ".join(_methods(run)),
        _BUDGET if _has_budget(run) else _RATIOS: _share(run),
        "Date": dates_of(run) or "",
        "Time taken": duration(results.wall_seconds),
        "Machine": results.device or "",
        "Ranks": "" if results.ranks is None else f"{results.ranks}",
        "Engine": results.engine or "",
        "Seed": "" if results.seed is None else str(results.seed),
        "Status": results.status,
    }
    return {word: said for word, said in found.items() if said not in ("", "-")}


def facts_of_all(runs: Sequence[RunRecord]) -> dict[str, str]:
    """What is to be known of several runs, with the names of those that differ in it."""
    each = [facts_of(run) for run in runs]
    found = {}
    for word in dict.fromkeys(word for facts in each for word in facts):
        values: dict[str, list[str]] = {}
        for facts, label in zip(each, labels_of(runs), strict=True):
            values.setdefault(facts.get(word, _missing(word, facts)), []).append(label)
        if len(values) == 1:
            (found[word],) = values
        elif len(values) <= _MOST_NAMED:
            found[word] = "; ".join(f"{said} ({_named(of)})" for said, of in values.items())
        else:
            found[word] = f"{len(values)} different ones, see below"
    return found


def _missing(word: str, facts: Mapping[str, str]) -> str:
    """What is said of a run that does not say something: one of a budget needs no ratios."""
    is_other = word in (_BUDGET, _RATIOS) and (_BUDGET in facts or _RATIOS in facts)
    return "none" if is_other else "not known"


def _named(labels: Sequence[str]) -> str:
    return ", ".join(labels) if len(labels) <= _MOST_NAMED else f"{len(labels)} runs"


def dates_of(run: RunRecord) -> str | None:
    """When a run began and was last heard of, in UTC; None where its log does not say."""
    return None if run.times is None else dates(*run.times)


def dates(first: float, last: float) -> str:
    """Two times in words, in UTC; both in seconds since 1970."""
    begin, end = (datetime.fromtimestamp(time, UTC) for time in (first, last))
    same_day = begin.date() == end.date()
    return f"{begin:%Y-%m-%d %H:%M} to {end:{'%H:%M' if same_day else '%Y-%m-%d %H:%M'}} UTC"


def duration(seconds: float | None) -> str:
    """A time in words; ``-`` for none."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"


def si_count(value: int | None) -> str:
    """A count with four figures and its prefix, such as ``2.31 G``; ``-`` for none."""
    if value is None:
        return "-"
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.4g}{unit}"
    return str(value)


def _data(run: RunRecord) -> str:
    root = run.settings.get("data.root")
    if not isinstance(root, str):
        return ""
    said = [root]
    classes = run.settings.get("data.demo.classes")
    if classes is not None:
        said = [f"generated images of {classes} classes, in {root}"]
    if run.results.image:
        channels, *sides = run.results.image
        said.append(f"{'x'.join(map(str, sides))} px, {channels} channels")
    return "; ".join(said)


def _methods(run: RunRecord) -> list[str]:
    """Titles of what made the networks of a run, or is to make them."""
    titles = [row.network for row in network_rows(run.results) if row.final and row.stage]
    if not titles:
        pruned = [name for name, stage in run.stages.items() if stage_kind(stage.kind).removes]
        titles = [title for name in pruned if (title := method_title(run.stages, name))]
    name = run.settings.get("method.name")
    return list(dict.fromkeys(titles)) or ([str(name)] if name else [])


def _has_budget(run: RunRecord) -> bool:
    return any(_setting(run, f"budget.{kind}") is not None for kind in BUDGET_KINDS)


def _setting(run: RunRecord, key: str) -> Any:
    return run.settings.get(f"pruning.{key}")


def _share(run: RunRecord) -> str:
    """How much is to go, in words; the ratios beside a budget are the most that may go."""
    start = "pruning.ratios."
    ratios = [
        f"{key.removeprefix(start)}: {_word(value)}"
        for key, value in run.settings.items()
        if key.startswith(start) and value is not None
    ]
    if len(ratios) > _MOST_NAMED:
        ratios[_MOST_NAMED:] = [f"and {len(ratios) - _MOST_NAMED} more"]
    said = ", ".join(ratios)
    budget = ", ".join(_budget(run))
    return f"{budget}; at most {said}" if budget and said else budget or said


def _budget(run: RunRecord) -> Iterator[str]:
    """Each limit of the budget; exactly one where the settings are valid."""
    for kind in BUDGET_KINDS:
        value = _setting(run, f"budget.{kind}")
        if value is None:
            continue
        said = _IN_WORDS[kind].format(_word(value, in_units=kind in ("macs", "parameters")))
        if kind.startswith("latency"):
            batch, device = (_setting(run, f"budget.{key}") for key in ("batch", "device"))
            where = f" on {device}" if device else ""
            said += f" (batch {_word(1 if batch is None else batch)}{where})"
        yield said


def _word(value: Any, *, in_units: bool = False) -> str:
    """A value as people write it; ``in_units`` with the prefix of a large count."""
    if in_units:
        try:
            return si_count(parse_count(value))
        except (UserError, OverflowError):  # of a file that was edited since
            return str(value)
    return f"{value:g}" if isinstance(value, float) else str(value)
