import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from zeroing import randomised, zeroed

from tpp.channels.channel_map import find_channels
from tpp.channels.removal import prune_model, prune_tensors
from tpp.checkpoints.model_file import load_model, read_checkpoint, read_metadata, save_model
from tpp.checkpoints.prune_file import prune_checkpoint
from tpp.checkpoints.sources import load_weights
from tpp.common.errors import UserError
from tpp.models.architecture import Architecture, build_model
from tpp.plan import PruningPlan
from tpp.prune import main
from tpp.selection.selection import Selection, select_filters
from tpp.selection.settings import PruningSection

ROOT = Path(__file__).resolve().parents[2]


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
    torch.testing.assert_close(pruned(x), zeroed(model, plan.pruned, x)(x))


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


def test_a_file_is_pruned_again_and_again(tmp_path):
    model = randomised("cifar_resnet8", torch.float32).eval()
    save_model(tmp_path / "0", model)
    layer = "layer1.0.conv1"
    # Each time the first of what is left, so that at the end filters 0, 1 and 2 are gone.
    for number in range(3):
        plan = PruningPlan({layer: 16 - number}, {layer: [0]})
        prune_checkpoint(tmp_path / str(number), plan, tmp_path / str(number + 1))
    at_once = prune_model(model, PruningPlan({layer: 16}, {layer: [0, 1, 2]}))
    loaded = load_model(tmp_path / "3")
    for name, tensor in at_once.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert loaded.architecture == model.architecture


def test_a_mask_is_cut_with_its_weights(tmp_path):
    """A companion for some of the tensors, of values that no arithmetic could be done with."""
    model = randomised("resnext50_32x4d", torch.float32)
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]

    def mask(network):
        return {f"{n}.weight": network.get_parameter(f"{n}.weight") > 0 for n in layers}

    plan = half(model, ["layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1"])
    save_model(tmp_path / "dense", model, companions={"mask": mask(model)})
    prune_checkpoint(tmp_path / "dense", plan, tmp_path / "pruned")
    tensors, companions, _ = read_checkpoint(tmp_path / "pruned")
    expected = mask(prune_model(model, plan))
    assert list(companions) == ["mask"] and companions["mask"].keys() == expected.keys()
    for name, kept in companions["mask"].items():
        assert kept.dtype == torch.bool and kept.shape == tensors[name].shape, name
        assert torch.equal(kept, expected[name]), name
    assert sum(kept.numel() for kept in expected.values()) < sum(
        kept.numel() for kept in mask(model).values()
    )


def test_loading_needs_nothing_of_the_training_code(tmp_path):
    """The file and the package tpp, alone, in a process that knows of nothing else of ours."""
    save_model(tmp_path / "dense", build_model("mobilenet_v2", 10))
    plan = half(load_model(tmp_path / "dense"), ["features.2.conv.0.0"])
    prune_checkpoint(tmp_path / "dense", plan, tmp_path / "pruned")
    shutil.copytree(ROOT / "tpp", tmp_path / "elsewhere" / "tpp")
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import tpp, torch\n"
        "model = tpp.load_model(sys.argv[2])\n"
        "assert model.features[2].conv[0][0].out_channels == 48\n"
        "model.classifier[1] = torch.nn.Linear(model.last_channel, 3)\n"
        "model.train()(torch.rand(2, 3, 64, 64)).sum().backward()\n"
        "ours = {'train', 'data_pipelines', 'launch', 'benchmarks'}\n"
        "heavy = {'torch_pruning', 'deepspeed', 'accelerate', 'nvidia.dali', 'pydantic'}\n"
        "print(sorted((ours | heavy) & set(sys.modules)), tpp.__file__)\n"
    )
    folder = tmp_path / "elsewhere"
    done = subprocess.run(
        [sys.executable, "-I", "-c", script, str(folder), str(tmp_path / "pruned")],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"[] {folder}/tpp/__init__.py\n"


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

    with pytest.raises(UserError, match="is there already; --overwrite replaces it"):
        run_prune(monkeypatch, *common, "--plan", tmp_path / "plan.json")
    common.append("--overwrite")
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


def write_config(path, **sections):
    path.write_text(json.dumps(sections))  # JSON is YAML
    return path


def test_a_configuration_says_network_and_what_goes(tmp_path, monkeypatch, capsys):
    """Of a run's configuration no more is read than that; the run may not even be possible."""
    model = build_model("cifar_resnet8", 10)
    save_file(model.state_dict(), tmp_path / "foreign.safetensors")
    write_config(
        tmp_path / "base.yaml",
        model={"name": "cifar_resnet8"},
        seed=3,
        pruning={"ratios": {"layer3*.conv1": 0.9}, "round_to": 2},
    )
    config = write_config(
        tmp_path / "a.yaml",
        extends="base.yaml",
        pruning={"ratios": {"layer*.conv1": 0.3}, "criterion": "random"},
        training={"batch_sise": "many"},
    )
    files = ["--checkpoint", tmp_path / "foreign.safetensors", "--output", tmp_path / "out"]
    run_prune(monkeypatch, *files, "--config", config, "--save-plan", tmp_path / "plan.json")
    assert "cifar_resnet8: parameters" in capsys.readouterr().out
    expected = Selection({"layer*.conv1": 0.3}, "random", round_to=2, seed=3).select(model)
    assert PruningPlan.load(tmp_path / "plan.json") == expected
    assert expected != Selection({"layer*.conv1": 0.3}, "random", round_to=2).select(model)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"model": {"name": "resnet18", "arg": {}}},
            "model.arg: unknown key; did you mean 'args'?",
        ),
        (
            {"model": {"name": "resnet18"}, "seed": -1},
            "seed: input should be greater than or equal",
        ),
        ({}, "model: this key is missing"),
        (
            {"model": {"name": "resnet18"}},
            "pruning.ratios says of no layer what goes, and there is no pruning.budget",
        ),
        (
            {"model": {"name": "resnet18"}, "pruning": {"budget": {"macs": 5, "speedup": 2.0}}},
            "pruning.budget: exactly one of speedup, macs, parameters, latency_ms, "
            "latency_speedup is needed, not speedup and macs",
        ),
    ],
)
def test_mistakes_in_a_configuration_are_named(tmp_path, monkeypatch, sections, message):
    config = write_config(tmp_path / "a.yaml", **sections)
    with pytest.raises(UserError) as error:
        run_prune(monkeypatch, "--checkpoint", "none", "--output", "x", "--config", config)
    assert str(error.value).startswith(f"{config}: {message}")


def test_a_pruning_section_has_what_a_selection_has():
    """But for seed and gradients, which are the run's; and by default the same goes."""
    names = {field.name for field in dataclasses.fields(Selection)} - {"seed", "gradients"}
    assert set(PruningSection.model_fields) == names
    assert PruningSection().selection(7) == Selection(seed=7)
