"""A profile of some of a stage's steps, as a trace that TensorBoard and Perfetto open."""

import contextlib
import gzip
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from tpp.common.files import write_whole
from train.monitor import Monitor
from train.run import Run


class ProfileObserver:
    """Profiles the steps that the configuration says, on the main rank, and writes the trace.

    Each step is named ``ProfilerStep#N``, which TensorBoard's plugin looks for, with N as logs
    count it, and has in it the parts of ``train.loop.parts``. What else is due before a step, such
    as an evaluation, lies in that step's name before the parts.

    Attributes:
        path: the trace; where there is one, a resumed stage does not miss it.
    """

    takes_time = True

    def __init__(
        self, run: Run, stage: str, monitor: Monitor, finished: Callable[[int], bool]
    ) -> None:
        self._run, self._stage, self._monitor = run, stage, monitor
        self._finished = finished
        settings = run.config.profile
        self._settings = settings if settings and settings.stage in (None, stage) else None
        # TensorBoard's plugin knows a trace by the end of its name.
        self.path = run.stage_folder(stage) / "profile" / "rank0.pt.trace.json.gz"
        # Those of all ranks go alike; the profiler is the main rank's alone.
        self._running = self._done = False
        self._first = self._at = 0
        self._profiler: profile | None = None
        self._mark: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()

    def begin(self, step: int) -> None:
        """Before the loop goes on from ``step`` steps: start, if it is to begin with the next."""
        if self._settings is None or self._running:
            return
        if step >= self._settings.last:
            self._done = True
            if not self.path.exists():
                self._say(f"no trace: the stage goes on after step {step}")
        elif step >= self._settings.start - 1:
            self._start(step)

    def due(self, step: int, *, last: bool) -> bool:
        """Before the first step that is profiled (see :meth:`begin`), and after each one."""
        if self._settings is None or self._done:
            return False
        return self._running or (not last and 0 < step >= self._settings.start - 1)

    def look(self, step: int, network: nn.Module) -> None:
        """Go on to the next step, or write the trace."""
        assert self._settings is not None
        if not self._running:
            self._start(step)
            return
        self._at = step
        if step >= self._settings.last or self._finished(step):
            self._write()
        else:
            self._mark.__exit__(None, None, None)
            self._begin_step(step + 1)

    def close(self) -> None:
        """The stage has ended, maybe early: write what there is."""
        if self._running:
            self._write()
        elif self._settings is not None and not self._done:
            self._say(f"no trace: this ended before step {self._settings.start}")

    def _start(self, step: int) -> None:
        self._running, self._first, self._at = True, step + 1, step
        if not self._run.is_main:
            return
        activities = [ProfilerActivity.CPU]
        if self._run.accelerator.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        else:  # it calls it an error that a PyTorch made for CUDA finds no GPU
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        self._profiler = profile(activities=activities)
        self._profiler.start()
        self._begin_step(step + 1)

    def _begin_step(self, number: int) -> None:
        if self._profiler is not None:
            self._mark = record_function(f"ProfilerStep#{number}")
            self._mark.__enter__()

    def _write(self) -> None:
        self._running, self._done = False, True
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        self._mark.__exit__(None, None, None)
        try:
            profiler.stop()
            if self._at < self._first:
                self._say(f"no trace: this ended in step {self._first}")
                return
            with tempfile.TemporaryDirectory() as folder:
                trace = Path(folder) / "trace.json"
                profiler.export_chrome_trace(str(trace))
                content = gzip.compress(trace.read_bytes(), compresslevel=6)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, content)
        except (OSError, RuntimeError) as error:  # a profile is not worth a run
            self._say(f"{self.path}: cannot be written ({error}); going on without it")
        else:
            self._say(f"steps {self._first} to {self._at}: {self.path}")

    def _say(self, message: str) -> None:
        self._monitor.say(f"{self._stage}: profile: {message}")
