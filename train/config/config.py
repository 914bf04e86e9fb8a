"""The configuration: YAML files into typed, validated models.

A file may extend another (``extends: base.yaml``, relative to itself): mappings are merged key by
key, everything else is replaced. Some mappings are replaced as a whole, since a part of the old
one makes no sense in the new: ``pruning.ratios``, ``pruning.floors``, ``model.args``, ``method``
where its ``name`` changes, and ``pruning.budget`` where its kind changes. Overrides from the
command line (``stages.finetune.epochs=5``) are merged last.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import (
    BaseModel,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from data_pipelines.loading.augment import check_augment
from data_pipelines.settings import AugmentSection, DataSection
from tpp.common.errors import UserError, printable
from tpp.common.files import write_whole
from tpp.common.paths import user_path
from tpp.common.settings import Section, Seed, UserPath, mistakes
from tpp.common.yaml_files import Dumper, Merging, Place, merge, parse_override, read_yaml
from tpp.methods import method_class
from tpp.methods.base import Method
from tpp.models.settings import MODEL_REPLACED, ModelSection
from tpp.selection.selection import Selection
from tpp.selection.settings import PRUNING_REPLACED, PruningSection, another_budget
from train.config.cycles import as_written, written_out
from train.config.ema import EmaSection
from train.config.optimizer import OptimizerSection
from train.config.profile import ProfileSection
from train.config.references import with_references
from train.config.sections import (
    OF_THE_RUN,
    CheckpointsSection,
    PublishedSection,
    StageSection,
    TrainingSection,
)
from train.config.stage_kinds import KINDS
from train.distillation.settings import LOGITS
from train.public_weights import wanted_preparation
from train.tasks import make_task
from train.tasks.base import Task

DEMO = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"


def _another_method(where: Place, base: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether a method replaces the old one: another name does; so does a setting its old value."""
    if where[:1] == ("method",):
        inside = where[1:]
    elif where[:1] == ("stages",) and where[2:3] == ("method",):
        inside = where[3:]
    else:
        return False
    return bool(inside) or new.get("name", base.get("name")) != base.get("name")


def _another_task(where: Place, base: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether a task replaces the old one: another kind does."""
    return where == ("task",) and new.get("kind", base.get("kind")) != base.get("kind")


def _another_distillation(where: Place, base: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether a distillation replaces the old one: another kind does."""
    if where[:1] != ("stages",) or where[2:] != ("distill",):
        return False
    return new.get("kind", base.get("kind", LOGITS)) != base.get("kind", LOGITS)


def _pruning_of_a_stage(where: Place, base: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """It replaces the run's as a whole, and so its own of another file."""
    return where[:1] == ("stages",) and where[2:] == ("pruning",)


MERGING = Merging(
    whole=(*MODEL_REPLACED, *PRUNING_REPLACED),
    rules=(
        another_budget,
        _another_method,
        _another_task,
        _another_distillation,
        _pruning_of_a_stage,
    ),
)


class Config(Section):
    """A run.

    Attributes:
        name: of the run; also of its folder unless ``output`` says otherwise.
        output: the run folder.
        seed: of weights, data order and augmentation.
        task: what the network is trained for, its ``kind`` and the settings of that.
        profile: which steps are profiled; null for none. It may differ when a run goes on.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,199}$")]
    output: UserPath = ""
    seed: Seed = 0
    model: ModelSection
    data: DataSection
    training: TrainingSection = TrainingSection()
    checkpoints: CheckpointsSection = CheckpointsSection()
    pruning: PruningSection = PruningSection()
    method: dict[str, Any] = {"name": "tpp"}
    task: dict[str, Any] = {"kind": "classification"}
    stages: dict[str, StageSection]
    profile: ProfileSection | None = None
    published: PublishedSection | None = None

    @field_validator("stages", mode="before")
    @classmethod
    def _kind_from_name(cls, stages: Any) -> Any:
        if not isinstance(stages, dict):
            return stages
        named = {}
        for name, stage in with_references(written_out(stages)).items():
            if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", name):
                raise ValueError(f"stage name {name!r}: use a string of letters, digits, . _ + -")
            # A stage's name is that of its folder.
            if len(name) > 100 or name.lower() in OF_THE_RUN:
                raise ValueError(f"stage name {name!r}: too long, or a file of the run has it")
            stage = {} if stage is None else stage
            if isinstance(stage, dict) and "kind" not in stage and name in KINDS:
                stage = {"kind": name, **stage}
            named[name] = stage
        return named

    @field_validator("method", mode="before")
    @classmethod
    def _tpp_unless_said(cls, method: Any) -> Any:
        return {"name": "tpp", **method} if isinstance(method, dict) else method

    @field_validator("task", mode="before")
    @classmethod
    def _classification_unless_said(cls, task: Any) -> Any:
        return {"kind": "classification", **task} if isinstance(task, dict) else task

    @model_validator(mode="after")
    def _images_suit_the_task(self) -> "Config":
        try:
            task = self.make_task()
            task.architecture(self.model)
        except UserError as error:
            raise ValueError(str(error)) from None
        task.check_data(self.data, self.data.augment, "data.augment")
        for name, stage in self.stages.items():
            self.stage_task(name)
            if stage.augment is not None:
                task.check_data(self.data, stage.augment, f"stages.{name}.augment")
        return self

    @model_validator(mode="after")
    def _images_are_as_the_weights_want_them(self) -> "Config":
        """What the configuration does not say of them, public starting weights do."""
        try:
            wanted = wanted_preparation(self.model, "model.checkpoint")
        except UserError as error:
            raise ValueError(str(error)) from None
        if wanted is not None:
            self.data = self.data.completed(wanted)
        return self

    @model_validator(mode="after")
    def _stages_fit_together(self) -> "Config":
        if not self.stages:
            raise ValueError("stages: at least one is needed")
        self.output = self.output or f"runs/{self.name}"
        check_augment(self.data.augment, self.data, "data.augment")
        previous: str | None = None
        names = list(self.stages)
        for position, (name, stage) in enumerate(self.stages.items()):
            if stage.input is None:
                stage.input = previous
            elif stage.input not in names[:position]:
                raise ValueError(
                    f"stages.{name}.input: {stage.input!r} is no earlier stage"
                    + (f"; there are: {', '.join(names[:position])}" if position else "")
                )
            elif not self.stages[stage.input].does.makes_network:
                raise ValueError(f"stages.{name}.input: {stage.input!r} makes no checkpoint")
            pruning = stage.pruning or self.pruning
            if self.needs_plan(name) and not pruning.ratios and not pruning.budget:
                raise ValueError(
                    f"stages.{name}: pruning.ratios says of no layer what goes, and there is no "
                    "pruning.budget"
                )
            if stage.carry_optimizer:
                self._check_carried(name)
            if stage.augment is not None:
                check_augment(stage.augment, self.data, f"stages.{name}.augment")
            method = self.stage_method(name)
            self._check_say(name, method)
            if stage.does.trains:
                self.stage_optimizer(name)
                self.stage_ema(name)
            if stage.does.regularizes:
                try:
                    steps = method.steps()
                except OverflowError:
                    raise ValueError(
                        f"stages.{name}: with these settings of {method.name!r} it never ends"
                    ) from None
                if (steps is None) == (stage.epochs is None):
                    raise ValueError(
                        f"stages.{name}.epochs: method {method.name!r} "
                        + ("needs the stage's length" if steps is None else "sets the length")
                    )
            if stage.does.makes_network:
                previous = name
        return self

    @model_validator(mode="after")
    def _profiled_stage_trains(self) -> "Config":
        stage = self.profile.stage if self.profile is not None else None
        trained = [name for name, stage in self.stages.items() if stage.does.trains]
        if stage is not None and stage not in trained:
            raise ValueError(
                f"profile.stage: {stage!r} is no stage that trains; "
                f"there are: {', '.join(trained) or 'none'}"
            )
        return self

    def make_task(self) -> Task:
        """A fresh instance of the task, with its settings.

        Raises:
            UserError: a mistake in them; names the key.
        """
        return make_task(self.task)

    def stage_task(self, name: str) -> Task:
        """The task as stage ``name`` trains for it.

        Raises:
            ValueError: the stage asks for what the task has not; names the key.
        """
        task, stage = self.make_task(), self.stages[name]
        of_classes = ("loss", "label_smoothing", "bce_threshold", "distill", "image_sizes")
        fields = StageSection.model_fields
        given = [key for key in of_classes if getattr(stage, key) != fields[key].default]
        if given and not task.has_classes:
            raise ValueError(
                f"stages.{name}.{given[0]}: goes with classification, not with {task.kind}"
            )
        if not given:
            return task
        smoothing, threshold = stage.label_smoothing, stage.bce_threshold
        return task.with_loss(stage.loss, label_smoothing=smoothing, bce_threshold=threshold)

    def dense_stage(self, name: str | None) -> str | None:
        """The stage that made the dense network which stage ``name`` comes from, or is.

        None where that is the network of the starting weights.
        """
        while name is not None and not self.stages[name].does.is_dense:
            name = self.stages[name].input
        return name

    def trained_before(self, name: str) -> str | None:
        """The training stage that stage ``name`` comes from, if there is one."""
        return next((n for n in self.inputs_of(name) if self.stages[n].does.trains), None)

    def inputs_of(self, name: str) -> Iterator[str]:
        """The stages that a stage comes from, the nearest first."""
        current = self.stages[name].input
        while current is not None:
            yield current
            current = self.stages[current].input

    def _check_carried(self, name: str) -> None:
        before = self.trained_before(name)
        if before is None:
            raise ValueError(
                f"stages.{name}.carry_optimizer: no stage before it trains, so there is no "
                "optimiser's state"
            )
        own, other = self.stages[name].optimizer, self.stages[before].optimizer
        assert own is not None and other is not None
        if own.name != other.name:
            raise ValueError(
                f"stages.{name}.carry_optimizer: {own.name} cannot go on with the state of "
                f"{other.name}, the optimiser of stage {before!r}"
            )
        for stage in (before, name):
            method, does = self.stage_method(stage), self.stages[stage].does
            if does.has_method and does.is_final and method.finetunes:
                raise ValueError(
                    f"stages.{name}.carry_optimizer: what {method.name} trains in stage {stage!r} "
                    "are not the network's own weights, and neither is the optimiser's state"
                )

    def _check_say(self, name: str, method: Method) -> None:
        """Check that a method has a say where it is named, and goes with the loss."""
        stage = self.stages[name]
        if stage.does.is_dense and stage.method is not None and not method.trains_dense:
            raise ValueError(
                f"stages.{name}.method: {method.name!r} has no say in the training of a dense "
                "network; leave it out"
            )
        if not (stage.does.trains and self.has_method(name) and method.needs_cross_entropy):
            return
        if not self.make_task().has_classes:
            raise ValueError(f"method {method.name!r} goes with task.kind: classification")
        for key in ("loss", "label_smoothing", "distill"):
            if getattr(stage, key) != StageSection.model_fields[key].default:
                raise ValueError(
                    f"stages.{name}.{key}: method {method.name!r} goes with plain cross entropy "
                    "alone; leave it out"
                )

    def has_method(self, name: str) -> bool:
        """Whether the method has a say in stage ``name``: in dense training, few have."""
        does = self.stages[name].does
        return does.has_method or (does.is_dense and self.stage_method(name).trains_dense)

    def needs_plan(self, name: str) -> bool:
        """Whether a stage has to do with filters that go, as its kind and its method say."""
        does = self.stages[name].does
        if not does.needs_plan:
            return False
        return not does.regularizes or self.stage_method(name).picks != "never"

    def selection(self, stage: str | None = None) -> Selection:
        """How the filters that go are chosen: in a stage, or where none says otherwise."""
        pruning = (self.stages[stage].pruning if stage is not None else None) or self.pruning
        return pruning.selection(self.seed)

    def stage_augment(self, name: str) -> AugmentSection:
        """How the images of stage ``name`` are augmented beyond ``data.augmentation``."""
        return self.stages[name].augment or self.data.augment

    def stage_optimizer(self, name: str, epochs: float | None = None) -> OptimizerSection:
        """The optimiser's settings in training stage ``name``, for the batch there is.

        Args:
            name: of the stage.
            epochs: length of a stage that does not say it itself, if it is known.

        Raises:
            ValueError: the batch makes something out of bounds of them; names the key.
        """
        stage, training = self.stages[name], self.training
        assert stage.optimizer is not None
        try:
            return stage.optimizer.for_batch(
                training.batch_factor,
                warmup_epochs=training.batch_warmup_epochs,
                stage_epochs=stage.epochs or epochs,
            )
        except ValidationError as error:
            key = f"stages.{name}.optimizer"
            raise ValueError(self._beyond(error, OptimizerSection, key)) from None
        except ValueError as error:  # nothing is known of such a batch
            raise ValueError(f"stages.{name}.optimizer.{error}") from None

    def stage_ema(self, name: str) -> EmaSection | None:
        """The moving average of training stage ``name``, for the batch there is; None for none.

        Raises:
            ValueError: the batch makes something out of bounds of it; names the key.
        """
        ema = self.stages[name].ema
        if ema is None:
            return None
        try:
            return ema.for_batch(self.training.batch_factor)
        except ValidationError as error:
            raise ValueError(self._beyond(error, EmaSection, f"stages.{name}.ema")) from None

    def stage_method(self, name: str, *, as_given: bool = False) -> Method:
        """A fresh instance of the method of stage ``name``, with its settings.

        Args:
            name: of the stage.
            as_given: with the settings as they are written, whatever ``training.batch`` says;
                otherwise with those for the batch there is.

        Raises:
            ValueError: a mistake in the settings; names the key.
        """
        stage = self.stages[name]
        key, settings = "method", dict(self.method)
        if stage.method is not None:
            key = f"stages.{name}.method"
            settings = dict(merge(self.method, stage.method, MERGING, ("method",)))
        method_name = settings.pop("name", None)
        if not isinstance(method_name, str):
            raise ValueError(f"{key}.name: expected a method's name, not {method_name!r}")
        try:
            method = method_class(method_name)
        except UserError as error:
            # It names the key of the run's method; the name may stand in a stage's own.
            raise ValueError(f"{key}.{str(error).removeprefix('method.')}") from None
        try:
            given = method.settings_type(**settings)
        except ValidationError as error:
            raise ValueError("\n".join(mistakes(error, method.settings_type, prefix=key))) from None
        factor = self.training.batch_factor
        try:
            return method(given if as_given or factor == 1 else given.for_batch(factor))
        except ValidationError as error:
            raise ValueError(self._beyond(error, method.settings_type, key)) from None
        except OverflowError:
            raise ValueError(f"{key}: with these settings {method.name!r} never ends") from None

    def _beyond(self, error: ValidationError, model: type[BaseModel], key: str) -> str:
        """What a batch far from the reference has put out of bounds."""
        training = self.training
        why = (
            f"for batch {training.batch_size} where the reference is "
            f"{training.reference_batch_size} (training.batch=as_given takes it as written)"
        )
        return "\n".join(f"{line}, {why}" for line in mistakes(error, model, prefix=key))


def load_config(path: str | Path | None, overrides: Iterable[str] = ()) -> Config:
    """Read, merge and validate a configuration.

    Args:
        path: the YAML file; None for the demo's.
        overrides: ``key.sub=value`` strings; the value is YAML.

    Raises:
        UserError: with one line per mistake, each naming the key, and the file or the override
            that it is in.
    """
    path, overrides = user_path(path) if path is not None else DEMO, list(overrides)
    in_file = read_yaml(path, MERGING)
    if {"methods", "ratios"} <= in_file.keys():
        raise UserError(f"{path}: a sweep of many runs; python -m train.sweep --config {path}")
    data = in_file
    for override in overrides:
        data = merge(data, parse_override(override, MERGING), MERGING)
    lines = _mistakes_in(data)
    if not lines:
        return Config.model_validate(data)
    of_file = {*_mistakes_in(in_file)} if overrides else {*lines}
    sources = [path if line in of_file else _source(line, path, overrides) for line in lines]
    raise UserError("\n".join(map("{}: {}".format, sources, lines)))


def _mistakes_in(data: dict[str, Any]) -> list[str]:
    try:
        Config.model_validate(data)
    except ValidationError as error:
        stages = data.get("stages")
        lines = (as_written(line, stages) for line in mistakes(error, Config))
        return [*dict.fromkeys(lines)]  # once, and not for each round of a cycle
    return []


def _source(line: str, path: Path, overrides: Sequence[str]) -> str:
    """Where a mistake is that the file alone does not have; ``line`` begins with its key."""
    place = re.split(r"[:\s]", line, maxsplit=1)[0]
    for override in reversed(overrides):
        key = override.partition("=")[0].strip()
        near = f"{place}.".startswith(f"{key}.") or key.startswith(f"{place}.")
        if near or len(overrides) == 1:
            return f"override {printable(override, 100)!r}"
    return f"{path} with the overrides"


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration: every key, defaults included."""
    text = yaml.dump(config.model_dump(), Dumper=Dumper, sort_keys=False, allow_unicode=True)
    write_whole(path, text)


def steps_for(epochs: float, images: int, batch_size: int) -> int:
    """Optimiser steps that cover ``epochs`` passes over ``images`` images, at least one."""
    return max(1, math.ceil(epochs * images / batch_size - 1e-9))


def stages_until(config: Config, until: str | None) -> list[str]:
    """The names of a configuration's stages up to one of them, or of all.

    Args:
        config: the run.
        until: ``STAGE``, or ``STAGE:STEP`` for a part of the last one; None for all.

    Raises:
        UserError: there is no such stage, or it has no such step.
    """
    names = list(config.stages)
    if until is None:
        return names
    until, colon, step = until.partition(":")
    if until not in names:
        raise UserError(f"--until: there is no stage {until!r}; there are {', '.join(names)}")
    if colon:
        if not re.fullmatch(r"[1-9][0-9]{0,14}", step):
            raise UserError(f"--until {until}:{step}: a step is a number from 1 on")
        if not config.stages[until].does.trains:
            raise UserError(f"--until {until}:{step}: stage {until!r} trains nothing")
    return names[: names.index(until) + 1]


def step_until(until: str | None, stage: str) -> int | None:
    """The step after which ``stage`` ends early for such an ``until``; None for its own end."""
    name, _, step = (until or "").partition(":")
    return int(step) if step and name == stage else None
