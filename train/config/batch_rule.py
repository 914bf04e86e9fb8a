"""What a global batch other than the reference does to the settings of a run (docs/batch.md).

With k = ``training.batch_size`` / ``training.reference_batch_size`` and ``training.batch:
reference``:

- the learning rate of every stage is multiplied by k, that of optimisers which divide the gradient
  by its size by the square root of k; for k > 1 it climbs there linearly from that of the reference
  batch (Goyal et al. 2017, arXiv:1706.02677, sections 2.1 and 2.2), unless the stage has a warm-up
  of its own, which then leads to the multiplied learning rate;
- what a method counts in steps is divided by k, so that it is the same in images seen
  (``for_batch`` of its settings);
- the decay of a moving average of weights is raised to the power k: the average reaches back over
  as many images (Busbridge et al. 2023, arXiv:2307.13813);
- what is counted in epochs stays.

The settings are read so wherever a stage uses them, and never written back: a saved configuration
makes the same run again. For k = 1 nothing is computed at all.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # it takes its optimisers' settings from here
    from tpp.methods.base import Method
    from train.config.config import Config


def describe(config: "Config", name: str, epochs: float | None = None) -> str | None:
    """One line of what the rule does to training stage ``name``; None where it does nothing.

    ``epochs`` is the length of a stage that does not say it itself, if it is known.
    """
    stage = config.stages[name]
    if stage.optimizer is None or config.training.batch_factor == 1:
        return None
    changes = [_learning_rate(config, name, epochs)]
    if stage.does.regularizes:  # in no other stage does a method count steps
        changes += _method_changes(config, name)
    old, new = stage.ema, config.stage_ema(name)
    if old is not None and new is not None:
        changes.append(f"EMA decay {old.decay:g} -> {new.decay:g}")
    return _line(config, changes)


def describe_method(config: "Config", name: str) -> str | None:
    """One line of what the rule does to the method of a stage; None where it does nothing."""
    changes = list(_method_changes(config, name))
    return _line(config, changes) if changes else None


def describe_length(config: "Config", name: str, images: int | None) -> str | None:
    """One line of what stretching a method to the stage's epochs does; None where there is none."""
    if images is None or not config.is_stretched(name):
        return None
    stretched, own = config.stage_method(name, images=images), config.stage_method(name)
    changes = _changes(own, stretched)
    return (
        f"{config.stages[name].epochs:g} epochs are {stretched.steps():,} steps where the method's "
        f"own are {own.steps():,}: {', '.join(changes) or 'nothing changes'}"
    )


def _line(config: "Config", changes: list[str]) -> str:
    training = config.training
    return (
        f"batch {training.batch_size} is {float(training.batch_factor):g} x the reference "
        f"{training.reference_batch_size}: {', '.join(changes)} "
        "(training.batch=as_given turns this off)"
    )


def _learning_rate(config: "Config", name: str, epochs: float | None) -> str:
    stage = config.stages[name]
    old, new = stage.optimizer, config.stage_optimizer(name, epochs)
    assert old is not None
    text = f"learning rate {old.lr:g} -> {new.lr:g}"
    if not new.warmup_epochs:
        return text
    if old.warmup_epochs:
        return f"{text} after the stage's own {new.warmup_epochs:.3g} epochs of warm-up"
    known = (stage.epochs or epochs) is not None
    most = "" if known else " (at most a third of the stage)"
    return f"{text} after {new.warmup_epochs:.3g} epochs of warm-up{most}"


def _method_changes(config: "Config", name: str) -> Iterator[str]:
    return _changes(config.stage_method(name, as_given=True), config.stage_method(name))


def _changes(old: "Method", new: "Method") -> Iterator[str]:
    values = dict(new.settings)
    for key, value in old.settings:
        if values[key] != value:
            yield f"{key} {_number(value)} -> {_number(values[key])}"


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else f"{value:,}"
