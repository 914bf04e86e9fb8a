"""Feature-flow regularisation, which can be killed."""

from toy_methods import mortal
from tpp.methods import ffr


class Settings(ffr.Settings, mortal.Settings):
    """Those of both."""


class Flow(ffr.FFR, mortal.Mortal):
    """Length and curvature of the features' paths."""

    name = "toy_flow"
    title = "Flow"
    settings_type = Settings

    def prepare(self, model, context):
        mortal.Mortal.prepare(self, model, context)
        ffr.FFR.prepare(self, model, context)
