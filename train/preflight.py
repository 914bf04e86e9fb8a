"""Finding a user's mistakes before anything is loaded, downloaded or trained."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from data_pipelines.demo import generate_demo
from tpp.common.errors import UserError, reason_of
from tpp.common.own_code import is_own
from tpp.masks import COMPANION, chosen_layers
from tpp.measure.counts import count
from tpp.models.architecture import (
    Architecture,
    build_on_meta,
    example_input_for,
    set_preprocessing,
)
from tpp.models.fitting import check_logits
from tpp.models.layers import prunable_layers
from tpp.models.recalibration import norms_with_statistics
from tpp.plan import PruningPlan
from tpp.selection.selection import Selection
from train.config.batch_rule import describe_length, describe_method
from train.config.config import Config
from train.config.optimizer import SGD, OptimizerSection
from train.config.tracking import check_trackers
from train.data import RunData, preprocessing_at, smaller_sizes
from train.distributed.collectives import from_main_rank
from train.loop.optim import check_optimizer, is_elementwise, parameter_groups
from train.teachers import check_teachers, open_teachers, teachers_exist
from train.weights import starting_weights_exist, starts_with

if TYPE_CHECKING:
    from accelerate import Accelerator

# A stage that takes more is not what somebody meant.
_MOST_EPOCHS = 2**20


@dataclass(frozen=True)
class Preflight:
    """What was found out about a configuration before anything is loaded.

    Attributes:
        images: None where only filters are removed, for which none are needed.
        architecture: of the dense network.
    """

    images: RunData | None
    architecture: Architecture


def preflight(config: Config, accelerator: "Accelerator", stages: Iterable[str]) -> Preflight:
    """Find a user's mistakes before anything is loaded, downloaded or written.

    Args:
        config: what to run.
        accelerator: the ranks.
        stages: names of those to run; what is done is skipped.

    Raises:
        UserError: the batch cannot be shared evenly, no class folders, a pattern that matches no
            layer or one whose filters cannot be removed, a budget out of reach, a schedule too
            short to zero every layer out, a missing checkpoint or loader.
    """
    from train.distributed.accelerator import check_batch_size, zero_stage

    check_batch_size(config.training, accelerator.num_processes)
    splits = zero_stage(accelerator) > 0
    starting_weights_exist(config.model)
    teachers_exist(config)
    from_main_rank(accelerator, lambda: check_trackers(config.trackers))
    task = config.make_task()
    known = task.architecture(config.model)
    if known is not None and from_main_rank(accelerator, lambda: only_prunes(config, stages)):
        check_network(config, known, splits=splits)
        return Preflight(None, known)
    if config.data.demo:
        with accelerator.local_main_process_first():  # the others find it there
            generate_demo(
                Path(config.data.root), config.data.demo, image_size=config.data.image_size
            )
    data = RunData(config, accelerator)
    index = data.train.index
    architecture = task.architecture(config.model, len(index.classes), index.place)
    assert architecture is not None
    check_network(config, architecture, splits=splits, images=len(index))
    # What is needed in days should not be found damaged then.
    from_main_rank(accelerator, lambda: open_teachers(config, architecture, download=True))
    return Preflight(data, architecture)


def only_prunes(config: Config, stages: Iterable[str]) -> bool:
    """Whether all that is left to do is to remove filters from checkpoints of this run."""
    folder = Path(config.output)
    left = [name for name in stages if not (folder / name / "done.json").exists()]
    return bool(left) and not any(
        config.needs_images(name) or config.stages[name].input is None for name in left
    )


def check_network(
    config: Config, architecture: Architecture, *, splits: bool = False, images: int | None = None
) -> PruningPlan | None:
    """Check all that a configuration asks of its network; returns the plan's widths.

    Args:
        config: what to run.
        architecture: the dense network.
        splits: see :func:`check_optimizers`.
        images: of training, where they are known.

    Raises:
        UserError: of the checks that follow.
    """
    check_own_network(config, architecture)
    plan = check_plans(config, architecture, images)
    check_masks(config, architecture)
    check_methods(config, architecture)
    check_optimizers(config, architecture, splits=splits)
    check_training_size(config, architecture)
    check_image_sizes(config, architecture)
    check_teachers(config, architecture)
    return plan


def check_own_network(config: Config, architecture: Architecture) -> None:
    """Check that a network of the user's own gives what a classifier does.

    Raises:
        UserError: it cannot be built, does not run, or gives something else.
    """
    if not is_own(architecture.name):
        return
    try:
        model = build_on_meta(architecture)
        set_preprocessing(model, config.data.preprocessing())
        check_logits(model, side=config.data.train_size)
    except UserError as error:
        raise UserError(f"model.name: {error}") from None


def check_plans(
    config: Config, architecture: Architecture, images: int | None = None
) -> PruningPlan | None:
    """Check selection and schedules against the architecture; returns the plan's widths.

    The indices in the plan are stand-ins: which filters go is decided from the weights. So are
    the widths where there is a budget, see :func:`stand_in_plan`.
    """
    planned = [name for name in config.stages if config.needs_plan(name)]
    if not planned:
        return None
    model = build_on_meta(architecture)
    set_preprocessing(model, config.data.preprocessing())
    for name in planned:
        if config.stages[name].recalibrate is not None and not norms_with_statistics(model):
            raise UserError(
                f"stages.{name}.recalibrate: {architecture.name} has no BatchNorm whose running "
                "statistics could change; leave it out"
            )
    known: dict[str, tuple[PruningPlan, PruningPlan]] = {}
    for name in planned:
        pruning = (config.stages[name].pruning or config.pruning).model_dump_json()
        if pruning not in known:
            selection = config.selection(name)
            plan = stand_in_plan(model, selection)
            # The real weights may take filters from any layer that a budget may take some from.
            most = plan if selection.budget is None else _ceiling(model, selection)
            known[pruning] = plan, most
        if config.stages[name].does.regularizes:
            _check_method(config, name, model, known[pruning][1], images)
    return next(iter(known.values()))[0]


def check_masks(config: Config, architecture: Architecture) -> None:
    """Check that what stages are to mask is there.

    Raises:
        UserError: a pattern matches no layer, or more is masked before; names the key.
    """
    if not any(stage.does.masks for stage in config.stages.values()):
        return
    layers = [*prunable_layers(build_on_meta(architecture))]
    for name, stage in config.stages.items():
        if stage.sparsify is not None:
            try:
                chosen = chosen_layers(layers, stage.sparsify)
            except UserError as error:
                raise UserError(f"stages.{name}.sparsify: {error}") from None
            _check_nested(config, name, layers, chosen)


def _check_nested(config: Config, name: str, layers: list[str], chosen: list[str]) -> None:
    """Check that a stage's ``sparsity`` is not below that of one before it, of the same layers."""
    own = config.stages[name].sparsify
    if own is None or own.sparsity is None:
        return
    for other in config.inputs_of(name):
        before = config.stages[other].sparsify
        if config.stages[other].does.removes:
            return  # filters that go take zeros along
        if before is None or before.sparsity is None or chosen_layers(layers, before) != chosen:
            continue
        if before.sparsity > own.sparsity:
            raise UserError(
                f"stages.{name}.sparsify.sparsity: {own.sparsity:g} is less than stage {other!r} "
                f"masks before it ({before.sparsity:g}), and what is masked stays masked"
            )


def check_methods(config: Config, architecture: Architecture) -> None:
    """Check that the methods of the training stages suit the network.

    Raises:
        UserError: one does not; names the key.
    """
    model = build_on_meta(architecture)
    for name, stage in config.stages.items():
        if stage.does.trains and config.has_method(name):
            key = "method" if stage.method is None else f"stages.{name}.method"
            method = config.stage_method(name)
            try:
                method.check_network(model, stage.kind)
            except UserError as error:
                raise UserError(f"{key}.{error}") from None
            why = method.refuses_mask(stage.kind)
            if why is not None and (masked := _masked_by(config, name)):
                raise UserError(
                    f"{key}.name: {method.name} does not go behind {masked} in stage {name!r}: its "
                    f"input has masked weights, {why}"
                )


def check_training_size(config: Config, architecture: Architecture) -> None:
    """Check that the network takes images of the side of training.

    Raises:
        UserError: it takes those of evaluation alone.
    """
    side = config.data.train_size
    if side is None or not any(stage.does.trains for stage in config.stages.values()):
        return
    model, reasons = build_on_meta(architecture).eval(), []
    for size in (config.data.image_size, side):
        try:
            with torch.no_grad():
                model(example_input_for(model, "meta", side=size))
        except Exception as error:  # whatever a network says to such images
            reasons.append(reason_of(error))
    if len(reasons) == 1:  # with both, it cannot be told without memory
        raise UserError(
            f"data.train_size: {architecture.name} takes no images of {side}x{side} ({reasons[0]})"
        )


def check_image_sizes(config: Config, architecture: Architecture) -> None:
    """Check that the network takes images of the sizes at which it is to be evaluated.

    Raises:
        UserError: it does not; names the key.
    """
    sizes = {name: smaller_sizes(config, name)[0] for name in config.stages}
    if not any(sizes.values()):
        return
    model = build_on_meta(architecture)
    for name, of_stage in sizes.items():
        for size in of_stage:
            try:
                set_preprocessing(model, preprocessing_at(config, size))
                count(model)
            except UserError as error:
                raise UserError(
                    f"stages.{name}.image_sizes: {architecture.name} is not evaluated at {size} "
                    f"pixels: {error}"
                ) from None


def check_optimizers(config: Config, architecture: Architecture, *, splits: bool = False) -> None:
    """Check that each training stage's optimiser suits the network, and can be resumed.

    Args:
        config: what to run.
        architecture: the dense network.
        splits: whether ZeRO splits the optimiser's tensors over the ranks.

    Raises:
        UserError: it does not; names the key.
    """
    for name, stage in config.stages.items():
        if not stage.does.trains:
            continue
        settings, key = config.stage_optimizer(name), f"stages.{name}.optimizer"
        check_optimizer(settings, key, split=splits)
        if config.training.capture and settings.name != SGD:
            raise UserError(
                f"{key}.name: training.capture records the step of sgd, and not that of "
                f"{settings.name}; use capture: false"
            )
        _check_retraining(config, name, settings)
        if not settings.asks_network:
            continue
        try:
            parameter_groups(build_on_meta(architecture), settings)
        except UserError as error:
            raise UserError(f"{key}.{error}") from None


def _check_retraining(config: Config, name: str, settings: OptimizerSection) -> None:
    """Find before anything is trained what a retraining schedule will miss."""
    key, stage = f"stages.{name}.optimizer.schedule: {settings.schedule}", config.stages[name]
    if settings.schedule == "allr":
        before = (config.stages[other].does for other in config.inputs_of(name))
        if any(does.removes or does.masks for does in before):
            return
        raise UserError(
            f"{key} goes by what a stage before it took, and none before {name!r} prunes or "
            "sparsifies; use llr"
        )
    reference = settings.reference
    if settings.schedule == "lrw" and reference and (stage.epochs or 0) > reference.epochs:
        raise UserError(
            f"{key} goes through the last {stage.epochs:g} epochs of the dense network's training, "
            f"which had {reference.epochs:g}"
        )


def what_counts_zeros(config: Config, name: str) -> str | None:
    """See :attr:`tpp.methods.base.TrainingContext.counts_zeros`, of a training stage."""
    training, optimizer = config.training, config.stage_optimizer(name)
    # Shifts of normalisations behind a GELU or a sigmoid have a gradient while they are at zero.
    for key in ("clip_gradient_norm", "max_gradient_norm"):
        if getattr(training, key) is not None:
            return f"training.{key}, as the gradient's norm takes in that of filters at zero"
    if not is_elementwise(optimizer):
        return f"stages.{name}.optimizer.name: {optimizer.name} looks at whole tensors"
    for later, stage in config.stages.items():
        if stage.input == name and stage.does.makes_network and not stage.does.removes:
            # Whatever picks filters behind it would pick from those that are left.
            return f"stage {later!r}, which takes its network before it is pruned"
    return _masks_before(config, name)


def _masks_before(config: Config, name: str) -> str | None:
    """Why a mask before stage ``name`` speaks against removals in it; None if there is none."""
    masked = _masked_by(config, name)
    return f"{masked}, whose mask is of the filters that there are" if masked else None


def _masked_by(config: Config, name: str) -> str | None:
    """What masks weights before stage ``name``, in words; None if nothing does."""
    for other in config.inputs_of(name):
        if config.stages[other].does.masks:
            return f"stage {other!r}"
    return config.model.checkpoint if starts_with(config.model, COMPANION) else None


def _check_method(
    config: Config, name: str, model: nn.Module, plan: PruningPlan, images: int | None
) -> None:
    if images is None and config.is_stretched(name):
        return  # the steps that it has to fit into are not known
    method, masks = config.stage_method(name, images=images), _masks_before(config, name)
    try:
        method.check(model, plan)
        if masks and method.removes_after(model, plan, counts_zeros=masks) is not None:
            raise UserError(
                f"stages.{name}: filters cannot be removed in the middle of it because of {masks}; "
                "leave method.remove_at_zero out"
            )
    except UserError as error:
        if (enough := _epochs_enough(config, name, model, plan, images)) is not None:
            said, batch = config.stages[name].epochs, config.training.batch_size
            raise UserError(
                f"stages.{name}.epochs: {said:g} epochs of {images:,} images are "
                f"{method.steps():,} steps, too few to set every pruned layer to zero in turn; "
                f"say {enough} or more, or a smaller training.batch_size than {batch}"
            ) from None
        # The numbers that it names may not be those that the user wrote.
        rules = (describe_method(config, name), describe_length(config, name, images))
        raise UserError("; ".join([str(error), *filter(None, rules)])) from None


def _epochs_enough(
    config: Config, name: str, model: nn.Module, plan: PruningPlan, images: int | None
) -> int | None:
    """The fewest whole epochs that a stretched method's check takes; None where it is another."""
    stage = config.stages[name]
    if stage.epochs is None or not config.is_stretched(name):
        return None

    def fits(epochs: float) -> bool:
        longer = stage.model_copy(update={"epochs": epochs})
        other = config.model_copy(update={"stages": {**config.stages, name: longer}})
        try:
            other.stage_method(name, images=images).check(model, plan)
        except UserError:
            return False
        return True

    if fits(stage.epochs):
        return None  # the mistake is another one
    short, enough = math.floor(stage.epochs), math.ceil(stage.epochs)
    while not fits(enough):
        if enough > _MOST_EPOCHS:
            return None
        short, enough = enough, 2 * enough
    while enough - short > 1:
        middle = (short + enough) // 2
        short, enough = (short, middle) if fits(middle) else (middle, enough)
    return enough


def stand_in_plan(model: nn.Module, selection: Selection) -> PruningPlan:
    """A plan with the right number of filters per layer, the last ones for want of weights.

    With a budget the numbers depend on the weights: here those of a network whose layers are all
    worth the same. With one of latency, which is measured when the plan is chosen, they are the
    most that may go.
    """
    if selection.budget is not None and selection.budget.measured:
        return _ceiling(model, selection)
    return selection.select(model, scores=_last_go(model))


def _ceiling(model: nn.Module, selection: Selection) -> PruningPlan:
    return selection.ceiling(model, scores=_last_go(model))


def _last_go(model: nn.Module) -> dict[str, Tensor]:
    """Scores n, n-1, ..., 1 of the n filters of every layer."""
    layers = prunable_layers(model)
    return {name: torch.arange(len(layer.weight), 0, -1) for name, layer in layers.items()}
