"""trackers.json: which run of a service a run folder is, and up to which step it has been told."""

import json
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tpp.common.errors import UserError
from tpp.common.files import write_whole
from tpp.common.reading import read_json

FILE = "trackers.json"


class Memory:
    """What a run folder keeps of its trackers; nothing of it gives access to anything.

    Args:
        folder: the run folder.
        settings: by stage, a digest of all that decides its outcome. Where a stage has been begun
            with others before, its folder was deleted: what the services have of it is of another
            run than this one, which begins anew there. None where nobody knows.
    """

    def __init__(self, folder: Path, settings: Mapping[str, str] | None) -> None:
        self._path, self._lock = folder / FILE, threading.Lock()
        known: dict[str, Any] = {}
        if self._path.exists():
            with suppress(UserError, TypeError, ValueError):  # nothing that a run should end for
                known = dict(read_json(self._path, "what trackers were told"))
        before, services = known.get("stages"), known.get("services")
        self._services: dict[str, dict[str, Any]] = services if isinstance(services, dict) else {}
        stages = before if isinstance(before, dict) else {}
        own = stages if settings is None else dict(settings)
        self.begun_anew = any(stages.get(name, one) != one for name, one in own.items())
        if self.begun_anew:
            self._services = {}
        self._stages = own

    def of(self, place: str) -> dict[str, Any]:
        """What is known of a service at a place."""
        with self._lock:
            return dict(self._services.get(place, {}))

    def id_of(self, name: str) -> str | None:
        """The identity that a service has been given at another place, if at any."""
        with self._lock:
            places = [place for place in self._services if place.split()[0] == name]
            ids = [self._services[place].get("id") for place in places]
        return next((one for one in ids if isinstance(one, str)), None)

    def note(self, place: str, **values: Any) -> None:
        """Keep something of a service at a place.

        Raises:
            OSError: it cannot be written.
        """
        with self._lock:
            known = self._services.setdefault(place, {})
            if values.items() <= known.items():
                return
            known |= values
            content = {"stages": self._stages, "services": self._services}
            write_whole(self._path, json.dumps(content, indent=1) + "\n")
