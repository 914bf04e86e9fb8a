import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tpp.channels.removal import prune_model
from tpp.checkpoints import training_state
from tpp.checkpoints.model_file import (
    load_model,
    load_optimizer_state,
    read_checkpoint,
    save_model,
)
from tpp.checkpoints.prune_file import prune_checkpoint
from tpp.checkpoints.sources import load_weights, name_optimizer_state, read_source
from tpp.checkpoints.training_state import TrainingState, state_folder, write_state
from tpp.common.errors import UserError
from tpp.models.architecture import Architecture, build_model, meta_copy
from tpp.plan import PruningPlan

LAYER = "layer2.0.conv1"
PLAN = PruningPlan({LAYER: 32}, {LAYER: list(range(3, 20))})


def small():
    torch.manual_seed(0)
    return prune_model(build_model("cifar_resnet8", 10), PLAN)


def same(a, b):
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("key", [None, "state_dict", "model_state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("zipped", [True, False])
def test_foreign_files(tmp_path, key, prefix, zipped):
    state = {"a.weight": torch.rand(2, 3), "a.bias": torch.rand(2)}
    data = {prefix + name: tensor for name, tensor in state.items()}
    path = tmp_path / "weights.pth"
    torch.save(
        {key: data, "epoch": 3} if key else data, path, _use_new_zipfile_serialization=zipped
    )
    source = read_source(path)
    assert source.info is None and source.architecture is None
    model = nn.ModuleDict({"a": nn.Linear(3, 2)})
    assert load_weights(model, path) == ()
    same(model.state_dict(), state)


def test_old_batchnorm_weights_and_plain_safetensors(tmp_path):
    model = build_model("cifar_resnet8", 10)
    old = {n: t for n, t in model.state_dict().items() if not n.endswith("num_batches_tracked")}
    save_file(old, tmp_path / "old.safetensors")
    other = build_model("cifar_resnet8", 10)
    load_weights(other, tmp_path / "old.safetensors")
    same(other.state_dict(), model.state_dict())


class Anything:
    pass


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["x.pth", "x"])
def test_a_hostile_file_runs_nothing(tmp_path, zipped, name):
    marker, path = tmp_path / "marker", tmp_path / name
    content = {"state_dict": build_model("mlp7_linear", 10).state_dict(), "more": Hostile(marker)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"x.*: holds (posix|os)\.system, and reading that"):
        read_source(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            Anything(),
            r"holds \S*test_sources\.Anything, and reading that could run any code; where it",
        ),
        ([1, 2], "holds a list"),
        ({"epoch": 3, "best": 1.0}, "epoch, best are no tensor"),
        ({}, "empty"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_files_without_weights(tmp_path, data, message, zipped):
    torch.save(data, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=message):
        read_source(tmp_path / "x.pth")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_pth_file(tmp_path, zipped, share):
    path = tmp_path / "x.pth"
    torch.save({"x": torch.rand(1000)}, path, _use_new_zipfile_serialization=zipped)
    raw = path.read_bytes()
    path.write_bytes(raw[: int(share * len(raw))])
    with pytest.raises(UserError):
        read_source(path)


def test_load_weights_names_what_does_not_fit(tmp_path):
    pruned, dense = small(), build_model("cifar_resnet8", 10)
    save_model(tmp_path / "ckpt", pruned)
    with pytest.raises(
        UserError, match=r"layer2\.0\.conv1\.weight is 15x16x3x3, the model's is 32"
    ):
        load_weights(dense, tmp_path / "ckpt")
    with pytest.raises(UserError, match=r"lacks layer1\.1\.conv1\.weight, .*in all"):
        load_weights(build_model("cifar_resnet14", 10), tmp_path / "ckpt")
    with pytest.raises(UserError, match="has unknown"):
        save_model(tmp_path / "deep", build_model("cifar_resnet14", 10))
        load_weights(dense, tmp_path / "deep")
    fresh = small().double()
    load_weights(fresh, tmp_path / "ckpt")
    assert fresh.conv1.weight.dtype == torch.float64
    assert torch.equal(fresh.conv1.weight, pruned.conv1.weight.double())


def test_the_public_resnet56_loads(shared_data):
    model = build_model("cifar_resnet56", 10)
    load_weights(model, shared_data("resnet56-cifar10.th"))
    path = shared_data("resnet56-cifar10.th")
    public = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    assert torch.equal(model.linear.weight, public["module.linear.weight"])


def trained(optimizer_of, steps=2):
    """A network after a few steps, and its optimiser."""
    torch.manual_seed(0)
    model = build_model("cifar_resnet8", 10)
    optimizer = optimizer_of(model)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(torch.rand(8, 3, 16, 16)), torch.arange(8))
        loss.backward()
        optimizer.step()
    return model, optimizer


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def as_timm_groups(model):
    """Biases and norms without weight decay, in a group of their own, first."""
    plain = [p for p in model.parameters() if p.dim() <= 1]
    rest = [p for p in model.parameters() if p.dim() > 1]
    return torch.optim.SGD([{"params": plain, "weight_decay": 0.0}, {"params": rest}], 0.1, 0.9)


def as_named(model):
    """In an order of its own, but with names."""
    named = sorted(model.named_parameters(), key=lambda pair: pair[0])
    return torch.optim.AdamW(named, lr=0.01)


@pytest.mark.parametrize("optimizer_of", [sgd, as_timm_groups, as_named])
def test_an_optimisers_state_gets_its_names(optimizer_of):
    model, optimizer = trained(optimizer_of)
    found = name_optimizer_state(optimizer.state_dict(), meta_copy(model))
    expected = {
        f"optimizer.{key}": {
            name: optimizer.state[parameter][key] for name, parameter in model.named_parameters()
        }
        for key in next(iter(optimizer.state.values()))
    }
    assert found.keys() == expected.keys()
    for key, tensors in expected.items():
        assert found[key].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(found[key][name], tensor), (key, name)


def test_a_state_in_an_order_that_nothing_tells_is_not_guessed():
    torch.manual_seed(0)
    model = build_model("cifar_resnet8", 10)
    optimizer = torch.optim.SGD(list(model.parameters())[::-1], lr=0.1, momentum=0.9)
    model(torch.rand(4, 3, 16, 16)).sum().backward()
    optimizer.step()
    assert name_optimizer_state(optimizer.state_dict(), model) is None
    for nonsense in ({}, {"state": 3, "param_groups": 4}, {"state": {}, "param_groups": [{}]}):
        assert name_optimizer_state(nonsense, model) is None


class Averaged(nn.Module):
    """As torch.optim.swa_utils keeps it, and torchvision's references after it."""

    def __init__(self, model):
        super().__init__()
        self.module = model
        self.register_buffer("n_averaged", torch.tensor(7))


@pytest.mark.parametrize("how", ["timm", "torchvision"])
def test_momentum_and_average_of_a_pth_are_pruned_alike(tmp_path, how):
    model, optimizer = trained(sgd)
    average = build_model("cifar_resnet8", 10)
    content = {"optimizer": optimizer.state_dict(), "epoch": 3}
    if how == "timm":
        content |= {"state_dict": model.state_dict(), "state_dict_ema": average.state_dict()}
    else:
        content |= {"model": model.state_dict(), "model_ema": Averaged(average).state_dict()}
    torch.save(content, tmp_path / "in.pth")
    out = tmp_path / "out.safetensors"
    prune_checkpoint(tmp_path / "in.pth", PLAN, out, architecture=Architecture("cifar_resnet8", 10))
    expected = prune_model(model, PLAN).state_dict()
    same(load_model(out).state_dict(), expected)
    same(load_model(out, companion="ema").state_dict(), prune_model(average, PLAN).state_dict())
    _, companions, _ = read_checkpoint(out)
    momentum = companions["optimizer.momentum_buffer"]
    full = {name: optimizer.state[p]["momentum_buffer"] for name, p in model.named_parameters()}
    kept = PLAN.kept(LAYER)
    assert torch.equal(momentum[f"{LAYER}.weight"], full[f"{LAYER}.weight"][kept])
    assert torch.equal(momentum["layer2.0.conv2.weight"], full["layer2.0.conv2.weight"][:, kept])
    assert torch.equal(momentum["linear.weight"], full["linear.weight"])


def test_training_goes_on_as_if_the_filters_had_only_been_zeroed(tmp_path):
    """The pruned network with its momentum takes the steps that the dense one takes in which the
    filters are held at zero."""
    model, optimizer = trained(sgd)
    model.double()
    dense = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    dense.load_state_dict(optimizer.state_dict())
    gone = PLAN.pruned[LAYER]

    @torch.no_grad()
    def hold():
        for module in (model.layer2[0].conv1, model.layer2[0].bn1):
            for parameter in module.parameters():
                parameter[gone] = 0

    hold()
    torch.save({"model": model.state_dict(), "optimizer": dense.state_dict()}, tmp_path / "in.pth")
    prune_checkpoint(
        tmp_path / "in.pth", PLAN, tmp_path / "out", architecture=Architecture("cifar_resnet8", 10)
    )
    pruned = load_model(tmp_path / "out").train()
    small = torch.optim.SGD(pruned.parameters(), lr=0.1, momentum=0.9)
    assert load_optimizer_state(tmp_path / "out", pruned, small) == len(
        small.param_groups[0]["params"]
    )
    for step in range(4):
        images = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(step)).double()
        for network, steps in ((model, dense), (pruned, small)):
            steps.zero_grad()
            nn.functional.cross_entropy(network(images), torch.arange(8)).backward()
            steps.step()
        hold()
    expected = prune_model(model, PLAN).state_dict()
    for name, tensor in pruned.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-9, atol=1e-10)


def trained_state(tmp_path):
    model, optimizer = trained(sgd)
    architecture = model.architecture.to_dict()
    state = TrainingState(2, model.state_dict(), optimizer.state_dict(), {}, architecture)
    folder = state_folder(tmp_path / "checkpoints", state.step)
    write_state(folder, state)
    return folder, model, optimizer


def test_a_checkpoint_that_a_stage_resumes_from_says_all_itself(tmp_path):
    folder, model, optimizer = trained_state(tmp_path)
    (folder.parent / "latest").symlink_to(folder.name)
    prune_checkpoint(folder.parent / "latest", PLAN, tmp_path / "out")
    same(load_model(tmp_path / "out").state_dict(), prune_model(model, PLAN).state_dict())
    _, companions, _ = read_checkpoint(tmp_path / "out")
    buffer = optimizer.state[model.layer2[0].conv1.weight]["momentum_buffer"]
    found = companions["optimizer.momentum_buffer"][f"{LAYER}.weight"]
    assert torch.equal(found, buffer[PLAN.kept(LAYER)])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "optimizer.safetensors").unlink(), "optimizer.safetensors: missing"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x"), "model.safetensors: damaged: it"),
        (lambda f: (f / "state.json").write_text("{"), "state.json: damaged: it has 1 bytes"),
        (lambda f: (f / "manifest.json").write_text("[]"), "manifest.json: damaged: it does not"),
        (lambda f: (f / "manifest.json").unlink(), "manifest.json: missing"),
        (lambda f: (f / "state.json").unlink(), "state.json: missing"),
        (
            lambda f: [(f / name).unlink() for name in ("manifest.json", "state.json")],
            "manifest.json: missing",
        ),
    ],
)
def test_a_damaged_training_checkpoint_is_refused(tmp_path, damage, message):
    folder, _, _ = trained_state(tmp_path)
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        read_source(folder)
    assert str(folder) in str(caught.value)


def test_a_training_checkpoint_that_cannot_be_read_now(tmp_path, monkeypatch):
    folder, _, _ = trained_state(tmp_path)
    place = str(folder / "model.safetensors")

    def stale(path):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), place)

    monkeypatch.setattr(training_state, "read_state", stale)
    with pytest.raises(UserError, match=rf"{place}: cannot be read: Stale file handle"):
        read_source(folder)


def test_what_cannot_be_taken_along_is_said(tmp_path, monkeypatch, capsys):
    from tpp import prune

    model, optimizer = trained(lambda m: torch.optim.SGD([*m.parameters()][::-1], 0.1, 0.9))
    average = {"state_dict_ema": {"conv1.weight": torch.zeros(2, 2)}}
    torch.save(
        {"state_dict": model.state_dict(), "optimizer": optimizer.state_dict(), **average},
        tmp_path / "in.pth",
    )
    arguments = ["--checkpoint", str(tmp_path / "in.pth"), "--output", str(tmp_path / "out")]
    arguments += ["--model", "cifar_resnet8", "--ratio", f"{LAYER}=0.5"]
    monkeypatch.setattr("sys.argv", ["prune", *arguments])
    prune.main()
    printed = capsys.readouterr().out
    assert "note: the optimiser's state is left out: whose it is cannot be told" in printed
    assert "note: ema is left out: conv1.weight is not of the network's shape" in printed
    _, companions, _ = read_checkpoint(tmp_path / "out")
    assert companions == {}


def mapped(path):
    """Where a file is mapped into this process's memory: [(first, last address)]."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    spans = [line.split()[0].split("-") for line in lines if line.endswith(f"/{path.name}")]
    return [(int(first, 16), int(last, 16)) for first, last in spans]


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_tensors_are_mapped_and_not_read(tmp_path, suffix):
    model = build_model("cifar_resnet8", 10)
    path = tmp_path / f"weights_to_map{suffix}"
    if suffix == ".pth":
        torch.save(model.state_dict(), path)
    else:
        save_model(path, model)
    for name, tensor in read_source(path).tensors.items():
        assert any(a <= tensor.data_ptr() < b for a, b in mapped(path)), name
