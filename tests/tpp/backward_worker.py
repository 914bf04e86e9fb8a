"""Backward passes under DeepSpeed, right and wrong; started by test_backward.py.

    backward_worker.py FOLDER

Writes FOLDER/found.json: by ZeRO stage, micro-batches and way, what was raised, or how far the
penalty's gradient is from what one process computes of it, relative.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rank_worker as worker
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

Way = Callable[[Any, Tensor, Tensor, int], None]


def as_documented(engine: Any, task: Tensor, penalty: Tensor, parts: int) -> None:
    engine.backward(task + parts * penalty)


def by_the_loss(engine: Any, task: Tensor, penalty: Tensor, parts: int) -> None:
    (task + penalty).backward()


def by_the_penalty(engine: Any, task: Tensor, penalty: Tensor, parts: int) -> None:
    engine.backward(task)
    penalty.backward()


def twice(engine: Any, task: Tensor, penalty: Tensor, parts: int) -> None:
    engine.backward(task)
    engine.backward(parts * penalty)


WAYS: tuple[Way, ...] = (as_documented, by_the_loss, by_the_penalty, twice)


def step(way: Way, stage: int, parts: int) -> dict[str, Tensor]:
    """The gradient that the optimiser applied; the task's part of it is 0."""
    import deepspeed

    net = worker.network()
    before = {key: value.detach().clone() for key, value in net.named_parameters()}
    regularizer = worker.regularizer_of(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=worker.READING_RATE)
    config = worker.deepspeed_config(stage, parts)
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config)
    worker.freeze_norms(engine)
    for images, labels in worker.micro_batches_of(0, 1, parts):
        task = 0.0 * F.cross_entropy(engine(images), labels)
        if engine.is_gradient_accumulation_boundary():
            way(engine, task, regularizer.penalty(worker.STEP), parts)
        else:
            engine.backward(task)
        engine.step()
    after = dict(net.named_parameters())
    return {key: (before[key] - after[key].detach()) / worker.READING_RATE for key in before}


def truth() -> dict[str, Tensor]:
    net = worker.network().double()
    worker.regularizer_of(net).penalty(worker.STEP).backward()
    zeros = {key: torch.zeros_like(value) for key, value in net.named_parameters()}
    return zeros | {k: p.grad for k, p in net.named_parameters() if p.grad is not None}


def main() -> None:
    """Go through all of them."""
    dist.init_process_group("gloo")
    worker.without_shared_memory_kernel()
    expected, found = truth(), {}
    for stage in worker.STAGES:
        for parts in worker.ACCUMULATIONS:
            for way in WAYS:
                try:
                    gradient = step(way, stage, parts)
                except Exception as error:
                    said: Any = f"{type(error).__name__}: {error}"
                else:
                    apart = [(gradient[k] - expected[k]).norm() / v.norm().clamp(min=1e-9)
                             for k, v in expected.items()]  # fmt: skip
                    said = max(apart).item()
                found[f"{stage} {parts} {way.__name__}"] = said
    (Path(sys.argv[1]) / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
