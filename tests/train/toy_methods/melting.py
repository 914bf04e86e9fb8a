"""A method that removes filters while it trains."""

import torch

from toy_methods import mortal
from tpp.models.layers import prunable_layers
from tpp.plan import PruningPlan


class Melting(mortal.Mortal):
    """After two and after four steps a quarter of the filters goes, those of the smallest norms."""

    name = "toy_melting"
    title = "Melting"
    picks = "after"

    def prepare(self, model, context):
        super().prepare(model, context)
        self._model = model if context.stage == "regularize" else None

    def shrink(self, step):
        if self._model is None or step not in (2, 4):
            return None
        layers = {n: m for n, m in prunable_layers(self._model).items() if n.endswith(".conv1")}
        pruned = {}
        for name, layer in layers.items():
            norms = layer.weight.detach().abs().flatten(1).sum(1)
            pruned[name] = sorted(torch.argsort(norms, stable=True)[: len(norms) // 4].tolist())
        return PruningPlan({n: len(m.weight) for n, m in layers.items()}, pruned)
