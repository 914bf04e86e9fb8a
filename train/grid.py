"""The runs of a sweep: which there are, where they stand, and what state they are in."""

import contextlib
import itertools
import json
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from tpp.common.errors import UserError, printable
from tpp.common.reading import parse_json
from tpp.common.settings import Ratio, Section, UserPath, mistakes
from tpp.common.yaml_files import read_yaml
from train.config.config import Config, load_config
from train.config.cycles import CYCLE
from train.config.merging import MERGING
from train.config.sections import MODEL_FILE
from train.run_folder.results import Results, read_results
from train.tasks.base import Metric

MAIN = Path(__file__).resolve().with_name("main.py")
# What the sweep sets in every run, so that an override of it would be lost.
_OF_THE_SWEEP = ("name", "output", "seed", "pruning")
_GROUP = "tracking.group"
_LOG_TAIL = 2**16
AS_CONFIGURED = "as configured"  # the one block of a sweep that sets nothing in finetuning
Label = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")]
MeanAndStd = Annotated[list[float], Field(min_length=1, max_length=2)]


class PublishedTable(Section):
    """The published figures beside a sweep's; every list is in the order of the ratios.

    Attributes:
        source: where the figures were published.
        dense_top1 (per cent): top-1 accuracy of the dense network; null where it is not known.
        sparsity (per cent): share of the parameters that is removed; null where it is not known.
        speedup: operations of the dense network over those of the pruned one; null where it is not
            known.
        top1 (per cent): top-1 accuracy by block of ``finetuning`` and by method, a list of
            ``[mean]`` or ``[mean, standard deviation]``.

    Example:
        {source: "Wang & Fu, ICLR 2023, Table 1", dense_top1: 93.78, sparsity: [31.14, 90.39],
        speedup: [1.45, 11.41], top1: {lr0.01: {tpp: [[93.81, 0.11], [89.63, 0.1]]}}}
    """

    source: str
    dense_top1: float | None = None
    sparsity: list[float] | None = None
    speedup: list[float] | None = None
    top1: dict[str, dict[str, list[MeanAndStd]]] = Field(default_factory=dict)


class Sweep(Section):
    """The file of a sweep, a grid of runs: every method at every ratio with every seed
    (docs/table1.md). It is run by ``tpp sweep --config FILE``. In the file its keys
    stand at the top level, without the word ``sweep``; paths of configurations are relative to it.

    Attributes:
        name: name of the sweep, with which its runs' names begin.
        output: the folder that holds the run folders.
        dense: configuration of the network that all runs start from; null where the methods'
            configurations say what they start from.
        methods: the configuration of each row of the table, with stages ``finetune`` and
            ``evaluate``.
        ratios: the ``pruning.ratios`` of each column of the table.
        finetuning: what is set in the stage ``finetune``, for each block of the table. All of them
            start from the one network that the run has pruned. null for rows as their
            configurations have them.
        seeds: seeds of the runs; each method runs with each of them at each ratio.
        overrides: ``key.sub=value`` for every run. One of a stage (``stages.finetune.epochs=5``) is
            for the runs that train in a stage of that name.
        published: published figures to show beside the measured ones; null for none.

    Shorthands:
        extends (path): another file, relative to this one, whose settings hold where this one says
            nothing.

    Example:
        {name: short, output: runs/short, dense: resnet56_dense.yaml,
        methods: {l1: resnet56_l1_base.yaml, tpp: resnet56_tpp_base.yaml},
        ratios: {pr0.5: {layer*.conv1: 0.5}, pr0.9: {layer*.conv1: 0.9}},
        finetuning: {lr0.01: {optimizer: {lr: 0.01}}}, seeds: [0, 1, 2],
        overrides: [training.precision=bf16]}
    """

    name: Label
    output: UserPath
    dense: UserPath | None = None
    methods: Annotated[dict[Label, UserPath], Field(min_length=1)]
    ratios: Annotated[dict[Label, dict[str, Ratio]], Field(min_length=1)]
    finetuning: Annotated[dict[Label, dict[str, Any]], Field(min_length=1)] | None = None
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], Field(min_length=1)]
    overrides: list[str] = Field(default_factory=list)
    published: PublishedTable | None = None

    @property
    def blocks(self) -> dict[str, dict[str, Any]]:
        """What is set in the stage ``finetune``, by block."""
        return {AS_CONFIGURED: {}} if self.finetuning is None else self.finetuning

    @model_validator(mode="after")
    def _published_fits_the_grid(self) -> "Sweep":
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: each may be there once")
        if self.published is None:
            return self
        rows: dict[str, Sequence[Any] | None] = {
            "sparsity": self.published.sparsity,
            "speedup": self.published.speedup,
        }
        for finetuning, methods in self.published.top1.items():
            _expect_one_of(self.blocks, finetuning, "published.top1")
            for method, row in methods.items():
                _expect_one_of(self.methods, method, f"published.top1.{finetuning}")
                rows[f"top1.{finetuning}.{method}"] = row
        for key, values in rows.items():
            if values is not None and len(values) != len(self.ratios):
                raise ValueError(
                    f"published.{key}: expected {len(self.ratios)}, one for each ratio"
                )
        return self


def _expect_one_of(known: dict[str, Any], key: str, where: str) -> None:
    if key not in known:
        raise ValueError(f"{where}.{key}: not in the sweep; there are: {', '.join(known)}")


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep.

    Attributes:
        number: 0 for the dense network, then from 1 on, the seeds outermost: another seed at the
            end of the list leaves all numbers as they were.
        name: of its folder in the sweep's.
        method, title, ratio, seed: its place in the grid; None of the dense run. The title is
            what a reader calls the method.
        folder: the run folder.
        config: the configuration, to which ``overrides`` are applied.
        evaluations: the ``evaluate`` stage that ends each finetuning.
        starts_from: the dense run's checkpoint, or None.
    """

    number: int
    name: str
    method: str | None
    title: str | None
    ratio: str | None
    seed: int | None
    folder: Path
    config: Path
    overrides: tuple[str, ...]
    evaluations: dict[str, str]
    starts_from: Path | None

    def command(self, launcher: Sequence[str]) -> list[str]:
        """The command that runs it."""
        return [*launcher, str(MAIN), "--config", str(self.config), *self.overrides]


@dataclass(frozen=True)
class State:
    """How far a run is.

    Attributes:
        done: every stage is, those of all finetunings included.
        text: ``done``, ``waiting``, or ``under way`` with stage and step.
        results: of its results.json; None before there is one.
    """

    done: bool
    text: str
    results: Results | None


def load_sweep(path: Path, output: Path | None = None) -> Sweep:
    """Read and validate a sweep's file.

    Args:
        path: the YAML file.
        output: another folder than the file's.

    Raises:
        UserError: with one line per mistake, each naming the file and the key.
    """
    data = read_yaml(path)
    if {"model", "stages"} & data.keys() and "methods" not in data:
        raise UserError(f"{path}: one run, and no sweep of many; train/main.py --config {path}")
    if output is not None:
        data["output"] = str(output)
    try:
        sweep = Sweep.model_validate(data)
    except ValidationError as error:
        raise UserError("\n".join(f"{path}: {line}" for line in mistakes(error, Sweep))) from None
    sweep.methods = {name: str(path.parent / file) for name, file in sweep.methods.items()}
    sweep.dense = None if sweep.dense is None else str(path.parent / sweep.dense)
    return sweep


def expand(sweep: Sweep, overrides: Sequence[str] = ()) -> list[SweepRun]:
    """All runs of a sweep, in the order in which they run.

    Args:
        sweep: the grid.
        overrides: ``key.sub=value`` for every run, after the sweep's own. One of a stage
            (``stages.finetune.epochs=5``) is for the runs that train in a stage of that name.

    Raises:
        UserError: a configuration or an override is not valid.
    """
    overrides = [*sweep.overrides, *overrides]
    for override in overrides:
        key = override.partition("=")[0].strip().split(".")[0]
        if key in _OF_THE_SWEEP:
            raise UserError(f"override {override!r}: the sweep itself says what {key} is")
    unused = set(overrides)
    runs, starts_from = [], None
    if sweep.dense is not None:
        dense, starts_from = _dense_run(sweep, sweep.dense, overrides, unused)
        runs.append(dense)
    grids = {method: _Grid.of(sweep, method, overrides, unused) for method in sweep.methods}
    if unused:
        raise UserError(f"override {min(unused)!r}: no run of the sweep trains in that stage")
    places = itertools.product(sweep.seeds, sweep.methods, sweep.ratios)
    for number, (seed, method, ratio) in enumerate(places, start=1):
        name, grid = f"{method}_{ratio}_seed{seed}", grids[method]
        settings: dict[str, Any] = {
            "name": f"{sweep.name}_{name}",
            "output": str(Path(sweep.output) / name),
            "seed": seed,
            "pruning.ratios": sweep.ratios[ratio],
            "stages": grid.stages,
            "published": _published(sweep, method, ratio),
            **_group(sweep, overrides),
        }
        if starts_from is not None:
            settings["model.checkpoint"] = str(starts_from)
        runs.append(
            SweepRun(
                number=number,
                name=name,
                method=method,
                title=grid.title,
                ratio=ratio,
                seed=seed,
                folder=Path(sweep.output) / name,
                config=Path(sweep.methods[method]),
                overrides=(*grid.overrides, *_as_overrides(settings)),
                evaluations=grid.evaluations,
                starts_from=starts_from,
            )
        )
    return runs


def state_of(run: SweepRun) -> State:
    """How far a run is, from what its folder holds.

    Raises:
        UserError: its results.json is broken.
    """
    path = run.folder / "results.json"
    results = read_results(path) if path.exists() else None
    if results is not None and results.status == "finished":
        missing = [stage for stage in run.evaluations.values() if stage not in results.stages]
        if not missing:
            return State(True, "done", results)
        return State(False, f"under way, {missing[0]} to do", results)
    if not run.folder.exists() or (results is None and not (run.folder / "log.jsonl").exists()):
        return State(False, "waiting", None)
    return State(False, f"under way{_last_logged(run.folder / 'log.jsonl')}", results)


def _last_logged(log: Path) -> str:
    """Stage and step of the newest entry, from the end of a file that may be long."""
    with contextlib.suppress(OSError), log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _LOG_TAIL))
        for line in reversed(file.read().decode(errors="replace").splitlines()):
            with contextlib.suppress(UserError, KeyError, TypeError):
                entry = parse_json(line, str(log))
                where = f", {entry['stage']}" + (f" {entry['step']}" if "step" in entry else "")
                return printable(where, 100)
    return ""


def metric_of(runs: Sequence[SweepRun]) -> Metric:
    """By which the networks of a sweep are compared: the first score of its runs' task."""
    return load_config(runs[0].config, runs[0].overrides).make_task().metrics[0]


@dataclass(frozen=True)
class _Grid:
    """What all runs of one method share."""

    title: str
    stages: dict[str, Any]
    evaluations: dict[str, str]
    overrides: list[str]

    @classmethod
    def of(cls, sweep: Sweep, method: str, overrides: list[str], unused: set[str]) -> "_Grid":
        """Resolve the configuration once for each finetuning.

        The first one takes the place of the stage ``finetune``; each of the others becomes a
        stage of its own from the same input, with everything else that the first one has.
        """
        path = Path(sweep.methods[method])
        cycles = _cycles_in(path)
        fixed: dict[str, Any] = {
            "name": sweep.name,
            "pruning.ratios": next(iter(sweep.ratios.values())),
            "published": None,
        }
        given = load_config(path, _as_overrides(fixed))
        if sweep.finetuning is not None and "finetune" not in given.stages:
            raise UserError(
                f"{path}: stages: the sweep's finetuning is of a stage 'finetune', and there is "
                "none; without finetuning, rows are as their configurations have them"
            )
        applied = _applied(given, overrides, unused, cycles)
        stages: dict[str, Any] = {}
        evaluations: dict[str, str] = {}
        if sweep.finetuning is None:
            config = load_config(path, [*_as_overrides(fixed), *applied])
            _expect_evaluate(config, path)
            evaluations[AS_CONFIGURED] = "evaluate"
            return cls(method, {}, evaluations, applied)
        for label, changes in sweep.finetuning.items():
            fixed["stages"] = {"finetune": changes}
            config = load_config(path, [*_as_overrides(fixed), *applied])
            _expect_evaluate(config, path)
            suffix = f"_{label}" if stages else ""
            evaluations[label] = f"evaluate{suffix}"
            stages[f"finetune{suffix}"] = config.stages["finetune"].model_dump()
            stages[f"evaluate{suffix}"] = {
                **config.stages["evaluate"].model_dump(),
                "input": f"finetune{suffix}",
            }
        return cls(config.stage_method("finetune").title, stages, evaluations, applied)


def _expect_evaluate(config: Config, path: Path) -> None:
    if "evaluate" not in config.stages:
        raise UserError(f"{path}: stages: a sweep needs a stage 'evaluate' at the end")


def _published(sweep: Sweep, method: str, ratio: str) -> dict[str, Any] | None:
    """What a run's own report compares with: the table's figures after the first finetuning."""
    published = sweep.published
    if published is None:
        return None
    column = list(sweep.ratios).index(ratio)
    row = published.top1.get(next(iter(sweep.blocks)), {}).get(method)
    top1, std = (*row[column], None)[:2] if row else (None, None)
    return {
        "source": f"{published.source}, {ratio}, {method}",
        "dense_top1": published.dense_top1,
        "top1": top1,
        "top1_std": std,
        "speedup": published.speedup[column] if published.speedup else None,
    }


def _dense_run(
    sweep: Sweep, path: str, overrides: list[str], unused: set[str]
) -> tuple[SweepRun, Path]:
    """The dense run and the checkpoint that it makes."""
    applied = _applied(load_config(path), overrides, unused, _cycles_in(Path(path)))
    folder = Path(sweep.output) / "dense"
    own = {"name": f"{sweep.name}_dense", "output": str(folder), **_group(sweep, overrides)}
    applied += _as_overrides(own)
    config = load_config(path, applied)
    makers = [name for name, stage in config.stages.items() if stage.does.makes_network]
    if not makers:
        raise UserError(f"{path}: stages: the sweep's dense run makes no network")
    run = SweepRun(
        number=0,
        name="dense",
        method=None,
        title=None,
        ratio=None,
        seed=None,
        folder=folder,
        config=Path(path),
        overrides=tuple(applied),
        evaluations={},
        starts_from=None,
    )
    return run, folder / makers[-1] / MODEL_FILE


def _cycles_in(path: Path) -> set[str]:
    """The names of a configuration's cycles, which are plain stages when it has been read."""
    stages = read_yaml(path, MERGING).get("stages")
    return {
        str(name)
        for name, stage in (stages.items() if isinstance(stages, dict) else ())
        if isinstance(stage, dict) and stage.get("kind") == CYCLE
    }


def _applied(
    config: Config, overrides: list[str], unused: set[str], cycles: Container[str]
) -> list[str]:
    """The overrides that are for this configuration; they are taken out of ``unused``."""
    applied = []
    for override in overrides:
        key = override.partition("=")[0].strip().split(".")
        stage = config.stages.get(key[1]) if key[0] == "stages" and len(key) > 1 else None
        of_cycle = len(key) > 1 and key[1] in cycles
        if key[0] != "stages" or of_cycle or (stage is not None and stage.does.trains):
            applied.append(override)
    unused.difference_update(applied)
    return applied


def _group(sweep: Sweep, overrides: Sequence[str]) -> dict[str, str]:
    """What trackers show a sweep's runs under, unless an override says it."""
    given = any(override.partition("=")[0].strip() == _GROUP for override in overrides)
    return {} if given else {_GROUP: sweep.name}


def _as_overrides(settings: dict[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]  # JSON is YAML
