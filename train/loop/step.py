"""One optimiser step's gradients."""

import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from tpp.methods.base import Method
from train.distributed.engine import Engine
from train.loop.meter import Meter

Batches = Iterator[tuple[Tensor, Tensor]]


def accumulate(
    engine: Engine,
    batches: Batches,
    method: Method,
    meter: Meter,
    step: int,
    *,
    accumulation: int,
    label_smoothing: float,
) -> Tensor:
    """Gather one step's gradients over its micro-batches; returns the loss, detached."""
    total = torch.zeros((), device=engine.accelerator.device)
    for micro in range(accumulation):
        asked = time.perf_counter()
        images, labels = next(batches)
        meter.count(len(labels), time.perf_counter() - asked)
        last = micro == accumulation - 1
        with engine.micro_batch(last=last):
            with engine.autocast():
                logits = engine.model(images)
            logits = logits.float()
            loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
            loss = loss / accumulation
            meter.add("task", loss)
            # Of mixed images, the class that has the larger share.
            classes = labels if labels.dim() == 1 else labels.argmax(1)
            meter.add("correct", (logits.argmax(1) == classes).sum())
            if last:
                for name, term in method.loss_terms(step).items():
                    meter.add(name, term)
                    loss = loss + term
            engine.backward(loss, last=last)
        total += loss.detach()
    return total
