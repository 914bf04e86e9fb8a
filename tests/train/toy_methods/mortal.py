"""What the others have in common: they can be killed once, in the middle of a step."""

import os
import signal
from pathlib import Path

from tpp.methods import base


class Settings(base.Settings):
    """When to die.

    Attributes:
        dies_at: after so many steps of the stage; None for never.
        grave: file that says that it has died already.
        dies_in: kind of the stage.
    """

    dies_at: int | None = None
    grave: str = ""
    dies_in: str = "regularize"


class Mortal(base.Method):
    """A method that may be killed."""

    settings_type = Settings

    def prepare(self, model, context):
        self._here = context.stage == self.settings.dies_in

    def after_step(self, step):
        at = self.settings.dies_at
        if (
            at is not None
            and self._here
            and step + 1 == at
            and not Path(self.settings.grave).exists()
        ):
            Path(self.settings.grave).touch()
            os.kill(os.getpid(), signal.SIGKILL)
