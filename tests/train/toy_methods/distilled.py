"""A method that needs what the dense network says."""

import torch
import torch.nn.functional as F

from toy_methods import mortal


class Distilled(mortal.Mortal):
    """Finetune with the dense network's answers beside the labels (Hinton et al. 2015)."""

    name = "toy_distilled"
    title = "Distillation"

    def prepare(self, model, context):
        super().prepare(model, context)
        self._teacher = context.dense() if context.stage == "finetune" else None

    def batch_terms(self, batch, outputs):
        if self._teacher is None:
            return {}
        with torch.no_grad():
            wanted = self._teacher(batch[0]).float()
        return {
            "distillation": F.kl_div(
                outputs.log_softmax(1),
                wanted.log_softmax(1),
                log_target=True,
                reduction="batchmean",
            )
        }
