"""The sections of a configuration that belong to the run."""

from fractions import Fraction
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from data_pipelines.settings import AugmentSection
from tpp.common.errors import UserError
from tpp.common.settings import (
    MAY_DIFFER,
    OF_TRAINING,
    PositiveFloat,
    PositiveInt,
    Section,
    UserPath,
)
from tpp.masks import SparsifySection
from tpp.selection.settings import PruningSection
from train.config.ema import EmaSection
from train.config.intervals import Interval
from train.config.optimizer import OptimizerSection
from train.config.stage_kinds import KINDS, StageKind, stage_kind
from train.distillation.settings import DistillSection
from train.tasks.base import Metric
from train.tasks.classification import TOP1

# Files and folders that a run keeps beside those of its stages.
OF_THE_RUN = {
    *("config.yaml", "plan.json", "results.json", "log.jsonl", "run.lock", "checkpoints"),
    *("report.html", "report.png", "compiled"),
}
OFF = "off"
MODEL_FILE = "model.safetensors"  # in the folder of each stage that makes a network


def _off(value: Any) -> Any:
    return OFF if value is False else value  # as YAML reads an off without quotes


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
        tf32: whether float32 products and convolutions on a GPU may be rounded to TF32, those of
            the penalty too; null for PyTorch's own: convolutions are, products are not.
        cudnn_benchmark: whether cuDNN looks for the fastest algorithm for each shape. What it finds
            may differ from start to start, and so then does the last bit.
        compile: the network's forward and backward pass by ``torch.compile``: ``default``, or
            ``max-autotune``, which tries kernels out. Compiled anew after filters went, and kept in
            the run folder.
        capture: the whole step as a CUDA graph, of one rank without DeepSpeed: for networks that
            are so small that a GPU waits for its launches.
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
        peak_tflops: what one device can do at most at ``precision``, in dense TFLOP/s, for
            ``train/mfu`` (docs/profile.md); null to look the GPU up.
        rank_timeout: seconds without a sign of life after which a rank counts as lost, and the
            run ends.
    """

    batch_size: Annotated[PositiveInt, OF_TRAINING] = 256
    batch: Annotated[Literal["reference", "as_given"], OF_TRAINING] = "as_given"
    reference_batch_size: Annotated[PositiveInt | None, OF_TRAINING] = None
    batch_warmup_epochs: Annotated[float, Field(ge=0), OF_TRAINING] = 5.0
    accumulation: Annotated[PositiveInt, OF_TRAINING] = 1
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    tf32: bool | None = None
    cudnn_benchmark: Annotated[bool, MAY_DIFFER] = False
    compile: Annotated[
        Literal["off", "default", "max-autotune"], BeforeValidator(_off), MAY_DIFFER
    ] = "off"
    capture: Annotated[bool, MAY_DIFFER] = False
    channels_last: bool = False
    sync_batchnorm: Annotated[bool, OF_TRAINING] = False
    evaluate_every: Annotated[PositiveFloat, MAY_DIFFER] = 1.0
    evaluate_batch_size: Annotated[PositiveInt | None, MAY_DIFFER] = None
    log_every: Annotated[PositiveInt, MAY_DIFFER] = 50
    statistics_every: Annotated[PositiveInt, MAY_DIFFER] = 250
    trainability_every: Annotated[PositiveInt | None, MAY_DIFFER] = None
    trainability_images: Annotated[PositiveInt, MAY_DIFFER] = 64
    on_bad_step: Annotated[Literal["stop", "skip", "rollback"], MAY_DIFFER] = "stop"
    max_bad_steps: Annotated[PositiveInt, MAY_DIFFER] = 3
    max_gradient_norm: Annotated[PositiveFloat | None, MAY_DIFFER] = None
    clip_gradient_norm: Annotated[PositiveFloat | None, OF_TRAINING] = None
    deepspeed: Annotated[UserPath | None, MAY_DIFFER] = None
    peak_tflops: Annotated[PositiveFloat | None, MAY_DIFFER] = None
    rank_timeout: Annotated[float, Field(ge=1), MAY_DIFFER] = 120.0

    @model_validator(mode="after")
    def _reference_is_known(self) -> "TrainingSection":
        if self.batch == "reference" and self.reference_batch_size is None:
            raise ValueError(
                "batch: reference needs reference_batch_size, the global batch that learning "
                "rates and steps are written for (256 in the published ImageNet rows)"
            )
        return self

    @model_validator(mode="after")
    def _can_be_captured(self) -> "TrainingSection":
        if self.capture and self.precision == "fp16":
            raise ValueError(
                "capture is not possible with precision: fp16, whose loss scaler looks at every "
                "step; use bf16"
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


def _known_kind(kind: str) -> str:
    if kind not in KINDS:
        *most, last = (repr(name) for name in KINDS)
        raise PydanticCustomError("stage_kind", f"Input should be {', '.join(most)} or {last}")
    return kind


class StageSection(Section):
    """One stage: from the checkpoint of ``input`` to its own.

    Attributes:
        kind: what it does; by default what its name says.
        input: the stage whose checkpoint it starts from; by default the one before it.
        epochs: length of ``dense`` and ``finetune``; a fraction is fine. A ``regularize`` stage
            is as long as its method says.
        optimizer: of the training stages.
        loss: of training: ``cross_entropy``, or ``bce``, binary cross entropy of each class.
        label_smoothing: of the training loss.
        ema: a moving average of the weights, beside those that are trained; null for none.
        bce_threshold: of ``bce``: shares of a class above it count as 1, others as 0; null for
            targets as they are.
        distill: a teacher's part in the training loss; null for none.
        method: another method than the configuration's, for this stage.
        augment: another ``data.augment``, as a whole, for this stage.
        pruning: another ``pruning``, as a whole, for this stage.
        carry_optimizer: whether the optimiser goes on with the state (momentum) that it had at the
            end of the training stage before, cut and masked along with the weights.
        sparsify: of a ``sparsify`` stage, which weights stay (:class:`tpp.masks.SparsifySection`).
        image_sizes: of an ``evaluate`` stage, further sides of the images, in pixels, at which the
            same network is evaluated (docs/rival.md); null for none.
    """

    kind: Annotated[str, AfterValidator(_known_kind)]
    input: str | None = None
    epochs: PositiveFloat | None = None
    optimizer: OptimizerSection | None = None
    loss: Literal["cross_entropy", "bce"] = "cross_entropy"
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    ema: EmaSection | None = None
    bce_threshold: Annotated[float, Field(ge=0, lt=1)] | None = None
    distill: DistillSection | None = None
    method: dict[str, Any] | None = None
    augment: AugmentSection | None = None
    pruning: PruningSection | None = None
    carry_optimizer: bool = False
    sparsify: SparsifySection | None = None
    image_sizes: Annotated[list[PositiveInt], Field(min_length=1)] | None = None

    @property
    def does(self) -> StageKind:
        """What a stage of its kind does."""
        return stage_kind(self.kind)

    @model_validator(mode="after")
    def _fits_its_kind(self) -> "StageSection":
        trains = self.does.trains
        if trains and self.optimizer is None:
            raise ValueError(f"a {self.kind} stage needs an optimizer")
        if not trains and (self.optimizer or self.epochs or self.augment):
            raise ValueError(
                f"stages of kind {self.kind} take neither epochs nor optimizer nor augment"
            )
        if not trains and (self.distill or self.loss != "cross_entropy"):
            raise ValueError(f"stages of kind {self.kind} take neither loss nor distill")
        if self.bce_threshold is not None and self.loss != "bce":
            raise ValueError("bce_threshold goes with loss: bce")
        if self.does.needs_epochs and self.epochs is None:
            raise ValueError(f"a {self.kind} stage needs epochs")
        if self.carry_optimizer and not trains:
            raise ValueError(f"stages of kind {self.kind} take no carry_optimizer: they train none")
        if self.does.masks and self.sparsify is None:
            raise ValueError(
                f"a {self.kind} stage needs sparsify, such as sparsify: {{sparsity: 0.9}}"
            )
        if self.sparsify is not None and not self.does.masks:
            raise ValueError(f"stages of kind {self.kind} take no sparsify")
        if self.image_sizes is not None:
            if trains or not self.does.needs_images:
                raise ValueError(f"stages of kind {self.kind} take no image_sizes: evaluate does")
            if len({*self.image_sizes}) < len(self.image_sizes):
                raise ValueError("image_sizes: a size stands there twice")
        if self.pruning is not None and not self.does.needs_plan:
            raise ValueError(f"stages of kind {self.kind} take no pruning")
        return self

    @model_validator(mode="after")
    def _average_fits_its_kind(self) -> "StageSection":
        if self.ema is None:
            return self
        if not self.does.trains:
            raise ValueError(f"stages of kind {self.kind} take no ema: they train no weights")
        if self.does.regularizes and self.ema.evaluate == "ema":
            raise ValueError(
                "ema.evaluate: ema is not possible in a stage that regularises: the average lags "
                "behind the filters on their way to zero, and is another network without them; "
                "use raw (the average is pruned along)"
            )
        if self.ema.evaluate is None:
            chosen = "raw" if self.does.regularizes else "ema"
            self.ema = self.ema.model_copy(update={"evaluate": chosen})
        return self


class PublishedScore(NamedTuple):
    """What was published of one metric; None where nothing was."""

    dense: float | None = None
    pruned: float | None = None
    pruned_std: float | None = None


class PublishedSection(Section):
    """The published figures that this configuration is to reproduce, for the report."""

    source: str
    dense_top1: float | None = None
    top1: float | None = None
    top1_std: float | None = None
    speedup: float | None = None

    def score(self, metric: Metric) -> PublishedScore:
        """The figures of a metric; they are all of top-1."""
        if metric != TOP1:
            return PublishedScore()
        return PublishedScore(self.dense_top1, self.top1, self.top1_std)
