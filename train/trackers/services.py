"""The services, each through Accelerate's tracker of it: beginning, going on, one point, the end.

All of it is called by a thread of the service's own (:mod:`train.trackers.trackers`), and may wait
for as long as the service makes it wait.
"""

import importlib
import json
import logging
import os
import re
import secrets
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tpp.common.object_storage import hidden
from tpp.common.redaction import without_secrets
from train.config.tracking import MLFLOW, TRACKIO, WANDB, TrackingSection, without_passwords
from train.trackers.points import Point
from train.trackers.wandb_files import last_step

Ending = Literal["finished", "stopped", "failed"]
# MLflow's bounds, of what it takes at once and of names and values.
_METRICS_AT_ONCE = 500
_LONGEST_NAME, _LONGEST_VALUE = 250, 6000
_NOT_IN_NAMES = re.compile(r"[^\w\-. :/]")
_FAREWELL = 1.0  # seconds, for a process that is told to end
_PLAIN_KEY = re.compile(r"[\w.-]+")
# A curve that every point has a value of, by which a service says how far it has been told.
STAGE, STAGE_STEP = "stage", "stage_step"


@dataclass(frozen=True)
class About:
    """What a service is told of a run.

    Attributes:
        name: of the run.
        folder: the run folder.
        tracking: the settings.
        configuration: resolved, with what the run was made with; holds no secret.
        trained: the stages that train, in their order.
        settings: by stage, a digest of all that decides its outcome; None where nobody knows.
    """

    name: str
    folder: Path
    tracking: TrackingSection
    configuration: dict[str, Any]
    trained: tuple[str, ...] = ()
    settings: dict[str, str] | None = None


class Service(ABC):
    """One service; the names and their meaning are the same in all of them.

    Args:
        about: the run.
    """

    name: str
    # Whether a run is the same one wherever it is told.
    shares_identity = False
    # What its library reads there as it is imported, unless the user says otherwise.
    environment: dict[str, str] = {}

    def __init__(self, about: About) -> None:
        self.about = about
        self._tracker: Any = None

    @property
    @abstractmethod
    def place(self) -> str:
        """Name and place of the service, without any password: what it knows is known there."""

    @property
    def address(self) -> str:
        """The URL of the place, as it may be printed; "" of files here."""
        address = self.place.partition(" ")[2]
        return without_secrets(hidden(address)) if "://" in address else ""

    def load(self) -> None:
        """Import its library, with what the environment has to say before."""
        for name, value in self.environment.items():
            os.environ.setdefault(name, value)
        importlib.import_module(self.name)

    @abstractmethod
    def open(self, identity: str | None) -> str:
        """Begin a run, or go on with the one of that identity; returns the identity."""

    @abstractmethod
    def where(self) -> str:
        """Where a person finds the run, in words."""

    def told(self) -> int | None:
        """The last step that the service says it has; None where it does not say."""
        return None

    @abstractmethod
    def send(self, point: Point) -> None:
        """Tell the values of one step, all at once."""

    @abstractmethod
    def summarize(self, values: Mapping[str, float], at: int) -> None:
        """Tell results of stages, at the step over all stages ``at``."""

    @abstractmethod
    def close(self, ending: Ending) -> None:
        """End the run there, or let it be known that it will go on."""

    def refuses(self, error: Exception) -> bool:
        """Whether what was sent is to blame, which will not be taken later either."""
        return isinstance(error, ValueError | TypeError)

    def abandon(self) -> None:  # noqa: B027 (most have nothing to do)
        """Leave nothing behind that keeps the process from ending."""


class Wandb(Service):
    """Weights & Biases; its own files are in the run folder."""

    name = WANDB
    shares_identity = True
    # Its reports on itself hold the end of a process up where no server answers.
    environment = {"WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}

    @property
    def place(self) -> str:
        """wandb's server, or none."""
        if self._offline:
            return f"{WANDB} offline"
        url = os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"
        return f"{WANDB} {without_passwords(url)}"

    @property
    def _offline(self) -> bool:
        return os.environ.get("WANDB_MODE") in ("offline", "dryrun", "disabled")

    def open(self, identity: str | None) -> str:
        """Begin the run, or go on behind the last step that the server has."""
        import wandb
        from accelerate.tracking import WandBTracker

        about, tracking = self.about, self.about.tracking
        # A wandb agent has made the run already.
        identity = identity or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
        settings = wandb.Settings(
            console="off",  # what the run says is in the job's log
            silent=True,
            disable_git=True,  # a remote's URL may hold a token; the commit is in the configuration
            disable_code=True,
            init_timeout=60,
            finish_timeout=max(tracking.wait, 1),
        )
        tracker = WandBTracker(
            tracking.project,
            id=identity,
            resume=None if self._offline else "allow",
            name=about.name,
            group=tracking.group,
            tags=tracking.tags,
            dir=str(about.folder),
            settings=settings,
        )
        tracker.start()
        tracker.store_init_configuration(about.configuration)
        self._tracker = tracker
        return identity

    def where(self) -> str:
        """The run's page, or how its files get to one."""
        if self._offline:
            files = self.about.folder / "wandb" / "offline-run-*"
            return f"offline; where there is a way out: wandb sync {files}"
        return str(self._tracker.tracker.url)

    def told(self) -> int | None:
        """What the server has, or without one the files."""
        run = self._tracker.tracker
        if self._offline:
            return last_step(self.about.folder / "wandb", run.id)
        return run.starting_step - 1

    def send(self, point: Point) -> None:
        """One row of the run's history."""
        values = {**point.values, STAGE: point.number, STAGE_STEP: point.step}
        self._tracker.log({**values, "_timestamp": point.time}, step=point.at)

    def summarize(self, values: Mapping[str, float], at: int) -> None:
        """Into the run's summary."""
        self._tracker.tracker.summary.update(dict(values))

    def close(self, ending: Ending) -> None:
        """A run that will go on is called preempted."""
        run = self._tracker.tracker
        if ending == "stopped":
            run.mark_preempting()
        run.finish(exit_code=0 if ending == "finished" else 1)

    def abandon(self) -> None:
        """End wandb's own process, which Python would wait for; its files stay."""
        import psutil
        import wandb

        # It takes its exit hook back first, and then waits for that process.
        threading.Thread(target=wandb.teardown, daemon=True).start()
        own = [child for child in psutil.Process().children() if "wandb-core" in child.name()]
        for child in psutil.wait_procs(own, timeout=_FAREWELL)[1]:
            with suppress(psutil.Error):
                child.kill()
        psutil.wait_procs(own, timeout=_FAREWELL)


class Mlflow(Service):
    """MLflow: a server, or a database in the run folder where MLFLOW_TRACKING_URI names none."""

    name = MLFLOW
    environment = {
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        # Its own are minutes, in which nobody is told what is wrong; it is asked again anyway.
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    }

    @property
    def place(self) -> str:
        """The server, or the run folder."""
        return (
            f"{MLFLOW} {without_passwords(os.environ.get('MLFLOW_TRACKING_URI') or 'run folder')}"
        )

    def open(self, identity: str | None) -> str:
        """Begin the run, or set it running again."""
        import mlflow
        from accelerate.tracking import MLflowTracker

        about, tracking = self.about, self.about.tracking
        artifacts = None
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            for name in ("alembic", "mlflow.store.db.utils"):
                logging.getLogger(name).setLevel(logging.WARNING)
            mlflow.set_tracking_uri(f"sqlite:///{about.folder.resolve() / 'mlflow.db'}")
            artifacts = (about.folder.resolve() / "mlflow").as_uri()
        while mlflow.active_run() is not None:  # of an attempt that broke off
            mlflow.end_run()
        tracker = MLflowTracker(
            tracking.project, logging_dir=artifacts, run_id=identity, run_name=about.name
        )
        # The environment's would be that of all runs that are started there.
        tracker.run_id = identity or tracker.run_id
        tracker.start()
        run = tracker.tracker
        known = mlflow.get_run(run.info.run_id).data.params
        flat = _flat(about.configuration)
        tracker.store_init_configuration({key: flat[key] for key in flat if key not in known})
        changed = {f"changed.{k}": v for k, v in flat.items() if known.get(k, v) != v}
        labels = dict.fromkeys(tracking.tags, "true")
        if tracking.group is not None:
            labels["group"] = tracking.group
        mlflow.set_tags({_name(key): value for key, value in (labels | changed).items()})
        self._tracker = tracker
        return str(run.info.run_id)

    def where(self) -> str:
        """The experiment, and the server or what opens the database."""
        project = self.about.tracking.project
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            uri = f"sqlite:///{self.about.folder / 'mlflow.db'}"
            return f"experiment {project}; mlflow ui --backend-store-uri {uri}"
        return f"experiment {project} at {self.address or self.place.partition(' ')[2]}"

    def told(self) -> int | None:
        """The last step that is there as a whole."""
        import mlflow

        history = mlflow.MlflowClient().get_metric_history(self._run_id, STAGE)
        return max((metric.step for metric in history), default=-1)

    @property
    def _run_id(self) -> str:
        return str(self._tracker.tracker.info.run_id)

    def send(self, point: Point) -> None:
        """A metric each, at the time when it was logged: told twice, it is there once."""
        # The stage's number last: a step that has it is a step that is there as a whole.
        values = {**point.values, STAGE_STEP: float(point.step), STAGE: float(point.number)}
        self._log(values, point.at, point.time)

    def summarize(self, values: Mapping[str, float], at: int) -> None:
        """A metric each, as MLflow has no summary."""
        self._log(values, at)

    def _log(self, values: Mapping[str, float], at: int, time: float | None = None) -> None:
        named = [(_name(key), value) for key, value in values.items()]
        when = {} if time is None else {"timestamp": int(1000 * time)}
        for begin in range(0, len(named), _METRICS_AT_ONCE):
            some = dict(named[begin : begin + _METRICS_AT_ONCE])
            self._tracker.log(some, step=at, **when)

    def close(self, ending: Ending) -> None:
        """A run that will go on is called killed until it does."""
        import mlflow

        states = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
        mlflow.end_run(states[ending])

    def refuses(self, error: Exception) -> bool:
        """What MLflow calls invalid, too."""
        code = getattr(error, "error_code", None)
        return super().refuses(error) or code == "INVALID_PARAMETER_VALUE"


def _name(text: str) -> str:
    """A name as MLflow takes it."""
    return _NOT_IN_NAMES.sub("_", text)[:_LONGEST_NAME]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Settings by dotted keys; a mapping with other keys than plain ones as JSON."""
    found: dict[str, str] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value and all(map(_PLAIN_KEY.fullmatch, value)):
            found |= _flat(value, f"{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            found[_name(name)] = text[:_LONGEST_VALUE]
    return found


class Trackio(Service):
    """Trackio, which keeps its runs in files of its own."""

    name = TRACKIO

    @property
    def place(self) -> str:
        """Trackio's own folder."""
        return TRACKIO

    def open(self, identity: str | None) -> str:
        """Begin the run, or go on with it."""
        from accelerate.tracking import TrackioTracker

        tracking = self.about.tracking
        identity = identity or f"{self.about.name}-{secrets.token_hex(4)}"
        tracker = TrackioTracker(
            tracking.project,
            name=identity,
            group=tracking.group,
            config=self.about.configuration,
            resume="allow",
            embed=False,
        )
        tracker.start()
        self._tracker = tracker
        return identity

    def where(self) -> str:
        """The project, and what shows it."""
        return f"trackio show --project {self.about.tracking.project}"

    def told(self) -> int | None:
        """What its database has: rows that were still in memory at a kill are not there."""
        from trackio.sqlite_storage import SQLiteStorage

        project, remote = self.about.tracking.project, ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")
        if any(os.environ.get(name) for name in remote):
            return None
        last = SQLiteStorage.get_max_step_for_run(project, run=self._tracker.tracker.name)
        return -1 if last is None else int(last)

    def send(self, point: Point) -> None:
        """One row of the run's history."""
        values = {**point.values, STAGE: point.number, STAGE_STEP: point.step}
        self._tracker.log(values, step=point.at)

    def summarize(self, values: Mapping[str, float], at: int) -> None:
        """A row too, as Trackio has no summary."""
        self._tracker.log(dict(values), step=at)

    def close(self, ending: Ending) -> None:
        """Write what is left."""
        self._tracker.finish()


SERVICES: dict[str, type[Service]] = {one.name: one for one in (Wandb, Mlflow, Trackio)}
