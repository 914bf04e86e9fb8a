"""log.jsonl: what happened, line by line."""

import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from tpp.common.errors import UserError
from tpp.common.files import write_whole
from tpp.common.reading import parse_json


def say(message: str) -> None:
    """Print a line on standard output at once, so that a job's log can be followed."""
    print(message, file=sys.stdout, flush=True)


def drop_later_entries(log: Path, stage: str, start_step: int) -> None:
    """Remove what a killed process logged of steps that are now done again."""
    # What is logged before the first step is logged again as well.
    last = start_step or -1
    if not log.exists():
        return
    kept = []
    for line in log.read_text().splitlines():
        try:
            entry = parse_json(line, str(log))
            later = entry["stage"] == stage and entry.get("step", 0) > last
        except (UserError, KeyError, TypeError, AttributeError):
            continue  # the line that was being written at the kill
        if not later:
            kept.append(line)
    write_whole(log, "".join(f"{line}\n" for line in kept))


# Steps and values beyond it are none that a run has, and more than an axis can hold.
LARGEST_LOG = 1e15
LogEntry = dict[str, Any]


def read_log(path: Path) -> dict[tuple[str, str], list[LogEntry]]:
    """The entries that have a step, by event and stage, in rising order of steps."""
    log: dict[tuple[str, str], list[LogEntry]] = defaultdict(list)
    if not path.exists():
        return log
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = parse_json(line, str(path))
            event, stage, step = str(entry["event"]), str(entry["stage"]), int(entry["step"])
        except (UserError, ValueError, KeyError, TypeError, OverflowError):
            continue  # has no step, or was being written when the process was killed
        if abs(step) > LARGEST_LOG:
            continue
        entries = log[event, stage]
        # A stage that was begun again logs its steps again: what it said last holds.
        while entries and entries[-1]["step"] >= step:
            entries.pop()
        entries.append({**entry, "step": step})
    return log
