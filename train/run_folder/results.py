"""results.json: what the stages found. Its writer fills the model that its readers get."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ValidationError, field_validator, model_validator

from tpp.common.errors import UserError
from tpp.common.reading import read_json
from tpp.common.registry import pick
from train.config.sections import PublishedScore, PublishedSection
from train.config.stage_kinds import stage_kind
from train.tasks import available_tasks
from train.tasks.base import Metric, Task
from train.tasks.classification import Classification

_SCORES = "scores"
# Evaluations of other networks in a stage's entry.
_OTHERS = ("start", "raw", "ema")
_LISTS = ("sizes", "folders")


class Evaluation(BaseModel):
    """What an evaluation of a network found.

    Attributes:
        scores: by the names of the task's metrics, in their order; None where nobody measured. In
            the file they stand among the other keys.
        images: how many were looked at.
    """

    scores: dict[str, float | None] = {}
    images: int | None = None

    @classmethod
    def from_dict(cls, flat: Any, metrics: Sequence[Metric]) -> Self:
        """From what the file says.

        Raises:
            ValidationError: of pydantic.
        """
        return cls.model_validate(_gathered(flat, metrics))

    def to_dict(self) -> dict[str, Any]:
        """As it is in the file, without what was never said."""
        said = self.model_dump(exclude_unset=True)
        return {**said.pop(_SCORES, {}), **said}

    @property
    def score(self) -> float | None:
        """Of the metric that leads; None where nobody measured."""
        return next(iter(self.scores.values()), None)


class NetworkResult(Evaluation):
    """A network with its scores, parameters and multiply-accumulates of one image."""

    parameters: int | None = None
    macs: int | None = None


class SizeResult(NetworkResult):
    """A network with images of another side, in pixels; its scores and MACs are of these."""

    image_size: int


class FolderResult(Evaluation):
    """What was found of the images in one folder, where folders are test sets and no classes."""

    folder: str


class StageResult(NetworkResult):
    """One stage, as results.json describes it; of a stage under way only what it is to do.

    Attributes:
        start: of the network that it started from.
        raw, ema: of the trained weights or of their moving average, whichever its own figures are
            not of; None where no average was kept.
        speedup: dense MACs over this network's.
        sizes: of the same network at other sizes of the images; None where nobody asked.
        folders: of the same network, the images of each folder by themselves.
        nonzero_parameters, nonzero_macs: without masked weights, or what its method says is left
            (:meth:`tpp.methods.base.Method.left`); None where there is neither.
        sparsity: share of the weights of masked layers that are masked, or the method's.
        removed_share: of the weights that were there, what the stage removed or masked.
        norm_before, norm_after: L2 norm of all trained values before and after that.
        removed_magnitude: largest absolute weight of the filters that it removed.
        recalibrated_batches: over which BatchNorm's running statistics were estimated after that;
            None where they are the dense network's.
    """

    kind: str
    method: str | None = None
    title: str | None = None
    input: str | None = None
    start: Evaluation | None = None
    raw: Evaluation | None = None
    ema: Evaluation | None = None
    steps: int | None = None
    epochs: float | None = None
    speedup: float | None = None
    sizes: list[SizeResult] | None = None
    folders: list[FolderResult] | None = None
    nonzero_parameters: int | None = None
    nonzero_macs: int | None = None
    sparsity: float | None = None
    removed_share: float | None = None
    norm_before: float | None = None
    norm_after: float | None = None
    removed_magnitude: float | None = None
    recalibrated_batches: int | None = None
    wall_seconds: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As it is in the file, without what was never said."""
        flat = super().to_dict()
        for key in _OTHERS:
            if (other := getattr(self, key)) is not None:
                flat[key] = other.to_dict()
        for key in _LISTS:
            if (listed := getattr(self, key)) is not None:
                flat[key] = [one.to_dict() for one in listed]
        names = ("kind", "method", "title", "input", *_OTHERS, "steps", "epochs")
        first = {name: flat.pop(name) for name in names if name in flat}
        if "images" in flat and not stage_kind(self.kind).needs_images:
            flat["images"] = flat.pop("images")  # the next stage looked at them: they come last
        return {**first, **flat}

    @property
    def other_weights(self) -> tuple[str, Evaluation] | None:
        """``raw`` or ``ema``, the weights that its own figures are not of, and their figures."""
        others = (("raw", self.raw), ("ema", self.ema))
        return next(((name, found) for name, found in others if found is not None), None)

    def measured(self, found: Evaluation) -> Self:
        """This stage with what was found of its network later."""
        return self.model_copy(
            update={name: getattr(found, name) for name in found.model_fields_set}
        )


class Results(BaseModel):
    """The content of results.json.

    Attributes:
        task: its kind.
        engine: what shared the training among the ranks.
        published: figures to put beside these.
        dense: the network that the run prunes.
        image: shape of the image that multiply-accumulates are of, (channels, height, width);
            None where an older run did not say.
        started_in: the folder where relative paths of its settings begin; None where an older run
            did not say.
    """

    name: str
    seed: int | None = None
    status: str = "running"
    model: str = ""
    task: str = Classification.kind
    wall_seconds: float | None = None
    versions: dict[str, str] = {}
    git_commit: str | None = None
    device: str | None = None
    ranks: int | None = None
    engine: str | None = None
    published: PublishedSection | None = None
    image: list[int] | None = None
    started_in: str | None = None
    dense: NetworkResult | None = None
    stages: dict[str, StageResult] = {}

    @model_validator(mode="before")
    @classmethod
    def _gather_scores(cls, data: Any) -> Any:
        task = _task(data.get("task", Classification.kind)) if isinstance(data, dict) else None
        if task is None:
            return data  # refused below
        stages = data.get("stages")
        if isinstance(stages, dict):
            stages = {name: _gathered(stage, task.metrics) for name, stage in stages.items()}
        gathered = {"dense": _gathered(data.get("dense"), task.metrics), "stages": stages}
        return {**data, **{key: value for key, value in gathered.items() if key in data}}

    @field_validator("task")
    @classmethod
    def _task_is_known(cls, task: str) -> str:
        try:
            pick(available_tasks(), task, "unknown task")
        except UserError as error:
            raise ValueError(str(error)) from None
        return task

    @property
    def task_type(self) -> type[Task]:
        """What the networks were trained for."""
        return available_tasks()[self.task]

    @property
    def published_score(self) -> PublishedScore:
        """What was published of the task's score."""
        score = self.task_type.metrics[0]
        return self.published.score(score) if self.published else PublishedScore()

    def to_dict(self) -> dict[str, Any]:
        """As it is in the file."""
        content = self.model_dump()
        if self.task == Classification.kind:
            del content["task"]
        for later in ("image", "started_in"):  # than the first runs
            if content[later] is None:
                del content[later]
        content["dense"] = self.dense and self.dense.to_dict()
        content["stages"] = {name: stage.to_dict() for name, stage in self.stages.items()}
        return content


def _task(kind: Any) -> type[Task] | None:
    return available_tasks().get(kind) if isinstance(kind, str) else None


def _gathered(flat: Any, metrics: Sequence[Metric]) -> Any:
    """A network of the file, with its scores in a mapping of their own."""
    if not isinstance(flat, dict):
        return flat
    gathered = {**flat, _SCORES: {metric.name: flat.get(metric.name) for metric in metrics}}
    for key in _OTHERS:
        if key in flat:
            gathered[key] = _gathered(flat[key], metrics)
    for key in _LISTS:
        if isinstance(flat.get(key), list):
            gathered[key] = [_gathered(one, metrics) for one in flat[key]]
    return gathered


def read_results(path: Path) -> Results:
    """Read a results.json.

    Raises:
        UserError: it cannot be read, or is not the results of a run.
    """
    try:
        return Results.model_validate(read_json(path, "the results"))
    except ValidationError as error:
        problem = error.errors()[0]
        parts = [str(part) for part in problem["loc"]]
        if _SCORES in parts[-2:-1] and parts[-1] not in StageResult.model_fields:
            del parts[-2]  # in the file there is no such level
        message = problem["msg"].removeprefix("Value error, ")
        message = message[0].lower() + message[1:]
        key = ".".join(parts) or "the file"
        raise UserError(f"{path}: not the results of a run: {key}: {message}") from None
