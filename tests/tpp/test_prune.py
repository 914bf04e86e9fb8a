import copy
import functools
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tpp.channels import find_channels
from tpp.checkpoint import load_model, load_weights, read_metadata, save_model
from tpp.errors import UserError
from tpp.models import Architecture, build_model
from tpp.plan import PruningPlan
from tpp.prune import main, prune_checkpoint, prune_model, prune_tensors
from tpp.selection import select_filters

# The layers whose filters go alone, and the BatchNorm behind each: written down here, network
# by network, so as not to ask the code under test.


def _cifar_resnet(depth):
    blocks = (depth - 2) // 6
    return {
        f"layer{stage}.{block}.conv1": f"layer{stage}.{block}.bn1"
        for stage in (1, 2, 3)
        for block in range(blocks)
    }


def _resnet(blocks, convs):
    return {
        f"layer{stage + 1}.{block}.conv{conv}": f"layer{stage + 1}.{block}.bn{conv}"
        for stage in range(4)
        for block in range(blocks[stage])
        for conv in convs
    }


def _vgg19():
    names, index = {}, 0
    for count in (2, 2, 4, 4, 4):
        for _ in range(count):
            names[f"features.{index}"] = f"features.{index + 1}"
            index += 3
        index += 1  # the max-pool
    return names


NETWORKS = {
    "cifar_resnet20": (_cifar_resnet(20), (3, 16, 16)),
    "cifar_resnet56": (_cifar_resnet(56), (3, 16, 16)),
    "cifar_vgg19_bn": (_vgg19(), (3, 16, 16)),
    "mlp7_linear": ({f"fc{i}": None for i in range(1, 7)}, (1, 28, 28)),
    "resnet18": (_resnet((2, 2, 2, 2), (1,)), (3, 32, 32)),
    "resnet34": (_resnet((3, 4, 6, 3), (1,)), (3, 32, 32)),
    "resnet50": (_resnet((3, 4, 6, 3), (1, 2)), (3, 32, 32)),
}


def randomised(name, dtype):
    """A network whose BatchNorms do something, on which float errors stay small."""
    torch.manual_seed(0)
    model = build_model(name, 10).to(dtype)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model


@functools.cache
def network(name):
    return randomised(name, torch.float64)


@torch.no_grad()
def zeroed(model, plan, norms):
    """The dense network with the pruned filters, their biases and BatchNorm entries at zero."""
    model = copy.deepcopy(model)
    for layer, pruned in plan.pruned.items():
        modules = [model.get_submodule(layer)]
        if norms[layer]:
            modules.append(model.get_submodule(norms[layer]))
        for module in modules:
            for parameter in module.parameters():
                parameter[pruned] = 0
    return model


@st.composite
def plans(draw, name):
    model, (norms, _) = network(name), NETWORKS[name]
    layers = draw(st.sets(st.sampled_from(sorted(norms)), min_size=2, max_size=8))
    filters, pruned = {}, {}
    for layer in norms:
        if layer in layers:
            n = model.get_submodule(layer).weight.shape[0]
            seed = draw(st.integers(0, 2**31))
            count = draw(st.integers(1, n - 1))
            order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
            filters[layer], pruned[layer] = n, sorted(order[:count].tolist())
    return PruningPlan(filters, pruned)


@pytest.mark.parametrize("name", NETWORKS)
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_removing_filters_equals_zeroing_them(name, data):
    model = network(name)
    norms, shape = NETWORKS[name]
    plan = data.draw(plans(name))
    images = torch.rand(4, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    reference = zeroed(model, plan, norms)
    pruned = prune_model(model, plan)
    for layer, indices in plan.pruned.items():
        assert pruned.get_submodule(layer).weight.shape[0] == plan.filters[layer] - len(indices)
    with torch.no_grad():
        for training in (False, True):
            expected, actual = (m.train(training)(images) for m in (reference, pruned))
            scale = expected.abs().max()
            torch.testing.assert_close(actual / scale, expected / scale, rtol=0, atol=1e-10)
        # Single precision: the same mathematics, with the sums in another order.
        small, dense = pruned.eval().float(), reference.eval().float()
        expected, actual = dense(images.float()), small(images.float())
        scale = expected.abs().max()
        torch.testing.assert_close(actual / scale, expected / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "ratios", "norms"),
    [
        (
            "resnet18",
            {"layer2.?.conv2": 0.4, "layer2.0.downsample.0": 0.4, "layer2.1.conv1": 0.7},
            {
                "layer2.0.conv2": "layer2.0.bn2",
                "layer2.1.conv2": "layer2.1.bn2",
                "layer2.0.downsample.0": "layer2.0.downsample.1",
                "layer2.1.conv1": "layer2.1.bn1",
            },
        ),
        (
            "mobilenet_v2",
            {"features.3.conv.0.0": 0.4, "features.3.conv.1.0": 0.4},
            {
                "features.3.conv.0.0": "features.3.conv.0.1",
                "features.3.conv.1.0": "features.3.conv.1.1",
            },
        ),
        (
            "resnext50_32x4d",
            {"layer[12].*.conv2": 0.4},
            {f"layer1.{i}.conv2": f"layer1.{i}.bn2" for i in range(3)}
            | {f"layer2.{i}.conv2": f"layer2.{i}.bn2" for i in range(4)},
        ),
    ],
)
def test_tied_and_grouped_filters_equal_zeroed_ones(name, ratios, norms, tmp_path):
    model = randomised(name, torch.float64).eval()
    plan = select_filters(model, ratios)
    assert plan.pruned.keys() == norms.keys()
    expected = zeroed(model, plan, norms)
    save_model(tmp_path / "dense.safetensors", model)
    prune_checkpoint(tmp_path / "dense.safetensors", plan, tmp_path / "pruned.safetensors")
    pruned = load_model(tmp_path / "pruned.safetensors").eval()
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        logits, ours = expected(images), pruned(images)
    assert logits.std() > 0
    torch.testing.assert_close(ours, logits, rtol=0, atol=1e-10 * logits.abs().max().item())


def half(model, layers):
    return select_filters(model, dict.fromkeys(layers, 0.5))


def test_the_model_is_left_alone_and_shares_no_memory():
    model = build_model("resnet18", 10).eval()
    model.fc.bias.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pruned = prune_model(model, half(model, ["layer1.0.conv1"]))
    with torch.no_grad():
        for tensor in pruned.state_dict().values():
            tensor.fill_(7)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not pruned.training
    assert pruned.architecture == model.architecture
    assert not pruned.fc.bias.requires_grad and pruned.fc.weight.requires_grad
    assert type(pruned) is type(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_training_flags_and_attributes(dtype):
    model = build_model("mobilenet_v2", 10).to(dtype).train()
    model.features[0].eval()
    layer = "features.2.conv.0.0"
    pruned = prune_model(model, PruningPlan({layer: 96}, {layer: list(range(90))}))
    block = pruned.features[2].conv
    assert str(block[0][0]).startswith("Conv2d(16, 6, kernel")
    assert str(block[1][0]).startswith("Conv2d(6, 6, kernel") and block[1][0].groups == 6
    assert block[0][1].num_features == block[1][1].num_features == 6
    assert str(block[2]).startswith("Conv2d(6, 24, kernel")
    assert {p.dtype for p in pruned.parameters()} == {dtype}
    assert [m.training for m in pruned.modules()] == [m.training for m in model.modules()]


def test_a_pruned_model_can_be_pruned_again():
    model = randomised("cifar_resnet8", torch.float64).eval()
    once = prune_model(model, PruningPlan({"layer1.0.conv1": 16}, {"layer1.0.conv1": [0, 5]}))
    twice = prune_model(once, PruningPlan({"layer1.0.conv1": 14}, {"layer1.0.conv1": [0, 13]}))
    at_once = prune_model(
        model, PruningPlan({"layer1.0.conv1": 16}, {"layer1.0.conv1": [0, 1, 5, 15]})
    )
    for name, tensor in at_once.state_dict().items():
        assert torch.equal(tensor, twice.state_dict()[name]), name


def test_tied_parameters_and_hidden_buffers_survive():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.head = (nn.Linear(6, 6) for _ in range(4))
            self.c.weight = self.head.weight
            self.register_buffer("scale", torch.tensor(3.0), persistent=False)

        def forward(self, x):
            return self.head(self.c(self.b(self.a(x)))) * self.scale

    model = Net()
    x = torch.rand(2, 6)
    plan = PruningPlan({"a": 6}, {"a": [1, 4]})
    pruned = prune_model(model, plan, example_input=x)
    assert pruned.c.weight is pruned.head.weight
    torch.testing.assert_close(pruned(x), zeroed(model, plan, {"a": None})(x))


def test_tensors_are_taken_out_on_both_sides_and_nowhere_else():
    model = build_model("mlp7_linear", 10)
    plan = PruningPlan({"fc1": 100, "fc2": 100}, {"fc1": [3, 50], "fc2": [0, 98, 99]})
    tensors = model.state_dict()
    result = prune_tensors(tensors, plan, find_channels(model, ["fc1", "fc2"]))
    rows = [i for i in range(100) if i not in (0, 98, 99)]
    columns = [i for i in range(100) if i not in (3, 50)]
    assert torch.equal(result["fc2.weight"], tensors["fc2.weight"][rows][:, columns])
    assert torch.equal(result["fc2.bias"], tensors["fc2.bias"][rows])
    assert result["fc4.weight"] is tensors["fc4.weight"]


def test_a_plan_for_another_network_is_refused():
    model = build_model("mlp7_linear", 10)
    with pytest.raises(UserError, match="fc1: is for 64 filters, the network has 100"):
        prune_model(model, PruningPlan({"fc1": 64}, {"fc1": [1]}))
    with pytest.raises(UserError, match="fc1: nothing is known"):
        prune_tensors(model.state_dict(), PruningPlan({"fc1": 100}, {"fc1": [1]}), {})
    with pytest.raises(UserError, match="no Conv2d or Linear layer is called 'fc9'"):
        prune_model(model, PruningPlan({"fc9": 64}, {"fc9": [1]}))


def test_an_empty_plan_gives_an_equal_copy():
    model = build_model("mlp7_linear", 10)
    pruned = prune_model(model, PruningPlan({"fc1": 100}, {"fc1": []}))
    assert pruned is not model
    assert pruned.fc1.weight.data_ptr() != model.fc1.weight.data_ptr()
    assert torch.equal(pruned.fc1.weight, model.fc1.weight)


def test_pruning_a_checkpoint_equals_pruning_the_model(tmp_path):
    model = randomised("cifar_resnet8", torch.float32).eval()
    plan = half(model, ["layer1.0.conv1", "layer3.0.conv1"])
    extra = {"classes": ["a", "b"], "top1": 93.0}
    save_model(tmp_path / "in", model, preprocessing={"mean": [0.5]}, extra=extra)
    prune_checkpoint(tmp_path / "in", plan, tmp_path / "out")
    expected = prune_model(model, plan)
    loaded = load_model(tmp_path / "out")
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    info = read_metadata(tmp_path / "out")
    assert info.preprocessing == {"mean": [0.5]}
    assert info.extra == {
        "stage": "prune",
        "classes": ["a", "b"],
        "pruned_from": {"file": "in", "top1": 93.0},
    }


def test_a_foreign_file_needs_its_architecture(tmp_path, shared_data):
    public = shared_data("resnet56-cifar10.th")
    architecture = Architecture("cifar_resnet56", 10)
    model = build_model("cifar_resnet56", 10)
    load_weights(model, public)
    plan = half(model, ["layer2.0.conv1"])
    with pytest.raises(UserError, match="does not say which network"):
        prune_checkpoint(public, plan, tmp_path / "out")
    with pytest.raises(UserError, match="not a cifar_resnet20"):
        prune_checkpoint(
            public, plan, tmp_path / "out", architecture=Architecture("cifar_resnet20", 10)
        )
    prune_checkpoint(public, plan, tmp_path / "out", architecture=architecture)
    expected = prune_model(model, plan).state_dict()
    for name, tensor in load_model(tmp_path / "out").state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def run_prune(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["prune", *map(str, arguments)])
    main()


def test_the_command(tmp_path, monkeypatch, capsys):
    model = build_model("cifar_resnet56", 10)
    save_model(tmp_path / "in", model)
    half(model, ["layer1.0.conv1"]).save(tmp_path / "plan.json")
    common = ["--checkpoint", tmp_path / "in", "--output", tmp_path / "new" / "out"]

    run_prune(monkeypatch, *common, "--ratio", "layer*.conv1=0.5")
    printed = capsys.readouterr().out
    assert "853.0 k -> 428.1 k (-49.82%)" in printed
    assert "speedup 1.9930x" in printed
    assert f"wrote {tmp_path / 'new' / 'out'}" in printed
    assert load_model(tmp_path / "new" / "out").layer1[0].conv1.out_channels == 8

    run_prune(monkeypatch, *common, "--plan", tmp_path / "plan.json")
    assert load_model(tmp_path / "new" / "out").layer1[1].conv1.out_channels == 16

    for arguments, message in (
        (["--ratio", "conv1"], "must be PATTERN=R"),
        (["--ratio", "nothing*=0.5"], "matches no Conv2d or Linear layer"),
        (["--plan", tmp_path / "none.json"], "cannot read the pruning plan"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            run_prune(monkeypatch, *common, *arguments)


def test_the_command_ends_a_mistake_in_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tpp.prune", "--checkpoint", "none", "--output", "x", "--ratio=a=0"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "error: none: no such file\n"
