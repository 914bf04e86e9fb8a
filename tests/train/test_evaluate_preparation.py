"""Evaluation prepares images as a network's own weights want them, and says what it assumes."""

import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.models import get_model_weights

from data_pipelines.images.batch import LoaderSettings
from data_pipelines.images.image_index import scan_class_folders
from data_pipelines.loaders import eval_batches
from data_pipelines.loading.augment import ImageTransform
from tpp.checkpoints.model_file import read_metadata, save_model
from tpp.models import preparation
from tpp.models.architecture import Architecture, build_model
from tpp.models.preparation import assumed_preparation, changed, find_preparation
from tpp.prune import main as prune
from train.evaluate import main as evaluate

timm = pytest.importorskip("timm")
SIZES = [(300, 400), (401, 299), (256, 256), (500, 190), (193, 261), (640, 480)]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Images with edges and noise of many shapes, each in a class folder of its own."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number, (height, width) in enumerate(SIZES * 2):
        coarse = rng.integers(0, 256, (7 + number, 9, 3), dtype=np.uint8)
        image = np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
        image = np.clip(image + rng.normal(0, 20, image.shape), 0, 255).astype(np.uint8)
        (root / f"c{number:02}").mkdir()
        Image.fromarray(image).save(root / f"c{number:02}" / "0.png")
    return root


def images_of(root):
    index = scan_class_folders(root)
    return [Image.open(index.root / file).convert("RGB") for file in index.files]


def official_transform(name):
    """How the library that a network is of prepares images for its weights."""
    if name.startswith("timm:"):
        config = timm.get_pretrained_cfg(name.removeprefix("timm:")).to_dict()
        return timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=config))
    return get_model_weights(name).DEFAULT.transforms()


@pytest.mark.processes
@pytest.mark.parametrize("loader", ["dali", "torchvision"])
@pytest.mark.parametrize(
    "name",
    [
        "timm:test_vit",  # bicubic, mean 0.5, 0.95 of the side
        "timm:test_resnet",  # bilinear, mean 0.5
        "timm:test_mambaout",  # the whole shorter side
        "timm:tiny_vit_21m_512",  # squashed
        "timm:volo_d5_448",  # more than the image, with a black border
        "resnet18",
        "resnet50",  # 232
        "swin_v2_t",  # bicubic, 256 from 260
        "inception_v3",  # 299 from 342
    ],
)
def test_images_are_those_of_the_librarys_own_transform(photos, name, loader):
    """To the last bit with Pillow; with torch's kernels for bytes to rounding, mostly.

    A bicubic curve overshoots at edges, and where it is clipped depends on whether rows or columns
    are scaled first.
    """
    theirs = official_transform(name)
    expected = torch.stack([theirs(image) for image in images_of(photos)])
    found = assumed_preparation(Architecture(name, 10))
    transform = ImageTransform.prepared(found.values, augmentation="none")
    settings = LoaderSettings(loader, 1, torch.device("cpu"))
    index = scan_class_folders(photos)
    images = torch.cat([batch for batch, _ in eval_batches(index, transform, 6, settings)])
    assert images.shape == expected.shape
    levels = (images - expected).abs() * 255 * torch.tensor(transform.std)[:, None, None]
    if loader == "torchvision":
        assert levels.max() < 1e-3
        return
    assert (levels > 0.5).float().mean() < 0.06
    assert (levels > 1.5).float().mean() < 0.001
    assert levels.max() < (8 if transform.interpolation == "bicubic" else 2)


def self_labelled(name, photos, folder, *, classes=3):
    """A network's random weights, and the photos in folders by what it says of each.

    Where an evaluation prepares images as the network's own library does, it finds 100%.
    """
    torch.manual_seed(1)
    network = build_model(name, classes).eval()
    theirs = official_transform(name)
    images = images_of(photos)
    batch = torch.stack([theirs(image) for image in images])
    *_, head = (m for m in network.modules() if isinstance(m, nn.Linear))
    with torch.no_grad():
        logits = network(batch)
        scale = 1 / logits.std(0)
        head.weight.mul_(scale[:, None])
        head.bias.copy_((head.bias - logits.mean(0)) * scale)
        logits = network(batch)
    answers, best = logits.argmax(1).tolist(), logits.topk(2, dim=1).values
    sure = (best[:, 0] - best[:, 1] > 0.03).tolist()  # rounding decides about the others
    for k in range(classes):
        (folder / "data" / f"c{k}").mkdir(parents=True)
    for number, (image, answer) in enumerate(zip(images, answers, strict=True)):
        if sure[number]:
            image.save(folder / "data" / f"c{answer}" / f"{number}.png")
    assert len(set(answers)) > 1 and sum(sure) > 6
    torch.save(network.state_dict(), folder / "self.pth")
    return folder / "self.pth", folder / "data"


def scores(monkeypatch, capsys, *options):
    """What ``train.evaluate`` prints, and its top-1."""
    monkeypatch.setattr(
        sys, "argv", ["evaluate", "--loader", "dali", "--threads", "1", *map(str, options)]
    )
    evaluate()
    text = capsys.readouterr().out
    found = re.search(r"top-1 ([\d.]+)%", text)
    assert found is not None
    return text, float(found[1])


@pytest.mark.parametrize("name", ["timm:test_vit", "timm:test_convnext2", "efficientnet_b0"])
def test_a_network_labelled_by_its_own_answers_scores_all(
    photos, tmp_path, monkeypatch, capsys, name
):
    weights, data = self_labelled(name, photos, tmp_path)
    text, top1 = scores(
        monkeypatch, capsys, "--checkpoint", weights, "--model", name, "--data", data
    )
    assert top1 == 100
    assert "images scaled to" in text and "(assumed, as " in text
    # The old way: what it costs not to know.
    imagenet = ["--mean", 0.485, 0.456, 0.406, "--std", 0.229, 0.224, 0.225]
    old = [*imagenet, "--interpolation", "bilinear", "--crop-share", 0.5]
    text, other = scores(
        monkeypatch, capsys, "--checkpoint", weights, "--model", name, "--data", data, *old
    )
    assert other < 100
    assert "crop_share, interpolation, mean, std as told" in text


def test_a_checkpoint_pruned_from_a_foreign_file_is_evaluated_as_that_was(
    photos, tmp_path, monkeypatch, capsys
):
    weights, data = self_labelled("timm:test_resnet", photos, tmp_path)
    pruned = tmp_path / "pruned.safetensors"
    prune(["--checkpoint", str(weights), "--model", "timm:test_resnet", "--output", str(pruned),
           "--ratio", "layer*.0.conv2=0.0"])  # fmt: skip
    assert "images scaled to 168 (bilinear), cut to 160x160" in capsys.readouterr().out
    assert read_metadata(pruned).preprocessing == {
        "image_size": 160,
        "resize": 168,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "channels": 3,
        "interpolation": "bilinear",
    }
    text, top1 = scores(monkeypatch, capsys, "--checkpoint", pruned, "--data", data)
    assert top1 == 100
    assert "assumed" not in text


def test_our_own_files_are_prepared_as_they_say(photos, tmp_path, monkeypatch, capsys):
    model = build_model("cifar_resnet8", len(SIZES) * 2)
    said = {"image_size": 24, "resize": 32, "mean": [0.1] * 3, "std": [2.0] * 3, "channels": 3}
    save_model(tmp_path / "a", model, preprocessing=said)
    text, _ = scores(monkeypatch, capsys, "--checkpoint", tmp_path / "a", "--data", photos)
    assert "images " not in text.replace("12 images", "")
    text, _ = scores(
        monkeypatch, capsys, "--checkpoint", tmp_path / "a", "--data", photos, "--image-size", 48
    )
    assert "images scaled to 64 (bilinear), cut to 48x48, mean 0.1, std 2 (image_size as" in text
    save_model(tmp_path / "b", model)
    text, _ = scores(monkeypatch, capsys, "--checkpoint", tmp_path / "b", "--data", photos)
    assert "images as they are, cut to 32x32" in text and "(assumed, as is usual for" in text


RESNET50 = {"resize": 232, "image_size": 224}


@pytest.mark.parametrize(
    ("name", "file", "expected"),
    [
        ("resnet50", "weights.pth", RESNET50),
        ("resnet50", "resnet50-11ad3fa6.pth", RESNET50),
        ("resnet50", "a/resnet50-0676ba61.pth", {"resize": 256}),
        ("vit_b_16", None, {"resize": 256, "image_size": 224, "interpolation": "bilinear"}),
        ("vit_h_14", None, {"resize": 224, "image_size": 224, "interpolation": "bicubic"}),
        ("inception_v3", None, {"resize": 342, "image_size": 299}),
        ("timm:resnet18.a1_in1k", None, {"resize": 235, "interpolation": "bicubic"}),
        ("timm:resnet18.tv_in1k", None, {"resize": 256, "interpolation": "bilinear"}),
        ("cifar_resnet56", None, {"resize": None, "image_size": 32}),
        ("mlp7_linear", None, {"mean": [0.485], "std": [0.229], "channels": 1}),
    ],
)
def test_what_is_assumed(name, file, expected):
    found = assumed_preparation(Architecture(name, 10), file)
    assert {key: found.values[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("name", "args", "expected"),
    [
        ("vit_b_16", {"image_size": 384}, {"resize": 384, "interpolation": "bicubic"}),
        ("vit_b_16", {"image_size": 112}, {"resize": 128, "image_size": 112}),
        ("timm:test_vit", {"img_size": 64}, {"resize": 67, "image_size": 64}),
        ("timm:test_vit", {"in_chans": 1}, {"mean": [0.5], "channels": 1}),
    ],
)
def test_arguments_of_the_network_count(name, args, expected):
    found = assumed_preparation(Architecture(name, 10, args))
    assert {key: found.values[key] for key in expected} == expected


@pytest.mark.parametrize(
    "name", ["timm:vit_base_patch16_sapiens2", "timm:deepseek_vit_412m", "edsr"]
)
def test_what_cannot_be_done_is_said(name):
    with pytest.raises(preparation.UserError, match=f"^model '{name}': "):
        assumed_preparation(Architecture(name, None if name == "edsr" else 10))


def test_options_change_one_thing_each():
    values = assumed_preparation(Architecture("resnet18", 10)).values
    for options, expected in [
        ({"image_size": 112}, {"image_size": 112, "resize": 128}),
        ({"image_size": 112, "resize": 112}, {"image_size": 112, "resize": 112}),
        ({"resize": 0}, {"resize": None}),
        ({"crop_share": 0.9}, {"resize": 248}),
        ({"mean": [0.5] * 3}, {"mean": [0.5] * 3}),
        ({"std": [0.5] * 3}, {"std": [0.5] * 3}),
        ({"interpolation": "bicubic"}, {"interpolation": "bicubic"}),
        ({"crop_mode": "squash"}, {"crop_mode": "squash"}),
    ]:
        assert changed(values, **options) == values | expected
    for options, said in [
        ({"image_size": 0}, "image_size must be between 1 and 4096, not 0"),
        ({"crop_share": 1.5}, "crop_share must be above 0 and at most 1, not 1.5"),
        ({"crop_share": 0.5, "resize": 3}, "give one of resize and crop_share"),
    ]:
        with pytest.raises(preparation.UserError, match=re.escape(said)):
            changed(values, **options)


def test_a_part_that_a_file_does_not_say_is_assumed():
    said = {"image_size": 64, "mean": [0.3] * 3}
    found = find_preparation(said, Architecture("timm:test_vit", 10), "a.pth")
    assert found.values == {
        "image_size": 64,
        "resize": 67,
        "mean": [0.3] * 3,
        "std": [0.5] * 3,
        "channels": 3,
        "interpolation": "bicubic",
    }
    assert found.source.startswith("assumed, ")
