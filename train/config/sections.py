"""The sections of a configuration that belong to the run."""

from fractions import Fraction
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from data_pipelines.settings import AugmentSection, EpisodesSection
from tpp.common.errors import UserError
from tpp.common.object_storage import check_url
from tpp.common.settings import (
    MAY_DIFFER,
    OF_TRAINING,
    Names,
    PositiveFloat,
    PositiveInt,
    Section,
    UserPath,
)
from tpp.masks import SparsifySection
from tpp.selection.settings import PruningSection
from train.config.cycles import CYCLE
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
    *("report.html", "report.png", "compiled", "copy.json"),
    *("trackers.json", "wandb", "mlflow", "mlflow.db"),
}
OFF = "off"
MODEL_FILE = "model.safetensors"  # in the folder of each stage that makes a network


def _off(value: Any) -> Any:
    return OFF if value is False else value  # as YAML reads an off without quotes


class TrainingSection(Section):
    """What holds for all training stages.

    Attributes:
        batch_size (images): global batch, over all ranks and micro-batches.
        batch: ``reference`` fits learning rates, and the methods' counts of steps, to
            ``batch_size`` (docs/batch.md); ``as_given`` takes them as they are written.
        reference_batch_size (images): the global batch that the learning rates and steps of the
            configuration are written for; ``batch: reference`` needs it.
        batch_warmup_epochs (epochs): with ``batch: reference`` and a larger batch, the length of a
            linear warm-up from the learning rate of the reference batch, in stages that have no
            warm-up of their own; at most a third of a stage.
        accumulation: number of micro-batches per optimiser step, on each rank.
        precision: arithmetic of training: ``fp32``, or autocast to ``bf16`` or ``fp16`` (CUDA
            only).
        tf32: whether float32 products and convolutions on a GPU may be rounded to TF32, those of
            the penalty included; null for PyTorch's own: convolutions are, products are not.
        cudnn_benchmark: whether cuDNN looks for the fastest algorithm for each shape. What it finds
            may differ from start to start, and so then does the last bit.
        compile: whether the network's forward and backward pass are compiled by ``torch.compile``
            (docs/performance.md): ``off``, ``default``, or ``max-autotune``, which tries kernels
            out. They are compiled anew after filters were removed; what was compiled is kept in the
            run folder.
        capture: whether the whole step is recorded as a CUDA graph, of one rank without DeepSpeed
            (docs/performance.md): for networks so small that a GPU waits for its launches.
        channels_last: whether images and convolution weights are in channels-last memory order.
        sync_batchnorm: whether BatchNorm's statistics are over all ranks; if not, each rank has its
            own, and rank 0's running statistics are kept.
        evaluate_every (epochs): interval of the evaluations in a training stage; there is always
            one at its end.
        evaluate_batch_size (images per rank): the batch of evaluations; null for that of training.
        log_every (steps): interval of the lines in log.jsonl and of the points in TensorBoard.
        statistics_every (steps): interval of the method's per-layer statistics.
        trainability_every (steps): interval of the measurements of the Jacobian's singular values,
            from before the first step to the end of every training stage (docs/trainability.md);
            null for none.
        trainability_images (images): number of validation images at which the singular values are
            measured, at most.
        on_bad_step: what to do about a step whose loss or gradient is not finite, or whose
            gradient's norm is above ``max_gradient_norm`` (docs/reliability.md): ``stop`` ends the
            run; ``skip`` leaves the weights as they were and goes on; ``rollback`` goes back to the
            newest checkpoint and leaves that step out. The names of the images are written down in
            each case.
        max_bad_steps (steps): how many steps of a stage ``skip`` and ``rollback`` may leave out.
        max_gradient_norm: the norm of the gradient of all parameters together above which a step is
            a bad one; null for no limit.
        clip_gradient_norm: the norm to which a longer gradient, of all parameters together, is
            scaled down; null for no clipping, as published.
        deepspeed: DeepSpeed's configuration, such as launch/deepspeed/zero1.json
            (docs/distributed.md); null for DistributedDataParallel, unless ``accelerate launch``
            was told to use DeepSpeed.
        peak_tflops (dense TFLOP/s): peak of one device at ``precision``, for ``train/mfu``
            (docs/profile.md); null looks the GPU up.
        rank_timeout (seconds): a rank that gives no sign of life for so long counts as lost, and
            the run ends (docs/cluster.md).

    Example:
        {batch_size: 1024, batch: reference, reference_batch_size: 256, batch_warmup_epochs: 2.5,
        accumulation: 2, precision: bf16, tf32: true, cudnn_benchmark: true, compile: max-autotune,
        channels_last: true, sync_batchnorm: true, evaluate_every: 5,
        evaluate_batch_size: 512, log_every: 100, statistics_every: 1000, trainability_every: 500,
        trainability_images: 32, on_bad_step: rollback, max_bad_steps: 10, max_gradient_norm: 100,
        clip_gradient_norm: 1.0, deepspeed: launch/deepspeed/zero1.json, peak_tflops: 989,
        rank_timeout: 600}

        {batch_size: 128, capture: true}
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
    """The checkpoints from which an interrupted training stage goes on (docs/reliability.md).

    Attributes:
        every: interval of the checkpoints, which is the most that a crash can cost: ``1000 steps``,
            ``0.5 epochs`` or ``30 minutes``.
        keep (checkpoints): how many of the newest checkpoints are kept while the stage runs.
        keep_every (checkpoints): one checkpoint in so many is kept for good; null for none.
        keep_best: whether the checkpoint with the best validation score is kept for good; an
            evaluation that is the best so far is then followed by a checkpoint.
        on_error: what to do when a checkpoint cannot be written: ``stop`` ends the run;
            ``continue`` says so and trains on. The older checkpoints stay in either case.
        asynchronous: whether training goes on while a checkpoint is written.
        copy_to: URL in an object store, such as ``s3://bucket/runs``, below which a copy of the run
            folder is kept under the folder's name, and from which a run goes on where that folder
            is empty (docs/object_storage.md); null for none.

    Example:
        {every: 30 minutes, keep: 3, keep_every: 10, keep_best: true, on_error: continue,
        asynchronous: false, copy_to: "s3://bucket/runs"}
    """

    every: Annotated[str, BeforeValidator(_interval)] = "1000 steps"
    keep: PositiveInt = 2
    keep_every: PositiveInt | None = None
    keep_best: bool = False
    on_error: Literal["stop", "continue"] = "stop"
    asynchronous: bool = True
    copy_to: Annotated[str, AfterValidator(check_url)] | None = None


def _known_kind(kind: str) -> str:
    if kind not in KINDS:
        *most, last = (repr(name) for name in KINDS)
        raise PydanticCustomError("stage_kind", f"Input should be {', '.join(most)} or {last}")
    return kind


class StageSection(Section):
    """The stages of a run, by name: each goes from the network of ``input`` to its own, which its
    folder keeps under the stage's name. Stages run in the order in which they are written.

    Attributes:
        kind: what the stage does; by default what its name says. ``dense`` trains the network with
            all its filters; ``regularize`` trains it so that filters can go, as the method says;
            ``prune`` removes filters; ``sparsify`` sets single weights to zero for good;
            ``finetune`` trains what is left; ``evaluate`` only measures; ``cycle`` repeats stages.
        input: the stage whose network this one begins with; by default the one before it that makes
            a network.
        epochs (epochs): length of ``dense`` and ``finetune``; a fraction is fine. A ``regularize``
            stage is as long as its method says, if it says so; with ``epochs`` the steps of the
            method are stretched to that length (docs/batch.md).
        optimizer: the optimiser of a training stage, which needs one.
        loss: the loss of training: ``cross_entropy``, or ``bce``, binary cross entropy of each
            class (docs/recipe.md).
        label_smoothing: share s of the training targets that is spread evenly over all C classes:
            they are 1 - s + s/C for the class of the image and s/C for the others.
        ema: a moving average of the weights, beside those that are trained; null for none.
        bce_threshold: for ``loss: bce``: targets above it count as 1, the others as 0; null for
            targets as they are.
        distill: a teacher's part in the training loss; null for none.
        method: another method than the configuration's, for this stage; null for the same.
        augment: another ``data.augment``, as a whole, for this stage; null for the same.
        pruning: another ``pruning``, as a whole, for this stage; null for the same.
        carry_optimizer: whether the optimiser goes on with the state (momentum) that it had at the
            end of the training stage before, cut and masked along with the weights (docs/masks.md).
        sparsify: which weights stay, for a ``sparsify`` stage, which needs it.
        recalibrate (batches): number of training batches over which a ``prune`` stage estimates
            BatchNorm's running statistics anew once filters are gone; null for the dense network's.
        image_sizes (pixels): smaller sides of the images at which an ``evaluate`` stage evaluates
            the same network too (docs/rival.md); those that are not smaller than
            ``data.image_size`` are left out. null for none.
        episodes: a few classes at a time, for a training stage; null for all of them at once.

    Example:
        {kind: finetune, input: prune, epochs: 90, optimizer: {lr: 0.01}, loss: bce,
        label_smoothing: 0.1, bce_threshold: 0.2, method: {name: linear_overparam},
        carry_optimizer: true}

        {kind: prune, recalibrate: 100}

        {kind: evaluate, input: finetune, image_sizes: [160, 192]}

        {kind: dense, epochs: 2, optimizer: {lr: 0.1}, episodes: {classes: 5}}
    """

    kind: Annotated[str, AfterValidator(_known_kind), Names((*KINDS, CYCLE))]
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
    recalibrate: PositiveInt | None = None
    image_sizes: Annotated[list[PositiveInt], Field(min_length=1)] | None = None
    episodes: EpisodesSection | None = None

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
        if self.episodes is not None and not trains:
            raise ValueError(f"stages of kind {self.kind} take no episodes: they train no weights")
        if self.episodes is not None and self.distill is not None:
            raise ValueError("episodes: a teacher tells all classes apart; leave distill out")
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
        if self.recalibrate is not None and not self.does.removes:
            raise ValueError(f"stages of kind {self.kind} take no recalibrate: prune does")
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
    """The published figures that a configuration is to reproduce; the report shows them beside the
    run's.

    Attributes:
        source: where the figures were published.
        dense_top1 (per cent): top-1 accuracy of the dense network; null where it is not known.
        top1 (per cent): top-1 accuracy of the pruned network, finetuned; null where it is not
            known.
        top1_std (per cent): standard deviation of ``top1``; null where it is not known.
        speedup: multiply-accumulates of the dense network over those of the pruned one; null where
            it is not known.

    Example:
        {source: "Wang & Fu, ICLR 2023, Table 1", dense_top1: 93.78, top1: 89.63, top1_std: 0.1,
        speedup: 11.41}
    """

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
