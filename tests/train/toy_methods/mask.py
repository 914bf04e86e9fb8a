"""A method that keeps masks instead of removing filters."""

import torch

from toy_methods import mortal
from tpp.checkpoints.model_file import read_checkpoint, save_model


class Masked(mortal.Mortal):
    """The filters are set to zero, and held there while the network is finetuned."""

    name = "toy_mask"
    title = "Masks"

    def remove(self, source, plan, target):
        tensors, _, info = read_checkpoint(source)
        masks = {}
        for layer in plan.active_layers:
            key = f"{layer}.weight"
            masks[key] = torch.ones_like(tensors[key])
            masks[key][plan.pruned[layer]] = 0
            tensors[key] = tensors[key] * masks[key]
        save_model(
            target,
            tensors,
            architecture=info.architecture,
            preprocessing=info.preprocessing,
            extra=info.extra,
            companions={"mask": masks},
        )

    def prepare(self, model, context):
        super().prepare(model, context)
        parameters = dict(model.named_parameters())
        masks = context.companion("mask") if context.stage == "finetune" else {}
        self._held = [(parameters[name], mask.bool().logical_not()) for name, mask in masks.items()]
        assert self._held or context.stage != "finetune"

    @torch.no_grad()
    def after_step(self, step):
        for parameter, gone in self._held:
            parameter.masked_fill_(gone.to(parameter.device), 0)
        super().after_step(step)
