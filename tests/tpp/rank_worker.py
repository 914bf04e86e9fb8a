"""What every rank of tests/tpp/test_ranks.py does, started by torchrun.

    torchrun --standalone --nproc_per_node=2 tests/tpp/rank_worker.py FOLDER gradients shares ...

Rank r writes FOLDER/rank{r}.safetensors and FOLDER/rank{r}.json; nothing is judged here. The
three ``*_step`` functions are the text of docs/distributed.md.
"""

import contextlib
import itertools
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DeepSpeedPlugin
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import tpp
from tpp.models.architecture import build_model
from tpp.models.layers import prunable_layers
from tpp.plan import PruningPlan
from tpp.regularization.regularizer import Regularizer
from tpp.regularization.schedule import GrowthSchedule
from tpp.regularization.sharding import work_units

SAMPLES = 48  # divisible by every number of ranks times micro-batches
GRAM_WEIGHT = 2.0
# One step at lambda = 0.4. The stabilise phase begins after step 10 and holds the first layer at
# zero from step 11 on, the second from step 12 on, ...
GROWTH = GrowthSchedule(delta=0.1, tau=1.0, update_interval=1, stabilize_steps=9,
                        zero_out_interval=1)  # fmt: skip
STEP = 4
TRAJECTORY = range(8, 15)
TRAJECTORY_SGD = {"lr": 0.02, "momentum": 0.9, "weight_decay": 1e-3}
# Far above the weights and a power of two: the weights before minus after one step, divided by
# it, are the gradient with hardly any rounding of their own.
READING_RATE = 1024.0
STAGES = (0, 1, 2)
ACCUMULATIONS = (1, 4)
ITEM_SIZES = {"float": 4, "long int": 8, "unsigned char": 1}  # as the profiler calls them

PLAN = PruningPlan(
    {"conv1": 8, "conv2": 6, "fc1": 10},
    {"conv1": [0, 3, 4, 7], "conv2": [1, 2, 5], "fc1": [0, 6, 8, 9]},
)
EXAMPLE = torch.zeros(1, 3, 8, 8)

MicroBatches = list[tuple[Tensor, Tensor]]


class Net(nn.Module):
    """Conv with BN, conv with bias and no BN, linear with bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 6, 3, stride=2, padding=1)
        self.fc1 = nn.Linear(6 * 16, 10)
        self.fc2 = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = self.conv2(x).relu()
        return self.fc2(self.fc1(x.flatten(1)).relu())


def network() -> Net:
    """The same weights and statistics on every rank."""
    net = Net()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        net.bn1.weight.add_(1.0)
        net.bn1.running_mean.copy_(torch.randn(8, generator=generator))
        net.bn1.running_var.copy_(1 + torch.rand(8, generator=generator))
    return net


def freeze_norms(model: nn.Module) -> None:
    """Let BatchNorm use its saved statistics, so that splitting the batch changes nothing."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def samples() -> tuple[Tensor, Tensor]:
    """The global batch: (48, 3, 8, 8) images and their labels."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(SAMPLES, 3, 8, 8, generator=generator)
    return images, torch.randint(4, (SAMPLES,), generator=generator)


def micro_batches_of(rank: int, world_size: int, accumulation: int) -> MicroBatches:
    """This rank's samples in equal parts."""
    images, labels = (values[rank::world_size].chunk(accumulation) for values in samples())
    return list(zip(images, labels, strict=True))


def regularizer_of(model: nn.Module) -> Regularizer:
    return Regularizer(
        model,
        PLAN,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        gram_weight=GRAM_WEIGHT,
        growth=GROWTH,
        example_input=EXAMPLE,
    )


def ddp_step(
    model: DistributedDataParallel,
    optimizer: torch.optim.Optimizer,
    regularizer: Regularizer,
    micro_batches: MicroBatches,
    step: int,
) -> None:
    for number, (images, labels) in enumerate(micro_batches, start=1):
        last = number == len(micro_batches)
        with contextlib.nullcontext() if last else model.no_sync():
            loss = F.cross_entropy(model(images), labels) / len(micro_batches)
            if last:
                loss = loss + regularizer.penalty(step)
            loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    regularizer.after_step(step)


def deepspeed_step(
    engine: Any, regularizer: Regularizer, micro_batches: MicroBatches, step: int
) -> None:
    for images, labels in micro_batches:
        loss = F.cross_entropy(engine(images), labels)
        if engine.is_gradient_accumulation_boundary():  # the last micro-batch of the step
            loss = loss + engine.gradient_accumulation_steps() * regularizer.penalty(step)
        engine.backward(loss)
        engine.step()
    regularizer.after_step(step)


def accelerate_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    regularizer: Regularizer,
    micro_batches: MicroBatches,
    step: int,
) -> None:
    for images, labels in micro_batches:
        with accelerator.accumulate(model):
            loss = F.cross_entropy(model(images), labels)
            if accelerator.sync_gradients:  # the last micro-batch of the step
                loss = loss + accelerator.gradient_accumulation_steps * regularizer.penalty(step)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    regularizer.after_step(step)


class Trainer:
    """A network of its own, its share of the samples, and an engine to train it under."""

    def __init__(self, accumulation: int = 1, **sgd: float) -> None:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        self.net = network()
        self.optimizer = torch.optim.SGD(self.net.parameters(), **sgd)
        self.accumulation = accumulation
        self.micro_batches = micro_batches_of(rank, world_size, accumulation)
        self.regularizer = regularizer_of(self.net)
        self.step: Callable[[int], None]

    def under_ddp(self) -> "Trainer":
        model = DistributedDataParallel(self.net)
        freeze_norms(model)
        self.step = lambda step: ddp_step(
            model, self.optimizer, self.regularizer, self.micro_batches, step
        )
        return self

    def under_deepspeed(self, stage: int) -> "Trainer":
        import deepspeed

        engine, *_ = deepspeed.initialize(
            model=self.net,
            optimizer=self.optimizer,
            config=deepspeed_config(stage, self.accumulation),
        )
        freeze_norms(engine)
        self.step = lambda step: deepspeed_step(engine, self.regularizer, self.micro_batches, step)
        return self

    def under_accelerate(self, stage: int | None) -> "Trainer":
        """DDP where there is no ZeRO ``stage``."""
        if stage is None:
            accelerator = Accelerator(cpu=True, gradient_accumulation_steps=self.accumulation)
        else:
            plugin = DeepSpeedPlugin(hf_ds_config=deepspeed_config(stage, self.accumulation))
            accelerator = Accelerator(deepspeed_plugin=plugin)
        model, optimizer = accelerator.prepare(self.net, self.optimizer)
        freeze_norms(model)
        self.step = lambda step: accelerate_step(
            accelerator, model, optimizer, self.regularizer, self.micro_batches, step
        )
        return self


def deepspeed_config(stage: int, accumulation: int = 1, **more: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": SAMPLES // dist.get_world_size() // accumulation,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,  # DeepSpeed's default is 1.0
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        **more,
    }


@contextlib.contextmanager
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps its state for the whole process; forget it afterwards."""
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
            del os.environ[name]


def plain_engines(accumulation: int, **sgd: float) -> Iterator[tuple[str, Trainer]]:
    """DDP and DeepSpeed as they are, by name."""
    yield "ddp", Trainer(accumulation, **sgd).under_ddp()
    for stage in STAGES:
        yield f"deepspeed-zero{stage}", Trainer(accumulation, **sgd).under_deepspeed(stage)


def accelerate_engines(accumulation: int, **sgd: float) -> Iterator[tuple[str, Trainer]]:
    """The same through Accelerate."""
    for stage in (None, *STAGES):
        name = "accelerate-ddp" if stage is None else f"accelerate-zero{stage}"
        with fresh_accelerate():
            yield name, Trainer(accumulation, **sgd).under_accelerate(stage)


def gradients(tensors: dict[str, Tensor]) -> None:
    """The averaged gradient of one step, as each engine's optimiser applied it."""
    before = dict(network().named_parameters())
    for accumulation in ACCUMULATIONS:
        for name, trainer in itertools.chain(
            plain_engines(accumulation, lr=READING_RATE),
            accelerate_engines(accumulation, lr=READING_RATE),
        ):
            trainer.step(STEP)
            for key, after in trainer.net.named_parameters():
                gradient = (before[key] - after).detach() / READING_RATE
                tensors[f"gradients/{name}-{accumulation}/{key}"] = gradient


def trajectory(tensors: dict[str, Tensor]) -> None:
    """Weights after a few steps in which the layers are set to zero one after the other."""
    for name, trainer in plain_engines(1, **TRAJECTORY_SGD):
        for step in TRAJECTORY:
            trainer.step(step)
        for key, parameter in trainer.net.named_parameters():
            tensors[f"trajectory/{name}/{key}"] = parameter.detach().clone()


def precision(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """This rank's share of the penalty under bf16, and the weights that it was computed from."""
    import deepspeed

    found = {}

    def record(name: str, regularizer: Regularizer, model: nn.Module) -> None:
        ones = torch.ones(2, 2)
        with torch.autocast("cpu", torch.bfloat16):
            assert (ones @ ones).dtype == torch.bfloat16
            penalty = regularizer.penalty(STEP)
        found[name] = {"dtype": str(penalty.dtype), "share": penalty.item()}
        for key, parameter in model.named_parameters():
            tensors[f"precision/{name}/{key}"] = parameter.detach().clone()

    with fresh_accelerate():
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        net = network()
        model = accelerator.prepare(net)
        regularizer = regularizer_of(net)
        record("autocast", regularizer, net)
        with accelerator.autocast():
            regularizer.penalty(STEP).backward()
        for key, parameter in net.named_parameters():
            if parameter.grad is not None:
                tensors[f"precision/autocast-gradient/{key}"] = parameter.grad
        assert model(EXAMPLE).dtype == torch.float32  # Accelerate casts the output back
    for stage in STAGES:
        net = network()
        engine, *_ = deepspeed.initialize(
            model=net,
            optimizer=torch.optim.SGD(net.parameters(), lr=0.01),
            config=deepspeed_config(stage, bf16={"enabled": True}),
        )
        record(f"deepspeed-bf16-zero{stage}", regularizer_of(net), engine.module)
    return found


def collectives_of(action: Callable[[], object]) -> list[tuple[str, int]]:
    """Name and bytes of every collective that this rank starts during ``action``, sorted."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True
    ) as profile:
        action()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profile.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    sizes = [
        (event["name"], zip(event["args"]["Input Dims"], event["args"]["Input type"], strict=True))
        for event in events
        if event["name"].startswith("gloo:")
    ]
    return sorted(
        (name, sum(math.prod(shape) * ITEM_SIZES[dtype] for shape, dtype in inputs))
        for name, inputs in sizes
    )


def collectives() -> dict[str, Any]:
    """What is communicated with and without the penalty, and what building it communicates."""
    model = DistributedDataParallel(network())
    freeze_norms(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    regularizer = regularizer_of(model.module)
    ((images, labels),) = micro_batches_of(dist.get_rank(), dist.get_world_size(), 1)

    def plain_step() -> None:
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    def step_with_penalty() -> None:
        ddp_step(model, optimizer, regularizer, [(images, labels)], STEP)

    def step_with_one_more() -> None:
        step_with_penalty()
        dist.all_reduce(torch.zeros(17))

    for _ in range(2):  # after its first step DDP rearranges its buckets
        plain_step()
    found: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "nothing": collectives_of(lambda: None),
        "building": collectives_of(lambda: regularizer_of(network())),
        "plain": collectives_of(plain_step),
        "penalty": collectives_of(step_with_penalty),
        "one more": collectives_of(step_with_one_more),
    }
    for stage in STAGES:
        trainer = Trainer(lr=0.0).under_deepspeed(stage)
        trainer.step(0)
        # lambda is 0 at step 0, and there is no penalty to differentiate.
        found[f"zero{stage}"] = [
            collectives_of(lambda t=trainer, s=s: t.step(s)) for s in (0, STEP)
        ]
    return found


def refusals() -> dict[str, list[str | None]]:
    """What is said of parameters split over ranks, before or after the regulariser was made."""
    import deepspeed

    def refusal(action: Callable[[], object]) -> str | None:
        try:
            action()
        except tpp.UserError as error:
            return str(error)
        return None

    config = deepspeed_config(3)

    def zero3(net: nn.Module) -> None:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        deepspeed.initialize(model=net, optimizer=optimizer, config=config)

    def fsdp2(net: nn.Module) -> None:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for child in net.children():
            fully_shard(child, mesh=mesh)
        fully_shard(net, mesh=mesh)

    def fsdp1(net: nn.Module) -> None:
        FullyShardedDataParallel(net, use_orig_params=True, device_id=torch.device("cpu"))

    found = {}
    for name, split in {"zero3": zero3, "fsdp2": fsdp2, "fsdp1": fsdp1}.items():
        net = network()
        regularizer = regularizer_of(net)
        whole = refusal(lambda regularizer=regularizer: regularizer.penalty(STEP))
        split(net)
        found[name] = [
            whole,
            refusal(lambda regularizer=regularizer: regularizer.penalty(STEP)),
            refusal(lambda net=net: regularizer_of(net)),
        ]
    with deepspeed.zero.Init(config_dict_or_path=config):
        net = Net()
    found["zero.Init"] = [None, refusal(lambda: regularizer_of(net))]
    return found


def shares() -> dict[str, Any]:
    """The plan, and what this rank thinks that every rank computes."""
    world_size = dist.get_world_size()
    torch.manual_seed(2)
    model = build_model("cifar_resnet20", 10)
    plan = tpp.select_filters(model, {"layer*.conv1": 0.5, "conv1": 0.0})
    sizes = {name: layer.weight[0].numel() for name, layer in prunable_layers(model).items()}
    return {
        "plan": plan.pruned,
        "units": [
            [
                [unit.layer, list(unit.rows)]
                for unit in work_units(plan, sizes, rank=rank, world_size=world_size)
            ]
            for rank in range(world_size)
        ],
        "mine": [
            [unit.layer, list(unit.rows)]
            for unit in Regularizer(model, plan, rank=dist.get_rank(), world_size=world_size).units
        ],
    }


def without_shared_memory_kernel() -> None:
    """Keep DeepSpeed from compiling for two minutes what only its inference on the CPU uses."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def main() -> None:
    folder, sections = Path(sys.argv[1]), sys.argv[2:]
    dist.init_process_group("gloo")
    without_shared_memory_kernel()
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}
    for section in sections:
        if section == "gradients":
            gradients(tensors)
        elif section == "trajectory":
            trajectory(tensors)
        elif section == "precision":
            facts[section] = precision(tensors)
        else:
            facts[section] = {"collectives": collectives, "refusals": refusals, "shares": shares}[
                section
            ]()
    name = f"rank{dist.get_rank()}"
    save_file(tensors, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps(facts))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
