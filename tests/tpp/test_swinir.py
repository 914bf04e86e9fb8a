"""SwinIR for super-resolution: beside a forward pass of its own, and what can go from it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from zeroing import randomised, relative_difference, zeroed

from tpp.channels.removal import prune_model
from tpp.channels.survey import survey_channels
from tpp.checkpoints.model_file import load_model, save_model
from tpp.checkpoints.prune_file import prune_checkpoint
from tpp.checkpoints.sources import load_weights
from tpp.common.errors import UserError
from tpp.models.architecture import Architecture, build_model, build_on_meta
from tpp.plan import PruningPlan

SMALL = {"width": 12, "depths": [2, 1], "heads": 2, "window": 4}
# Tensors of each layer in the authors' checkpoints.
LAYER = (
    *("norm1.weight", "norm1.bias", "attn.relative_position_bias_table"),
    *("attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "attn.proj.bias"),
    *("norm2.weight", "norm2.bias"),
    *("mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"),
)
AROUND = ("conv_first", "patch_embed.norm", "norm", "conv_after_body", "upsample.0")


def network(**args):
    return randomised("swinir_light", classes=None, **{**SMALL, **args}).eval()


def images(size, channels=3):
    generator = torch.Generator().manual_seed(sum(size))
    return torch.rand(2, channels, *size, generator=generator, dtype=torch.float64)


def attention(x, weights, *, heads, window, shift):
    """Attention of images (n, h, w, c) without windows and rolls: each pixel looks at those in its
    own part of the image, which the lines of the grid, moved by ``shift``, cut out.
    """
    count, height, width, channels = x.shape
    pixels = [(row, column) for row in range(height) for column in range(width)]
    table = weights["attn.relative_position_bias_table"]
    seen = torch.full((heads, len(pixels), len(pixels)), -torch.inf, dtype=x.dtype)
    for one, (row, column) in enumerate(pixels):
        for other, (there, across) in enumerate(pixels):
            parts = [(place - shift) // window for place in (row, column, there, across)]
            if parts[:2] == parts[2:]:
                down, right = row - there + window - 1, column - across + window - 1
                seen[:, one, other] = table[down * (2 * window - 1) + right]
    qkv = F.linear(x.flatten(1, 2), weights["attn.qkv.weight"], weights["attn.qkv.bias"])
    each = channels // heads
    found = []
    for head in range(heads):
        q, k, v = (qkv[..., part * channels + head * each :][..., :each] for part in range(3))
        found.append(((q @ k.mT) / each**0.5 + seen[head]).softmax(-1) @ v)
    out = F.linear(torch.cat(found, -1), weights["attn.proj.weight"], weights["attn.proj.bias"])
    return out.view(count, height, width, channels)


def forward(x, state, *, scale, depths, heads, window, mean):
    """What the network makes of images, by the paper and the names of its published weights."""

    def of(name):
        return state[f"{name}.weight"], state[f"{name}.bias"]

    def conv(name, y):
        return F.conv2d(y, *of(name), padding=1)

    def norm(name, y):
        return F.layer_norm(y, y.shape[-1:], *of(name))

    height, width = x.shape[2:]
    more = [(0, 0), (0, 0), *((0, -side % window) for side in (height, width))]
    x = torch.from_numpy(np.pad(x.numpy(), more, mode="reflect"))
    mean = torch.tensor(mean, dtype=x.dtype)[:, None, None]
    first = conv("conv_first", x - mean)
    y = norm("patch_embed.norm", first.permute(0, 2, 3, 1))
    for group, depth in enumerate(depths):
        before = y
        for number in range(depth):
            layer = f"layers.{group}.residual_group.blocks.{number}"
            weights = {name: state[f"{layer}.{name}"] for name in LAYER}
            shift = window // 2 if number % 2 else 0
            seen = norm(f"{layer}.norm1", y)
            y = y + attention(seen, weights, heads=heads, window=window, shift=shift)
            hidden = F.gelu(F.linear(norm(f"{layer}.norm2", y), *of(f"{layer}.mlp.fc1")))
            y = y + F.linear(hidden, *of(f"{layer}.mlp.fc2"))
        y = before + conv(f"layers.{group}.conv", y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    y = first + conv("conv_after_body", norm("norm", y).permute(0, 3, 1, 2))
    y = conv("upsample.0", y)
    count, _, tall, wide = y.shape
    large = y.view(count, -1, scale, scale, tall, wide).permute(0, 1, 4, 2, 5, 3)
    large = large.reshape(count, -1, scale * tall, scale * wide) + mean
    return large[:, :, : scale * height, : scale * width]


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("size", [(8, 12), (7, 10), (4, 4), (3, 1)])
def test_as_written_down(scale, size):
    model = network(scale=scale)
    mean = (0.4488, 0.4371, 0.4040)
    sizes = {"scale": scale, "depths": (2, 1), "heads": 2, "window": 4}
    with torch.no_grad():
        expected = forward(images(size), model.state_dict(), mean=mean, **sizes)
        found = model(images(size))
    assert found.shape == (2, 3, scale * size[0], scale * size[1])
    assert relative_difference(found, expected) < 1e-12


def test_grey_images_have_no_mean():
    model, x = network(channels=1), images((4, 8), channels=1)
    sizes = {"scale": 2, "depths": (2, 1), "heads": 2, "window": 4}
    with torch.no_grad():
        expected = forward(x, model.state_dict(), mean=(0.0,), **sizes)
        assert relative_difference(model(x), expected) < 1e-12


@pytest.mark.parametrize(
    ("scale", "parameters", "said"), [(2, 910_152, 878), (3, 918_267, 886), (4, 929_628, 897)]
)
def test_as_many_parameters_as_the_authors_network(scale, parameters, said):
    model = build_on_meta(Architecture("swinir_light", None, {"scale": scale}))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    # What the paper's table says is fewer by as many as such a convolution has.
    last = sum(parameter.numel() for parameter in model.conv_after_body.parameters())
    assert round((parameters - last) / 1000) == said


def published(scale):
    """A file with the authors' names and shapes, of random values, buffers included."""
    shapes = {
        **{f"conv_first.{k}": s for k, s in (("weight", (60, 3, 3, 3)), ("bias", (60,)))},
        **{f"{n}.{k}": (60,) for n in ("patch_embed.norm", "norm") for k in ("weight", "bias")},
        "conv_after_body.weight": (60, 60, 3, 3),
        "conv_after_body.bias": (60,),
        "upsample.0.weight": (3 * scale**2, 60, 3, 3),
        "upsample.0.bias": (3 * scale**2,),
    }
    of_layer = [(60,), (60,), (225, 6), (180, 60), (180,), (60, 60), (60,), (60,), (60,)]
    of_layer += [(120, 60), (120,), (60, 120), (60,)]
    for group in range(4):
        for number in range(6):
            layer = f"layers.{group}.residual_group.blocks.{number}"
            shapes |= {f"{layer}.{n}": s for n, s in zip(LAYER, of_layer, strict=True)}
        shapes |= {
            f"layers.{group}.conv.weight": (60, 60, 3, 3),
            f"layers.{group}.conv.bias": (60,),
        }
    generator = torch.Generator().manual_seed(0)
    tensors = {n: torch.rand(s, generator=generator) for n, s in shapes.items()}
    for group in range(4):
        for number in range(6):
            layer = f"layers.{group}.residual_group.blocks.{number}"
            tensors[f"{layer}.attn.relative_position_index"] = torch.zeros(64, 64).long()
            if number % 2:
                tensors[f"{layer}.attn_mask"] = torch.zeros(64, 64, 64)
    return tensors


def test_a_published_file_is_loaded(tmp_path):
    tensors = published(scale=2)
    path = tmp_path / "002_lightweightSR_DIV2K_s64w8_SwinIR-S_x2.pth"
    torch.save({"params": tensors}, path)
    model = build_model("swinir_light", None)
    notes = load_weights(model, path)
    state = model.state_dict()
    assert {name for name in tensors if name not in state} == {
        name for name in tensors if name.endswith(("relative_position_index", "attn_mask"))
    }
    assert all(state[name].equal(tensors[name]) for name in state)
    assert len(notes) == 2 and "'params'" in notes[0] and "relative_position_index" in notes[1]
    with pytest.raises(UserError, match=r"upsample\.0\.weight is 12x60x3x3, the model's is 27x60"):
        load_weights(build_model("swinir_light", None, scale=3), path)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"scale": 5}, "scale must be one of 2, 3, 4, not 5"),
        ({"width": 50}, r"width \(50\) must be a multiple of heads \(6\)"),
        ({"window": 7}, "window must be an even number, not 7"),
        ({"num_classes": 10}, "its output is an image"),
    ],
)
def test_mistakes_are_one_line(args, says):
    with pytest.raises(UserError, match=says):
        build_model("swinir_light", args.pop("num_classes", None), **args)


def test_removing_hidden_channels_equals_zeroing_them(tmp_path):
    model = network().double()
    layers = [f"layers.0.residual_group.blocks.{n}.mlp.fc1" for n in (0, 1)]
    layers += ["layers.1.residual_group.blocks.0.mlp.fc1"]
    assert list(survey_channels(model).channels) == layers
    gone = {layers[0]: [0, 3, 22], layers[1]: list(range(1, 24)), layers[2]: [5]}
    plan = PruningPlan.from_indices(dict.fromkeys(layers, 24), gone)
    pruned, dense = prune_model(model, plan), zeroed(model, plan.pruned, images((8, 8)))
    for size in ((8, 8), (5, 11)):
        with torch.no_grad():
            assert relative_difference(pruned(images(size)), dense(images(size))) < 1e-10
    assert pruned.get_submodule(layers[1].replace("fc1", "fc2")).in_features == 1
    save_model(tmp_path / "dense", model)
    prune_checkpoint(tmp_path / "dense", plan, tmp_path / "pruned")
    with torch.no_grad():
        assert load_model(tmp_path / "pruned")(images((8, 8))).equal(pruned(images((8, 8))))


def test_what_cannot_go_is_said():
    alone, coupled = survey_channels(network()), survey_channels(network(), coupled=True)
    for number in (0, 1):
        layer = f"layers.0.residual_group.blocks.{number}.attn.qkv"
        assert "a reshape that splits channels into parts" in alone.refused[layer]
    assert "added to or multiplied with those of" in alone.refused["conv_first"]
    # LayerNorm's mean over fewer channels is another one.
    stream = coupled.channels["conv_first"]
    assert "normalised together by a LayerNorm (at patch_embed.norm)" in stream.inexact
    assert set(AROUND) - {"patch_embed.norm", "norm", "upsample.0"} <= set(coupled.channels)
    assert "pixel_shuffle" in coupled.refused["upsample.0"]
