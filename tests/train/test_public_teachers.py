"""Teachers with public weights, out of the caches in which torchvision and timm keep them."""

import hashlib
import io
from pathlib import Path

import huggingface_hub.constants
import pytest
import timm
import torch
from timm.models import save_for_hf
from torch import nn
from torchvision.models import ResNet18_Weights

from tpp.common.errors import UserError
from tpp.models.architecture import Architecture, build_model, example_input_for
from train.config.config import Config
from train.distillation.distillation import Distillation
from train.distillation.settings import DistillSection
from train.teachers import check_teachers, load_teacher, open_teachers, teachers_exist

RUN = Architecture("cifar_resnet8", 4)
KEY = "stages.finetune.distill.teacher"


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Both are empty, and nothing can be fetched."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def keep_on_hub(cache: Path, repository: str, revision: str, network: nn.Module) -> None:
    """Lay a network into the Hub's cache, as a download of that revision would."""
    place = cache / "hf" / f"models--{repository.replace('/', '--')}"
    save_for_hf(network, place / "snapshots" / ("0" * 40), safe_serialization=True)
    (place / "refs").mkdir()
    (place / "refs" / revision).write_text("0" * 40)


def test_weights_of_torchvision(caches, monkeypatch):
    torch.manual_seed(3)
    network = build_model("resnet18", 1000)
    stream = io.BytesIO()
    torch.save(network.state_dict(), stream)
    folder = caches / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    name = f"resnet18-{hashlib.sha256(stream.getvalue()).hexdigest()[:8]}.pth"
    (folder / name).write_bytes(stream.getvalue())
    url = f"https://example.invalid/{name}"
    monkeypatch.setattr(ResNet18_Weights.IMAGENET1K_V1.value, "url", url)
    for source in ("torchvision:resnet18", "torchvision:resnet18.IMAGENET1K_V1"):
        found = load_teacher(source, RUN, [], key=KEY)
        assert torch.equal(found.get_parameter("fc.weight"), network.fc.weight)
        assert found.preprocessing["mean"] == [0.485, 0.456, 0.406]
        assert found.architecture == Architecture("resnet18", 1000)


def test_weights_of_timm(caches):
    torch.manual_seed(3)
    network = timm.create_model("test_resnet")
    keep_on_hub(caches, "timm/test_resnet.r160_in1k", "main", network)
    found = load_teacher("timm:test_resnet.r160_in1k", RUN, [], key=KEY)
    assert torch.equal(found.get_parameter("fc.weight"), network.fc.weight)
    assert found.preprocessing["mean"] == [0.5, 0.5, 0.5]
    assert found.architecture == Architecture("timm:test_resnet", 1000)
    # Where widths and classes are others, attention is what can be compared.
    student = build_model("cifar_resnet8", 4)
    preprocessing = {"mean": [0.0] * 3, "std": [1.0] * 3, "channels": 3}
    distillation = Distillation(
        DistillSection(kind="features"),
        student.train(),
        found.eval().requires_grad_(False),
        example=example_input_for(student),
        preprocessing=preprocessing,
        key="distill",
    )
    images = torch.rand(2, 3, 32, 32)
    assert distillation.term(images, student(images)).item() > 0


def test_weights_of_a_revision_on_the_hub(caches):
    network = timm.create_model("test_resnet", num_classes=4)
    keep_on_hub(caches, "someone/mine", "v1", network)
    found = load_teacher("hf-hub:someone/mine@v1", RUN, [], key=KEY)
    assert torch.equal(found.get_parameter("fc.weight"), network.fc.weight)
    assert found.preprocessing["std"] == [0.5, 0.5, 0.5]
    with pytest.raises(UserError, match=f"{KEY}: cannot load hf-hub:someone/mine@v2"):
        load_teacher("hf-hub:someone/mine@v2", RUN, [], key=KEY)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("torchvision:resnet1", "torchvision has no weights for 'resnet1'"),
        (
            "torchvision:resnet18.V9",
            "torchvision has no 'V9' for 'resnet18'; there are: IMAGENET1K",
        ),
        (
            "timm:test_resnet.x",
            "timm has no weights 'test_resnet.x'; there are: test_resnet.r160_in1k",
        ),
    ],
)
def test_a_wrong_name_is_told_before_anything_is_fetched(tiny_config, source, says):
    tiny_config["stages"]["finetune"]["distill"] = {"teacher": source}
    with pytest.raises(UserError) as caught:
        teachers_exist(Config.model_validate(tiny_config))
    assert str(caught.value).startswith(f"{KEY}: {says}")


@pytest.mark.parametrize(
    "source", ["torchvision:resnet18", "timm:test_resnet.r160_in1k", "hf-hub:timm/x@v1"]
)
def test_what_cannot_be_fetched_is_one_line(caches, tiny_config, monkeypatch, source):
    """A dry run says that it is still to come; classes are compared without it."""
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    tiny_config["stages"]["finetune"]["distill"] = {"teacher": source, "kind": "features"}
    config = Config.model_validate(tiny_config)
    teachers_exist(config)
    assert open_teachers(config, RUN) == [f"{KEY}: {source}: is downloaded when a run starts"]
    with pytest.raises(UserError) as caught:
        open_teachers(config, RUN, download=True)
    message = str(caught.value)
    assert message.startswith(f"{KEY}: cannot ") and "\n" not in message
    if not source.startswith("hf-hub"):
        tiny_config["stages"]["finetune"]["distill"] = {"teacher": source}
        with pytest.raises(UserError, match="tells 1000 classes apart, the network 4"):
            check_teachers(Config.model_validate(tiny_config), RUN)
