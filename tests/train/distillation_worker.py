"""A rank that compares distilled gradients with those of the whole batch; see test_distilled_runs.

    distillation_worker.py FOLDER

Under DistributedDataParallel in float64; under DeepSpeed's ZeRO 1, which keeps its gradients to
itself, a step of SGD in float32.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn

from tpp.methods.base import Method, Settings
from train.config.sections import TrainingSection
from train.distillation.distillation import Distillation
from train.distillation.settings import DistillSection
from train.distributed.accelerator import make_accelerator, make_engine
from train.distributed.deepspeed_engine import deepspeed_plugin
from train.loop.meter import Meter
from train.loop.step import gradients
from train.tasks import make_task

ZERO1 = Path(__file__).resolve().parents[2] / "launch" / "deepspeed" / "zero1.json"
PLAIN = {"mean": [0.0] * 3, "std": [1.0] * 3, "channels": 3}
WEIGHT = {"logits": 0.6, "features": 30.0}
T, LR = 2.5, 0.1


def network(width: int, seed: int) -> nn.Sequential:
    """Parts 1 and 3 have places."""
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv2d(3, width, 3), nn.Tanh(), nn.Conv2d(width, width, 4), nn.Tanh()),
        *(nn.Flatten(), nn.Linear(9 * width, 5)),
    )


def truth(
    kind: str, student: nn.Sequential, teacher: nn.Sequential, images: Tensor, labels: Tensor
) -> list[Tensor]:
    """Gradients of the loss of all images, written down."""
    logits, wanted = student(images), teacher(images).detach()
    loss = -logits.log_softmax(1)[torch.arange(len(labels)), labels].mean()
    if kind == "logits":
        p, q = (wanted / T).softmax(1), (logits / T).softmax(1)
        soft = T * T * (p * (p.log() - q.log())).sum(1).mean()
        loss = (1 - WEIGHT[kind]) * loss + WEIGHT[kind] * soft
    else:
        for last in (2, 4):
            a, b = (part[:last](images).square().sum(1).flatten(1) for part in (student, teacher))
            a, b = (v / v.square().sum(1, keepdim=True).sqrt() for v in (a, b))
            loss = loss + WEIGHT[kind] * (a - b).square().mean()
    return [*torch.autograd.grad(loss, list(student.parameters()))]


def compare(engine_name: str, kind: str) -> None:
    """Raise where this rank's gradients, or the weights after a step, are others."""
    zero = engine_name == "zero1"
    dtype = torch.float32 if zero else torch.float64
    training = TrainingSection(batch_size=16, deepspeed=str(ZERO1) if zero else None)
    accelerator = make_accelerator("fp32", 60.0, plugin=deepspeed_plugin(training))
    rank, ranks = accelerator.process_index, accelerator.num_processes
    assert ranks == 2
    numbers = torch.Generator().manual_seed(2)
    images = torch.randn(16, 3, 8, 8, generator=numbers, dtype=torch.float64)
    labels = torch.randint(0, 5, (16,), generator=numbers)
    student, teacher = network(3, 0).to(dtype), network(4, 1).to(dtype)
    if zero:  # as configs/imagenet has it
        student.to(memory_format=torch.channels_last)
    wanted = truth(kind, network(3, 0).double(), network(4, 1).double(), images, labels)
    distillation = Distillation(
        DistillSection(
            kind=kind,
            weight=WEIGHT[kind],
            temperature=T if kind == "logits" else None,
        ),
        student,
        teacher.eval().requires_grad_(False),
        example=torch.zeros(1, 3, 8, 8, dtype=dtype),
        preprocessing=PLAIN,
        key="distill",
    )
    before = [parameter.detach().clone() for parameter in student.parameters()]
    engine = make_engine(accelerator, student, torch.optim.SGD(student.parameters(), lr=LR))
    engine.model.train()
    mine = slice(rank, None, ranks)
    batches = zip(images[mine].to(dtype).chunk(4), labels[mine].chunk(4), strict=True)
    gradients(
        engine,
        batches,
        make_task({"kind": "classification"}),
        Method(Settings()),
        Meter(accelerator),
        accumulation=4,
        distillation=distillation,
    )
    if zero:
        engine.step()
        found = [(b - p.detach()) / LR for b, p in zip(before, student.parameters(), strict=True)]
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)
    else:
        for parameter, other in zip(student.parameters(), wanted, strict=True):
            torch.testing.assert_close(parameter.grad, other, rtol=1e-10, atol=1e-13)
    accelerator.free_memory()
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def main() -> None:
    """Compare all; the process group is made, and reset, by each."""
    torch.set_num_threads(1)
    done = []
    for engine in ("ddp", "zero1"):
        for kind in ("logits", "features"):
            compare(engine, kind)
            done.append(f"{engine} {kind}")
    if int(os.environ["RANK"]) == 0:
        (Path(sys.argv[1]) / "compared.json").write_text(json.dumps(done))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
