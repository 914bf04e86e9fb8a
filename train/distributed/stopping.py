"""Stop requests: a signal ends the run within about a second, with a checkpoint of that very step.

SLURM sends SIGUSR1 ahead of a time limit (``--signal``) and SIGTERM at a preemption, to all ranks
or to one, and each meets it at another moment. The ranks agree on the step to stop at.
"""

import signal
import time
from types import FrameType

import torch
import torch.distributed as dist

from train.distributed.collectives import world_size

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
# How often the ranks ask each other, in seconds and at most so many steps.
_ASK_EVERY = 1.0
_MOST_STEPS = 100


class Stopped(Exception):  # noqa: N818 - nothing went wrong
    """The run ends here because it was asked to, and goes on when it is started again."""


class Reached(Stopped):
    """The run has come to the step up to which it was asked to go."""


class StopRequest:
    """Listens for the signals, and finds the step at which all ranks stop.

    A signal is only noted; nothing of a step is broken off.
    """

    def __init__(self) -> None:
        self._signal = 0
        self._next_ask = 0
        self._asked = (0, 0.0)  # at which step, and when

    def listen(self) -> None:
        """Note the signals from now on; for a process's main thread."""
        for number in SIGNALS:
            signal.signal(number, self._note)

    def agreed(self, step: int) -> str | None:
        """Whether all ranks are to stop after ``step`` steps; all have to ask after every step.

        They ask each other about once a second, so that it costs nothing to speak of: one
        reduction of two numbers.

        Returns:
            The signal's name; None to go on.
        """
        if world_size() == 1:
            return _name(self._signal)
        if self._asked[0] <= step < self._next_ask:
            return None
        before, then = self._asked
        now = time.monotonic()
        a_step = (now - then) / (step - before) if then and step > before else _ASK_EVERY
        number, slowest = self._ask(a_step)
        # From the slowest rank's time, and so the same number of steps on every rank.
        self._next_ask = step + min(max(int(_ASK_EVERY / max(slowest, 1e-6)), 1), _MOST_STEPS)
        self._asked = step, now
        return _name(number)

    def agreed_now(self) -> str | None:
        """Whether all ranks are to stop where no steps are counted; all have to ask together."""
        self._next_ask = 0
        self._asked = (0, 0.0)
        return _name(self._signal if world_size() == 1 else self._ask(0.0)[0])

    def _ask(self, seconds: float) -> tuple[int, float]:
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        mine = torch.tensor([self._signal, seconds], dtype=torch.float64, device=device)
        dist.all_reduce(mine, op=dist.ReduceOp.MAX)
        number, slowest = mine.tolist()
        return int(number), slowest

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = number


def message_of(name: str, where: str) -> str:
    """What is said of a stop by the signal ``name``."""
    return f"stopped by {name} {where}; started again, the run goes on from there"


def _name(number: int) -> str | None:
    return signal.Signals(number).name if number else None
