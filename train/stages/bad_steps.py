"""What a stage does about a bad step: write it down, then stop, go back, or go on without it."""

import json
import math
from collections.abc import Callable

from tpp.checkpoints.training_state import state_folders
from tpp.common.files import write_whole
from train.distributed.collectives import EveryRankError
from train.loop.bad_steps import BadStep
from train.monitor import Monitor
from train.run import Run
from train.run_folder.checkpoints import CHECKPOINTS, CheckpointWriter


class RollBack(Exception):  # noqa: N818 (what it asks for)
    """Go back to the newest checkpoint, and on after this bad step."""

    def __init__(self, bad: BadStep) -> None:
        self.bad = bad


class BadSteps:
    """Called with each bad step; raises, or returns to go on without it.

    Args:
        run: the run.
        stage: name of the stage.
        learning_rate: of a 0-based step.
        monitor: tells.
        writer: of the checkpoints, on the main rank.
        count: how many there were before.

    Attributes:
        count: how many there were.
    """

    def __init__(
        self,
        run: Run,
        stage: str,
        learning_rate: Callable[[int], float],
        monitor: Monitor,
        writer: CheckpointWriter | None,
        count: int,
    ) -> None:
        self._run, self._stage, self._learning_rate = run, stage, learning_rate
        self._monitor, self._writer = monitor, writer
        self.count = count

    def __call__(self, bad: BadStep) -> None:
        """Write down which images it was, and do what ``training.on_bad_step`` says.

        Raises:
            EveryRankError: the run ends.
            RollBack: it goes back.
        """
        training, folder = self._run.config.training, self._run.stage_folder(self._stage)
        lr = self._learning_rate(bad.step - 1)
        reason = bad.reason(training.max_gradient_norm)
        path = folder / f"bad_step-{bad.step:08d}.json"
        # JSON has no numbers that are not finite.
        found = {k: v if math.isfinite(v) else str(v) for k, v in vars(bad).items()}
        if self._run.is_main:
            images = self._run.data.images_of(self._stage, bad.step - 1)
            content = {"stage": self._stage, **found, "learning_rate": lr, "images": images}
            write_whole(path, json.dumps(content, indent=1) + "\n")
        what = f"stage {self._stage}: step {bad.step}: {reason} (learning rate {lr:g})"
        self._monitor.event("bad_step", **found)
        self.count += 1
        if training.on_bad_step == "stop" or self.count > training.max_bad_steps:
            if self._writer is not None:
                self._writer.wait()
            newest = next(iter(state_folders(folder / CHECKPOINTS)), None)
            often = (
                ""
                if training.on_bad_step == "stop"
                else f"; training.max_bad_steps allows {training.max_bad_steps} of them"
            )
            raise EveryRankError(
                f"{what}{often}; its images are named in {path}; "
                + (f"the last good checkpoint is {newest}" if newest else "there is no checkpoint")
            )
        self._monitor.say(f"{what}; left out, its images are named in {path}")
        if training.on_bad_step == "rollback":
            raise RollBack(bad)
