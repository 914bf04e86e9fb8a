"""Checkpoints as other people's programs write them: the rows of docs/checkpoints.md.

Each function below makes one with the real library where that is here, and says what must come of
it. tests/tpp/test_checkpoint_rows.py prunes each, and compares the list with the page.
"""

import argparse
import datetime
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import timm
import torch
import torch.distributed as dist
from accelerate import Accelerator
from huggingface_hub import save_torch_model
from safetensors.torch import save_file
from timm.models._hub import save_for_hf
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

from tpp.checkpoints.model_file import save_model
from tpp.checkpoints.training_state import TrainingState, state_folder, write_state
from tpp.models.architecture import build_model

LAYER = "layer2.0.conv1"


@dataclass
class Made:
    """A checkpoint, and what must be read from it.

    Attributes:
        path: the file or folder.
        model: the network that is in it.
        name: what ``--model`` says; None where the checkpoint says it.
        layer: a layer to prune.
        optimizer: whose momentum comes along, if it does.
        average: whose weights come along as ``ema``, if any do.
        notes: what the command says, each a part of one line.
    """

    path: Path
    model: nn.Module
    name: str | None = "cifar_resnet8"
    layer: str = LAYER
    optimizer: torch.optim.Optimizer | None = None
    average: nn.Module | None = None
    notes: list[str] = field(default_factory=list)


ROWS: dict[str, Callable[[Path], Made] | str] = {
    # Made there by several processes.
    "DeepSpeed, ZeRO 0 to 3": (
        "tests/tpp/test_deepspeed_files.py::test_weights_and_states_are_what_deepspeed_gathered"
    )
}


def row(name: str) -> Callable[[Callable[[Path], Made]], Callable[[Path], Made]]:
    """Note a function as what makes the checkpoint of a row."""

    def note(function: Callable[[Path], Made]) -> Callable[[Path], Made]:
        ROWS[name] = function
        return function

    return note


def trained(model: nn.Module | None = None, side: int = 8) -> tuple[nn.Module, torch.optim.SGD]:
    """A network after a step, and its optimiser."""
    torch.manual_seed(0)
    model = build_model("cifar_resnet8", 10) if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    out = model(torch.rand(4, 3, side, side))
    (out if isinstance(out, torch.Tensor) else sum(out)).square().mean().backward()
    optimizer.step()
    return model, optimizer


def of_state(folder: Path, name: str, change: Callable[[str], str]) -> Made:
    """A file whose names are changed."""
    model, _ = trained()
    torch.save({change(k): v for k, v in model.state_dict().items()}, folder / name)
    return Made(folder / name, model)


def scripts_arguments() -> argparse.Namespace:
    """What argparse gives, with the kinds of values that scripts put there."""
    return argparse.Namespace(
        model="resnet8",
        lr=0.1,
        data_dir=Path("/data"),
        best=np.float64(71.5),
        seed=np.int64(3),
        began=datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone.utc),  # noqa: UP017
        took=datetime.timedelta(seconds=3),
        distributed=False,
    )


@row("this project: `tpp.save_model`, `tpp.prune`, a stage's `model.safetensors`")
def ours(folder: Path) -> Made:
    model, _ = trained()
    save_model(folder / "model.safetensors", model, companions={"ema": model.state_dict()})
    return Made(folder / "model.safetensors", model, name=None, average=model)


@row("this project: a folder that training resumes from (`checkpoints/step-...`)")
def state(folder: Path) -> Made:
    model, optimizer = trained()
    state = TrainingState(
        2, model.state_dict(), optimizer.state_dict(), {}, model.architecture.to_dict()
    )
    path = state_folder(folder / "checkpoints", 2)
    write_state(path, state)
    return Made(path, model, name=None, optimizer=optimizer)


@row("`torch.save(model.state_dict())`")
def plain(folder: Path) -> Made:
    return of_state(folder, "model.pth", str)


@row("the same by PyTorch before 1.6 (no zip), or before 0.4.1 (no `num_batches_tracked`)")
def legacy(folder: Path) -> Made:
    model, _ = trained()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.num_batches_tracked.zero_()
    old = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(old, folder / "old.th", _use_new_zipfile_serialization=False)
    return Made(folder / "old.th", model)


@row("plain safetensors")
def safetensors(folder: Path) -> Made:
    model, _ = trained()
    save_file(model.state_dict(), folder / "model.safetensors")
    return Made(folder / "model.safetensors", model)


@row("half, bfloat16 or double weights")
def half(folder: Path) -> Made:
    model, _ = trained()
    torch.save(model.half().state_dict(), folder / "half.pth")
    return Made(folder / "half.pth", model, notes=["weights are float16, and so are those that"])


@row("timm's training script (`timm.utils.CheckpointSaver`)")
def timm_script(folder: Path) -> Made:
    model, optimizer = trained()
    average = ModelEmaV3(model, decay=0.5)
    average.update(model)
    saver = CheckpointSaver(
        model,
        optimizer,
        args=scripts_arguments(),
        model_ema=average,
        checkpoint_dir=str(folder),
        recovery_dir=str(folder),
    )
    saver.save_checkpoint(0, 12.5)
    return Made(folder / "last.pth.tar", model, optimizer=optimizer, average=average.module)


@row("torchvision's reference script (`train.py`)")
def torchvision_script(folder: Path) -> Made:
    model, optimizer = trained()
    average = AveragedModel(model, use_buffers=True)  # its ExponentialMovingAverage is one
    average.update_parameters(model)
    content = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": torch.optim.lr_scheduler.MultiStepLR(optimizer, [3]).state_dict(),
        "epoch": 3,
        "args": scripts_arguments(),
        "model_ema": average.state_dict(),
        "scaler": torch.amp.GradScaler("cpu").state_dict(),
    }
    torch.save(content, folder / "model_3.pth")
    return Made(folder / "model_3.pth", model, optimizer=optimizer, average=average.module)


@row("PyTorch's ImageNet example (`main.py`)")
def imagenet_example(folder: Path) -> Made:
    model, optimizer = trained()
    content = {
        "epoch": 3,
        "arch": "resnet18",
        "state_dict": nn.DataParallel(model).state_dict(),
        "best_acc1": torch.tensor(71.5),
        "optimizer": optimizer.state_dict(),
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 30).state_dict(),
    }
    torch.save(content, folder / "checkpoint.pth.tar")
    return Made(folder / "checkpoint.pth.tar", model, optimizer=optimizer)


class Lit(nn.Module):
    """As a LightningModule holds a network and its loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.criterion = nn.CrossEntropyLoss(weight=torch.rand(10))


@row("PyTorch Lightning (`Trainer.save_checkpoint`)")
def lightning(folder: Path) -> Made:
    model, optimizer = trained()
    content = {
        "epoch": 3,
        "global_step": 40,
        "pytorch-lightning_version": "2.5.0",
        "torch_version": torch.__version__,  # a class of its own
        "state_dict": Lit(model).state_dict(),
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5)}},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": {"lr": 0.1, "root": Path("/data")},
    }
    torch.save(content, folder / "epoch=3.ckpt")
    notes = ["without the beginning 'model.'", "left out: criterion.weight, no part of"]
    return Made(folder / "epoch=3.ckpt", model, optimizer=optimizer, notes=notes)


@row("Lightning with `torch.compile` or DeepSpeed: `_forward_module.model.`, `model._orig_mod.`")
def lightning_wrapped(folder: Path) -> Made:
    made = of_state(folder, "a.ckpt", lambda name: f"_forward_module.model._orig_mod.{name}")
    return Made(made.path, made.model, notes=["without the beginning 'model.'"])


@row("OpenMMLab (`backbone.`, `head.`)")
def openmmlab(folder: Path) -> Made:
    model, optimizer = trained()
    names = {
        name: ("head." if "linear" in name else "backbone.") + name for name in model.state_dict()
    }
    content = {
        "meta": {"cfg": "model = dict()", "seed": 1, "mmengine_version": "0.10"},
        "state_dict": OrderedDict((names[k], v) for k, v in model.state_dict().items()),
        "message_hub": {"log": np.zeros(3), "counts": defaultdict(int, a=1)},
        "optimizer": optimizer.state_dict(),
    }
    torch.save(content, folder / "epoch_3.pth")
    notes = ["without the beginning 'backbone.'", "without the beginning 'head.'"]
    return Made(folder / "epoch_3.pth", model, optimizer=optimizer, notes=notes)


@row("a dict of any other keys: `{'net': state_dict, 'acc': 93.1, 'epoch': 3}`")
def other_keys(folder: Path) -> Made:
    model, _ = trained()
    content = {"net": model.state_dict(), "acc": 93.1, "rng": {"cpu": torch.get_rng_state()}}
    torch.save(content, folder / "ckpt.t7")
    return Made(folder / "ckpt.t7", model, notes=["the weights are those under 'net'"])


@row("DataParallel, DistributedDataParallel: `module.`")
def data_parallel(folder: Path) -> Made:
    model, _ = trained()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        state = nn.parallel.DistributedDataParallel(model).state_dict()
    finally:
        dist.destroy_process_group()
    assert state.keys() == nn.DataParallel(model).state_dict().keys()
    torch.save(state, folder / "model.pt")
    return Made(folder / "model.pt", model)


@row("DataParallel of a part: `features.module.`")
def part_parallel(folder: Path) -> Made:
    model, _ = trained(build_model("squeezenet1_1", 10), side=64)
    wrapped = deepcopy(model)
    wrapped.features = nn.DataParallel(wrapped.features)
    torch.save(wrapped.state_dict(), folder / "model.pth")
    return Made(folder / "model.pth", model, "squeezenet1_1", "features.3.squeeze")


@row("`torch.compile`: `_orig_mod.`")
def compiled(folder: Path) -> Made:
    model, _ = trained()
    torch.save(torch.compile(model).state_dict(), folder / "model.pth")
    return Made(folder / "model.pth", model)


@row("FSDP and activation checkpointing: `_fsdp_wrapped_module.`, `_checkpoint_wrapped_module.`")
def fsdp(folder: Path) -> Made:
    model, _ = trained()
    wrapped = deepcopy(model)
    wrapped.layer1 = checkpoint_wrapper(wrapped.layer1)
    names = {f"_fsdp_wrapped_module.{n}": p for n, p in wrapped.named_parameters()}
    assert any("_checkpoint_wrapped_module" in name for name in names)
    torch.save(names | dict(wrapped.named_buffers()), folder / "model.pt")
    return Made(folder / "model.pt", model)


@row("`AveragedModel` alone: `module.` and `n_averaged`")
def averaged(folder: Path) -> Made:
    model, _ = trained()
    torch.save(AveragedModel(model).state_dict(), folder / "swa.pth")
    return Made(folder / "swa.pth", model, notes=["left out: n_averaged, no part of"])


@row("a file saved after `thop.profile`: `total_ops`, `total_params`")
def thop(folder: Path) -> Made:
    model, optimizer = trained()
    counted = deepcopy(model)
    for module in counted.modules():  # as thop does
        module.register_buffer("total_ops", torch.zeros(1, dtype=torch.float64))
        module.register_buffer("total_params", torch.zeros(1, dtype=torch.float64))
    content = {"model": counted.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(content, folder / "model.pth")
    return Made(folder / "model.pth", model, optimizer=optimizer, notes=["total_ops"])


@row("the weights of a loss beside the network's: `criterion.weight`, `loss_fn....`")
def loss_weights(folder: Path) -> Made:
    model, _ = trained()
    beside = {"criterion.weight": torch.rand(10), "loss_fn.pos_weight": torch.rand(10)}
    torch.save({**model.state_dict(), **beside, "epoch": 3}, folder / "model.pth")
    notes = ["left out: epoch, no tensor", "criterion.weight, loss_fn.pos_weight, no part of"]
    return Made(folder / "model.pth", model, notes=notes)


@row("`googlenet`, `inception_v3` with their auxiliary heads, as torchvision publishes them")
def googlenet(folder: Path) -> Made:
    import torchvision

    net = torchvision.models.googlenet(weights=None, aux_logits=True, init_weights=False)
    for module in net.modules():  # small enough to be quick
        if isinstance(module, nn.Linear) and module.out_features == 1000:
            module.out_features, module.weight = 3, nn.Parameter(module.weight[:3].detach())
            module.bias = nn.Parameter(module.bias[:3].detach())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for parameter in net.parameters():
        parameter.grad = torch.rand_like(parameter)
    optimizer.step()
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, folder / "g.pth")
    model = build_model("googlenet", 3, transform_input=True)
    own = model.state_dict()
    model.load_state_dict({name: net.state_dict()[name] for name in own})
    optimizer.param_groups[0]["params"] = [
        p for name, p in net.named_parameters() if not name.startswith("aux")
    ]
    notes = ["left out: aux1, aux2, auxiliary heads", "transform_input is taken to be True"]
    layer = "inception3a.branch2.0.conv"
    return Made(folder / "g.pth", model, "googlenet", layer, optimizer, None, notes)


@row("`Accelerator.save_state`")
def accelerate_folder(folder: Path) -> Made:
    model, optimizer = trained()
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(model, optimizer)
    accelerator.save_state(str(folder / "state"))
    accelerator.free_memory(*prepared)
    return Made(folder / "state", model, optimizer=optimizer)


@row("`Accelerator.save_state(safe_serialization=False)`")
def accelerate_pickle_folder(folder: Path) -> Made:
    model, optimizer = trained()
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(model, optimizer)
    accelerator.save_state(str(folder / "state"), safe_serialization=False)
    accelerator.free_memory(*prepared)
    return Made(folder / "state", model, optimizer=optimizer)


@row("a Hugging Face folder of timm (`timm.models.push_to_hf_hub`)")
def timm_hub(folder: Path) -> Made:
    model = timm.create_model("resnet10t", num_classes=3)
    save_for_hf(model, folder / "hub", safe_serialization=True)
    return Made(folder / "hub", model, None, "layer2.0.conv1")


@row("a Hugging Face folder in several files (`huggingface_hub.save_torch_model`)")
def sharded(folder: Path) -> Made:
    model, _ = trained()
    (folder / "hub").mkdir()
    save_torch_model(model, folder / "hub", max_shard_size="50KB")
    assert len(list((folder / "hub").glob("*.safetensors"))) > 1
    return Made(folder / "hub", model)


@row("a whole network: `torch.save(model, PATH)`")
def whole_network(folder: Path) -> Made:
    model, _ = trained()
    torch.save(model, folder / "model.pth")
    notes = ["the tensors of a pickled tpp.models.cifar.CifarResNet are taken; its class is not"]
    return Made(folder / "model.pth", model, notes=notes)


class Tracker:
    """What a training script keeps its figures in."""


@row("the authors' TPP: `{'arch': ..., 'model': network, 'state_dict': ...}`")
def authors(folder: Path) -> Made:
    model, optimizer = trained()
    content = {
        "epoch": 90,
        "arch": "resnet8",
        "model": model,
        "state_dict": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "ExpID": "SERVER-20210520-001530",
        "prune_state": "finetune",
        "lr": 1e-5,
        "acc1": 75.6,
        "metrics": {"acc1": np.zeros(90)},
        "tracker": Tracker(),
    }
    torch.save(content, folder / "ckpt_best.pth")
    return Made(folder / "ckpt_best.pth", model, optimizer=optimizer)
