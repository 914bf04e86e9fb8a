"""Writes DeepSpeed checkpoints for tests/tpp/test_deepspeed_files.py, started by torchrun.

    torchrun --standalone --nproc_per_node=2 tests/tpp/deepspeed_worker.py FOLDER

Each case trains a small network for three steps and saves it to FOLDER/{case}/. What DeepSpeed
itself gathers from the ranks at that moment goes to FOLDER/truth.safetensors, as
{case}/weights/{parameter} and {case}/{state of the optimiser}/{parameter}. Nothing is judged here.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from tpp.models.architecture import build_model

STEPS = 3
SAMPLES = 4  # for each rank and step
STAGES = (0, 1, 2, 3)
OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "adam": (torch.optim.Adam, {"lr": 0.01}),
}
STATES = {"sgd": ["momentum_buffer"], "adam": ["exp_avg", "exp_avg_sq"]}
ZERO_CASES = {
    f"zero{stage}-{optimizer}-{precision}": (stage, optimizer, precision)
    for stage in STAGES
    for optimizer in OPTIMIZERS
    for precision in ("fp32", "bf16")
}
SPECIAL_CASES: dict[str, tuple[tuple[int, str, str], dict[str, Any]]] = {
    # Several flat vectors for one group of parameters.
    "zero3-small-groups": ((3, "adam", "fp32"), {"zero_optimization": {"sub_group_size": 100}}),
    # States without padding, in another layout.
    "zero2-elastic": ((2, "adam", "fp32"), {"zero_optimization": {"elastic_checkpoint": True}}),
    # BF16_Optimizer in place of ZeRO's own.
    "zero1-fp32-gradients": ((1, "sgd", "bf16"), {"data_types": {"grad_accum_dtype": "fp32"}}),
    # Objects of the training script, in the file with the network.
    "zero2-objects": ((2, "sgd", "fp32"), {}),
}


class Net(nn.Module):
    """Convolutions, BatchNorm, odd sizes, a tied weight and a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.5, 1.5, 2.0]).view(3, 1, 1), requires_grad=False)
        self.conv1 = nn.Conv2d(3, 5, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(5)
        self.conv2 = nn.Conv2d(5, 7, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(7)
        self.fc = nn.Linear(7, 7)
        self.head = nn.Linear(7, 7)
        self.head.weight = self.fc.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x * self.scale)).relu()
        x = self.bn2(self.conv2(x).relu()).mean((2, 3))
        return self.head(self.fc(x))


def network() -> Net:
    torch.manual_seed(0)
    return Net()


def images(rank: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(SAMPLES, 3, 6, 6, generator=generator)


def loss_of(output: Tensor) -> Tensor:
    return (output.float() - 1).square().mean()


def named_groups(net: nn.Module, *, by_kind: bool = False) -> list[list[tuple[str, nn.Parameter]]]:
    """Kernels and vectors apart, or weights and biases apart (``by_kind``)."""
    trained = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    first = [n.endswith("weight") if by_kind else p.ndim > 1 for n, p in trained]
    return [
        [pair for pair, is_first in zip(trained, first, strict=True) if is_first == wanted]
        for wanted in (True, False)
    ]


def optimizer_of(groups: list[list[tuple[str, nn.Parameter]]], kind: str) -> torch.optim.Optimizer:
    make, arguments = OPTIMIZERS[kind]
    parameters = [[p for _, p in group] for group in groups]
    return make([{"params": parameters[0]}, {"params": parameters[1], "lr": 0.02}], **arguments)


def config_of(stage: int, precision: str, **more: Any) -> dict[str, Any]:
    config = {
        "train_micro_batch_size_per_gpu": SAMPLES,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        **more,
        "zero_optimization": {"stage": stage, **more.get("zero_optimization", {})},
    }
    if precision == "bf16":
        config["bf16"] = {"enabled": True}
    return config


def script_objects() -> dict[str, Any]:
    """What training scripts like to keep, and a loss scaler of fp16, which wants a GPU."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    scaler = DynamicLossScaler(2.0**16, 1000, 1.0, 2, False)
    arguments = argparse.Namespace(epochs=90, output=Path("runs"))
    return {"scaler": scaler, "args": arguments, "best": np.float64(76.1)}


def save_case(
    folder: Path,
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: dict[str, Any],
    client_state: dict[str, Any],
) -> Any:
    """Train for three steps and save; returns the engine."""
    import deepspeed

    if "bf16" in config:
        net.bfloat16()  # DeepSpeed leaves BatchNorm's statistics as they are
    dtype = next(net.parameters()).dtype
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config)
    for step in range(STEPS):
        loss = loss_of(engine(images(dist.get_rank(), step).to(dtype)))
        engine.backward(loss)
        engine.step()
    engine.save_checkpoint(str(folder), client_state=client_state)
    return engine


def gathered(
    engine: Any, groups: list[list[tuple[str, nn.Parameter]]], stage: int, states: Iterable[str]
) -> dict[str, Tensor]:
    """Weights and states as DeepSpeed has them; every rank has to call this."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    found = {}
    if stage in (1, 2):
        # DeepSpeed looks for the states before the first step, when SGD has none yet.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    if stage > 0:
        for name, parameter in [pair for group in groups for pair in group]:
            found[f"weights/{name}"] = safe_get_full_fp32_param(parameter)
            for key in states:
                found[f"{key}/{name}"] = safe_get_full_optimizer_state(parameter, key)
        return found
    # In bf16 a wrapper is around the optimiser, whose parameters are the float32 copies.
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    for group, inner_group in zip(groups, inner.param_groups, strict=True):
        for (name, _), parameter in zip(group, inner_group["params"], strict=True):
            found[f"weights/{name}"] = parameter.detach()
            for key in states:
                found[f"{key}/{name}"] = inner.state[parameter][key]
    return found


def save_under_accelerate(folder: Path) -> None:
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin

    net = network()
    optimizer = optimizer_of(named_groups(net), "sgd")
    plugin = DeepSpeedPlugin(hf_ds_config=config_of(2, "fp32"))
    accelerator = Accelerator(deepspeed_plugin=plugin)
    model, optimizer = accelerator.prepare(net, optimizer)
    for step in range(STEPS):
        loss = loss_of(model(images(dist.get_rank(), step)))
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    accelerator.save_state(str(folder))


def main() -> None:
    import deepspeed

    # Keeps DeepSpeed from compiling for two minutes what only its inference on the CPU uses.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    dist.init_process_group("gloo")
    root = Path(sys.argv[1])
    truth: dict[str, Tensor] = {}
    cases = {name: (case, {}) for name, case in ZERO_CASES.items()} | SPECIAL_CASES
    for name, ((stage, kind, precision), more) in cases.items():
        net = network()
        groups = named_groups(net)
        config = config_of(stage, precision, **more)
        objects = script_objects() if name == "zero2-objects" else {}
        engine = save_case(root / name, net, optimizer_of(groups, kind), config, objects)
        for key, tensor in gathered(engine, groups, stage, STATES[kind]).items():
            truth[f"{name}/{key}"] = tensor.detach().clone().contiguous()
    # ZeRO 0 with groups that shapes alone do not tell apart, without and with names.
    for name, named in (("zero0-ambiguous", False), ("zero0-named", True)):
        net = network()
        groups = named_groups(net, by_kind=True)
        optimizer = optimizer_of(groups, "sgd")
        if named:
            arguments = OPTIMIZERS["sgd"][1]
            optimizer = torch.optim.SGD([{"params": group} for group in groups], **arguments)
        engine = save_case(root / name, net, optimizer, config_of(0, "fp32"), {})
        for key, tensor in gathered(engine, groups, 0, STATES["sgd"]).items():
            truth[f"{name}/{key}"] = tensor.detach().clone().contiguous()
    for stage in (0, 2, 3):  # a network that the pruner knows
        torch.manual_seed(0)
        net = build_model("cifar_resnet8", 10)
        groups = named_groups(net)
        name = f"resnet8-zero{stage}"
        engine = save_case(
            root / name, net, optimizer_of(groups, "sgd"), config_of(stage, "fp32"), {}
        )
        for key, tensor in gathered(engine, groups, stage, STATES["sgd"]).items():
            truth[f"{name}/{key}"] = tensor.detach().clone().contiguous()
    save_under_accelerate(root / "accelerate")
    if dist.get_rank() == 0:
        save_file(truth, root / "truth.safetensors")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
