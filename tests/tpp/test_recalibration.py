"""Running statistics after a removal: against a pass in float64 that is written out."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.io import write_png

from tpp.checkpoints.model_file import load_model, read_checkpoint, save_model
from tpp.common.errors import UserError
from tpp.models.architecture import build_model
from tpp.models.recalibration import recalibrate, statistics_of
from tpp.prune import main

CLASSES = ("a", "b", "c")


class Net(nn.Module):
    """Two convolutions with their BatchNorm, and dropout, which recalibration leaves off."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)
        self.drop = nn.Dropout(0.5)
        self.conv2, self.bn2 = nn.Conv2d(5, 4, 3), nn.BatchNorm2d(4, momentum=0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.drop(F.relu(self.bn1(self.conv1(x))))))


def network() -> Net:
    torch.manual_seed(0)
    net = Net()
    nn.init.uniform_(net.bn1.weight, 0.5, 2)
    nn.init.uniform_(net.bn1.bias, -1, 1)
    return net.eval()


BATCHES = [torch.rand(n, 3, 9, 9, generator=torch.Generator().manual_seed(n)) for n in (4, 7, 2)]


def by_hand(net: Net, batches) -> dict[str, Tensor]:
    """Means over batches of each batch's mean and variance over n - 1, in float64."""
    net = copy.deepcopy(net).double()
    found: dict[str, list[Tensor]] = {}

    def normalised(x: Tensor, name: str) -> Tensor:
        norm, values = net.get_submodule(name), x.transpose(0, 1).flatten(1)
        count = values.shape[1]
        mean = values.sum(1) / count
        squares = (values - mean[:, None]).square().sum(1)
        found.setdefault(f"{name}.running_mean", []).append(mean)
        found.setdefault(f"{name}.running_var", []).append(squares / (count - 1))
        shape = (1, -1, 1, 1)
        x = (x - mean.view(shape)) / (squares / count + norm.eps).sqrt().view(shape)
        return x * norm.weight.view(shape) + norm.bias.view(shape)

    for images in batches:
        x = F.relu(normalised(net.conv1(images.double()), "bn1"))
        normalised(net.conv2(x), "bn2")
    return {name: sum(values) / len(values) for name, values in found.items()}


@pytest.mark.parametrize("training", [True, False])
def test_statistics_are_those_of_a_pass_by_hand(training):
    net = network().train()
    net(10 * BATCHES[0])  # statistics of before, which are to go
    net.train(training)
    net.bn1.eval()
    weights = {name: value.clone() for name, value in net.named_parameters()}
    flags = [module.training for module in net.modules()]
    assert recalibrate(net, iter(BATCHES)) == 3
    for name, value in by_hand(net, BATCHES).items():
        torch.testing.assert_close(net.get_buffer(name).double(), value, rtol=1e-5, atol=1e-6)
    assert [module.training for module in net.modules()] == flags
    assert (net.bn1.momentum, net.bn2.momentum) == (0.1, 0.3)
    assert all(torch.equal(weights[name], value) for name, value in net.named_parameters())
    assert {*statistics_of(net)} == {
        f"bn{n}.{kind}"
        for n in (1, 2)
        for kind in ("running_mean", "running_var", "num_batches_tracked")
    }


def test_what_it_cannot_do_is_one_line():
    with pytest.raises(UserError, match="no BatchNorm whose running statistics could change"):
        recalibrate(nn.Sequential(nn.Linear(3, 3)), BATCHES)
    with pytest.raises(UserError, match="there are no images"):
        recalibrate(network(), [])
    one = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3))
    with pytest.raises(UserError, match="a batch of 1 images is too small"):
        recalibrate(one, [torch.rand(1, 3)])


@pytest.fixture
def folders(tmp_path):
    """Four images of each of three classes, 20x24."""
    generator = torch.Generator().manual_seed(0)
    for name in CLASSES:
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(4):
            image = torch.randint(0, 256, (3, 20, 24), generator=generator, dtype=torch.uint8)
            write_png(image, str(tmp_path / "data" / name / f"{number}.png"))
    return tmp_path / "data"


PREPARED = {"image_size": 16, "resize": 18, "mean": [0.5] * 3, "std": [0.25] * 3, "channels": 3}


@pytest.fixture
def dense(tmp_path):
    torch.manual_seed(0)
    model = build_model("cifar_resnet8", 3).eval()
    extra = {"classes": ["c", "a", "b"]}
    companions = {"ema": model.state_dict()}
    path = tmp_path / "dense.safetensors"
    save_model(path, model, preprocessing=PREPARED, extra=extra, companions=companions)
    return path


def prune(dense, output, *arguments) -> None:
    main(["--checkpoint", str(dense), "--output", str(output), *map(str, arguments)])


def test_the_command_recalibrates_what_is_left(folders, dense, tmp_path, capsys):
    ratio = ("--ratio", "layer*.conv1=0.5")
    prune(dense, tmp_path / "plain", *ratio)
    options = ("--data", folders, "--batch-size", 5)
    prune(dense, tmp_path / "new", *ratio, *options, "--recalibrate", 9, "--seed", 4)
    assert "running statistics are of 2 batches of images" in capsys.readouterr().out
    plain, companions, _ = read_checkpoint(tmp_path / "plain")
    new, new_companions, info = read_checkpoint(tmp_path / "new")
    assert info.extra["recalibrated_batches"] == 2 and info.extra["classes"] == ["c", "a", "b"]
    assert companions["ema"].keys() == new_companions["ema"].keys()
    statistics = statistics_of(load_model(tmp_path / "new"))
    assert all(torch.equal(plain[name], new[name]) for name in plain if name not in statistics)
    # The same 10 images again, by a folder's own reading; a shifted weight would change all.
    from tpp.class_folders import ClassFolders

    images = ClassFolders(
        folders, PREPARED, outputs=3, names=["c", "a", "b"], file="f", batch_size=5, seed=4
    )
    network = load_model(tmp_path / "plain")
    recalibrate(network, (batch for batch, _ in images(9)))
    for name, value in statistics_of(network).items():
        assert torch.equal(new[name], value), name
        assert name.endswith("tracked") or not torch.allclose(plain[name], value)


def test_classes_are_found_by_name_and_images_come_once(folders):
    from tpp.class_folders import ClassFolders

    images = ClassFolders(
        folders, PREPARED, outputs=3, names=["c", "a", "b"], file="f", batch_size=5, seed=1
    )
    batches = [*images(7)]
    assert [len(labels) for _, labels in batches] == [5, 5]
    assert batches[0][0].shape == (5, 3, 16, 16) and batches[0][0].dtype == torch.float32
    again = [*images(1)]
    assert len(again) == 1 and torch.equal(again[0][0], batches[0][0])
    whole = ClassFolders(
        folders, PREPARED, outputs=3, names=["c", "a", "b"], file="f", batch_size=99, seed=1
    )
    ((_, labels),) = whole(3)
    assert labels.bincount().tolist() == [4, 4, 4]
    assert len(whole._images) == 12 and whole._outputs == [1, 2, 0]


def test_taylor_of_the_command_is_that_of_the_loss(folders, dense, tmp_path):
    """Which filters go, against gradients of a loop over the images."""
    layer = "layer2.0.conv1"
    prune(
        *(dense, tmp_path / "out", "--ratio", f"{layer}=0.5", "--criterion", "taylor"),
        *("--data", folders, "--batch-size", 4, "--batches", 2, "--save-plan", tmp_path / "p.json"),
    )
    from tpp.class_folders import ClassFolders

    images = ClassFolders(
        folders, PREPARED, outputs=3, names=["c", "a", "b"], file="f", batch_size=4, seed=0
    )
    model = load_model(dense).double()
    norm, scores = model.layer2[0].bn1, torch.zeros(32, dtype=torch.float64)
    for batch, labels in images(2):
        model.zero_grad()
        F.cross_entropy(model(batch.double()), labels).backward()
        change = norm.weight * norm.weight.grad + norm.bias * norm.bias.grad
        scores += change.detach().square()
    plan = json.loads((tmp_path / "p.json").read_text())["layers"][layer]
    assert plan["pruned"] == sorted(scores.argsort()[:16].tolist())
    assert math.isfinite(scores.sum()) and scores.min() < scores.max()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--criterion", "taylor"], "--criterion taylor needs --data DIR"),
        (["--recalibrate", "3"], "--recalibrate needs --data DIR"),
        (
            ["--data", "D"],
            "--data has no effect without --criterion taylor or hessian, or --recalibrate",
        ),
        (["--batches", "3"], "--batches has no effect without --criterion taylor or hessian"),
        (["--batch-size", "3"], "--batch-size has no effect without --data"),
        (["--data", "D", "--recalibrate", "0"], "--recalibrate must be at least 1, not 0"),
    ],
)
def test_options_that_do_not_go_together(arguments, message):
    with pytest.raises(UserError, match=f"^{message}"):
        prune("none", "out", "--ratio", "*=0.5", *arguments)


def test_bad_folders_are_one_line_and_nothing_is_written(folders, dense, tmp_path):
    options = ("--ratio", "layer*.conv1=0.5", "--recalibrate", 1, "--data")
    with pytest.raises(UserError, match=r"^--data .*nowhere: there is no such folder$"):
        prune(dense, tmp_path / "out", *options, tmp_path / "nowhere")
    (folders / "z").mkdir()
    write_png(torch.zeros(3, 9, 9, dtype=torch.uint8), str(folders / "z" / "0.png"))
    with pytest.raises(UserError, match=r"no class is called z"):
        prune(dense, tmp_path / "out", *options, folders)
    (folders / "z" / "0.png").unlink()
    (folders / "z").rmdir()
    (folders / "a" / "0.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"0\.png: cannot read this image"):
        prune(dense, tmp_path / "out", *options, folders)
    assert not (tmp_path / "out").exists()
