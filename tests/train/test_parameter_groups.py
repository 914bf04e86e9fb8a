"""Which parameters decay, and how fast each learns, for every network that is pruned in tests."""

import copy

import pytest
import timm
import torch
from networks import NETWORKS
from torch import nn
from toy_methods.gate import Gated
from toy_methods.mortal import Settings

from tpp.common.errors import UserError
from tpp.models.architecture import Architecture, build_on_meta
from tpp.models.classifier import classifier_tensors
from train.config.optimizer import OptimizerSection
from train.distributed.engine import numbers_of, portable
from train.loop.optim import make_optimizer, parameter_groups


def network(name: str) -> nn.Module:
    return build_on_meta(Architecture(name, 10, NETWORKS[name][2]))


def grouped(model: nn.Module, **settings) -> dict[str, dict]:
    """The group of every parameter, by its name; each is in exactly one."""
    groups = parameter_groups(model, OptimizerSection(lr=0.1, **settings))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, dict] = {}
    for group in groups:
        assert group.get("param_names", list(found)) is not None
        for place, parameter in enumerate(group["params"]):
            name = names[id(parameter)]
            assert name not in found, f"{name} is in two groups"
            assert group.get("param_names", [name] * (place + 1))[place] == name
            found[name] = group
    assert found.keys() == set(names.values())
    return found


@pytest.mark.parametrize("name", NETWORKS)
def test_no_norm_and_no_bias_decays_and_all_else_does(name):
    model = network(name)
    found = grouped(model, decay_norms_and_biases=False, weight_decay=0.02, head_lr_factor=10.0)
    spared = set()
    for place, module in model.named_modules():
        is_norm = "Norm" in type(module).__name__
        for key, _ in module.named_parameters(place, recurse=False):
            if is_norm or key.endswith("bias"):
                spared.add(key)
    assert spared, "nothing to spare in this network"
    for key, parameter in model.named_parameters():
        decay = found[key]["weight_decay"]
        if key in spared:
            assert decay == 0, key
        elif parameter.dim() > 1 and key not in getattr(model, "no_weight_decay", set)():
            assert decay == 0.02, key
    # What is as wide as there are classes is the last layer, and learns faster.
    fast = {key for key, group in found.items() if group["lr_scale"] == 10.0}
    last = [key for key, p in model.named_parameters() if p.dim() > 1][-1]
    assert last in fast and len(fast) <= 4  # two of them, where one is distilled
    assert all(model.get_parameter(key).shape[0] == 10 for key in fast)


def test_by_default_all_are_in_one_group_as_published():
    model = network("cifar_resnet20")
    (group,) = parameter_groups(model, OptimizerSection(lr=0.1))
    assert group.keys() == {"params"} and len(group["params"]) == len([*model.parameters()])


def test_layer_decay_is_timms():
    model = network("timm:vit_tiny_patch16_224")
    found = grouped(model, name="adamw", layer_decay=0.7, decay_norms_and_biases=False)
    truth = timm.optim.param_groups_layer_decay(
        model, 1e-4, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.7
    )
    wanted = {id(p): g for g in truth for p in g["params"]}
    for name, parameter in model.named_parameters():
        mine, its = found[name], wanted[id(parameter)]
        assert mine["lr_scale"] == pytest.approx(its["lr_scale"], rel=1e-12), name
        assert mine["weight_decay"] == its["weight_decay"], name


def test_what_a_method_adds_is_in_a_group_too():
    torch.manual_seed(0)
    model = network("cifar_resnet20")
    Gated(Settings()).modify(model, "regularize")
    found = grouped(model, decay_norms_and_biases=False)
    gates = [name for name in found if name.endswith(".gate")]
    assert len(gates) == 9 and all(found[name]["weight_decay"] == 0 for name in gates)


@pytest.mark.parametrize(
    ("name", "settings", "why"),
    [
        ("resnet18", {"layer_decay": 0.7}, "layer_decay: ResNet does not say what its layers are"),
        ("edsr", {"head_lr_factor": 3.0}, "head_lr_factor: this network has no classifier"),
    ],
)
def test_what_a_network_cannot_say(name, settings, why):
    classes = None if name == "edsr" else 10
    model = build_on_meta(Architecture(name, classes, {}))
    with pytest.raises(UserError, match=why):
        parameter_groups(model, OptimizerSection(lr=0.1, **settings))


def test_classifiers_are_found_whatever_they_are_called():
    found = {
        name: sorted(classifier_tensors(Architecture(name, 10, {})))
        for name in ("resnet18", "vgg16_bn", "squeezenet1_1", "timm:convnext_tiny")
    }
    assert found == {
        "resnet18": ["fc.bias", "fc.weight"],
        "vgg16_bn": ["classifier.6.bias", "classifier.6.weight"],
        "squeezenet1_1": ["classifier.1.bias", "classifier.1.weight"],
        "timm:convnext_tiny": ["head.fc.bias", "head.fc.weight"],
    }


def test_a_state_numbers_parameters_as_the_network_does():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 1))
    section = OptimizerSection(name="adamw", lr=0.1, decay_norms_and_biases=False)
    optimizer = make_optimizer(model, section)
    model(torch.randn(2, 3, 4, 4)).square().sum().backward()
    optimizer.step()
    state = portable(optimizer.state_dict(), numbers_of(model, optimizer))
    for number, parameter in enumerate(model.parameters()):
        assert state["state"][number]["exp_avg"] is optimizer.state[parameter]["exp_avg"]
    assert [group["params"] for group in state["param_groups"]] == [[0, 4], [1, 2, 3, 5]]
    # One group takes it up as well as two: the numbers are the same.
    other = make_optimizer(copy.deepcopy(model), section)
    other.load_state_dict(state)
    for one, two in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert one["exp_avg"].equal(two["exp_avg"]) and one["step"] == two["step"]
