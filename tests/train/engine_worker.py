"""A rank that trains the same network with every engine; run by torchrun, see test_engines.py.

    engine_worker.py FOLDER

Writes, on the main rank, ``FOLDER/ENGINE-CASE.safetensors`` with the weights after 24 steps of
TPP, and those of runs that were broken off half way and taken up, with the same or another engine.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import save_file
from torch import Tensor

from tpp.methods import method_class
from tpp.methods.base import Method, TrainingContext
from tpp.models.architecture import build_model
from tpp.selection.selection import Selection
from train.config.optimizer import OptimizerSection
from train.config.sections import TrainingSection
from train.distributed.accelerator import make_accelerator, make_engine
from train.distributed.collectives import broadcast_buffers
from train.distributed.deepspeed_engine import deepspeed_plugin
from train.loop.bad_steps import StepCheck
from train.loop.loop import LoopSettings, train
from train.loop.optim import make_optimizer
from train.tasks import make_task

STEPS, HALF, BATCH, LR = 24, 12, 32, 0.001
CONFIGS = Path(__file__).resolve().parents[2] / "launch" / "deepspeed"
ENGINES: dict[str, str | None] = {
    "ddp": None,
    **{f"zero{stage}": str(CONFIGS / f"zero{stage}.json") for stage in range(3)},
}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"accumulation": 2},
    "clipping": {"clip_gradient_norm": 0.5},
    "bf16": {"precision": "bf16"},
}
# With counts of steps beside the tensors, and parameters in groups that are in no order of theirs.
# An epsilon this large keeps rounding from deciding which way small gradients go.
ADAMW: dict[str, Any] = {
    "name": "adamw",
    "lr": LR,
    "betas": [0.8, 0.95],
    "eps": 1e-3,
    "weight_decay": 0.1,
    "decay_norms_and_biases": False,
    "head_lr_factor": 2.0,
}
RESUMED_ADAMW = [("zero1", "zero1"), ("zero2", "zero2"), ("zero2", "ddp"), ("ddp", "zero1")]
# On four ranks all at once, on two each by itself.
ALL = {key: value for case in CASES.values() for key, value in case.items()}
# Broken off after half of the steps under the one and taken up under the other.
RESUMED = [
    ("zero1", "zero1"),
    ("zero2", "zero2"),
    ("zero0", "zero0"),
    ("zero1", "ddp"),
    ("ddp", "zero2"),
]
# Two summands have one order; from three on, the order in which ranks are summed shows.
RESUMED_ON_FOUR = [("ddp", "ddp"), ("zero1", "zero1"), ("zero2", "zero2")]


def method() -> Method:
    """TPP whose growth ends after 10 steps; its layers are zeroed from step 12 on, one by one."""
    tpp = method_class("tpp")
    settings = {"delta": 0.2, "update_interval": 2, "stabilize_steps": 40, "zero_out_interval": 2}
    return tpp(tpp.settings_type(**settings))


def batches(accumulation: int, first: int) -> Any:
    """This rank's share of batches of 32 images that everyone draws alike."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for step in range(first, STEPS):
        numbers = torch.Generator().manual_seed(step)
        images = torch.randn(BATCH, 3, 16, 16, generator=numbers)
        labels = torch.randint(0, 4, (BATCH,), generator=numbers)
        mine = slice(rank, None, ranks)
        parts = zip(images[mine].chunk(accumulation), labels[mine].chunk(accumulation), strict=True)
        yield from parts


def run(
    engine_name: str,
    case: dict[str, Any],
    until: int,
    taken_up: dict[str, Any] | None = None,
    optim: OptimizerSection = OptimizerSection(lr=LR),  # noqa: B008 (frozen in effect)
) -> dict[str, Any]:
    """Train up to ``until`` steps; returns what a checkpoint keeps, and the norms."""
    training = TrainingSection(batch_size=BATCH, deepspeed=ENGINES[engine_name], **case)
    accelerator = make_accelerator(training.precision, 60.0, plugin=deepspeed_plugin(training))
    torch.manual_seed(0)
    network = build_model("cifar_resnet8", 4)
    # Per-rank statistics are DDP's own business; what is compared is the step.
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.0
    selection = Selection(ratios={"layer*.conv1": 0.5})
    tpp = method()
    context = TrainingContext(
        stage="regularize",
        plan=selection.select(network),
        selection=selection,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        example_input=torch.zeros(1, 3, 16, 16),
    )
    if taken_up is not None:
        network.load_state_dict(taken_up["model"])
    tpp.prepare(network, context)
    optimizer = make_optimizer(network, optim)
    engine = make_engine(accelerator, network, optimizer, clip=training.clip_gradient_norm)
    if taken_up is not None:
        tpp.load_state_dict(taken_up["method"])
        engine.load_state_dict(taken_up["optimizer"])
    start = HALF if taken_up is not None else 0
    norms: list[float] = []
    train(
        engine,
        batches(training.accumulation, start),
        make_task({"kind": "classification"}),
        tpp,
        LoopSettings(
            lr=lambda step: LR,
            finished=lambda step: step >= until,
            accumulation=training.accumulation,
            log_every=1,
        ),
        check=StepCheck(network, max_norm=None, at_once=False),
        start_step=start,
        on_bad_step=lambda bad: None,
        on_report=lambda step, report: norms.append(report.gradient_norm),
        on_step=lambda step: False,
    )
    broadcast_buffers(network)
    found = {
        "model": {key: value.clone() for key, value in network.state_dict().items()},
        "optimizer": engine.state_dict(),
        "method": tpp.state_dict(),
        "norms": norms,
    }
    accelerator.free_memory()
    os.environ.pop("ACCELERATE_USE_DEEPSPEED")
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return found


def main() -> None:
    """Run every engine in every case."""
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])

    def keep(name: str, found: dict[str, Any]) -> None:
        if dist.get_rank() == 0:
            momentum = {
                f"momentum/{number}": entries.get("momentum_buffer", entries.get("exp_avg"))
                for number, entries in found["optimizer"]["state"].items()
            }
            tensors: dict[str, Tensor] = {**found["model"], **momentum}
            tensors["norms"] = torch.tensor(found["norms"], dtype=torch.float64)
            save_file(
                {k: v.contiguous() for k, v in tensors.items()}, folder / f"{name}.safetensors"
            )

    # The process group is made, and reset, by each run.
    on_two = int(os.environ["WORLD_SIZE"]) == 2
    for case, settings in (CASES if on_two else {"all": ALL}).items():
        for engine in ENGINES:
            keep(f"{engine}-{case}", run(engine, settings, STEPS))
    for first, second in RESUMED if on_two else RESUMED_ON_FOUR:
        settings = {} if on_two else ALL
        keep(f"{first}-{second}-resumed", run(second, settings, STEPS, run(first, settings, HALF)))
    if on_two:
        adamw = OptimizerSection(**ADAMW)
        for engine in ENGINES:
            keep(f"{engine}-adamw", run(engine, {}, STEPS, optim=adamw))
        for first, second in RESUMED_ADAMW:
            half = run(first, {}, HALF, optim=adamw)
            keep(f"{first}-{second}-adamw-resumed", run(second, {}, STEPS, half, adamw))
    if dist.get_rank() == 0:
        (folder / "ranks.json").write_text(json.dumps(int(os.environ["WORLD_SIZE"])))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
