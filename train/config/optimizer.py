"""The settings of an optimiser, and of its learning rate over a stage."""

import difflib
import math
from fractions import Fraction
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from tpp.common.settings import PositiveFloat, Section

# Longer, a warm-up would reach into what comes after a step schedule's first milestone, and a
# short stage would hardly see the learning rate that it is warming up to.
LONGEST_WARMUP = Fraction(1, 3)

SGD = "sgd"
# How the learning rate follows the batch, for those of which it is known (docs/batch.md).
_LINEAR = {SGD, "momentum", "nesterov", "sgdw", "nesterovw", "lars", "nlars", "larc", "nlarc"}
_SQUARE_ROOT = {
    *("adam", "adamw", "adamwlegacy", "nadam", "nadamw", "nadamlegacy", "adamax"),
    *("radam", "radamw", "radamlegacy", "rmsprop", "rmsproptf", "lamb", "lambw", "lambc", "lambcw"),
}


# Of a network that lost weights, named as Zimmer et al. 2023 do; see train/schedules.py.
RETRAINING = ("llr", "allr", "slr", "clr", "lrw", "ft")
# Those whose learning rates are the reference's own.
_AS_IT_WAS = ("slr", "lrw", "ft")


class ReferenceSection(Section):
    """How the dense network was trained, which retraining schedules go by (docs/masks.md).

    Attributes:
        epochs (epochs): length of that training.
        lr: its learning rate.
        schedule: its schedule; this and what follows as in an ``optimizer``.
        milestones (epochs): where the learning rate was multiplied by ``gamma``, for ``schedule:
            step``.
        gamma: factor of the learning rate at each milestone, for ``schedule: step``.
        min_lr: the learning rate below which the schedule did not go.
        warmup_epochs (epochs): length of its linear warm-up.
        warmup_from: share of the learning rate that its warm-up began with.
        warmup_prefix: whether its schedule began only when the warm-up had ended.

    Example:
        {epochs: 200, lr: 0.1, schedule: step, milestones: [100, 150], gamma: 0.2,
        warmup_epochs: 5, warmup_from: 0.01, warmup_prefix: true}

        {epochs: 90, lr: 0.1, schedule: cosine, min_lr: 1e-5}
    """

    epochs: PositiveFloat
    lr: PositiveFloat
    schedule: Literal["constant", "step", "cosine", "linear"] = "constant"
    milestones: list[PositiveFloat] = []
    gamma: PositiveFloat = 0.1
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    warmup_from: Annotated[float, Field(ge=0, le=1)] = 0.0
    warmup_prefix: bool = False

    @model_validator(mode="after")
    def _is_a_schedule(self) -> "ReferenceSection":
        self.optimizer()
        return self

    def optimizer(self) -> "OptimizerSection":
        """The settings of an optimiser with this learning rate."""
        return OptimizerSection(**self.model_dump(exclude={"epochs"}))


class OptimizerSection(Section):
    """An optimiser and its learning rate over a stage (docs/optimizers.md).

    Attributes:
        name: ``sgd``, or one of timm's: ``adamw``, ``lamb``, ``lars`` and so on.
        lr: learning rate, for the batch that the configuration is written for: ``training.batch``
            says which that is. Retraining schedules that go by the reference's learning rate do
            without.
        momentum: momentum of the optimisers that have one; the others ignore it.
        nesterov: whether ``sgd`` takes Nesterov's momentum; other optimisers say it by their name.
        betas: decay rates of the running averages, for optimisers that have them, such as
            ``adamw``; null for the optimiser's own.
        eps: small number that is added to a denominator, for optimisers that have one; null for the
            optimiser's own.
        args: further keyword arguments of an optimiser of timm's.
        weight_decay: weight decay as the optimiser understands it: L2 of ``sgd``, decoupled of
            ``adamw``.
        decay_norms_and_biases: whether weight decay holds for biases, and for all other parameters
            of one dimension, as in the paper; if not, neither does it for those that the network
            itself excepts (timm's ``no_weight_decay``).
        layer_decay: the learning rate of each layer as a share of that of the layer above it, for
            networks of timm; null for the same in all.
        head_lr_factor: factor of the classifier's learning rate.
        schedule: course of the learning rate over the stage: ``constant``, ``step`` (times
            ``gamma`` at each milestone), ``cosine`` or ``linear`` (to ``min_lr``); or, of a network
            that lost weights, ``llr``, ``allr``, ``slr``, ``clr``, ``lrw`` or ``ft``
            (docs/masks.md).
        reference: how the dense network was trained, for the schedules of a network that lost
            weights; ``like`` takes it from a stage. null where none is needed.
        milestones (epochs): where the learning rate is multiplied by ``gamma``, for ``schedule:
            step``; in rising order.
        gamma: factor of the learning rate at each milestone, for ``schedule: step``.
        min_lr: the learning rate below which the schedule does not go.
        warmup_epochs (epochs): length of a linear warm-up at the beginning of the stage.
        warmup_from: share of the learning rate that the warm-up begins with.
        warmup_prefix: whether the schedule begins only when the warm-up ends; if not, the warm-up
            scales what the schedule says.

    Shorthands:
        like (name of a stage): an earlier training stage of the run whose settings ``reference`` is
            to have, such as ``like: dense``; for the retraining schedules.

    Example:
        {lr: 0.1, momentum: 0.95, nesterov: true, weight_decay: 5e-4, schedule: step,
        milestones: [100, 150], gamma: 0.2}

        {name: adamw, lr: 1e-3, betas: [0.9, 0.98], eps: 1e-7, args: {amsgrad: true},
        weight_decay: 0.05, decay_norms_and_biases: false, layer_decay: 0.75, head_lr_factor: 10,
        schedule: cosine, min_lr: 1e-6, warmup_epochs: 5, warmup_from: 0.01, warmup_prefix: true}
    """

    name: str = SGD
    lr: PositiveFloat
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = False
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=1)] | None = None
    eps: PositiveFloat | None = None
    args: dict[str, Any] = {}
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    decay_norms_and_biases: bool = True
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    head_lr_factor: PositiveFloat = 1.0
    schedule: Literal[
        "constant", "step", "cosine", "linear", "llr", "allr", "slr", "clr", "lrw", "ft"
    ] = "constant"
    reference: ReferenceSection | None = None
    milestones: list[PositiveFloat] = []
    gamma: PositiveFloat = 0.1
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    warmup_from: Annotated[float, Field(ge=0, le=1)] = 0.0
    warmup_prefix: bool = False

    @model_validator(mode="after")
    def _reference_goes_with_retraining(self) -> "OptimizerSection":
        if not self.retrains:
            if self.reference is not None:
                raise ValueError(f"reference goes with schedule: {', '.join(RETRAINING)}")
            return self
        for key in ("warmup_epochs", "min_lr"):
            if getattr(self, key):
                raise ValueError(f"{key}: schedule {self.schedule} has its own")
        if self.reference is None and self.schedule != "llr":
            raise ValueError(
                f"schedule {self.schedule} goes by how the dense network was trained: like: STAGE "
                "names its stage, or reference: {lr, epochs, ...} says it"
            )
        if self.schedule in _AS_IT_WAS and self.reference and self.lr != self.reference.lr:
            raise ValueError(
                f"lr: schedule {self.schedule} has the learning rates of the reference "
                f"({self.reference.lr}); leave it out"
            )
        return self

    @model_validator(mode="after")
    def _is_known(self) -> "OptimizerSection":
        if self.name == SGD:
            for key in ("betas", "eps"):
                if getattr(self, key) is not None:
                    raise ValueError(f"{key} go with adamw and the like, not with sgd")
            if self.args:
                raise ValueError("args go with optimisers of timm; sgd has its keys here")
            return self
        from timm.optim import get_optimizer_info, list_optimizers  # a second or two

        known = [name for name in map(str, list_optimizers()) if not _needs_more(name)]
        if self.name not in known:
            near = difflib.get_close_matches(self.name.lower(), known, n=3, cutoff=0.4)
            raise ValueError(
                f"name: {self.name!r} is no optimiser that can be used here; "
                + (
                    f"did you mean {' or '.join(near)}?"
                    if near
                    else f"there are {', '.join(known)}"
                )
            )
        info = get_optimizer_info(self.name)
        if self.nesterov:
            raise ValueError(f"nesterov goes with sgd; {self.name} says by its name what it does")
        if not info.has_momentum and "momentum" in self.model_fields_set and self.momentum != 0.9:
            raise ValueError(f"momentum: {self.name} has none" + _instead(info.has_betas))
        if self.betas is not None and not info.has_betas:
            raise ValueError(
                f"betas: {self.name} has none" + ("; it has momentum" * info.has_momentum)
            )
        if self.betas is not None and len(self.betas) != info.num_betas:
            raise ValueError(f"betas: {self.name} has {info.num_betas} of them")
        if self.eps is not None and not info.has_eps:
            raise ValueError(f"eps: {self.name} has none")
        reserved = {*type(self).model_fields, "params", "foreach", "fused"} & self.args.keys()
        if reserved:
            raise ValueError(f"args.{min(reserved)}: not possible there")
        return self

    @model_validator(mode="after")
    def _warmup_has_a_length(self) -> "OptimizerSection":
        for key in ("warmup_from", "warmup_prefix"):
            if getattr(self, key) and not self.warmup_epochs:
                raise ValueError(f"{key} goes with warmup_epochs")
        return self

    @model_validator(mode="after")
    def _floor_is_below(self) -> "OptimizerSection":
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr ({self.min_lr}) must not be above lr ({self.lr})")
        return self

    @model_validator(mode="after")
    def _milestones_belong_to_steps(self) -> "OptimizerSection":
        if (self.schedule == "step") != bool(self.milestones):
            raise ValueError("milestones (in epochs) and schedule: step go together")
        if self.milestones != sorted(set(self.milestones)):
            raise ValueError("milestones must be in rising order")
        return self

    @property
    def retrains(self) -> bool:
        """Whether the schedule is one of a network that lost weights."""
        return self.schedule in RETRAINING

    @property
    def asks_network(self) -> bool:
        """Whether a network may have no answer to it: which layers it has, which classifier."""
        return self.layer_decay is not None or self.head_lr_factor != 1

    def for_batch(
        self, factor: Fraction, *, warmup_epochs: float, stage_epochs: float | None
    ) -> Self:
        """These settings for a global batch of ``factor`` times the one that they are written for.

        Learning rates are multiplied by ``factor``, or by its square root for optimisers that
        divide the gradient by its size.

        Args:
            factor: k; at 1 they are returned as they are.
            warmup_epochs: to a learning rate above the written one.
            stage_epochs: length of the stage, a third of which is the most that the warm-up takes;
                None where it is not known.

        Raises:
            ValidationError: of pydantic; the learning rate is out of bounds.
            ValueError: nothing is known of how this optimiser's follows the batch.
        """
        if factor == 1:
            return self
        times, start = float(factor), float(1 / factor)
        if self.name in _SQUARE_ROOT:
            times, start = math.sqrt(times), math.sqrt(start)
        elif self.name not in _LINEAR:
            raise ValueError(
                f"name: how the learning rate of {self.name} follows the batch is not known; write "
                "it for this batch, and training.batch=as_given"
            )
        changes: dict[str, Any] = {"lr": self.lr * times, "min_lr": self.min_lr * times}
        if self.reference is not None:
            like = {"lr": self.reference.lr * times, "min_lr": self.reference.min_lr * times}
            changes["reference"] = ReferenceSection(**{**dict(self.reference), **like})
        if factor > 1 and not self.warmup_epochs and not self.retrains:
            if stage_epochs is not None:
                warmup_epochs = min(warmup_epochs, float(LONGEST_WARMUP) * stage_epochs)
            if warmup_epochs:
                changes |= {"warmup_epochs": warmup_epochs, "warmup_from": start}
        return type(self)(**{**dict(self), **changes})


def _needs_more(name: str) -> bool:
    """Whether an optimiser of timm needs what there is not: another package, second derivatives."""
    from timm.optim import get_optimizer_info

    info = get_optimizer_info(name)
    return isinstance(info.opt_class, str) or info.second_order


def _instead(has_betas: bool) -> str:
    return "; it has betas" if has_betas else ""
