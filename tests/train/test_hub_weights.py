"""A repository that `tpp push` wrote, as what a run starts from and as its teacher."""

import warnings

import pytest
import torch

from tpp.channels.removal import prune_model
from tpp.checkpoints.model_file import save_model
from tpp.common.errors import Note, UserError
from tpp.models.architecture import Architecture, build_model
from tpp.models.settings import ModelSection
from tpp.plan import PruningPlan
from tpp.push import main as push
from train.public_weights import wanted_preparation
from train.teachers import load_teacher
from train.weights import load_starting_weights, starting_companion, starting_weights_exist

IMAGES = {"image_size": 32, "resize": None, "mean": [0.5], "std": [0.2], "channels": 3}
OURS = Architecture("cifar_resnet8", 10)


def test_a_pruned_repository_starts_a_run_and_teaches(tmp_path, hub_service, monkeypatch):
    warnings.simplefilter("ignore", Note)
    torch.manual_seed(0)
    plan = PruningPlan({"layer1.0.conv1": 16}, {"layer1.0.conv1": [0, 3, 5]})
    network = prune_model(build_model("cifar_resnet8", 10), plan).eval()
    path = tmp_path / "small.safetensors"
    mask = {"layer1.0.conv1.weight": torch.ones_like(network.layer1[0].conv1.weight)}
    save_model(path, network, preprocessing=IMAGES, companions={"mask": mask})
    push([str(path), "me/small"])
    commit = hub_service.repositories["me/small"].branches["main"]
    images = torch.randn(2, 3, 32, 32)
    for revision in ("main", commit):
        source = f"hf-hub:me/small@{revision}"
        section = ModelSection(name="cifar_resnet8", checkpoint=source)
        starting_weights_exist(section)
        found = load_starting_weights(section, OURS, 0)
        assert found(images).equal(network(images))
        assert wanted_preparation(section, "model.checkpoint") == IMAGES
        assert starting_companion(section, OURS, "mask").keys() == mask.keys()
        assert load_teacher(source, OURS, [], key="teacher")(images).equal(network(images))
    new = ModelSection(name="cifar_resnet8", checkpoint=source, head="new")
    found = load_starting_weights(new, Architecture("cifar_resnet8", 3), 0)
    assert found.layer1[0].conv1.out_channels == 13 and found.linear.out_features == 3
    with pytest.raises(UserError, match=r"model\.checkpoint: .* holds cifar_resnet8 .* asks for"):
        load_starting_weights(section, Architecture("cifar_resnet8", 3), 0)
    gone = ModelSection(name="cifar_resnet8", checkpoint="hf-hub:me/small@v9")
    with pytest.raises(UserError, match=r"cannot load hf-hub:me/small@v9: .* no revision v9"):
        load_starting_weights(gone, OURS, 0)
