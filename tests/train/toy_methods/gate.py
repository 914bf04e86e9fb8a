"""A method with parameters of its own: a factor for each channel behind a BatchNorm."""

import torch
from torch import nn

from toy_methods import mortal


class Gated(mortal.Mortal):
    """Train factors towards 0 beside the weights; at the end they are part of the BatchNorm."""

    name = "toy_gate"
    title = "Gates"
    picks = "after"

    def modify(self, model, stage):
        self._norms = [] if stage != "regularize" else [
            module for name, module in model.named_modules() if name.endswith(".bn1")
        ]  # fmt: skip
        for norm in self._norms:
            norm.register_parameter("gate", nn.Parameter(torch.ones_like(norm.weight)))
            norm.gate_hook = norm.register_forward_hook(_gate)

    def restore(self, model):
        for module in model.modules():
            if hasattr(module, "gate"):
                with torch.no_grad():
                    module.weight *= module.gate
                    module.bias *= module.gate
                module.gate_hook.remove()
                del module.gate, module.gate_hook

    def loss_terms(self):
        if not self._norms:
            return {}
        return {"gates": 0.01 * sum(norm.gate.abs().sum() for norm in self._norms)}


def _gate(norm, inputs, output):
    return output * norm.gate.view(1, -1, 1, 1)
