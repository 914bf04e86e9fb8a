"""A side of its own in training; the share of an image that is seen, and how it is scaled."""

import json
from pathlib import Path

import pytest
from accelerate import Accelerator

from tpp.common.errors import UserError
from tpp.common.images import ImagesSection
from tpp.models.architecture import Architecture
from train.config.config import Config, load_config, save_config
from train.data import RunData, image_transform
from train.preflight import check_training_size


def configured(tiny_config, tmp_path: Path, **data) -> Config:
    tiny_config["data"] |= {"augmentation": "imagenet", **data}
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(tiny_config))
    return load_config(path)


@pytest.mark.processes
@pytest.mark.parametrize("loader", ["dali", "torchvision"])
def test_training_sees_other_squares_than_evaluation(tiny_config, tmp_path, loader):
    """Those of a run all of whose images are of that side."""
    own = configured(
        tiny_config, tmp_path, loader=loader, image_size=32, resize=36, train_size=20, threads=1
    )
    other = configured(tiny_config, tmp_path, image_size=20, resize=20, train_size=None)
    first = {}
    for name, config in (("own", own), ("other", other)):
        batches = RunData(config, Accelerator(cpu=True)).train_batches("dense", 0, 2)
        first[name] = next(batches)[0].clone()
        batches.close()
    assert first["own"].shape == (16, 3, 20, 20) and first["own"].equal(first["other"])
    batches = RunData(own, Accelerator(cpu=True)).eval_batches(4)
    assert next(batches)[0].shape == (4, 3, 32, 32)
    batches.close()


def test_a_run_is_counted_and_kept_at_the_side_of_evaluation(tiny_config, tmp_path, run_inside):
    tiny_config["data"] |= {"augmentation": "imagenet", "train_size": 16}
    tiny_config["stages"] = {"dense": tiny_config["stages"]["dense"], "evaluate": {}}
    run_inside(tiny_config)
    results = json.loads((Path(tiny_config["output"]) / "results.json").read_text())
    assert results["image"] == [3, 32, 32]
    assert results["stages"]["dense"]["loss"] == pytest.approx(
        results["stages"]["evaluate"]["loss"]
    )


@pytest.mark.parametrize("name", ["timm:vit_tiny_patch16_224", "vit_b_16"])
def test_a_network_of_one_size_is_refused(tiny_config, tmp_path, name):
    config = configured(tiny_config, tmp_path, image_size=224, resize=256, train_size=176)
    with pytest.raises(UserError, match=rf"data\.train_size: {name} takes no images of 176x176"):
        check_training_size(config, Architecture(name, 4))
    check_training_size(config, Architecture("timm:test_convnext2", 4))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ({"augmentation": "cifar", "train_size": 16}, "data.train_size: does not go with"),
        ({"image_size": 224, "resize": 256, "crop_share": 0.95}, "asks for, 235"),
        ({"crop_share": 1.2}, "data.crop_share"),
        ({"interpolation": "lanczos"}, "data.interpolation"),
        ({"train_size": 0}, "data.train_size"),
        (
            {"train_size": 16, "augment": {"progressive": {"start_size": 24, "end_epoch": 2}}},
            "must not be larger than train_size (16)",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(tiny_config, tmp_path, data, why):
    with pytest.raises(UserError) as refused:
        configured(tiny_config, tmp_path, **data)
    assert why in str(refused.value)


def test_a_share_says_how_large_images_become(tiny_config, tmp_path):
    config = configured(
        tiny_config, tmp_path, image_size=224, resize=None, crop_share=0.95, interpolation="bicubic"
    )
    assert config.data.resize == 235, "rounded down, as timm does"
    said = config.data.preprocessing()
    assert said["resize"] == 235 and said["interpolation"] == "bicubic"
    assert image_transform(config).interpolation == "bicubic"
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


def test_a_share_is_of_the_side_that_the_weights_want():
    images = ImagesSection.model_validate({"crop_share": 0.95}).completed(
        {
            "image_size": 288,
            "resize": 288,
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
            "channels": 3,
            "interpolation": "bicubic",
        }
    )
    assert (images.image_size, images.resize, images.crop_share) == (288, 303, 0.95)
