"""The parts of a step by name, for a profile."""

import contextlib
from typing import Any

import torch
from torch.profiler import record_function

PARTS = ("load", "forward", "penalty", "backward", "optimiser", "log")
# What a captured step has in the place of all but "load".
REPLAY = "replay"
_UNNAMED: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()


def part(name: str) -> contextlib.AbstractContextManager[Any]:
    """For a part of a step, one of ``PARTS`` or ``REPLAY``; named where a profiler looks.

    ``record_function`` itself takes 9 microseconds where none does, asking takes 0.1.
    """
    return record_function(name) if torch.autograd._profiler_enabled() else _UNNAMED
