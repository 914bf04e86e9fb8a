"""The configuration: YAML files into typed, validated models.

A file may extend another (``extends: base.yaml``, relative to itself): mappings are merged key by
key, everything else is replaced. Some mappings are replaced as a whole, since a part of the old
one makes no sense in the new: ``pruning.ratios``, ``pruning.floors``, ``model.args``, ``method``
where its ``name`` changes, and ``pruning.budget`` where its kind changes. Overrides from the
command line (``stages.finetune.epochs=5``) are merged last.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence, Set
from fractions import Fraction
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
from tpp.common.object_storage import hidden
from tpp.common.own_code import is_own
from tpp.common.paths import user_path
from tpp.common.settings import MAY_DIFFER, Section, Seed, UserPath, mistakes
from tpp.common.yaml_files import Dumper, merge, parse_override, read_yaml
from tpp.methods import method_class
from tpp.methods.base import Method
from tpp.models.own import take_up
from tpp.models.settings import ModelSection
from tpp.selection.selection import Selection
from tpp.selection.settings import PruningSection
from train.config.cycles import as_written, written_out
from train.config.ema import EmaSection
from train.config.merging import MERGING
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
from train.config.tracking import (
    HOLDS_A_SECRET,
    TENSORBOARD,
    TrackerName,
    TrackingSection,
    refuse_secrets,
)
from train.public_weights import wanted_preparation
from train.tasks import make_task
from train.tasks.base import Task

DEMO = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"


class Config(Section):
    """What stands at the top level of a file, beside the sections that follow.

    Attributes:
        name: name of the run, and of its folder unless ``output`` says otherwise.
        output: the run folder; "" for ``runs/NAME``.
        seed: seed of the random numbers of weights, data order and augmentation.
        method: how filters are chosen and driven out, or what else is trained: ``name``, and the
            settings of that method (docs/methods.md). A stage may have another.
        task: what the network is trained for: ``kind``, and the settings of that task
            (docs/extending.md).
        trackers: services that are shown the run's curves (docs/trackers.md). TensorBoard's files
            and log.jsonl are written in any case. They may come and go when a run is resumed.

    Shorthands:
        extends (path): another file, relative to this one, whose settings hold where this one says
            nothing, such as ``extends: base.yaml``. Mappings are merged key by key, everything else
            is replaced.

    Example:
        name: resnet50_half
        seed: 1
        model: {name: resnet50, checkpoint: "torchvision:IMAGENET1K_V1"}
        data: {root: /data/imagenet, threads: 8}
        training: {batch_size: 256, precision: bf16}
        trackers: [tensorboard, mlflow]
        pruning: {budget: {speedup: 2}}
        method: {name: tpp, update_interval: 5, stabilize_steps: 40000}
        stages:
          regularize: {optimizer: {lr: 0.001}}
          prune: {}
          finetune:
            epochs: 90
            optimizer: {lr: 0.01, schedule: step, milestones: [30, 60, 75]}
          evaluate: {}

        name: photos_x2
        output: /scratch/runs/photos_x2
        model: {name: edsr, args: {blocks: 4, width: 32}}
        task: {kind: super_resolution, scale: 2}
        data: {root: /data/photos, image_size: 96, augmentation: patch, resize: null,
          crop_mode: whole, mean: [0, 0, 0], std: [1, 1, 1]}
        stages:
          dense: {epochs: 100, optimizer: {name: adamw, lr: 2e-4, schedule: cosine}}
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
    trackers: Annotated[list[TrackerName], MAY_DIFFER] = [TENSORBOARD]
    tracking: TrackingSection = TrackingSection()

    @model_validator(mode="before")
    @classmethod
    def _no_secrets(cls, data: Any) -> Any:
        refuse_secrets(data)
        return data

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
            self._check_episodes(name)
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
                if steps is None and stage.epochs is None:
                    raise ValueError(
                        f"stages.{name}.epochs: method {method.name!r} needs the stage's length"
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
        of_classes = (
            *("loss", "label_smoothing", "bce_threshold", "distill", "image_sizes"),
            "episodes",
        )
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

    def _check_episodes(self, name: str) -> None:
        """Check that there are so many classes, as far as it is known."""
        episodes, classes = self.stages[name].episodes, self.model.num_classes
        if episodes is None:
            return
        if self.data.shuffle_window is not None:
            raise ValueError(f"stages.{name}.episodes: goes without data.shuffle_window")
        if classes is not None and episodes.classes > classes:
            raise ValueError(
                f"stages.{name}.episodes.classes: {episodes.classes}, and model.num_classes is "
                f"{classes}"
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

    def needs_images(self, name: str) -> bool:
        """Whether there have to be images for stage ``name``, by its kind or by its settings."""
        stage = self.stages[name]
        if stage.does.needs_images or stage.recalibrate is not None:
            return True
        # What its input was made ready for, it takes over.
        taken_over = stage.input is not None and self.readies_a_plan(stage.input)
        return not taken_over and self.needs_plan(name) and self.selection(name).needs_images

    def readies_a_plan(self, name: str) -> bool:
        """Whether a stage readies the network for the removal of filters that it knows."""
        picks = self.stage_method(name).picks
        return self.stages[name].does.regularizes and picks in ("before", "during")

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

    def is_stretched(self, name: str) -> bool:
        """Whether stage ``name`` says how long it is though its method knows a length itself."""
        stage = self.stages[name]
        told = stage.does.regularizes and stage.epochs is not None
        return told and self.stage_method(name).steps() is not None

    def steps_of(self, name: str, images: int | None) -> int | None:
        """Optimiser steps of stage ``name``; None if it makes none, or it takes the images to know.

        Args:
            name: of the stage.
            images: of training, where they are known.
        """
        stage = self.stages[name]
        if not stage.does.trains:
            return None
        if stage.does.regularizes and (images or stage.epochs is None):
            steps = self.stage_method(name, images=images).steps()
            if steps is not None:
                return steps
        return steps_for(stage.epochs or 0, images, self.training.batch_size) if images else None

    def stage_method(
        self, name: str, *, as_given: bool = False, images: int | None = None
    ) -> Method:
        """A fresh instance of the method of stage ``name``, with its settings.

        Args:
            name: of the stage.
            as_given: with the settings as they are written, whatever ``training.batch`` says;
                otherwise with those for the batch there is.
            images: of training, where they are known: with them, what a method counts in steps
                is stretched to the epochs that a regularised stage is said to have.

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
            if as_given:
                return method(given)
            made = method(given if factor == 1 else given.for_batch(factor))
            steps = made.steps() if stage.does.regularizes and stage.epochs and images else None
            if steps is None:
                return made
            wanted = steps_for(stage.epochs or 0, images or 0, self.training.batch_size)
            return method(made.settings.for_batch(Fraction(steps, wanted)))
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
    """Read, merge and validate a configuration; a network of one's own that it names is taken up.

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
        raise UserError(f"{path}: a sweep of many runs; tpp sweep --config {path}")
    if {"graph", "rewirings", "network"} & in_file.keys():
        raise UserError(f"{path}: prunes no network; tpp graphs --config {path}")
    data = in_file
    for override in overrides:
        data = merge(data, parse_override(override, MERGING), MERGING)
    lines = _mistakes_in(data)
    if not lines:
        config = Config.model_validate(data)
        if is_own(config.model.name):
            try:
                take_up(config.model.name, "model.name", config.data.shape)
            except UserError as error:
                by_file = in_file.get("model", {}).get("name") == config.model.name
                line = str(error)
                raise with_sources([line], {line} if by_file else set(), path, overrides) from None
        return config
    raise with_sources(lines, {*_mistakes_in(in_file)} if overrides else {*lines}, path, overrides)


def _mistakes_in(data: dict[str, Any]) -> list[str]:
    try:
        Config.model_validate(data)
    except ValidationError as error:
        stages = data.get("stages")
        lines = (as_written(line, stages) for line in mistakes(error, Config))
        return [*dict.fromkeys(lines)]  # once, and not for each round of a cycle
    return []


def with_sources(
    lines: Sequence[str], of_file: Set[str], path: Path, overrides: Sequence[str]
) -> UserError:
    """Mistakes in a configuration, each with where it is.

    Args:
        lines: one mistake each; it begins with its key.
        of_file: those that the file has without the overrides.
        path: the file.
        overrides: ``key.sub=value`` strings.
    """
    sources = [path if line in of_file else _source_of(line, path, overrides) for line in lines]
    return UserError("\n".join(map("{}: {}".format, sources, lines)))


def _source_of(line: str, path: Path, overrides: Sequence[str]) -> str:
    """Where a mistake is that the file alone does not have; ``line`` begins with its key."""
    place = re.split(r"[:\s]", line, maxsplit=1)[0]
    for override in reversed(overrides):
        key = override.partition("=")[0].strip()
        near = f"{place}.".startswith(f"{key}.") or key.startswith(f"{place}.")
        if near or len(overrides) == 1:
            told = f"{key}=..." if HOLDS_A_SECRET in line else hidden(override)
            return f"override {printable(told, 100)!r}"
    return f"{path} with the overrides"


def as_yaml(config: BaseModel) -> str:
    """A resolved configuration: every key, defaults included."""
    return yaml.dump(config.model_dump(), Dumper=Dumper, sort_keys=False, allow_unicode=True)


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration."""
    write_whole(path, as_yaml(config))


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
