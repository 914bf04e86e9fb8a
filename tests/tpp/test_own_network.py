"""Networks of a class of one's own: where the class comes from, and where it never does."""

import json
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
from own_page import blocks, write_example
from safetensors import safe_open
from torch import nn
from zeroing import relative_difference, zeroed

import tpp
from tpp import describe, export, latency, prune, sparsify, survey
from tpp.channels.survey import survey_channels
from tpp.common import own_code
from tpp.common.errors import Note, UserError
from tpp.measure.counts import count
from tpp.models import own
from tpp.models.architecture import (
    architecture_of,
    build_model,
    image_shape_for,
    set_architecture,
    set_preprocessing,
)
from tpp.models.fitting import check_logits
from tpp.plan import PruningPlan

IMAGES = torch.rand(3, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
PLAN = PruningPlan(
    {"blocks.0.near": 8, "blocks.0.far": 8, "blocks.1.far": 8},
    {"blocks.0.near": [0, 3, 7], "blocks.0.far": [2], "blocks.1.far": [1, 2, 4, 6]},
)


@pytest.fixture(autouse=True)
def nothing_is_known(monkeypatch):
    """As in a process of its own: what one test names, the next has not heard of."""
    monkeypatch.setattr(own, "_NAMED", {})
    monkeypatch.setattr(own_code, "_LOADED", {})
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.fixture
def page(tmp_path, monkeypatch):
    """The folder with the page's example in it."""
    write_example(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def network_class(page):
    return own_code.load_own("net.py:MyNet")[0]


@pytest.fixture
def dense(network_class):
    torch.manual_seed(0)
    model = network_class(4, width=8).double()
    for block in model.blocks:
        nn.init.normal_(block.norm.bias, std=0.3)
        nn.init.uniform_(block.norm.running_var, 0.5, 2.0)
    return model.eval()


def unknown() -> None:
    own._NAMED.clear()


@torch.no_grad()
def test_pruned_and_loaded_it_is_the_dense_one_with_zeros(dense, network_class, page):
    expected = zeroed(dense, PLAN.pruned, IMAGES)(IMAGES)
    assert relative_difference(expected, dense(IMAGES)) > 1e-3
    torch.save(dense.state_dict(), "dense.pth")
    given = network_class(4, width=8)
    before = {name: tensor.clone() for name, tensor in given.state_dict().items()}
    tpp.prune_checkpoint("dense.pth", PLAN, "small.safetensors", network=given)
    small = tpp.load_model("small.safetensors", network=given)
    assert small.blocks[0].near.out_channels == 5 and small.blocks[1].gate.out_channels == 12
    assert relative_difference(small(IMAGES), expected) < 1e-10
    # What was given is a pattern and no more.
    assert all(torch.equal(given.state_dict()[name], t) for name, t in before.items())

    # A network in memory, saved under the name of its class, and pruned once more.
    in_memory = tpp.prune_model(dense, PLAN)
    tpp.save_model("again.safetensors", in_memory)
    again = tpp.load_model("again.safetensors", network=network_class(4, width=8))
    assert relative_difference(again(IMAGES), expected) < 1e-10
    assert architecture_of(again).num_classes == 4
    more = PruningPlan({"blocks.0.near": 5}, {"blocks.0.near": [1]})
    tpp.prune_checkpoint("again.safetensors", more, "less.safetensors", network=given)
    twice = {**PLAN.pruned, "blocks.0.near": [0, 2, 3, 7]}
    expected = zeroed(dense, twice, IMAGES)(IMAGES)
    less = tpp.load_model("less.safetensors", network=given)
    assert relative_difference(less(IMAGES), expected) < 1e-10


def test_a_file_names_the_class_and_runs_nothing(dense, page, monkeypatch, capsys):
    """Though the file lies where the command runs, and says where it was."""
    set_architecture(dense, tpp.Architecture("net.py:MyNet", 4, {"width": 8}))
    tpp.save_model("own.safetensors", dense)
    with safe_open("own.safetensors", "pt") as file:
        said = json.loads(file.metadata()["tpp-checkpoint"])
    assert said["architecture"] == {
        "name": "net.py:MyNet",
        "num_classes": 4,
        "args": {"width": 8},
    }
    ran = page / "ran"
    (page / "net.py").write_text(f"open({str(ran)!r}, 'w')\n")
    unknown()
    for run in (
        lambda: tpp.load_model("own.safetensors"),
        lambda: describe.main(["own.safetensors"]),
        lambda: latency.main(["own.safetensors"]),
        lambda: export.main(["own.safetensors", "--output", "own.pt2"]),
        lambda: survey.main(["own.safetensors"]),
        lambda: prune.main(
            ["--checkpoint", "own.safetensors", "--output", "x.safetensors", "--ratio", "*=0"]
        ),
        lambda: sparsify.main(
            ["--checkpoint", "own.safetensors", "--output", "x.safetensors", "--sparsity", "0.5"]
        ),
    ):
        with pytest.raises(UserError) as caught:
            run()
        assert re.fullmatch(
            r"own\.safetensors: the network is net\.py:MyNet, a class of somebody's own, which no "
            r"file brings along: name yours, with --model FILE\.py:CLASS, or "
            r"tpp\.load_model\(PATH, network=CLASS\(\)\)",
            str(caught.value),
        )
    assert not ran.exists() and not (page / "x.safetensors").exists()


@pytest.mark.parametrize("kind", ["ours", "foreign"])
def test_all_commands_take_the_class(kind, dense, page, capsys):
    """Of a file that names it, and of a state_dict that says nothing."""
    dense = dense.float()
    file = "own.safetensors" if kind == "ours" else "own.pth"
    if kind == "ours":
        # By now its file is called otherwise.
        set_architecture(dense, tpp.Architecture("old.py:Former", 4, {"width": 8}))
        tpp.save_model(file, dense)
    else:
        wide = own_code.load_own("net.py:MyNet")[0](4)  # the class's own width
        torch.save(wide.state_dict(), file)
    unknown()
    model = ["--model", "net.py:MyNet"]
    describe.main([file, *model])
    assert re.search(r"blocks\.1\.gate +\d+ / \d+", capsys.readouterr().out)
    survey.main([file, *model])
    assert "goes along with blocks.0.near, blocks.0.far" in capsys.readouterr().out
    latency.main([file, *model, "--repeats", "1", "--warmup", "0"])
    assert f"{file} " in capsys.readouterr().out
    export.main([file, *model, "--output", "own.pt2"])
    assert "checked in PyTorch" in capsys.readouterr().out
    command = ["--checkpoint", file, *model, "--output"]
    sparsify.main([*command, "sparse.safetensors", "--sparsity", "0.5"])
    prune.main([*command, "small.safetensors", "--ratio", "blocks*.near=0.5"])
    assert "wrote small.safetensors" in capsys.readouterr().out
    near = tpp.load_model("small.safetensors").blocks[0].near
    assert near.out_channels == (4 if kind == "ours" else 8)


def test_a_configuration_names_it_for_the_pruner(dense, page, capsys):
    (page / "sub").mkdir()
    (page / "sub" / "child.yaml").write_text("extends: ../own.yaml\nmodel: {args: {width: 8}}\n")
    torch.save(dense.state_dict(), "own.pth")
    # The path goes by the file that says it, which is not the one that extends it.
    prune.main(
        ["--checkpoint", "own.pth", "--config", "sub/child.yaml", "--output", "s.safetensors"]
    )
    said = capsys.readouterr().out
    assert said.startswith("net.py:MyNet: ") and "3x32x32" in said
    assert tpp.load_model("s.safetensors").blocks[1].far.out_channels == 4


def test_images_that_are_assumed_are_told(page, tmp_path):
    """Where the class says nothing; not where it does, nor where a file or an argument does."""
    silent = tmp_path / "silent.py"
    silent.write_text(
        "from torch import nn\nclass Net(nn.Sequential):\n"
        "    def __init__(self, num_classes, **args):\n"
        "        super().__init__(nn.Conv2d(3, num_classes, 3), nn.AdaptiveAvgPool2d(1), "
        "nn.Flatten())\n"
    )
    name = own.take_up(f"{silent}:Net", "--model")
    with pytest.warns(Note, match=r"^silent.py:Net does not say .*; 3x224x224 is assumed$"):
        assert image_shape_for(build_model(name, 4)) == (3, 224, 224)
    prepared = build_model(name, 4)
    set_preprocessing(prepared, {"image_size": 9})
    said = build_model(own.take_up("net.py:MyNet", "--model"), 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert image_shape_for(prepared) == (3, 9, 9)
        assert image_shape_for(build_model(name, 4, image_size=8)) == (3, 8, 8)
        assert image_shape_for(said) == (3, 32, 32)


NETWORKS = """
import torch
from torch import nn

class Base(nn.Module):
    image_shape = (3, 8, 8)
    def __init__(self, num_classes):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, num_classes)
    def forward(self, x):
        return self.head(self.conv(x).mean((2, 3)))

class Two(Base):
    def forward(self, x):
        return super().forward(x), x

class Auxiliary(Base):
    def forward(self, x):
        return {"a": super().forward(x)} if self.training else super().forward(x)

class Map(Base):
    def forward(self, x):
        return self.conv(x)

class Ten(Base):
    def __init__(self):
        super().__init__(10)

class Looks(Base):
    def forward(self, x):
        return super().forward(x + x.sum().item())

class Raises(Base):
    def __init__(self, num_classes):
        raise KeyError("no such key")

class Lazy(Base):
    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.head = nn.LazyLinear(num_classes)

class Needs(Base):
    def __init__(self, num_classes, width):
        super().__init__(num_classes)

class Other: ...

def nothing(): ...

def made(num_classes):
    return Base(num_classes)

made.image_shape = (3, 9, 9)
instance = Base(4)
"""
GIVES = "and classification takes one tensor, a row of 4 logits for each image"
MISTAKES = {
    "some.py:Two": f"some.py:Two gives a tuple of 2 in evaluation mode, {GIVES}",
    "some.py:Auxiliary": f"some.py:Auxiliary gives a dict of 1 in training mode, {GIVES}",
    "some.py:Map": f"some.py:Map gives 4x6x6 for an image in evaluation mode, {GIVES}",
    "some.py:Ten": "some.py:Ten gives 10 logits for an image, and there are 4 classes; let it take "
    "num_classes, or say with model.args how many",
    "some.py:Looks": "some.py:Looks does not run on images of 3x8x8 without memory, in evaluation "
    "mode, in forward(), some.py:31: Tensor.item() cannot be called on meta tensors",
    "some.py:Raises": "model 'some.py:Raises' cannot be built with {}: 'no such key'",
    "some.py:Lazy": "it has lazy layers (nn.Lazy...), whose widths nobody knows before it has seen "
    "images; say them",
    "some.py:Needs": "model 'some.py:Needs': missing a required argument: 'width'; it takes "
    "num_classes, width, and model.args says what they are",
    "some.py:nothing": "model 'some.py:nothing': gives nothing, not a torch.nn.Module",
    "some.py:Other": "--model: some.py:Other is another class; name a class that derives from "
    "torch.nn.Module, or a function that returns such a network",
    "some.py:instance": "--model: some.py:instance is an object of Base; name a class that derives "
    "from torch.nn.Module, or a function that returns such a network",
    "some.py:Missing": "--model: {folder}/some.py has no Missing; it has Base, Two, Auxiliary, "
    "Map, Ten, Looks, Raises, Lazy, Needs, Other, nothing, made",
    "other.py:Net": "--model: Net: there is no file {folder}/other.py",
    "broken.py:Net": "--model: {folder}/broken.py, line 2: cannot be imported: "
    "ZeroDivisionError: division by zero",
    "syntax.py:Net": "--model: {folder}/syntax.py, line 1: cannot be imported: invalid syntax",
    "leaves.py:Net": "--model: {folder}/leaves.py, line 1: cannot be imported: SystemExit: 3",
    "some.py": "--model: some.py: expected FILE.py:NAME, a class or a function in that file",
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some.py").write_text(NETWORKS)
    (tmp_path / "broken.py").write_text("x = 1\ny = 1 / 0\n")
    (tmp_path / "syntax.py").write_text("class (\n")
    (tmp_path / "leaves.py").write_text("raise SystemExit(3)\n")
    with pytest.raises(UserError) as caught:
        known = own.take_up(name, "--model")
        check_logits(build_model(known, 4))
    assert str(caught.value) == MISTAKES[name].replace("{folder}", str(tmp_path))


def test_what_is_right_is_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "beside.py").write_text("SIZE = 9\n")
    (tmp_path / "some.py").write_text(f"from beside import SIZE\n{NETWORKS}")
    for name in ("some.py:Base", "some.py:made"):
        model = build_model(own.take_up(name, "--model"), 4)
        check_logits(model)
        assert architecture_of(model) == tpp.Architecture(name, 4)
    # Two files that checkpoints could not tell apart.
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "some.py").write_text(f"{NETWORKS}\n# another\n")
    with pytest.raises(UserError, match=r"not alike, and checkpoints call both some\.py:Base"):
        own.take_up("sub/some.py:Base", "--model")
    (tmp_path / "sub" / "some.py").write_text((tmp_path / "some.py").read_text())
    own.take_up("sub/some.py:Base", "--model")


class Between(nn.Module):
    """A row of the page's table: what is between two convolutions."""

    def __init__(self, between):
        super().__init__()
        self.one, self.between = nn.Conv2d(3, 8, 3, padding=1), between
        self.narrow = nn.Conv2d(8, 3, 1)
        self.two, self.head = nn.LazyConv2d(8, 1), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.two(self.between(self, self.one(x))).mean((2, 3)))


ROWS = {
    "reach a slice of the channels": [
        lambda net, x: x[:, :4],
        lambda net, x: x.split(4, 1)[0],
        lambda net, x: x.chunk(2, 1)[0] * x.chunk(2, 1)[1],
    ],
    "reach a reshape that splits channels into parts": [
        lambda net, x: x.view(len(x), 2, 4, 8, 8).transpose(1, 2).flatten(1, 2),
    ],
    "are added to a padding of the channels or another fixed value": [
        lambda net, x: x + nn.functional.pad(net.narrow(x), (0, 0, 0, 0, 2, 3)),
    ],
    "reach a GroupNorm in": [lambda net, x: nn.functional.group_norm(x, 4)],
    "reach a softmax over the channels": [lambda net, x: x.softmax(1)],
}


@pytest.mark.parametrize("reason", ROWS)
def test_what_the_page_says_is_refused(reason):
    text = (Path(__file__).resolve().parents[2] / "docs/own_network.md").read_text()
    assert f"`{reason}`" in text
    example = torch.zeros(1, 3, 8, 8)
    for between in ROWS[reason]:
        model = Between(between)
        model(example)  # the lazy layer
        refused = survey_channels(model, example_input=example).refused
        assert reason in refused["one"]


def test_the_page_shows_what_is_printed(page, capsys):
    (command,) = [line for line in blocks("bash")[0].splitlines() if "survey" in line]
    survey.main(command.split()[2:])
    printed = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for line in blocks("")[0].splitlines():
        assert line == "..." or " ".join(line.split()) in printed


def test_arguments_of_the_class(dense, page, capsys):
    """--model-arg says what the class is called with, and what a file says of it stays."""
    torch.save(dense.float().state_dict(), "eight.pth")
    own = ["--model", "net.py:MyNet"]
    describe.main(["eight.pth", *own])
    assert "60.44% removed" in capsys.readouterr().out, "of the sixteen that it has by itself"
    describe.main(["eight.pth", *own, "--model-arg", "width=8"])
    assert "(0.00% removed)" in capsys.readouterr().out
    less = ["--ratio", "*.near=0.5", "--output", "p.safetensors"]
    prune.main(["eight.pth", *own, "--model-arg", "width=8", *less])
    with safe_open("p.safetensors", "pt") as file:
        assert file.get_tensor("blocks.0.near.weight").shape == (4, 8, 3, 3)
    said = "says what its network is called with, width=8, and not width=16; leave --model-arg out"
    for arguments, line in [
        (["p.safetensors", *own, "--model-arg", "width=16"], said),
        (["eight.pth", *own, "--model-arg", "width=4"], "stem has 8 filters and its class makes 4"),
        (["eight.pth", *own, "--model-arg", "width"], "width: write KEY=VALUE, as width=16"),
        (["eight.pth", "--model-arg", "width=8"], "--model-arg width: goes with --model only"),
    ]:
        with pytest.raises((UserError, SystemExit)) as ended:
            describe.main(arguments)
        assert line in str(ended.value) + capsys.readouterr().err
    describe.main(["p.safetensors", *own, "--model-arg", "width=8"])


def test_what_does_not_run_when_it_is_counted_has_its_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some.py").write_text(NETWORKS)
    network = build_model(own.take_up("some.py:Looks", "--model"), 4)
    with pytest.raises(UserError, match=r"without values: .* \(in forward\(\), some\.py:\d+\)$"):
        count(network)
