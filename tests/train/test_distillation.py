"""A teacher's term in the loss: its gradient, where it is taken from, what becomes of it."""

import copy
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tpp.checkpoints.model_file import save_model
from tpp.common.errors import UserError
from tpp.methods.base import Method, Settings
from tpp.models.architecture import (
    Architecture,
    build_model,
    build_on_meta,
    set_preprocessing,
)
from train.distillation.distillation import Distillation
from train.distillation.features import find_stages, look_inside
from train.distillation.losses import attention_map, attention_transfer
from train.distillation.settings import DistillSection
from train.distributed.engine import Engine
from train.loop.meter import Meter
from train.loop.step import gradients
from train.tasks import make_task
from train.teachers import load_teacher

PLAIN = {"mean": [0.0] * 3, "std": [1.0] * 3, "channels": 3, "image_size": 8, "resize": None}


def small(width: int, seed: int) -> nn.Sequential:
    """A network whose parts 1 and 3 are at 6x6 and 3x3."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, width, 3),
        nn.Tanh(),
        nn.Conv2d(width, 2 * width, 4),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(18 * width, 5),
    ).double()


def beside(student: nn.Module, teacher: nn.Module, **settings: Any) -> Distillation:
    return Distillation(
        DistillSection(**settings),
        student,
        teacher.eval().requires_grad_(False),
        example=torch.zeros(1, 3, 8, 8, dtype=next(student.parameters()).dtype),
        preprocessing=PLAIN,
        key="stages.finetune.distill",
    )


def softmax(logits: Tensor) -> Tensor:
    powers = (logits - logits.max(1, keepdim=True).values).exp()
    return powers / powers.sum(1, keepdim=True)


def hinton(logits: Tensor, wanted: Tensor, labels: Tensor, weight: float, t: float) -> Tensor:
    """The loss as the paper has it, sum by sum."""
    hard = torch.zeros((), dtype=torch.float64)
    soft = torch.zeros((), dtype=torch.float64)
    for image, label in enumerate(labels):
        q = softmax(logits[image : image + 1])[0]
        hard = hard - q[label].log()
        p_t = softmax(wanted[image : image + 1] / t)[0]
        q_t = softmax(logits[image : image + 1] / t)[0]
        for c in range(len(q)):
            soft = soft + p_t[c] * (p_t[c].log() - q_t[c].log())
    return ((1 - weight) * hard + weight * t * t * soft) / len(labels)


def attention(mine: Tensor, its: Tensor) -> Tensor:
    """The distance of one pair of layers, image by image and place by place."""
    found = torch.zeros((), dtype=torch.float64)
    for one, other in zip(mine, its, strict=True):
        a, b = (sum(channel * channel for channel in image) for image in (one, other))
        assert isinstance(a, Tensor) and isinstance(b, Tensor)
        a, b = a / (a * a).sum().sqrt(), b / (b * b).sum().sqrt()
        for row in range(a.shape[0]):
            for column in range(a.shape[1]):
                found = found + (a[row, column] - b[row, column]) ** 2 / a.numel()
    return found / len(mine)


@pytest.mark.parametrize("kind", ["logits", "features"])
def test_the_gradient_is_that_of_the_loss_written_down(kind):
    """In float64, with whole and split batches; a mean over the micro-batches."""
    numbers = torch.Generator().manual_seed(3)
    images = torch.randn(16, 3, 8, 8, dtype=torch.float64, generator=numbers)
    labels = torch.randint(0, 5, (16,), generator=numbers)
    settings = {"weight": 0.7, "temperature": 3.0} if kind == "logits" else {"weight": 50.0}
    if kind == "features":
        settings |= {"layers": ["1", "3"]}
    found, logged = [], []
    for accumulation in (1, 4):
        model, teacher = small(3, 0), small(4, 1)
        distillation = beside(model, teacher, kind=kind, **settings)
        accelerator = Accelerator(cpu=True)
        engine = Engine(accelerator, model, torch.optim.SGD(model.parameters(), lr=0.1))
        batches = zip(images.chunk(accumulation), labels.chunk(accumulation), strict=True)
        meter = Meter(accelerator)
        model.train()
        gradients(
            engine,
            batches,
            make_task({"kind": "classification"}),
            Method(Settings()),
            meter,
            accumulation=accumulation,
            distillation=distillation,
        )
        found.append([parameter.grad.clone() for parameter in model.parameters()])
        meter.step()
        meter.count(len(images), 0.0)
        logged.append(meter.report(0.1))
        assert all(parameter.grad is None for parameter in teacher.parameters())

    model, teacher = small(3, 0), small(4, 1)
    logits = model(images)
    task = hinton(logits, logits, labels, 0.0, 1.0)
    if kind == "logits":
        loss = hinton(logits, teacher(images).detach(), labels, 0.7, 3.0)
        own = loss - 0.3 * task
    else:
        own = torch.zeros((), dtype=torch.float64)
        for last in (2, 4):
            its = teacher[:last](images).detach()
            own = own + 50 * attention(model[:last](images), its)
        loss = task + own
    truth = torch.autograd.grad(loss, list(model.parameters()))
    for gradient in found:
        torch.testing.assert_close(gradient, list(truth), rtol=1e-10, atol=1e-13)
    for report in logged:
        assert report.loss_terms.keys() == {"task", "distillation"}
        values = report.loss, report.loss_terms["task"], report.loss_terms["distillation"]
        # The meter's sum over a step is in float32.
        assert values == pytest.approx([loss.item(), task.item(), own.item()], rel=1e-6)


def test_nothing_is_kept_of_an_evaluation_or_after_a_step():
    model, teacher = small(3, 0), small(4, 1)
    distillation = beside(model, teacher, kind="features")
    assert distillation.layers == ("1", "3")
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    model.eval()(images)
    assert not distillation._mine._maps and not distillation._its._maps
    model.train()
    distillation.term(images, model(images)).backward()
    assert not distillation._mine._maps and not distillation._its._maps
    # A copy, such as a moving average, shares neither teacher nor maps with it.
    copied = copy.deepcopy(model)
    copied.eval()(images)
    assert not distillation._mine._maps


def test_the_teacher_gets_its_own_normalization():
    """The same pixels: (x s + m - m') / s'."""
    student, teacher = small(3, 0), small(4, 1)
    mine = {**PLAIN, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]}
    its = {**PLAIN, "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.125]}
    set_preprocessing(teacher, its)
    pixels = torch.rand(4, 3, 8, 8, dtype=torch.float64)
    seen = []
    teacher.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    distillation = Distillation(
        DistillSection(),
        student,
        teacher.eval().requires_grad_(False),
        example=torch.zeros(1, 3, 8, 8).double(),
        preprocessing=mine,
        key="distill",
    )

    def normalized(values: dict[str, Any]) -> Tensor:
        mean, std = (torch.tensor(values[key]).double()[:, None, None] for key in ("mean", "std"))
        return (pixels - mean) / std

    images = normalized(mine)
    distillation.term(images, student(images))
    torch.testing.assert_close(seen[-1], normalized(its), rtol=1e-5, atol=1e-6)


def test_maps_of_another_size_are_averaged_down():
    numbers = torch.Generator().manual_seed(1)
    large = torch.rand(2, 8, 8, generator=numbers).double()
    little = torch.rand(2, 4, 4, generator=numbers).double()
    means = large.reshape(2, 4, 2, 4, 2).mean((2, 4))
    wanted = attention(means[:, None].sqrt(), little[:, None].sqrt())
    torch.testing.assert_close(attention_transfer(large, little), wanted)
    torch.testing.assert_close(attention_transfer(little, large), wanted)


def test_a_map_is_in_float32_at_least_and_of_dead_channels_zero():
    half = torch.full((1, 2, 2, 2), 300.0, dtype=torch.float16)
    assert attention_map(half, 1).equal(torch.full((1, 2, 2), 90000.0))
    dead = torch.zeros(2, 3, 3, requires_grad=True)
    attention_transfer(dead, torch.rand(2, 3, 3)).backward()
    assert dead.grad is not None and dead.grad.isfinite().all()


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("cifar_resnet8", ["layer1", "layer2", "layer3"]),
        ("resnet18", ["layer1", "layer2", "layer3", "layer4"]),
        ("vgg11_bn", ["features.2", "features.6", "features.13", "features.20", "features.27"]),
        ("mobilenet_v2", [f"features.{number}" for number in (1, 3, 6, 13, 18)]),
        # What its last norm gives is changed in place by the ReLU behind it.
        ("densenet121", [f"features.denseblock{number}" for number in (1, 2, 3, 4)]),
        ("timm:convnext_atto", [f"stages.{number}" for number in range(4)]),
        # Channels come last there.
        ("swin_t", [f"features.{number}" for number in (1, 3, 5, 7)]),
        ("timm:vit_tiny_patch16_224", [f"blocks.{number}" for number in (2, 5, 8, 11)]),
    ],
)
def test_which_layers_are_compared(name, stages):
    network = build_model(name, 10)
    side = 32 if name.startswith("cifar") else 224
    modes = [module.training for module in network.modules()]
    seen = look_inside(network, torch.zeros(2, 3, side, side))
    assert [*find_stages(network, seen).values()][: len(stages)] == stages
    assert [module.training for module in network.modules()] == modes
    assert not any(module._forward_hooks for module in network.modules())


@pytest.mark.parametrize("kind", ["logits", "features"])
def test_the_teacher_computes_in_the_precision_of_the_step(kind):
    """And what it says is compared in float32: against the same in float64, to bf16's rounding."""
    student, teacher = small(3, 0).float(), small(4, 1).float()
    distillation = beside(student, teacher, kind=kind)
    seen = []
    teacher[2].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    student.train()
    with torch.autocast("cpu", torch.bfloat16):
        term = distillation.term(images, student(images).float())
    assert seen == [torch.bfloat16] and term.dtype == torch.float32
    exact = beside(student.double(), teacher.double(), kind=kind)
    truth = exact.term(images.double(), student(images.double()))
    assert term.item() == pytest.approx(truth.item(), rel=0.05) and term.item() != truth.item()
    term.backward()
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def on_meta(student: str, teacher: str, **settings: Any) -> Distillation:
    mine, its = (build_on_meta(Architecture(name, 10)).eval() for name in (student, teacher))
    return Distillation(
        DistillSection(kind="features", **settings),
        mine,
        its.requires_grad_(False),
        example=torch.zeros(1, 3, 224, 224, device="meta"),
        preprocessing=PLAIN,
        key="distill",
    )


def test_other_architectures_are_matched_by_resolution():
    assert on_meta("resnet18", "mobilenet_v2").layers == ("layer1", "layer2", "layer3", "layer4")
    assert on_meta("resnet18", "swin_t").layers == ("layer1", "layer2", "layer3", "layer4")
    with pytest.raises(UserError, match=r"distill.layers: network and teacher have no resolution"):
        on_meta("resnet18", "vit_b_16")


@pytest.mark.parametrize(
    ("network", "layer", "says"),
    [
        ("densenet121", "features.norm5", "is changed in place afterwards; name the block around"),
        ("resnet18", "layer1.0.relu", "layer1.0.relu of the network is used 2 times in one pass"),
        ("resnet18", "fc", "fc of the network tells no places of an image apart"),
        ("resnet18", "avgpool", "avgpool of the network tells no places of an image apart"),
        ("resnet18", "layer5", "the network has no module 'layer5' that gives activations of"),
    ],
)
def test_a_layer_that_cannot_be_compared_is_one_line(network, layer, says):
    with pytest.raises(UserError) as caught:
        on_meta(network, network, layers=[layer])
    assert str(caught.value).startswith("distill.layers: ") and says in str(caught.value)


def test_a_file_of_other_classes_says_so(tmp_path):
    path = tmp_path / "x.safetensors"
    save_model(path, build_model("cifar_resnet8", 2), extra={"classes": ["cat", "dog"]})
    said: list[str] = []
    for folders in (["cat", "dog"], ["dog", "fox"]):
        load_teacher(
            str(path), Architecture("resnet18", 2), folders, key="distill.teacher", say=said.append
        )
    assert said == [
        f"distill.teacher: {path} is of the classes cat, dog, the class folders are dog, fox: its "
        "outputs are taken for them in this order"
    ]
