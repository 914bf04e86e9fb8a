"""Shapes of runs without memory are those of real runs, and nothing slow is imported for them."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tpp.measure.counts import count
from tpp.models.architecture import build_model
from tpp.models.meta_runs import ShapesOnly

ROOT = Path(__file__).resolve().parents[2]


def norm(x, *, training, **sizes):
    own = {name: torch.ones(sizes.get(name, x.shape[1])) for name in ("mean", "var", "w", "b")}
    return nn.functional.batch_norm(x, own["mean"], own["var"], own["w"], own["b"], training)


IMAGES = torch.rand(2, 6, 9, 8)
CASES = {
    "conv": lambda x: nn.functional.conv2d(x, torch.rand(4, 6, 3, 2), torch.rand(4), 2, 1, 2),
    "conv in groups": lambda x: nn.functional.conv2d(x, torch.rand(4, 3, 3, 3), groups=2),
    "conv transposed": lambda x: nn.functional.conv_transpose2d(x, torch.rand(6, 4, 3, 3), None, 2),
    "conv 1d": lambda x: nn.functional.conv1d(x[:, :, 0], torch.rand(4, 6, 3), padding=1),
    "norm, evaluation": lambda x: norm(x, training=False),
    "norm, training": lambda x: norm(x, training=True),
    "max pool": lambda x: nn.functional.max_pool2d(x, 3, 2, 1, 2),
    "max pool, rounded up": lambda x: nn.functional.max_pool2d(x, 3, 2, ceil_mode=True),
    "mean": lambda x: x.mean([-1, 2]),
    "mean, kept": lambda x: x.mean((2, 3), keepdim=True),
    "linear": lambda x: nn.functional.linear(x[:, :, 0, 0], torch.rand(5, 6), torch.rand(5)),
    "cat": lambda x: torch.cat([x, x[:, :2].contiguous()], 1),
    "cat of nothing": lambda x: torch.cat([torch.rand(0), x], 1),
    "add": lambda x: x + torch.rand(1, 6, 1, 1),
    "add a number": lambda x: x + 2,
    "add to few": lambda x: torch.rand(6, 1, 1) * x,
    "add twice": lambda x: torch.add(x, x, alpha=2),
    "add in place": lambda x: x.add_(torch.rand(2, 6, 1, 8)),
    "compare": lambda x: (x > 0.5) + x,
    "gelu": nn.functional.gelu,
    "relu": nn.functional.relu,
    "sigmoid of whole numbers": lambda x: torch.sigmoid(torch.ones_like(x, dtype=torch.int64)),
    "channels last": lambda x: nn.functional.silu(x.to(memory_format=torch.channels_last)),
}
WRONG = {
    "conv, other channels": lambda x: nn.functional.conv2d(x, torch.rand(4, 5, 3, 3)),
    "conv, too large": lambda x: nn.functional.conv2d(x, torch.rand(4, 6, 11, 3)),
    "norm, another width": lambda x: norm(x, training=False, w=5),
    "norm, other statistics": lambda x: norm(x, training=True, mean=5),
    "linear": lambda x: nn.functional.linear(x[:, :, 0, 0], torch.rand(5, 7), torch.rand(5)),
    "cat": lambda x: torch.cat([x, x[:, :, :2]], 1),
    "add": lambda x: x + torch.rand(1, 5, 1, 1),
    "add in place": lambda x: x[:, :1].add_(x),
    "mean": lambda x: x.mean([4]),
    "max pool": lambda x: nn.functional.max_pool2d(x, 3, padding=2),
}


@pytest.mark.parametrize("case", CASES)
def test_shapes_types_and_places_in_memory_are_those_of_a_real_run(case):
    real = CASES[case](IMAGES.clone())
    with torch.device("meta"), ShapesOnly():
        found = CASES[case](IMAGES.to("meta"))
    assert found.is_meta
    assert (found.shape, found.dtype) == (real.shape, real.dtype)
    assert found.stride() == real.stride()


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_fails(case):
    with pytest.raises((RuntimeError, IndexError)):
        WRONG[case](IMAGES.clone())
    with torch.device("meta"), ShapesOnly(), pytest.raises((RuntimeError, IndexError)):
        WRONG[case](IMAGES.to("meta"))


def test_what_has_memory_is_computed():
    layer = nn.BatchNorm2d(6)
    with ShapesOnly():
        found = layer(IMAGES)
        drawn = torch.zeros(100).normal_()
    assert torch.equal(found, nn.BatchNorm2d(6)(IMAGES)) and layer.running_mean.any()
    assert drawn.any()


@pytest.mark.parametrize(
    ("name", "args", "side"),
    [
        ("resnext50_32x4d", {}, 64),
        ("timm:vit_tiny_patch16_224", {"img_size": 32}, 32),
        ("densenet121", {}, 64),
        ("mlp7_linear", {}, 28),
    ],
)
def test_counts_are_those_of_torch_flop_counter(name, args, side):
    model = build_model(name, 10, **args).eval().requires_grad_(False)
    images = torch.rand(1, 1 if name == "mlp7_linear" else 3, side, side)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(images)
    flops = {str(op).rpartition(".")[2]: n for op, n in counter.get_flop_counts()["Global"].items()}
    wanted = sum(flops.get(op, 0) for op in ("convolution", "_convolution", "mm", "addmm"))
    found = count(model, example_input=images)
    assert 2 * found.macs == wanted > 0
    assert sum(layer.macs for layer in found.layers) <= found.macs


def test_pruning_a_resnet_imports_no_compiler():
    code = (
        "import sys; from tpp.channels.survey import survey_channels\n"
        "from tpp.measure.counts import count\n"
        "from tpp.models.architecture import Architecture, build_on_meta\n"
        "model = build_on_meta(Architecture('resnet18', 10))\n"
        "count(model), survey_channels(model)\n"
        "slow = {'torch._dynamo', 'torch._dynamo.utils', 'sympy', 'triton'} & set(sys.modules)\n"
        "assert not slow, slow\n"
        # What torchvision asks for is there once it is called.
        "from torchvision.ops.roi_align import is_compile_supported\n"
        "import torch._dynamo.utils as real\n"
        "assert is_compile_supported('cpu') == real.is_compile_supported('cpu')\n"
        "assert torch._dynamo.utils is real and real.__file__\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", "import torch\n" + code], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
