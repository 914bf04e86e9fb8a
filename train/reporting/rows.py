"""What a report says of each run."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from tpp.common.errors import UserError
from tpp.common.reading import read_text
from tpp.common.yaml_files import LARGEST_YAML, parse_yaml
from tpp.methods import available_methods
from tpp.methods.base import Method
from tpp.plan import PruningPlan
from train.config.stage_kinds import StageKind, stage_kind
from train.run_folder.log import LogEntry, read_log
from train.run_folder.plans import PLAN_FILE
from train.run_folder.results import NetworkResult, Results, StageResult, read_results
from train.tasks import task_class
from train.tasks.base import Task
from train.tasks.classification import Classification

# What names a run and where it is, rather than what it does.
IDENTITY = ("name", "output", "published")
_LONGEST_NAME = 255  # bytes, of a file
_LATEST = 2**35  # seconds since 1970: after it no run of today was


@dataclass(frozen=True)
class SummaryRow:
    """One network of a run: the dense one, or what came out at the end of a branch.

    Attributes:
        network: what a reader calls it: ``Dense``, or the title of the method that pruned it.
        stage: the stage that the figures are from; None for the dense network.
        final: False for a network on its way, which no published figure compares with.
        scores: by the names of the task's metrics; None where nobody measured.
        parameters, macs: counts; MACs are those of one image. Masked weights are counted in.
        sparsity: share of the weights of masked layers that are masked; None for no mask.
        speedup: dense MACs over this network's.
        aside: whether it is of other weights, or other sizes of the images, of a network above;
            headlines leave it out.
    """

    network: str
    stage: str | None
    final: bool
    scores: Mapping[str, float | None]
    parameters: int | None
    macs: int | None
    speedup: float | None
    aside: bool = False
    sparsity: float | None = None

    @property
    def score(self) -> float | None:
        """Of the metric that leads."""
        return next(iter(self.scores.values()), None)


@dataclass(frozen=True)
class RunRecord:
    """What a run folder says about its run.

    Attributes:
        folder: the run folder.
        results: of results.json, or little more than a name before the first stage is done.
        log: entries of log.jsonl that have a step, by event and stage, in rising order of steps.
        settings: every setting of config.yaml by its dotted key; empty where there is no file.
        stages: the stages that are done, and those that config.yaml announces.
        config: the text of config.yaml; None where there is no file.
        plans: of the stages that wrote one, by name.
    """

    folder: Path
    results: Results
    log: dict[tuple[str, str], list[LogEntry]]
    settings: dict[str, Any]
    stages: dict[str, StageResult]
    config: str | None = None
    plans: dict[str, PruningPlan] = field(default_factory=dict)

    @property
    def times(self) -> tuple[float, float] | None:
        """Of its first and its last entry in the log, in seconds since 1970; None without one."""
        logged = [entry.get("time") for entries in self.log.values() for entry in entries]
        times = [t for t in logged if isinstance(t, int | float) and 0 < t < _LATEST]
        return (min(times), max(times)) if times else None


def load_run(folder: Path) -> RunRecord:
    """Read a run folder.

    Raises:
        UserError: it is no run folder, or its results.json, its config.yaml or a plan of it is
            broken.
    """
    path, config_path = folder / "results.json", folder / "config.yaml"
    if not path.exists() and not (folder / "log.jsonl").exists():
        raise UserError(f"{folder}: no run folder: it has neither results.json nor log.jsonl")
    results = read_results(path) if path.exists() else None
    config_text = None
    if config_path.exists():
        config_text = read_text(config_path, "the configuration", largest=LARGEST_YAML)
    config = {} if config_text is None else _parse_config(config_text, config_path)
    if results is None:
        results = Results(name=folder.resolve().name, task=_task_in(config, config_path))
    stages = {name: _announced(stage, config) for name, stage in config.get("stages", {}).items()}
    stages |= results.stages
    return RunRecord(
        folder=folder,
        results=results,
        log=read_log(folder / "log.jsonl"),
        settings=dict(_flatten(config)),
        stages=stages,
        config=config_text,
        plans=dict(_plans(folder, stages)),
    )


def _announced(stage: dict[str, Any], config: dict[str, Any]) -> StageResult:
    """A stage as its settings have it, before anything is known of it."""
    kind = str(stage.get("kind"))
    section = stage.get("method") or config.get("method")
    name = _text(section.get("name")) if isinstance(section, dict) else None
    method = available_methods().get(name or "") if stage_kind(kind).has_method else None
    return StageResult(
        kind=kind,
        input=_text(stage.get("input")),
        method=method.name if method else None,
        title=method.title if method else None,
    )


def _plans(folder: Path, stages: Iterable[str]) -> Iterator[tuple[str, PruningPlan]]:
    for name in stages:
        of_stage = stage_folder(folder, name)
        if of_stage is not None and (path := of_stage / PLAN_FILE).exists():
            yield name, PruningPlan.load(path)


def stage_folder(folder: Path, stage: str) -> Path | None:
    """The folder of a stage, which may not be there.

    None where it would be another: in a stranger's results a stage may have any name.
    """
    is_one = stage.isprintable() and 0 < len(stage.encode()) <= _LONGEST_NAME
    return folder / stage if is_one and "/" not in stage and stage not in (".", "..") else None


def summary_rows(results: Results | Mapping[str, Any]) -> list[SummaryRow]:
    """The networks of :func:`network_rows`, each followed by itself at other sizes of the images.

    Args:
        results: the content of results.json.
    """
    results = Results.model_validate(results)
    of_dense = next((of for of in results.stages.values() if _is_dense(results, of)), None)
    rows: list[SummaryRow] = []
    for row in network_rows(results):
        rows.append(row)
        stage = results.stages[row.stage] if row.stage else of_dense
        if stage is not None and not row.aside:
            rows += _other_sizes(row, stage, results)
    return rows


def _is_dense(results: Results, stage: StageResult) -> bool:
    """Whether it is an evaluation of a dense network at other sizes too."""
    made_by = results.stages.get(stage.input) if stage.input else None
    of_dense = made_by is None or _kind_of(made_by).is_dense
    return bool(stage.sizes) and of_dense


def _other_sizes(row: SummaryRow, stage: StageResult, results: Results) -> Iterator[SummaryRow]:
    for size in sorted(stage.sizes or (), key=lambda size: -size.image_size):
        dense = results.dense.macs if results.dense else None
        yield replace(
            row,
            network=f"{row.network} at {size.image_size} px",
            final=False,
            scores=size.scores,
            macs=size.macs,
            speedup=dense / size.macs if dense and size.macs else None,
            aside=True,
        )


def network_rows(results: Results | Mapping[str, Any]) -> list[SummaryRow]:
    """The dense network, where it is known, and the network at the end of every branch.

    A branch ends in a stage that no other takes as its input: an ``evaluate`` stage, or the last
    one done. A pruned network goes by the title of the method that pruned it.

    Args:
        results: the content of results.json.
    """
    results = Results.model_validate(results)
    dense = results.dense
    rows: list[SummaryRow] = []
    for name, made_by in _branch_ends(results.stages):
        stage = results.stages[name]
        if made_by is not None and not _kind_of(results.stages[made_by]).is_dense:
            row = _row(results.stages, name, made_by)
            rows += [row, *_other_weights(row, results.stages[made_by])]
        elif dense is None or dense.score is None:
            dense = stage  # an evaluation of the dense network
    repeated = Counter(row.network for row in rows)
    rows = [
        replace(row, network=f"{row.network} ({row.stage})") if repeated[row.network] > 1 else row
        for row in rows
    ]
    if dense is None:
        return rows
    row = _dense_row(dense)
    trained = [stage for stage in results.stages.values() if _kind_of(stage).is_dense]
    return [row, *(other for stage in trained for other in _other_weights(row, stage)), *rows]


def task_of(runs: Sequence[RunRecord]) -> type[Task]:
    """What the networks of all these runs were trained for.

    Raises:
        UserError: not all for the same.
    """
    first = runs[0]
    for run in runs:
        if run.results.task != first.results.task:
            raise UserError(
                f"{run.folder}: its task is {run.results.task}, and that of {first.folder} "
                f"{first.results.task}: they do not go beside each other"
            )
    return first.results.task_type


def _parse_config(text: str, path: Path) -> dict[str, Any]:
    # The resolved configuration extends nothing: no other file is opened for what it says.
    config = parse_yaml(text, str(path))
    stages = config.get("stages", {}) if isinstance(config, dict) else None
    if not isinstance(stages, dict) or not all(isinstance(s, dict) for s in stages.values()):
        raise UserError(f"{path}: not the resolved configuration of a run")
    return config


def _task_in(config: dict[str, Any], path: Path) -> str:
    """The kind of the task that a configuration is for; older ones do not say."""
    task = config.get("task")
    kind = task.get("kind") if isinstance(task, dict) else None
    try:
        return task_class(Classification.kind if kind is None else str(kind)).kind
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _kind_of(stage: StageResult) -> StageKind:
    return stage_kind(stage.kind)


def _flatten(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for part, inner in value.items():
            yield from _flatten(inner, f"{key}.{part}".strip("."))
    else:
        yield key, value


def chain_of(stages: Mapping[str, StageResult], name: str | None) -> list[str]:
    """Stage ``name`` and all that it came from, the first stage first."""
    chain: list[str] = []
    while name is not None and name in stages and name not in chain:
        chain.insert(0, name)
        name = stages[name].input
    return chain


def _branch_ends(stages: Mapping[str, StageResult]) -> Iterator[tuple[str, str | None]]:
    """Every branch's last stage, and the stage that made the network which that one measured."""
    inputs = {stage.input for stage in stages.values()}
    for name, stage in stages.items():
        if name not in inputs:
            made_by = name if _kind_of(stage).makes_network else stage.input
            yield name, made_by if made_by in stages else None


def method_title(stages: Mapping[str, StageResult], name: str) -> str | None:
    """What made the network of a stage: masks, what pruned it, a way of finetuning it.

    Args:
        stages: of the run.
        name: of the stage that made the network.

    Returns:
        The titles, such as ``L1``, ``TPP, masked`` or ``L1, Linear over-parameterization (a
        reconstruction)``; None for a network that nothing was taken from.
    """
    chain = chain_of(stages, name)
    removed = [ancestor for ancestor in chain if _kind_of(stages[ancestor]).removes]
    regularized = [ancestor for ancestor in chain if _kind_of(stages[ancestor]).regularizes]
    titles = []
    if removed or regularized:
        titles.append(_title(stages, (removed or regularized)[-1]))
    if any(_kind_of(stages[ancestor]).masks for ancestor in chain):
        titles.append("masked" if titles else "Masked")
    method = _method_of(stages[name])
    if method is not None and method.finetunes and _kind_of(stages[name]).is_final:
        titles.append(_title(stages, name))
    # Once, where filters went under the method's name, too.
    return ", ".join(dict.fromkeys(titles)) or None


def _title(stages: Mapping[str, StageResult], name: str) -> str:
    """Of a stage's method, and whether it is a reconstruction."""
    title = stages[name].title or stages[name].method or name
    method = _method_of(stages[name])
    return title if method is None or method.faithful else f"{title} (a reconstruction)"


def _method_of(stage: StageResult) -> type[Method] | None:
    """None where the results name none, or one that is not there any more."""
    return available_methods().get(stage.method or "")


def _dense_row(dense: NetworkResult) -> SummaryRow:
    return SummaryRow(
        network="Dense",
        stage=None,
        final=True,
        scores=dense.scores,
        parameters=dense.parameters,
        macs=dense.macs,
        speedup=None if dense.macs is None else 1.0,
    )


def _other_weights(row: SummaryRow, stage: StageResult) -> list[SummaryRow]:
    """A row of the weights that a stage's own figures are not of, where it averaged any."""
    if stage.other_weights is None:
        return []
    weights, found = stage.other_weights
    network = f"{row.network}, {'averaged' if weights == 'ema' else 'raw'} weights"
    return [replace(row, network=network, final=False, scores=found.scores, aside=True)]


def _row(stages: Mapping[str, StageResult], name: str, made_by: str) -> SummaryRow:
    title, stage = method_title(stages, made_by), stages[name]
    kind, method = _kind_of(stages[made_by]), _method_of(stages[made_by])
    ends = kind.regularizes and method is not None and method.ends_pruned
    final = title is not None and (kind.is_final or ends)
    return SummaryRow(
        network=title if final and title else f"{title or 'Dense'} after {made_by}",
        stage=name,
        final=final,
        scores=stage.scores,
        parameters=stage.parameters,
        macs=stage.macs,
        speedup=stage.speedup,
        sparsity=stage.sparsity,
    )


def published_score(row: SummaryRow, rows: Sequence[SummaryRow], results: Results) -> float | None:
    """The published score that ``row`` is to reproduce, if it is clear which row that is."""
    published = results.published_score
    if row.network == "Dense":
        return published.dense
    finals = [other for other in rows if other.final and other.network != "Dense"]
    return published.pruned if finals == [row] else None


def labels_of(runs: Sequence[RunRecord]) -> list[str]:
    """A name for every run; where two share one, with the seed or the folder to tell them apart."""
    names = [run.results.name for run in runs]
    with_seeds = [f"{run.results.name}, seed {run.results.seed}" for run in runs]
    for labels in (names, with_seeds):
        if len(set(labels)) == len(runs):
            return labels
    return [str(run.folder) for run in runs]


def headline_of(run: RunRecord) -> str:
    """A run in one line: from where to where, at what speedup, and what was published."""
    rows, results = summary_rows(run.results), run.results
    score, published = results.task_type.metrics[0], results.published_score.pruned
    parts = []
    for row in rows:
        if row.score is not None and not row.aside:
            speedup = f" at {row.speedup:.2f}x fewer MACs" if row.speedup not in (None, 1) else ""
            parts.append(f"{row.network} {score.number(row.score)}{score.unit}{speedup}")
    line = f"{score.word}: {', '.join(parts)}" if parts else f"no {score.noun or score.word} yet"
    if published is not None:
        line += f" (published {score.number(published)}{score.unit})"
    if results.status == "finished":
        return line
    return f"{line} - {'still running' if results.status == 'running' else results.status}"


class Listed(NamedTuple):
    """A network in a table of several runs.

    Attributes:
        label: of its run, or of the runs that began from it.
        run: the first of these.
        row: the network.
        rows: all networks of that run.
    """

    label: str
    run: RunRecord
    row: SummaryRow
    rows: Sequence[SummaryRow]

    @property
    def published(self) -> float | None:
        """The score that it is to reproduce; None where none is known, or it is not clear which."""
        return published_score(self.row, self.rows, self.run.results)

    @property
    def beside_dense(self) -> float | None:
        """Its score less that of the dense network of its run."""
        dense = self.rows[0]
        if self.row is dense or dense.network != "Dense":
            return None
        known = self.row.score is not None and dense.score is not None
        return self.row.score - dense.score if known else None  # type: ignore[operator]


def listed(runs: Sequence[RunRecord]) -> list[Listed]:
    """All networks of all runs; a dense one that several runs began from is there once."""
    found: list[Listed] = []
    for run, label in zip(runs, labels_of(runs), strict=True):
        rows = summary_rows(run.results)
        found += [Listed(label, run, row, rows) for row in rows]
    several: dict[int, list[str]] = {}
    once: list[Listed] = []
    for one in found:
        first = None
        if one.row.stage is None:
            first = next(
                (n for n, o in enumerate(once) if (o.row, o.published) == (one.row, one.published)),
                None,
            )
        if first is None:
            several[len(once)] = [one.label]
            once.append(one)
        else:
            several[first].append(one.label)
    return [
        one._replace(label=_labels_in_short(several[number], len(runs)))
        for number, one in enumerate(once)
    ]


def _labels_in_short(labels: Sequence[str], of: int) -> str:
    if len(labels) == 1:
        return labels[0]
    if len(labels) == of:
        return "both runs" if of == 2 else f"all {of} runs"
    return f"{labels[0]} and {len(labels) - 1} more"
