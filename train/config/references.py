"""``like: STAGE``: a retraining schedule goes by how another stage of the run trains.

It is written out into ``reference`` when a configuration is read, so that the stage's settings say
all that its learning rates depend on.
"""

from collections.abc import Mapping
from typing import Any

from train.config.optimizer import RETRAINING, ReferenceSection

LIKE = "like"


def with_references(stages: Mapping[Any, Any]) -> dict[Any, Any]:
    """The stages of a configuration with references in the place of ``like``.

    A learning rate that is not given is the reference's.

    Raises:
        ValueError: there is no such stage before it, or it does not train; names the key.
    """
    found: dict[Any, Any] = {}
    for name, stage in stages.items():
        optimizer = stage.get("optimizer") if isinstance(stage, Mapping) else None
        if isinstance(optimizer, Mapping):
            optimizer = dict(optimizer)
            if LIKE in optimizer:
                key = f"stages.{name}.optimizer.{LIKE}"
                if optimizer.get("schedule") not in RETRAINING:
                    raise ValueError(f"{key}: goes with schedule: {', '.join(RETRAINING)}")
                if optimizer.get("reference") is not None:
                    raise ValueError(f"{key}: goes without reference, which says the same")
                optimizer["reference"] = _of_stage(found, optimizer.pop(LIKE), key)
            reference, schedule = optimizer.get("reference"), optimizer.get("schedule")
            if schedule in RETRAINING and isinstance(reference, Mapping) and "lr" in reference:
                optimizer.setdefault("lr", reference["lr"])
            stage = {**stage, "optimizer": optimizer}
        found[name] = stage
    return found


def _of_stage(earlier: Mapping[Any, Any], name: Any, key: str) -> dict[str, Any]:
    stage = earlier.get(name) if isinstance(name, str) else None
    optimizer = stage.get("optimizer") if isinstance(stage, Mapping) else None
    if not isinstance(optimizer, Mapping) or not isinstance(stage, Mapping):
        trained = [
            str(other)
            for other, settings in earlier.items()
            if isinstance(settings, Mapping) and settings.get("optimizer")
        ]
        there = f"there are: {', '.join(trained)}" if trained else "there are none"
        raise ValueError(f"{key}: {name!r} is no earlier stage that trains; {there}")
    if "epochs" not in stage:
        raise ValueError(f"{key}: stage {name!r} does not say its epochs")
    if optimizer.get("schedule") in RETRAINING:
        raise ValueError(f"{key}: stage {name!r} is itself retraining")
    fields = ReferenceSection.model_fields.keys() - {"epochs"}
    own = {field: optimizer[field] for field in fields if field in optimizer}
    return {**own, "epochs": stage["epochs"]}
