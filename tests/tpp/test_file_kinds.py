"""What is not read is called what it is: the second table of docs/checkpoints.md."""

import argparse
import gzip
import io
import shlex
import tarfile
import warnings
from collections import OrderedDict, defaultdict
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from test_checkpoint_rows import rows_of
from torch.nn.utils import parametrizations, prune

from tpp.checkpoints.export_file import export_model
from tpp.checkpoints.file_kinds import is_safetensors
from tpp.checkpoints.model_file import find_metadata, load_model, read_metadata
from tpp.checkpoints.prune_file import read_dense
from tpp.checkpoints.sources import load_weights, read_source
from tpp.checkpoints.stand_ins import Inert
from tpp.checkpoints.torch_files import load_torch
from tpp.checkpoints.training_state import TrainingState, state_folder, write_state
from tpp.common.errors import UserError
from tpp.models.architecture import Architecture, build_model
from tpp.prune import main

ROOT = Path(__file__).resolve().parents[2]
REFUSED = {}


def row(name, message):
    def note(function):
        REFUSED[name] = (function, message)
        return function

    return note


def network():
    torch.manual_seed(0)
    return build_model("cifar_resnet8", 10)


def state():
    return network().state_dict()


def saved(folder, data, name="model.pth", **how):
    torch.save(data, folder / name, **how)
    return folder / name


@row(
    "a whole network by PyTorch before 1.6 (no zip)",
    r"holds tpp\.models\.cifar\.CifarResNet, and read",
)
def whole_network(folder):
    return saved(folder, network(), _use_new_zipfile_serialization=False)


@row("an object of any other class", r"holds fractions\.Fraction, and reading that could run any")
def other_class(folder):
    return saved(folder, {"model": state(), "share": Fraction(1, 3)})


@row("TorchScript", r"a TorchScript file, .*torch.save\(torch.jit.load")
def torchscript(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(network().eval(), torch.rand(1, 3, 8, 8)), folder / "m.pt")
    return folder / "m.pt"


@row("an exported program (`.pt2`)", r"an exported program \(torch\.export\), made for serving")
def exported(folder):
    export_model(network(), folder / "m.pt2", check=False)
    return (folder / "m.pt2").rename(folder / "m.pth")


@row("ONNX", "an ONNX file; name the checkpoint")
def onnx(folder):
    export_model(network(), folder / "m.onnx", check=False)
    return folder / "m.onnx"


@row("a truncated file of `torch.save`", r"it begins as one, and its end is missing \(\S+ kB are")
def truncated(folder):
    path = saved(folder, state())
    path.write_bytes(path.read_bytes()[:100_000])
    return path


@row("an empty file", "an empty file; copy it again")
def empty(folder):
    (folder / "model.pth").touch()
    return folder / "model.pth"


@row("a text file", r'a text file \(\{ "format": "tpp-pruning-plan".* \.\.\.\), no checkpoint')
def text(folder):
    (folder / "plan.pth").write_text('{\n  "format": "tpp-pruning-plan",\n "layers": {}}')
    return folder / "plan.pth"


@row("a pointer of Git LFS", r"a pointer of Git LFS, .* git lfs pull")
def lfs(folder):
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    (folder / "model.safetensors").write_text(text)
    return folder / "model.safetensors"


@row("a web page", "a web page, so it was not downloaded")
def web_page(folder):
    (folder / "model.pth").write_text("\n<!DOCTYPE html><html><head><title>Sign in ü</title>")
    return folder / "model.pth"


@row("gzip, tar and other archives", "compressed with gzip; unpack it first")
def packed(folder):
    (folder / "model.pth.gz").write_bytes(gzip.compress(saved(folder, state()).read_bytes()))
    return folder / "model.pth.gz"


@row("NumPy arrays in place of tensors", r"conv1\.weight, .* are no tensor but a NumPy ndarray")
def arrays(folder):
    return saved(folder, {name: tensor.numpy() for name, tensor in state().items()})


@row("pickle protocols above 2", "pickle protocol above 2, which is not read here")
def protocol(folder):
    return saved(folder, state(), pickle_protocol=4)


@row("a file of `torch.save` that is named `.safetensors`", r"whatever its name says; rename it to")
def misnamed(folder):
    return saved(folder, state(), "model.safetensors")


@row("a folder of `torch.distributed.checkpoint` (FSDP)", "format_utils dcp_to_torch FOLDER FILE")
def dcp_folder(folder):
    dcp.save(state(), checkpoint_id=folder / "dcp", no_dist=True)
    return folder / "dcp"


@row("a folder of files", r"holds no checkpoint: name a file in it \(a\.pth, b\.safetensors\)")
def files(folder):
    saved(folder, state(), "a.pth")
    save_file(state(), folder / "b.safetensors")
    return folder


@row("an empty folder, or one of something else", "neither DeepSpeed's, Accelerate's or Hugging")
def empty_folder(folder):
    return folder


@row("several networks under keys of their own", "holds several state_dicts, under student, teach")
def several(folder):
    return saved(folder, {"student": state(), "teacher": state(), "epoch": 3})


@row("several networks under prefixes", "holds CifarResNet 2 times, with names that begin with")
def prefixes(folder):
    return saved(folder, {f"{p}.{k}": v for p in ("q", "k") for k, v in state().items()})


@row("another network of the kind", r"has unknown layer1\.1\.conv1\.weight, .* in all")
def deeper(folder):
    return saved(folder, build_model("cifar_resnet14", 10).state_dict())


@row(
    "another network", r"lacks conv1\.weight, .* in all\); the file's names begin with fc1\. \(2\)"
)
def other_network(folder):
    return saved(folder, build_model("mlp7_linear", 10).state_dict())


@row(
    "computed weights: `torch.nn.utils.prune`, `parametrizations`", r"call torch\.nn\.utils\.prune"
)
def computed(folder):
    model = network()
    prune.l1_unstructured(model.layer1[0].conv1, "weight", 0.3)
    return saved(folder, model.state_dict())


def refusal(call, *arguments):
    with pytest.raises(UserError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_is_named(tmp_path, name):
    make, message = REFUSED[name]
    path = make(tmp_path)
    before = sorted(p.name for p in tmp_path.rglob("*"))
    for call in (
        lambda: read_dense(path, Architecture("cifar_resnet8", 10)),
        lambda: load_weights(network(), path),
    ):
        with pytest.raises(UserError, match=message) as caught:
            call()
        assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_the_page_has_the_rows_that_are_tested():
    page = (ROOT / "docs/checkpoints.md").read_text()
    assert rows_of(page, "What is not read") == list(REFUSED)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda f: saved(f, state()),
            "a file of torch.save, not a tpp-checkpoint: it does not say",
        ),
        (lambda f: saved(f, state(), _use_new_zipfile_serialization=False), "a file of torch.save"),
        (torchscript, "a TorchScript file"),
        (truncated, "its end is missing"),
        (text, "a text file"),
        (lfs, "git lfs pull"),
    ],
)
def test_what_needs_our_own_file_says_what_another_one_is(tmp_path, make, message):
    """tpp.describe, tpp.latency and tpp.export read with these."""
    path = make(tmp_path)
    for read in (read_metadata, load_model):
        said = refusal(read, path)
        assert said.startswith(f"{path}: ") and message in said, said


def test_the_way_to_a_file_of_ours_that_is_named_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(state(), "a model.pth")
    path = state_folder(tmp_path / "checkpoints", 2)
    model = network()
    rest = {"state": {}, "param_groups": []}
    write_state(path, TrainingState(2, state(), rest, {}, model.architecture.to_dict()))
    for source, number in (("a model.pth", 1), (path, 2)):
        said = refusal(load_model, source)
        line = said.partition("make one of it: tpp prune ")[2]
        assert ("--model NAME" in line) == (number == 1)
        line = line.replace("NAME", "cifar_resnet8").replace("NEW", str(number))
        main(shlex.split(line))
        found = load_model(f"{number}.safetensors").state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in state().items())


@pytest.mark.parametrize("kind", ["w:", "w:xz"])
def test_further_archives(tmp_path, kind):
    path = tmp_path / "model.pth.tar"
    with tarfile.open(path, kind) as tar:
        tar.addfile(tarfile.TarInfo("a"), io.BytesIO())
    assert "unpack it" in refusal(read_source, path)


def test_other_zip_archives(tmp_path):
    np.savez(tmp_path / "weights.npz", a=np.zeros(3))
    assert "that torch.save did not write" in refusal(read_source, tmp_path / "weights.npz")


def test_other_computed_weights(tmp_path):
    model = network()
    parametrizations.weight_norm(model.linear)
    path = saved(tmp_path, model.state_dict())
    assert "remove_parametrizations" in refusal(read_dense, path, Architecture("cifar_resnet8", 10))


def test_text_is_told_from_weights(tmp_path):
    """Whatever a length at the beginning of a safetensors file looks like."""
    for name in ("a", "b.safetensors"):
        save_file(state(), tmp_path / name)
        assert is_safetensors(tmp_path / name)
    assert find_metadata(tmp_path) is None and find_metadata(tmp_path / "a") is None
    (tmp_path / "wide").write_text("ÄÖÜ äöü ß " * 100)
    assert "a text file (ÄÖÜ äöü" in refusal(read_source, tmp_path / "wide")
    (tmp_path / "bytes").write_bytes(bytes(range(1, 256)))
    assert "neither a safetensors file nor one" in refusal(read_source, tmp_path / "bytes")


class Loud:
    """What a Namespace of a file could be given."""

    def __reduce__(self):
        return argparse.Namespace, (), {"x": 3}


def test_what_stands_for_a_class_keeps_nothing(tmp_path):
    found = load_torch(saved(tmp_path, {"args": Loud(), "table": defaultdict(int, a=1)}))
    assert isinstance(found["args"], Inert) and not vars(found["args"])
    assert not isinstance(found["args"], argparse.Namespace)
    assert type(found["table"]) is OrderedDict and found["table"] == {"a": 1}
