"""The first stage's weights from files that others wrote."""

import pytest
import torch
from safetensors.torch import save_file

from tpp.checkpoints.model_file import save_model
from tpp.common.errors import UserError
from tpp.models.architecture import Architecture, build_model
from tpp.models.settings import ModelSection
from train.weights import load_starting_weights, starting_weights_exist


def load(name, checkpoint, classes, args=None):
    section = ModelSection(name=name, checkpoint=str(checkpoint), args=args or {})
    starting_weights_exist(section)
    said = []
    architecture = Architecture(name, classes, args or {})
    return load_starting_weights(section, architecture, 0, said.append), said


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
