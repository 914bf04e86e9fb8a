"""Sending what a run folder holds, when nothing is trained."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tpp.common.errors import UserError
from tpp.common.reading import read_text
from tpp.common.registry import pick
from tpp.common.settings import mistakes
from tpp.common.yaml_files import parse_yaml
from train.config.stage_kinds import KINDS, stage_kind
from train.config.tracking import (
    TENSORBOARD,
    TrackingSection,
    check_trackers,
    known_tracker,
    refuse_secrets,
    services_of,
)
from train.run_folder.lock import RunLock
from train.run_folder.results import read_results
from train.trackers.services import SERVICES, About
from train.trackers.trackers import Trackers, made_with


def send(folder: Path, names: Sequence[str] | None, *, wait: float) -> bool:
    """Send what a run has logged, up to its newest whole step.

    Args:
        folder: of a run that is not under way. Nothing in it is run.
        names: of the services; None for those that the run names.
        wait: seconds for all of it.

    Returns:
        Whether the services have taken everything.

    Raises:
        UserError: it is no run folder, a run is under way in it, or a service cannot be used here.
    """
    from accelerate import PartialState

    results = read_results(folder / "results.json")
    path = folder / "config.yaml"
    config = _plain(path)
    if names is None:
        services = services_of(map(known_tracker, config.get("trackers") or []))
    else:
        services = list(dict.fromkeys(map(_service, names)))
    if not services:
        raise UserError(f"{path}: trackers: names no service to send to; say which with --to")
    check_trackers(services)
    stages = {name: stage.get("kind") for name, stage in config["stages"].items()}
    trained = tuple(
        name for name, kind in stages.items() if kind in KINDS and stage_kind(kind).trains
    )
    try:
        refuse_secrets(config)
        tracking = TrackingSection.model_validate(config.get("tracking") or {})
    except ValidationError as error:
        lines = mistakes(error, TrackingSection, prefix="tracking")
        raise UserError("\n".join(f"{path}: {line}" for line in lines)) from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    PartialState(cpu=True)  # Accelerate's trackers ask it which process they are in
    with RunLock(folder):
        about = About(results.name, folder, tracking, config | made_with(results), trained)
        trackers = Trackers(about, services, training=False)
        steps = {name: stage.steps or 0 for name, stage in results.stages.items()}
        for name in trained:
            trackers.ready(name, steps)
            if name not in steps:
                break  # under way, and none after it has begun
        trackers.start()
        finished = results.status == "finished"
        return trackers.close("finished" if finished else "stopped", wait=wait)


def _service(name: str) -> str:
    """A name that was given by hand, if it is one of a service."""
    if name == TENSORBOARD:
        raise UserError(
            f"--to {name}: nothing is sent there, as its events are in the run folder already; "
            f"expected one of {', '.join(sorted(SERVICES))}"
        )
    pick(SERVICES, name, "--to: unknown service")
    return name


def _plain(path: Path) -> dict[str, Any]:
    """A run's configuration as plain data; a network or a method of its own is not taken up."""
    config = parse_yaml(read_text(path, "the configuration"), str(path))
    stages = config.get("stages") if isinstance(config, dict) else None
    if not isinstance(stages, dict) or not all(isinstance(one, dict) for one in stages.values()):
        raise UserError(f"{path}: not the configuration of a run")
    return config
