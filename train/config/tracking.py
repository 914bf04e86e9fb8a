"""Which services a run is shown in, and that no secret stands in its configuration."""

import netrc
import os
import re
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from tpp.common.errors import UserError
from tpp.common.registry import pick
from tpp.common.settings import MAY_DIFFER, Names, Section

TENSORBOARD, WANDB, MLFLOW, TRACKIO = "tensorboard", "wandb", "mlflow", "trackio"
# What `import` calls each, and what pip does.
_PACKAGES = {TENSORBOARD: "tensorboard", WANDB: "wandb", MLFLOW: "mlflow", TRACKIO: "trackio"}
_SECRET_KEY = re.compile(
    r"(^|[_.-])(token|secret|passw(or)?d|api_?key|access_?key|secret_?key|credentials?)$",
    re.IGNORECASE,
)
_SECRET_VALUE = re.compile(r"\b(hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{30,}|AKIA[A-Z0-9]{16})\b")
HOLDS_A_SECRET = "holds a password or a token"
_PASSWORD_IN_URL = re.compile(r"://[^/\s@:]*:[^/\s@]+@")
# Where wandb finds a key, beside the file of `wandb login`.
_WANDB_KEYS = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")
_WANDB_QUIET = ("offline", "dryrun", "disabled")


def known_tracker(name: str) -> str:
    """The name of a tracker, if it is one.

    Raises:
        UserError: there is none of that name; the nearest is named.
    """
    pick(_PACKAGES, name, "unknown tracker")
    return name


def _known(name: str) -> str:
    try:
        return known_tracker(name)
    except UserError as error:
        raise ValueError(str(error)) from None


TrackerName = Annotated[str, AfterValidator(_known), Names((*_PACKAGES,))]


class TrackingSection(Section):
    """What the services that ``trackers`` names are told (docs/trackers.md). Where they are, and
    the keys to them, are the environment's (``WANDB_API_KEY``, ``MLFLOW_TRACKING_URI``).

    Attributes:
        project: the project of wandb and Trackio, and the experiment of MLflow.
        group: what several runs have in common; null for the sweep's name in a sweep, and otherwise
            none.
        tags: words to find the run by.
        layers: whether the curves of single layers go there too; TensorBoard has them in any case.
        wait (seconds): how long the end of a run waits for services that have not taken everything
            yet; at most five where a signal ends it.

    Example:
        {project: resnet50, group: ablation, tags: [imagenet, half], layers: true, wait: 120}
    """

    project: Annotated[str, Field(min_length=1, max_length=128), MAY_DIFFER] = "tpp"
    group: Annotated[str | None, Field(min_length=1, max_length=128), MAY_DIFFER] = None
    tags: Annotated[list[Annotated[str, Field(min_length=1, max_length=64)]], MAY_DIFFER] = []
    layers: Annotated[bool, MAY_DIFFER] = False
    wait: Annotated[float, Field(ge=0, le=600), MAY_DIFFER] = 30.0


def services_of(trackers: Iterable[str]) -> list[str]:
    """The trackers that are told by what is in log.jsonl: all but TensorBoard, each once."""
    return [name for name in dict.fromkeys(trackers) if name != TENSORBOARD]


def without_passwords(text: str) -> str:
    """A text without the user and password that its URLs may hold."""
    return _PASSWORD_IN_URL.sub("://", text)


def check_trackers(trackers: Iterable[str]) -> None:
    """Check that a run's trackers can be used here, without asking any of them.

    Raises:
        UserError: a package or wandb's key is missing; says what to do.
    """
    for name in services_of(trackers):
        if find_spec(_PACKAGES[name]) is None:
            raise UserError(
                f"trackers: {name} is not installed; pip install {_PACKAGES[name]} "
                "(docs/trackers.md says which version), or leave it out"
            )
        if name == WANDB and not _wandb_can_start():
            raise UserError(
                "trackers: wandb: there is no key; set WANDB_API_KEY or run wandb login, or set "
                "WANDB_MODE=offline to keep everything in the run folder"
            )


def _wandb_can_start() -> bool:
    """Whether wandb would begin without asking at the terminal."""
    mode = os.environ.get("WANDB_MODE", "")
    if mode in _WANDB_QUIET or any(os.environ.get(name) for name in _WANDB_KEYS):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    for path in filter(None, (os.environ.get("NETRC"), "~/.netrc", "~/_netrc")):
        try:
            if netrc.netrc(Path(path).expanduser()).authenticators(host) is not None:
                return True
        except (OSError, RuntimeError, netrc.NetrcParseError):
            continue
    return False


def refuse_secrets(data: Any, key: str = "") -> None:
    """Refuse a configuration that holds a secret: it is written into run folders, and sent.

    Args:
        data: as it was read from a file, with overrides.
        key: of it.

    Raises:
        ValueError: names the key, and not the value.
    """
    if isinstance(data, Mapping):
        for name, value in data.items():
            refuse_secrets(value, f"{key}.{name}".strip("."))
    elif isinstance(data, list | tuple):
        for value in data:
            refuse_secrets(value, key)
    elif isinstance(data, str) and data and _is_secret(key, data):
        raise ValueError(
            f"{key}: looks like it {HOLDS_A_SECRET}, which would be kept in config.yaml; "
            "services take theirs from the environment"
        )


def _is_secret(key: str, text: str) -> bool:
    found = _SECRET_KEY.search(key) or _SECRET_VALUE.search(text) or _PASSWORD_IN_URL.search(text)
    return found is not None
