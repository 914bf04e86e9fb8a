"""Linear over-parameterisation, which can be killed."""

from toy_methods import mortal
from tpp.methods import linear_overparam


class Settings(linear_overparam.Settings, mortal.Settings):
    """Those of both."""


class Overparam(linear_overparam.LinearOverparam, mortal.Mortal):
    """Factors, and the dense network as teacher."""

    name = "toy_overparam"
    title = "Factors"
    settings_type = Settings

    def prepare(self, model, context):
        mortal.Mortal.prepare(self, model, context)
        linear_overparam.LinearOverparam.prepare(self, model, context)
