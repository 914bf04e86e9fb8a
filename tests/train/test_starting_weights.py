"""The first stage's weights from files that others wrote."""

import json

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import nn

from tpp.channels.removal import prune_model
from tpp.checkpoints.model_file import load_model, save_model
from tpp.common.errors import UserError
from tpp.models.architecture import Architecture, build_model
from tpp.models.settings import ModelSection
from tpp.plan import PruningPlan
from train.config.config import load_config, save_config
from train.weights import load_starting_weights, notes_on_images, starting_weights_exist


def load(name, checkpoint, classes, args=None, *, seed=0, **model):
    section = ModelSection(name=name, checkpoint=str(checkpoint), args=args or {}, **model)
    starting_weights_exist(section)
    said = []
    architecture = Architecture(name, classes, args or {})
    return load_starting_weights(section, architecture, seed, said.append), said


def test_a_folder_of_weights_starts_a_run(tmp_path):
    model = build_model("cifar_resnet8", 10)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    found, said = load("cifar_resnet8", tmp_path, 10)
    assert said == []
    assert torch.equal(found.linear.weight, model.linear.weight)
    with pytest.raises(UserError, match="no such file"):
        load("cifar_resnet8", tmp_path / "none", 10)


def test_what_is_left_out_of_the_weights_is_said(tmp_path):
    state = build_model("cifar_resnet8", 10).state_dict()
    path = tmp_path / "x.pth"
    torch.save({**state, "total_ops": torch.zeros(1)}, path)
    _, said = load("cifar_resnet8", path, 10)
    assert said == [f"{path}: left out: total_ops, no part of CifarResNet"]


def test_a_published_network_keeps_its_setting_from_file_to_file(tmp_path):
    """The file that pruning makes of it has a setting that the configuration need not have."""
    model = build_model("googlenet", 3)
    torch.save(model.state_dict(), tmp_path / "x.pth")
    found, said = load("googlenet", tmp_path / "x.pth", 3)
    assert found.transform_input and len(said) == 1 and "transform_input" in said[0]
    save_model(tmp_path / "ours", found)
    again, _ = load("googlenet", tmp_path / "ours", 3)
    assert again.transform_input and again.architecture == found.architecture
    with pytest.raises(UserError, match="the configuration asks for"):
        load("googlenet", tmp_path / "ours", 3, {"transform_input": False})
    other, said = load("googlenet", tmp_path / "x.pth", 3, {"transform_input": False})
    assert not other.transform_input and said == []


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The Hub's cache, empty; nothing can be fetched."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def keep(repository: str, revision: str, network: nn.Module, **config) -> None:
        place = tmp_path / "hf" / f"models--{repository.replace('/', '--')}"
        snapshot = place / "snapshots" / ("0" * 40)
        save_for_hf(network, snapshot, safe_serialization=True)
        said = json.loads((snapshot / "config.json").read_text())
        said["pretrained_cfg"] |= config
        (snapshot / "config.json").write_text(json.dumps(said))
        (place / "refs").mkdir()
        (place / "refs" / revision).write_text("0" * 40)

    return keep


def test_weights_of_timm_answer_as_timm_has_them_answer(hub):
    torch.manual_seed(3)
    hub("timm/test_vit.r160_in1k", "main", timm.create_model("test_vit"))
    truth = timm.create_model("test_vit.r160_in1k", pretrained=True).eval()
    images = torch.randn(2, 3, 160, 160)
    for name in ("timm:test_vit", "timm:test_vit.r160_in1k"):
        found, _ = load(name, "timm:test_vit.r160_in1k", 1000)
        assert found.architecture == Architecture(name, 1000, {})
        assert found.eval()(images).equal(truth(images))
    with pytest.raises(UserError, match=r"is of timm:test_vit, and model.name is 'timm:test_vit2'"):
        load("timm:test_vit2", "timm:test_vit.r160_in1k", 1000)
    with pytest.raises(UserError, match=r"tells 1000 classes apart.*asks for 10; model.head=new"):
        load("timm:test_vit", "timm:test_vit.r160_in1k", 10)


def test_weights_of_a_revision_on_the_hub(hub):
    network = timm.create_model("test_resnet", num_classes=7)
    hub("someone/mine", "v1", network)
    found, _ = load("timm:test_resnet", "hf-hub:someone/mine@v1", 7)
    assert found.state_dict()["fc.weight"].equal(network.fc.weight)
    for source, why in (
        ("hf-hub:someone/mine", "OWNER/REPO@REVISION"),
        ("hf-hub:mine@v1", "OWNER/REPO@REVISION"),
        ("hf-hub:someone/mine@v2", "cannot load hf-hub:someone/mine@v2"),
    ):
        with pytest.raises(UserError, match=why):
            load("timm:test_resnet", source, 7)


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("resnet18", "fc"),
        ("mobilenet_v2", "classifier.1"),
        ("timm:test_convnext2", "head.fc"),
        ("timm:test_vit", "head"),
        ("cifar_vgg19_bn", "classifier"),
    ],
)
def test_a_new_classifier_takes_nothing_else_away(tmp_path, name, head):
    torch.manual_seed(1)
    given = build_model(name, 12)
    path = tmp_path / "x.pth"
    torch.save(given.state_dict(), path)
    with pytest.raises(UserError, match=r"model\.head=new gives it a classifier of its own"):
        load(name, path, 3)
    found, said = load(name, path, 3, head="new")
    assert len(said) == 1 and "the classifier for 12 classes is left out" in said[0]
    old = given.state_dict()
    for key, tensor in found.state_dict().items():
        if key.startswith(f"{head}."):
            assert len(tensor) == 3
        else:
            assert tensor.equal(old[key]), key
    again, _ = load(name, path, 3, head="new")
    other, _ = load(name, path, 3, head="new", seed=1)
    weights = [net.get_parameter(f"{head}.weight") for net in (found, again, other)]
    assert weights[0].equal(weights[1]) and not weights[0].equal(weights[2])
    # It is a network like any other: kept, and read again.
    save_model(tmp_path / "ours.safetensors", found)
    assert load_model(tmp_path / "ours.safetensors").architecture.num_classes == 3


def test_a_pruned_network_gets_a_new_classifier_of_its_widths(tmp_path):
    network = build_model("resnet18", 12)
    plan = PruningPlan({"layer4.1.conv1": 512}, {"layer4.1.conv1": list(range(100))})
    save_model(tmp_path / "x.safetensors", prune_model(network, plan))
    found, _ = load("resnet18", tmp_path / "x.safetensors", 3, head="new")
    assert found.get_submodule("layer4.1.conv1").out_channels == 412
    assert found(torch.zeros(1, 3, 64, 64)).shape == (1, 3)


def wanted(tiny_config, tmp_path, data, **model):
    tiny_config["model"] = model
    for key in ("image_size", "resize"):
        tiny_config["data"].pop(key, None)
    tiny_config["data"] |= {"augmentation": "imagenet", **data}
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(tiny_config))
    return load_config(path)


def test_images_are_as_public_weights_want_them(tiny_config, tmp_path, hub):
    """Where nothing is said; a saved configuration says it all, and is not changed any more."""
    config = wanted(
        tiny_config, tmp_path, {}, name="resnet50", checkpoint="torchvision:IMAGENET1K_V2"
    )
    assert (config.data.image_size, config.data.resize) == (224, 232)
    assert notes_on_images(config.model, config.data) == []
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config

    timms = {"name": "timm:test_vit", "checkpoint": "timm:test_vit.r160_in1k"}
    config = wanted(tiny_config | {"stages": {"evaluate": {}}}, tmp_path, {}, **timms)
    found = config.data.preprocessing()
    assert found == {
        "image_size": 160,
        "resize": 168,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "channels": 3,
        "interpolation": "bicubic",
    }

    network = timm.create_model("test_resnet", num_classes=7)
    hub("someone/mine", "v1", network, mean=[0.1, 0.2, 0.3], crop_pct=0.5)
    hubs = {"name": "timm:test_resnet", "checkpoint": "hf-hub:someone/mine@v1"}
    config = wanted(tiny_config, tmp_path, {}, **hubs)
    assert config.data.mean == [0.1, 0.2, 0.3]
    assert config.data.resize == 2 * config.data.image_size


def test_what_a_configuration_says_otherwise_is_told(tiny_config, tmp_path):
    config = wanted(
        tiny_config,
        tmp_path,
        {"image_size": 112, "mean": [0.5, 0.5, 0.5]},
        name="resnet50",
        checkpoint="torchvision:IMAGENET1K_V2",
    )
    assert config.data.resize == 116, "as much of an image is seen"
    source = "model.checkpoint: torchvision:IMAGENET1K_V2 wants"
    assert notes_on_images(config.model, config.data) == [
        f"{source} image_size 224, and data.image_size is 112",
        f"{source} resize 232, and data.resize is 116",
        f"{source} mean [0.485, 0.456, 0.406], and data.mean is [0.5, 0.5, 0.5]",
    ]
