"""What a report says of each run."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tpp.common.errors import UserError
from tpp.common.reading import read_text
from tpp.common.yaml_files import LARGEST_YAML, parse_yaml
from tpp.methods import available_methods
from tpp.methods.base import Method
from train.config.stage_kinds import StageKind, stage_kind
from train.run_folder.log import LogEntry, read_log
from train.run_folder.results import NetworkResult, Results, StageResult, read_results
from train.tasks import task_class
from train.tasks.base import Task
from train.tasks.classification import Classification

# What names a run and where it is, rather than what it does.
IDENTITY = ("name", "output", "published")


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
    """

    folder: Path
    results: Results
    log: dict[tuple[str, str], list[LogEntry]]
    settings: dict[str, Any]
    stages: dict[str, StageResult]


def load_run(folder: Path) -> RunRecord:
    """Read a run folder.

    Raises:
        UserError: it is no run folder, or its results.json or config.yaml is broken.
    """
    path, config_path = folder / "results.json", folder / "config.yaml"
    if not path.exists() and not (folder / "log.jsonl").exists():
        raise UserError(f"{folder}: no run folder: it has neither results.json nor log.jsonl")
    results = read_results(path) if path.exists() else None
    config = _read_config(config_path)
    if results is None:
        results = Results(name=folder.resolve().name, task=_task_in(config, config_path))
    stages = {
        name: StageResult(kind=str(stage.get("kind")), input=_text(stage.get("input")))
        for name, stage in config.get("stages", {}).items()
    }
    return RunRecord(
        folder=folder,
        results=results,
        log=read_log(folder / "log.jsonl"),
        settings=dict(_flatten(config)),
        stages={**stages, **results.stages},
    )


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


def _read_config(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    # The resolved configuration extends nothing: no other file is opened for what it says.
    config = parse_yaml(read_text(path, "the configuration", largest=LARGEST_YAML), str(path))
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
    return line if results.status == "finished" else f"{line} - still {results.status}"
