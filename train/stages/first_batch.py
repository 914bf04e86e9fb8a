"""What a method may ask of a stage's first step before there is an optimiser: its gradients."""

from collections.abc import Sequence
from contextlib import closing

import torch
from torch import Tensor, nn
from torch.func import functional_call

from train.distributed.collectives import EveryRankError, mean_over_ranks
from train.distributed.engine import forward_pass
from train.loop.loop import seed, seed_of_rank
from train.run import Run


class FirstBatch:
    """The images of a stage's first step, on all ranks.

    Args:
        run: the run.
        name: of the stage.
        network: what it trains, placed and not yet in an engine.
    """

    def __init__(self, run: Run, name: str, network: nn.Module) -> None:
        self._run, self._name, self._network = run, name, network

    def gradients(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of the task's loss, see :class:`tpp.methods.base.TrainingContext`.

        In training mode, with the images, the augmentation, the random numbers and the precision
        of the first step; BatchNorm's running statistics stay what they are.

        Args:
            tensors: leaves that the network computes with, of any shapes.

        Returns:
            one for each, 0 where the loss does not depend on it.

        Raises:
            EveryRankError: the gradients are not finite.
        """
        run, network = self._run, self._network
        device, scaler = run.accelerator.device, run.accelerator.scaler
        run.at(f"stage {self._name}, gradients before the first step")
        modes = {module: module.training for module in network.modules()}
        scale = 1.0 if scaler is None else scaler.get_scale()
        network.train()
        try:
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                found = self._of_loss(tensors, scale)
                # In float16 the loss is scaled up, and down again as long as that was too much.
                while scaler is not None and not _finite(found) and scale > 1:
                    scale /= 2
                    found = self._of_loss(tensors, scale)
        finally:
            for module, training in modes.items():
                module.training = training
        if not _finite(found):
            raise EveryRankError(
                f"stage {self._name}: the gradients before the first step are not finite; the "
                "weights that it begins with, or its images, are no good"
            )
        return found

    def _of_loss(self, tensors: Sequence[Tensor], scale: float) -> list[Tensor]:
        """The mean over micro-batches and ranks, computed of ``scale`` times the loss."""
        run = self._run
        task, accumulation = run.data.task(self._name), run.config.training.accumulation
        task.before_step(0, run.accelerator.device)
        buffers = {name: buffer.clone() for name, buffer in self._network.named_buffers()}
        forward = forward_pass(
            lambda inputs: functional_call(self._network, buffers, (inputs,)), run.accelerator
        )
        sums = [
            torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
            for tensor in tensors
        ]
        seed(run.accelerator.device, seed_of_rank(run.config.seed, run.accelerator.process_index))
        with closing(run.data.train_batches(self._name, 0, 1)) as batches:
            for batch in batches:
                loss = task.loss(forward, batch)[0] / accumulation * scale
                found = torch.autograd.grad(
                    loss, tensors, allow_unused=True, materialize_grads=True
                )
                for total, gradient in zip(sums, found, strict=True):
                    total += gradient
        return [mean_over_ranks(total) / scale for total in sums]


def _finite(tensors: Sequence[Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)
