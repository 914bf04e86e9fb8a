"""The learning rate of a training stage, step by step."""

from train import schedules
from train.config.config import steps_for
from train.config.optimizer import OptimizerSection
from train.distributed.collectives import EveryRankError
from train.loop.optim import learning_rate
from train.run import Run
from train.run_folder.results import StageResult
from train.schedules import Dense, Rate


def rate_of(run: Run, name: str, settings: OptimizerSection, steps: int) -> Rate:
    """The learning rate of a 0-based step.

    Args:
        run: what is done of it says what the pruning before the stage has cost.
        name: of the stage.
        settings: for the batch there is.
        steps: length of the stage.

    Raises:
        EveryRankError: what was done before says nothing of what ALLR goes by.
    """
    images, batch = len(run.data.train.index), run.config.training.batch_size
    per_step = batch / images
    epochs = run.config.stages[name].epochs or steps * per_step
    reference = settings.reference
    if not settings.retrains:
        return lambda step: learning_rate(settings, step * per_step, epochs)
    if settings.schedule == "llr":
        return schedules.llr(settings.lr, steps)
    assert reference is not None
    if settings.schedule == "allr":
        damage, share = damage_before(run, name), min(1.0, epochs / reference.epochs)
        return schedules.allr(settings.lr, steps, damage=damage, share=share)
    like = reference.optimizer()
    dense = Dense(
        rate=lambda step: learning_rate(like, step * per_step, reference.epochs),
        steps=steps_for(reference.epochs, images, batch),
        warmup=round(reference.warmup_epochs / per_step),
    )
    if settings.schedule == "clr":
        return schedules.clr(settings.lr, dense.lowest, steps)
    if settings.schedule == "slr":
        return schedules.slr(dense, steps)
    return schedules.ft(dense) if settings.schedule == "ft" else schedules.lrw(dense, steps)


def damage_before(run: Run, name: str) -> float:
    """d1 of ALLR (:func:`train.schedules.relative_damage`), of the nearest stage that took weights.

    There is one, as has been looked at before (:func:`train.preflight.check_optimizers`).

    Raises:
        EveryRankError: an earlier version made it, and does not say what it took.
    """
    stages = run.config.stages
    nearest = next(
        other
        for other in run.config.inputs_of(name)
        if stages[other].does.removes or stages[other].does.masks
    )
    done = StageResult.from_dict(run.done[nearest], run.task.metrics)
    if done.norm_before is None or done.norm_after is None or done.removed_share is None:
        raise EveryRankError(
            f"stages.{name}.optimizer.schedule: allr: stage {nearest!r} does not say what it took; "
            f"delete {run.stage_folder(nearest)} to run it again"
        )
    return schedules.relative_damage(done.norm_before, done.norm_after, done.removed_share)
