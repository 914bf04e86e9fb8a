"""A method can be anything that the contract says, in one file: see toy_methods/."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

import tpp
from tpp.checkpoints.model_file import read_checkpoint
from tpp.methods.base import Method, Settings
from train.distributed.engine import Engine
from train.loop.meter import Meter
from train.loop.step import gradients
from train.tasks import make_task

ROOT = Path(__file__).resolve().parents[2]
MAIN = Path(__file__).with_name("toy_main.py")
MODEL = "model.safetensors"
ZERO1 = ROOT / "launch" / "deepspeed" / "zero1.json"
METHODS = (
    *("toy_gate", "toy_activity", "toy_mask", "toy_melting", "toy_distilled", "toy_overparam"),
    "toy_flow",
)
# Those that act while the pruned network is finetuned.
LATE = ("toy_mask", "toy_distilled", "toy_overparam")
SETTINGS: dict[str, dict[str, Any]] = {
    "toy_overparam": {"expansion": 2, "similarity": 10.0, "weight_decay": 1e-3},
    # Four features of one shape in each block.
    "toy_flow": {"length": 0.3, "curvature": 0.3, "features": ["*.conv?", "*.bn?"]},
}


def stages_of(name: str, grave: Path | None) -> dict[str, Any]:
    """The stages of one method; with a ``grave`` it is killed after three steps of one."""
    late = name in LATE
    method: dict[str, Any] = {"name": name, **SETTINGS.get(name, {})}
    if grave is not None:
        dies_in = "finetune" if late else "regularize"
        method |= {"dies_at": 5, "grave": str(grave / name), "dies_in": dies_in}
    # Averages go the same ways as weights: modified, cut, gathered, resumed.
    averages = {"decay": 0.9, "warmup": False}
    regularize = {"optimizer": {"lr": 0.05}, "epochs": 1, "ema": averages}
    finetune = {
        "optimizer": {"lr": 0.02},
        "epochs": 1 if late else 0.5,
        "ema": {"decay": 0.8, "every": 2},
    }
    stages = {} if late else {"regularize": regularize}
    if name != "toy_melting":
        stages["prune"] = {}
    stages["finetune"] = finetune
    stages["evaluate"] = {}
    next(iter(stages.values()))["input"] = "dense"
    return {
        f"{name}_{kind}": {"kind": kind, "method": method, **stage}
        for kind, stage in stages.items()
    }


def configured(config: dict[str, Any], output: Path, grave: Path | None) -> dict[str, Any]:
    config = copy.deepcopy(config)
    config["output"] = str(output)
    config["checkpoints"] = {"every": "2 steps", "asynchronous": False}
    config["stages"] = {"dense": config["stages"]["dense"]}
    for name in METHODS:
        config["stages"] |= stages_of(name, grave)
    return config


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("ranks", "accumulation", "deepspeed"),
    [
        pytest.param(1, 1, None, id="one rank"),
        pytest.param(2, 4, None, id="two ranks, accumulation", marks=pytest.mark.nightly),
        pytest.param(2, 1, ZERO1, id="ZeRO 1", marks=pytest.mark.nightly),
        pytest.param(2, 4, ZERO1, id="ZeRO 1, accumulation"),
    ],
)
def test_every_kind_of_method_is_killed_and_goes_on_to_the_bit(
    tiny_config, tmp_path, run_main, ranks, accumulation, deepspeed
):
    tiny_config["training"] |= {"accumulation": accumulation}
    if deepspeed is not None:
        tiny_config["training"]["deepspeed"] = str(deepspeed)
    whole, broken, grave = (tmp_path / name for name in ("whole", "broken", "grave"))
    grave.mkdir()
    run_main(configured(tiny_config, whole, None), ranks=ranks, script=MAIN)
    config = configured(tiny_config, broken, grave)
    for name in METHODS:
        run_main(config, ranks=ranks, script=MAIN, expect=-9)
        assert (grave / name).exists(), f"{name} was not killed"
    done = run_main(config, ranks=ranks, script=MAIN)
    assert "resumed after 4 steps" in done.stdout
    for stage in config["stages"]:
        if not stage.endswith("_evaluate"):
            one, other = (load_file(run / stage / "model.safetensors") for run in (whole, broken))
            assert one.keys() == other.keys()
            assert all(one[key].equal(other[key]) for key in one), stage
            if stage.endswith(("_regularize", "_finetune")):
                assert any(key.startswith(("ema:", "raw:")) for key in one), stage
    check_what_they_made(whole)


def check_what_they_made(run: Path) -> None:
    """Each method did what it is for."""
    stages = json.loads((run / "results.json").read_text())["stages"]
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    terms = {
        e["stage"]: {k for k in e if k.startswith("loss/")} for e in log if e["event"] == "train"
    }
    dense = tpp.load_model(run / "dense" / "model.safetensors")

    # The gates are part of the BatchNorms: what was measured with them is what the file holds.
    gated = tpp.load_model(run / "toy_gate_regularize" / "model.safetensors")
    assert dict(gated.named_parameters()).keys() == dict(dense.named_parameters()).keys()
    assert "loss/gates" in terms["toy_gate_regularize"]
    start = stages["toy_gate_prune"]
    assert start["parameters"] < stages["dense"]["parameters"]

    assert "loss/activity" in terms["toy_activity_regularize"]
    assert "loss/activity" not in terms["toy_activity_finetune"]

    # Masked filters are there, and zero from removal to the end.
    assert stages["toy_mask_finetune"]["parameters"] == stages["dense"]["parameters"]
    _, companions, _ = read_checkpoint(run / "toy_mask_prune" / "model.safetensors")
    masks, tuned = companions["mask"], load_file(run / "toy_mask_finetune" / "model.safetensors")
    for name, mask in masks.items():
        assert 0 < mask.mean() < 1 and not tuned[name][mask == 0].any()
        assert tuned[name][mask == 1].all()

    # A quarter of 16, 32, 64 filters went, then a quarter of what was left.
    melted = tpp.load_model(run / "toy_melting_regularize" / "model.safetensors")
    widths = [melted.get_submodule(f"layer{n}.0.conv1").out_channels for n in (1, 2, 3)]
    assert widths == [9, 18, 36]
    assert stages["toy_melting_regularize"]["parameters"] == sum(
        p.numel() for p in melted.parameters()
    )
    assert [e["step"] for e in log if e["event"] == "shrink"] == [2, 4]

    assert "loss/distillation" in terms["toy_distilled_finetune"]

    assert {"loss/flow_length", "loss/flow_curvature"} <= terms["toy_flow_regularize"]
    assert not any("flow" in term for term in terms["toy_flow_finetune"])

    # Factors were trained, and the file holds a pruned network.
    assert {"loss/similarity", "loss/decay"} <= terms["toy_overparam_finetune"]
    shapes = [
        {key: tensor.shape for key, tensor in load_file(run / f"toy_{kind}" / name).items()}
        for kind, name in (("overparam_prune", MODEL), ("overparam_finetune", MODEL))
    ]
    assert shapes[0].items() <= shapes[1].items()
    assert not any("original" in key for key in shapes[1] if not key.startswith(("ema:", "raw:")))


class Smooth(Method):
    """A term of activations, and one of the weights."""

    name, title = "toy_smooth", "Smooth"

    def __init__(self, model: nn.Module, with_weights: bool) -> None:
        super().__init__(Settings())
        self._weight = model[0].weight if with_weights else None
        self._asked: list[int] = []
        model[1].register_forward_hook(lambda module, inputs, output: self._keep(output))

    def _keep(self, output):
        self._seen = output

    def batch_terms(self, batch, outputs):
        return {"smooth": 0.3 * self._seen.pow(4).mean() + 0.1 * outputs.square().mean()}

    def loss_terms(self):
        return {} if self._weight is None else {"weights": 0.2 * self._weight.square().sum()}


@pytest.mark.parametrize("with_weights", [False, True])
def test_accumulated_terms_of_activations_have_the_gradient_of_the_whole_batch(with_weights):
    """In float64, against autograd on the loss written down in one line."""
    torch.manual_seed(3)
    images = torch.randn(16, 3, 4, 4, dtype=torch.float64)
    labels = torch.randint(0, 5, (16,))
    found = []
    for accumulation in (1, 4):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 5)
        ).double()
        accelerator = Accelerator(cpu=True)
        engine = Engine(accelerator, model, torch.optim.SGD(model.parameters(), lr=0.1))
        method = Smooth(model, with_weights)
        batches = zip(images.chunk(accumulation), labels.chunk(accumulation), strict=True)
        task = make_task({"kind": "classification"})
        meter = Meter(accelerator)
        gradients(engine, batches, task, method, meter, accumulation=accumulation)
        found.append([parameter.grad.clone() for parameter in model.parameters()])

    middle = model[1](model[0](images))
    logits = model[3](model[2](middle))
    loss = F.cross_entropy(logits, labels) + 0.3 * middle.pow(4).mean()
    loss = loss + 0.1 * logits.square().mean()
    if with_weights:
        loss = loss + 0.2 * model[0].weight.square().sum()
    truth = torch.autograd.grad(loss, list(model.parameters()))
    for gradient in found:
        torch.testing.assert_close(gradient, list(truth), rtol=1e-12, atol=1e-14)
