"""The configuration: YAML files into typed, validated models.

A file may extend another (``extends: base.yaml``, relative to itself): mappings are merged key by
key, everything else is replaced. Some mappings are replaced as a whole, since a part of the old
one makes no sense in the new: ``pruning.ratios``, ``pruning.floors``, ``model.args``, ``method``
where its ``name`` changes, and ``pruning.budget`` where its kind changes. Overrides from the
command line (``stages.finetune.epochs=5``) are merged last.
"""

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    field_validator,
    model_validator,
)

from data_pipelines.augment import MOST_OPERATIONS
from tpp.budget import BUDGET_KINDS, Budget, BudgetKind, parse_count
from tpp.errors import UserError, printable
from tpp.files import write_whole
from tpp.methods import method_class
from tpp.methods.base import Method
from tpp.reading import DEEPEST, is_shallow, read_text
from tpp.selection import Criterion, Selection, check_floor
from train.batch_rule import scale_optimizer
from train.intervals import Interval

DEMO = Path(__file__).resolve().parents[1] / "configs" / "demo.yaml"
REPLACED_WHOLE = (("pruning", "ratios"), ("pruning", "floors"), ("model", "args"))

StageKind = Literal["dense", "regularize", "prune", "finetune", "evaluate"]
# Bytes of a YAML file: PyYAML takes seconds for that many.
LARGEST_YAML = 2**20
# Of one file, with aliases written out; and files that extend each other.
_MOST_VALUES = 20_000
_LONGEST_CHAIN = 20
# Files and folders that a run keeps beside those of its stages.
_OF_THE_RUN = {
    *("config.yaml", "plan.json", "results.json", "log.jsonl", "run.lock", "checkpoints"),
    *("report.html", "report.png"),
}
TRAINING_KINDS = ("dense", "regularize", "finetune")

Ratio = Annotated[float, Field(ge=0, lt=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
PositiveInt = Annotated[int, Field(ge=1)]
# NaN and infinity are numbers to YAML and never what anybody wants in these settings.
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Section(BaseModel):
    """Base of all sections: unknown keys and wrong types are errors."""

    model_config = _STRICT


class ModelSection(Section):
    """Which network, and where its weights come from.

    Attributes:
        name: see ``tpp.models``: ``cifar_resnet56``, any torchvision name, ``timm:NAME``.
        args: keyword arguments of the network's constructor.
        num_classes: null counts the class folders; a number is checked against them.
        checkpoint: weights to start from: a file of ours, a foreign state_dict (.pth, .th,
            .safetensors), an https URL, ``torchvision:WEIGHTS`` such as
            ``torchvision:IMAGENET1K_V1``, or null for a fresh initialisation.
    """

    name: str
    args: dict[str, Any] = {}
    num_classes: Annotated[int, Field(ge=2)] | None = None
    checkpoint: str | None = None


class DemoData(Section):
    """Generate the embedded data set into ``data.root`` before the run."""

    classes: Annotated[int, Field(ge=2)] = 10
    train_per_class: PositiveInt = 400
    val_per_class: PositiveInt = 100
    seed: int = 0


class ColorJitterSection(Section):
    """Random changes of colour, as torchvision's ColorJitter draws them.

    Attributes:
        brightness, contrast, saturation: factors between 1 - value and 1 + value.
        hue: turns of the colour wheel, between -value and value.
    """

    brightness: Annotated[float, Field(ge=0)] = 0.0
    contrast: Annotated[float, Field(ge=0)] = 0.0
    saturation: Annotated[float, Field(ge=0)] = 0.0
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0


class RandAugmentSection(Section):
    """RandAugment (Cubuk et al. 2020).

    Attributes:
        operations: how many are applied to each image.
        magnitude: of each one, of ``bins`` levels.
        bins: number of levels.
    """

    operations: Annotated[int, Field(ge=1, le=MOST_OPERATIONS)] = 2
    magnitude: Annotated[int, Field(ge=0)] = 9
    bins: Annotated[int, Field(ge=2)] = 31

    @model_validator(mode="after")
    def _magnitude_is_a_level(self) -> "RandAugmentSection":
        if self.magnitude >= self.bins:
            raise ValueError(f"magnitude ({self.magnitude}) must be below bins ({self.bins})")
        return self


class ProgressiveSection(Section):
    """Progressive resizing: smaller images first, with the 'imagenet' augmentation.

    Attributes:
        start_size: side of the images up to ``start_epoch``, in pixels.
        start_epoch, end_epoch: of the stage; between them the side grows to ``data.image_size``,
            in multiples of 32.
    """

    start_size: PositiveInt
    start_epoch: Annotated[float, Field(ge=0)] = 0.0
    end_epoch: PositiveFloat

    @model_validator(mode="after")
    def _grows(self) -> "ProgressiveSection":
        if self.end_epoch <= self.start_epoch:
            raise ValueError(
                f"end_epoch ({self.end_epoch}) must come after start_epoch ({self.start_epoch})"
            )
        return self


class AugmentSection(Section):
    """Augmentation of the training images beyond ``data.augmentation``; all off by default.

    Attributes:
        color_jitter: random colours.
        rand_augment: random operations.
        random_erasing: probability that a box of the image is erased (Zhong et al. 2020).
        mixup, cutmix: alpha of the Beta distribution that pairs of images are mixed by (Zhang et
            al. 2018, Yun et al. 2019); 0 for off. With both, each batch takes one of them.
        repeats: times that an image comes in a row, augmented differently (Hoffer et al. 2020).
        progressive: smaller images first.
    """

    color_jitter: ColorJitterSection | None = None
    rand_augment: RandAugmentSection | None = None
    random_erasing: Annotated[float, Field(ge=0, le=1)] = 0.0
    mixup: Annotated[float, Field(ge=0)] = 0.0
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    repeats: PositiveInt = 1
    progressive: ProgressiveSection | None = None


class DataSection(Section):
    """The images: class folders or shards below ``root``, and how they become tensors.

    Attributes:
        root: folder that holds the ``train`` and ``val`` folders.
        train, val: names of these two folders.
        loader: ``dali``, ``torchvision``, or ``auto`` for DALI where it is installed.
        augmentation: ``imagenet`` (RandomResizedCrop, flip), ``cifar`` (padded crop, flip),
            ``none``.
        image_size: side of the square that the network sees, in pixels.
        resize: shorter side before the centre crop of evaluation; null for no resize.
        mean, std: per channel, of values in 0..1.
        channels: 3 for RGB, 1 for grey.
        threads: decoding threads (DALI) or worker processes (torchvision) per rank.
        demo: generate the embedded data set.
        index: folder that holds the indices, ``train.safetensors`` and so on, that
            ``python -m data_pipelines.index --out`` wrote; null for those in the image folders
            themselves, or none.
        on_error: what becomes of an image that cannot be read: ``fail`` ends the run and names
            it, ``skip`` replaces it by the next one of the order, and leaves it out of
            evaluations.
        max_skipped: the share of the images that may be skipped.
        shuffle_window: of shards: null shuffles whole epochs, a number the shards, and the images
            within windows of so many.
        prefetch: batches made ahead (torchvision: by each worker).
        augment: augmentation beyond ``augmentation``; a stage's ``augment`` replaces it.
    """

    root: str
    train: str = "train"
    val: str = "val"
    loader: Literal["auto", "dali", "torchvision"] = "auto"
    augmentation: Literal["imagenet", "cifar", "none"] = "imagenet"
    image_size: PositiveInt = 224
    resize: PositiveInt | None = 256
    mean: list[float] = [0.485, 0.456, 0.406]
    std: list[PositiveFloat] = [0.229, 0.224, 0.225]
    channels: Literal[1, 3] = 3
    threads: Annotated[int, Field(ge=1, le=256)] = 4
    demo: DemoData | None = None
    index: str | None = None
    on_error: Literal["fail", "skip"] = "fail"
    max_skipped: Ratio = 0.001
    shuffle_window: PositiveInt | None = None
    prefetch: Annotated[int, Field(ge=1, le=64)] = 2
    augment: AugmentSection = AugmentSection()

    @model_validator(mode="after")
    def _one_value_per_channel(self) -> "DataSection":
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise ValueError(f"mean and std need {self.channels} values, one per channel")
        if self.resize is not None and self.resize < self.image_size:
            raise ValueError(
                f"resize ({self.resize}) must not be smaller than image_size ({self.image_size})"
            )
        return self

    def check_augment(self, augment: AugmentSection, key: str) -> None:
        """Check that augmentations go with the recipe; ValueError names what does not."""
        if self.augmentation == "none" and augment != AugmentSection(repeats=augment.repeats):
            raise ValueError(f"{key}: with augmentation: none there is no augmentation to add to")
        if self.channels == 1 and (augment.color_jitter or augment.rand_augment):
            raise ValueError(f"{key}: color_jitter and rand_augment need 3 channels")
        if augment.progressive is None:
            return
        if self.augmentation != "imagenet":
            raise ValueError(f"{key}.progressive: goes with augmentation: imagenet only")
        if augment.progressive.start_size > self.image_size:
            raise ValueError(
                f"{key}.progressive.start_size ({augment.progressive.start_size}) must not be "
                f"larger than image_size ({self.image_size})"
            )

    def preprocessing(self) -> dict[str, Any]:
        """What a user of the trained network must do to an image; kept in every checkpoint."""
        return self.model_dump(include={"image_size", "resize", "mean", "std", "channels"})


class OptimizerSection(Section):
    """SGD and its learning rate over a stage.

    Attributes:
        lr: learning rate, for the batch that the configuration is for: ``training.batch`` says
            which that is.
        schedule: ``constant``, ``step`` (times ``gamma`` at each milestone) or ``cosine`` (to 0).
        milestones: in epochs.
        warmup_epochs: linear warm-up.
        warmup_from: share of the learning rate that the warm-up begins with.
    """

    lr: PositiveFloat
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = False
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    schedule: Literal["constant", "step", "cosine"] = "constant"
    milestones: list[PositiveFloat] = []
    gamma: PositiveFloat = 0.1
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    warmup_from: Annotated[float, Field(ge=0, le=1)] = 0.0

    @model_validator(mode="after")
    def _warmup_has_a_length(self) -> "OptimizerSection":
        if self.warmup_from and not self.warmup_epochs:
            raise ValueError("warmup_from goes with warmup_epochs")
        return self

    @model_validator(mode="after")
    def _milestones_belong_to_steps(self) -> "OptimizerSection":
        if (self.schedule == "step") != bool(self.milestones):
            raise ValueError("milestones (in epochs) and schedule: step go together")
        if self.milestones != sorted(set(self.milestones)):
            raise ValueError("milestones must be in rising order")
        return self


class TrainingSection(Section):
    """What holds for all training stages.

    Attributes:
        batch_size: global batch, over all ranks and micro-batches.
        batch: ``reference`` fits learning rates, and the methods' counts of steps, to
            ``batch_size`` (docs/batch.md); ``as_given`` takes them as they are written.
        reference_batch_size: the global batch that they are written for.
        batch_warmup_epochs: linear warm-up from the learning rate of the reference batch to that
            of a larger one, of stages that have no warm-up of their own; at most a third of a
            stage.
        accumulation: micro-batches per optimiser step.
        precision: ``fp32``, or autocast to ``bf16`` or ``fp16`` (CUDA only).
        channels_last: memory format of images and convolution weights.
        sync_batchnorm: BatchNorm statistics over all ranks; by default each rank's own, with
            rank 0's running statistics.
        evaluate_every: epochs between evaluations in a training stage; the end is always one.
        evaluate_batch_size: per rank; null for that of training.
        log_every: steps between lines in log.jsonl and TensorBoard.
        statistics_every: steps between the per-layer statistics of the method.
        trainability_every: steps between measurements of the Jacobian's singular values, from
            before the first step to the end of every training stage; null for none.
        trainability_images: validation images to measure them at, at most.
        on_bad_step: what becomes of a step whose loss or gradient is not finite, or whose
            gradient's norm is above ``max_gradient_norm``: ``stop`` ends the run, ``skip`` leaves
            the weights as they were and goes on, ``rollback`` goes back to the newest checkpoint
            and leaves that step out. The images' names are written down in each case.
        max_bad_steps: how many steps of a stage ``skip`` and ``rollback`` may leave out.
        max_gradient_norm: of all parameters together; null for no limit.
        clip_gradient_norm: the gradient is scaled down to this norm where it is longer; null for
            no clipping, as published.
        deepspeed: DeepSpeed's configuration, such as launch/deepspeed/zero1.json; null for
            DistributedDataParallel, unless ``accelerate launch`` was told to use DeepSpeed.
        rank_timeout: seconds without a sign of life after which a rank counts as lost, and the
            run ends.
    """

    batch_size: PositiveInt = 256
    batch: Literal["reference", "as_given"] = "as_given"
    reference_batch_size: PositiveInt | None = None
    batch_warmup_epochs: Annotated[float, Field(ge=0)] = 5.0
    accumulation: PositiveInt = 1
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    channels_last: bool = False
    sync_batchnorm: bool = False
    evaluate_every: PositiveFloat = 1.0
    evaluate_batch_size: PositiveInt | None = None
    log_every: PositiveInt = 50
    statistics_every: PositiveInt = 250
    trainability_every: PositiveInt | None = None
    trainability_images: PositiveInt = 64
    on_bad_step: Literal["stop", "skip", "rollback"] = "stop"
    max_bad_steps: PositiveInt = 3
    max_gradient_norm: PositiveFloat | None = None
    clip_gradient_norm: PositiveFloat | None = None
    deepspeed: str | None = None
    rank_timeout: Annotated[float, Field(ge=1)] = 120.0

    @model_validator(mode="after")
    def _reference_is_known(self) -> "TrainingSection":
        if self.batch == "reference" and self.reference_batch_size is None:
            raise ValueError(
                "batch: reference needs reference_batch_size, the global batch that learning "
                "rates and steps are written for (256 in the published ImageNet rows)"
            )
        return self

    @property
    def batch_factor(self) -> Fraction:
        """The global batch as a multiple of the reference; 1 where all is taken as given."""
        if self.batch == "as_given" or self.reference_batch_size is None:
            return Fraction(1)
        return Fraction(self.batch_size, self.reference_batch_size)


def _interval(value: Any) -> Any:
    if not isinstance(value, str):
        raise ValueError(f"expected '1000 steps', '0.5 epochs' or '30 minutes', not {value!r}")
    try:
        Interval.parse(value)
    except UserError as error:
        raise ValueError(str(error)) from None
    return value


class CheckpointsSection(Section):
    """The checkpoints that an interrupted training stage resumes from.

    Attributes:
        every: ``1000 steps``, ``0.5 epochs`` or ``30 minutes``: the most that a crash can cost.
        keep: how many of the newest are kept while the stage runs.
        keep_every: every so-manieth is kept for good; null for none.
        keep_best: whether the one with the best validation top-1 is kept for good; an evaluation
            that is the best so far is followed by a checkpoint.
        on_error: when one cannot be written: ``stop`` ends the run, ``continue`` says so and
            trains on; the older ones stay in either case.
        asynchronous: whether training goes on while one is written.
    """

    every: Annotated[str, BeforeValidator(_interval)] = "1000 steps"
    keep: PositiveInt = 2
    keep_every: PositiveInt | None = None
    keep_best: bool = False
    on_error: Literal["stop", "continue"] = "stop"
    asynchronous: bool = True


def _count(value: Any) -> Any:
    try:
        return None if value is None else parse_count(value)
    except UserError as error:
        raise ValueError(str(error)) from None


def _floor(value: Any) -> int | float:
    try:
        check_floor(value, "a floor")
    except UserError as error:
        raise ValueError(str(error)) from None
    return value


Count = Annotated[PositiveInt | None, BeforeValidator(_count)]
Floor = Annotated[int | float, PlainValidator(_floor)]


class BudgetSection(Section):
    """What the pruned network may cost: exactly one of the first four keys.

    Attributes:
        speedup: dense multiply-accumulates over those left, at least.
        macs: multiply-accumulates for one image, at most; 2000000000, 2e9 or 2G.
        parameters: at most, written likewise.
        latency_ms: milliseconds per batch on the machine that the run is on, at most.
        batch, threads, dtype, channels_last, compile, device, repeats, warmup: how a latency is
            measured, see ``tpp.latency.LatencySettings``.
    """

    speedup: Annotated[float, Field(ge=1)] | None = None
    macs: Count = None
    parameters: Count = None
    latency_ms: PositiveFloat | None = None
    batch: PositiveInt = 1
    threads: PositiveInt | None = None
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    channels_last: bool = False
    compile: bool = False
    device: Literal["cpu", "cuda"] = "cpu"
    repeats: PositiveInt = 30
    warmup: Annotated[int, Field(ge=0)] = 5

    @model_validator(mode="after")
    def _one_kind(self) -> "BudgetSection":
        kinds = _budget_kinds(self.model_dump())
        if len(kinds) != 1:
            found = f", not {' and '.join(kinds)}" if kinds else ""
            raise ValueError(f"exactly one of {', '.join(BUDGET_KINDS)} is needed{found}")
        if kinds != ["latency_ms"]:
            for key, value in self._conditions().items():
                if value != type(self).model_fields[key].default:
                    raise ValueError(f"{key} goes with latency_ms only")
        return self

    def budget(self) -> Budget:
        """The budget itself."""
        kind = _budget_kinds(self.model_dump())[0]
        if kind != "latency_ms":
            return Budget(kind, getattr(self, kind))
        from tpp.latency import LatencySettings

        return Budget(kind, getattr(self, kind), LatencySettings(**self._conditions()))

    def _conditions(self) -> dict[str, Any]:
        return self.model_dump(exclude={*map(str, BUDGET_KINDS)})


class PruningSection(Section):
    """How much of which layers goes; see ``tpp.selection.Selection`` for what it means.

    Attributes:
        ratios: layer-name pattern (shell-style glob) to share of the filters to remove, in
            [0, 1); the last pattern that matches a layer wins. With a budget, the most that may
            go.
        budget: what the whole network may cost.
        criterion: which filters go.
        round_to: the number of filters kept is a multiple of it.
        floors: layer-name pattern to how many filters (3), or what share (0.3), must stay.
        skip: patterns of layers that lose nothing.
        coupled: whether layers tied to those chosen are pruned with them.
    """

    ratios: dict[str, Ratio] = {}
    budget: BudgetSection | None = None
    criterion: Criterion = "l1"
    round_to: PositiveInt = 1
    floors: dict[str, Floor] = {}
    skip: list[str] = []
    coupled: bool = False


class StageSection(Section):
    """One stage: from the checkpoint of ``input`` to its own.

    Attributes:
        kind: what it does; by default what its name says.
        input: the stage whose checkpoint it starts from; by default the one before it.
        epochs: length of ``dense`` and ``finetune``; a fraction is fine. A ``regularize`` stage
            is as long as its method says.
        optimizer: of the training stages.
        label_smoothing: of the training loss.
        method: another method than the configuration's, for this stage.
        augment: another ``data.augment``, as a whole, for this stage.
    """

    kind: StageKind
    input: str | None = None
    epochs: PositiveFloat | None = None
    optimizer: OptimizerSection | None = None
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    method: dict[str, Any] | None = None
    augment: AugmentSection | None = None

    @model_validator(mode="after")
    def _training_needs_an_optimizer(self) -> "StageSection":
        trains = self.kind in TRAINING_KINDS
        if trains and self.optimizer is None:
            raise ValueError(f"a {self.kind} stage needs an optimizer")
        if not trains and (self.optimizer or self.epochs or self.augment):
            raise ValueError(
                f"stages of kind {self.kind} take neither epochs nor optimizer nor augment"
            )
        if self.kind in ("dense", "finetune") and self.epochs is None:
            raise ValueError(f"a {self.kind} stage needs epochs")
        return self


class PublishedSection(Section):
    """The published figures that this configuration is to reproduce, for the report."""

    source: str
    dense_top1: float | None = None
    top1: float | None = None
    top1_std: float | None = None
    speedup: float | None = None


class Config(Section):
    """A run.

    Attributes:
        name: of the run; also of its folder unless ``output`` says otherwise.
        output: the run folder.
        seed: of weights, data order and augmentation.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,199}$")]
    output: str = ""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    model: ModelSection
    data: DataSection
    training: TrainingSection = TrainingSection()
    checkpoints: CheckpointsSection = CheckpointsSection()
    pruning: PruningSection = PruningSection()
    method: dict[str, Any] = {"name": "tpp"}
    stages: dict[str, StageSection]
    published: PublishedSection | None = None

    @field_validator("stages", mode="before")
    @classmethod
    def _kind_from_name(cls, stages: Any) -> Any:
        if not isinstance(stages, dict):
            return stages
        named = {}
        for name, stage in stages.items():
            if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", name):
                raise ValueError(f"stage name {name!r}: use a string of letters, digits, . _ + -")
            # A stage's name is that of its folder.
            if len(name) > 100 or name.lower() in _OF_THE_RUN:
                raise ValueError(f"stage name {name!r}: too long, or a file of the run has it")
            stage = {} if stage is None else stage
            if isinstance(stage, dict) and "kind" not in stage and name in get_args(StageKind):
                stage = {"kind": name, **stage}
            named[name] = stage
        return named

    @field_validator("method", mode="before")
    @classmethod
    def _tpp_unless_said(cls, method: Any) -> Any:
        return {"name": "tpp", **method} if isinstance(method, dict) else method

    @model_validator(mode="after")
    def _stages_fit_together(self) -> "Config":
        if not self.stages:
            raise ValueError("stages: at least one is needed")
        self.output = self.output or f"runs/{self.name}"
        self.data.check_augment(self.data.augment, "data.augment")
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
            elif self.stages[stage.input].kind == "evaluate":
                raise ValueError(f"stages.{name}.input: {stage.input!r} makes no checkpoint")
            prunes = stage.kind in ("regularize", "prune")
            if prunes and not self.pruning.ratios and not self.pruning.budget:
                raise ValueError(
                    f"stages.{name}: pruning.ratios says of no layer what goes, and there is no "
                    "pruning.budget"
                )
            if stage.augment is not None:
                self.data.check_augment(stage.augment, f"stages.{name}.augment")
            method = self.stage_method(name)
            if stage.kind in TRAINING_KINDS:
                self.stage_optimizer(name)
            if stage.kind == "regularize":
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
            if stage.kind != "evaluate":
                previous = name
        return self

    def selection(self) -> Selection:
        """How the filters that go are chosen."""
        pruning = self.pruning
        return Selection(
            ratios=pruning.ratios,
            criterion=pruning.criterion,
            round_to=pruning.round_to,
            floors=pruning.floors,
            skip=tuple(pruning.skip),
            coupled=pruning.coupled,
            budget=pruning.budget.budget() if pruning.budget else None,
            seed=self.seed,
        )

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
            return scale_optimizer(
                stage.optimizer,
                training.batch_factor,
                warmup_epochs=training.batch_warmup_epochs,
                stage_epochs=stage.epochs or epochs,
            )
        except ValidationError as error:
            key = f"stages.{name}.optimizer"
            raise ValueError(self._beyond(error, OptimizerSection, key)) from None

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
            key, settings = f"stages.{name}.method", dict(_merged_method(self.method, stage.method))
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
        UserError: with one line per mistake, each naming the file and the key.
    """
    path = Path(path) if path is not None else DEMO
    data = read_yaml(path)
    for override in overrides:
        data = _merge(data, _parse_override(override))
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise UserError("\n".join(f"{path}: {line}" for line in mistakes(error, Config))) from None


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration: every key, defaults included."""
    text = yaml.dump(config.model_dump(), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    write_whole(path, text)


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a number, and refuses repeated keys and what grows too large.

    Aliases (``*a``) let a few lines stand for any number of values, and a list hold itself.
    """

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None and _size(node, {}) > _MOST_VALUES:
            raise yaml.MarkedYAMLError(problem=f"more than {_MOST_VALUES:,} values, with aliases")
        return node

    def fetch_flow_collection_start(self, TokenClass: type[yaml.Token]) -> None:
        # The scanner's time grows with the square of this depth.
        if self.flow_level >= DEEPEST:
            raise yaml.MarkedYAMLError(problem="nested too deeply", problem_mark=self.get_mark())
        super().fetch_flow_collection_start(TokenClass)

    def construct_yaml_str(self, node: yaml.ScalarNode) -> str:
        value = super().construct_yaml_str(node)
        value.encode()  # ValueError for half a character, which could not be written anywhere
        return value

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        value = super().construct_yaml_int(node)
        if abs(value) >= 2**64:
            raise yaml.MarkedYAMLError(problem="a number of more than 64 bits")
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[tuple[str, str]] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue  # the base class says that such a key is not possible
            key = (key_node.tag, key_node.value)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key_node.value!r} is there twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _refuse(_: _Loader, node: yaml.Node) -> None:
    raise yaml.MarkedYAMLError(problem=f"{node.tag} is no plain data", problem_mark=node.start_mark)


def _size(node: yaml.Node, known: dict[yaml.Node, float]) -> float:
    """How many values a node stands for, aliases written out; infinite if it holds itself."""
    if node not in known:
        known[node] = math.inf
        parts = []
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            parts = node.value
        known[node] = 1 + sum(_size(part, known) for part in parts)
    return known[node]


class _Dumper(yaml.SafeDumper):
    """SafeDumper that puts a string such as "1e-4" in quotes, for :class:`_Loader` to read it."""


# YAML's types that are no plain data: a date without quotes stays a string.
for _tag in ("timestamp", "binary", "set", "omap", "pairs"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _refuse)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.construct_yaml_str)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}
for _side in (_Loader, _Dumper):  # YAML 1.1 wants 1.0e-4; nobody writes that
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
        list("-+0123456789"),
    )


def parse_yaml(text: str, source: str) -> Any:
    """What a YAML text holds: plain data, of a size and depth that a configuration can have.

    Raises:
        UserError: it is not valid YAML, or not of that kind; ``source`` says where it is from.
    """
    try:
        data = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        where = f" (line {error.problem_mark.line + 1})" if error.problem_mark else ""
        raise UserError(f"{source}: not valid YAML: {error.problem}{where}") from None
    except RecursionError:
        raise UserError(f"{source}: not valid YAML: nested too deeply") from None
    except Exception as error:  # PyYAML lets through whatever a tag such as !!int stumbles over
        raise UserError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None
    if not is_shallow(data):
        raise UserError(f"{source}: not valid YAML: nested too deeply")
    return data


def read_yaml(path: Path, extended_by: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A YAML file as plain data, with all that it extends merged in.

    Args:
        path: the file.
        extended_by: the files that lead to it, the first one first.

    Raises:
        UserError: it cannot be read, is not YAML, or extends itself.
    """
    extended = f", which {extended_by[-1]} extends" if extended_by else ""
    text = read_text(path, f"the configuration{extended}", largest=LARGEST_YAML)
    resolved = path.resolve()
    if resolved in extended_by:
        raise UserError(f"{path}: extends itself by way of {extended_by[-1]}")
    if len(extended_by) > _LONGEST_CHAIN:
        raise UserError(f"{path}: too many files that extend each other")
    data = parse_yaml(text, str(path))
    if not isinstance(data, dict):
        raise UserError(f"{path}: a configuration is a mapping of keys to values")
    base = data.pop("extends", None)
    if base is None:
        return data
    if not isinstance(base, str):
        raise UserError(f"{path}: extends: expected the path of a YAML file")
    return _merge(read_yaml(path.parent / base, (*extended_by, resolved)), data)


def _merge(base: Any, new: Any, where: tuple[str, ...] = ()) -> Any:
    if not isinstance(base, dict) or not isinstance(new, dict) or where in REPLACED_WHOLE:
        return new
    if where == ("method",) or (where[:1] == ("stages",) and where[2:] == ("method",)):
        return _merged_method(base, new)
    if where == ("pruning", "budget") and not {*_budget_kinds(new)} <= {*_budget_kinds(base)}:
        return new
    merged = dict(base)
    for key, value in new.items():
        merged[key] = _merge(base[key], value, (*where, key)) if key in base else value
    return merged


def _merged_method(base: Mapping[str, Any], new: Mapping[str, Any]) -> Mapping[str, Any]:
    return {**base, **new} if new.get("name", base.get("name")) == base.get("name") else new


def _budget_kinds(section: Mapping[str, Any]) -> list[BudgetKind]:
    return [kind for kind in BUDGET_KINDS if section.get(kind) is not None]


def _parse_override(override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UserError(f"override {override!r}: expected key.sub=value")
    if tuple(parts[:2]) in REPLACED_WHOLE and len(parts) > 2:
        whole = ".".join(parts[:2])
        raise UserError(
            f"override {override!r}: {whole} is replaced as a whole: {whole}='{{KEY: VALUE, ...}}'"
        )
    value = parse_yaml(text, f"override {override!r}")
    for part in reversed(parts):
        value = {part: value}
    return value


def mistakes(error: ValidationError, model: type[BaseModel], prefix: str = "") -> list[str]:
    """One line for each mistake: the key, what is wrong, and what would be right."""
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in (prefix, *problem["loc"]) if part not in ("", "[key]"))
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            known = list(_section_at(model, problem["loc"][:-1]).model_fields)
            known += ["name"] if prefix else []  # a method's, beside its settings
            near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1, cutoff=0.5)
            message = "unknown key" + (
                f"; did you mean {near[0]!r}?" if near else f"; there are: {', '.join(known)}"
            )
        elif problem["type"] == "missing":
            message = "this key is missing"
        elif "[key]" in problem["loc"] and problem["type"] == "string_type":
            message = f"keys should be strings, not {problem['input']!r}"
        elif problem["type"] != "value_error":
            message = f"{message[0].lower()}{message[1:]}, not {problem['input']!r}"
        key = printable(key, 200)
        lines += [f"{key}: {part}" if key else part for part in message.splitlines()]
    return lines


def _section_at(model: type[BaseModel], location: tuple[int | str, ...]) -> type[BaseModel]:
    """The section class in which an unknown key was found."""
    for part in location:
        if str(part) in model.model_fields:
            candidates = [model.model_fields[str(part)].annotation]
            while candidates:
                candidate = candidates.pop()
                if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                    model = candidate
                    break
                candidates += list(get_args(candidate))
    return model


def steps_for(epochs: float, images: int, batch_size: int) -> int:
    """Optimiser steps that cover ``epochs`` passes over ``images`` images, at least one."""
    return max(1, math.ceil(epochs * images / batch_size - 1e-9))
