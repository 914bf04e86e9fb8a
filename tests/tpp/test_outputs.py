"""What commands are told to write: nothing is lost, no name lies, and a group can read it."""

import json
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tpp import describe, export, latency, prune, survey
from tpp.checkpoints.model_file import load_model, save_model
from tpp.checkpoints.training_state import TrainingState, state_folder, write_state
from tpp.common.errors import UserError
from tpp.common.files import new_file
from tpp.common.outputs import check_apart, check_output
from tpp.models.architecture import build_model

RATIO = ("--ratio", "layer*.conv1=0.5")


def run_prune(folder, path, *more):
    prune.main(["--checkpoint", f"{folder}/in.safetensors", "--output", str(path), *RATIO, *more])


def save_plan(folder, path, *more):
    plan = ["--save-plan", str(path)]
    output = folder / f"other{len(list(folder.iterdir()))}"
    run_prune(folder, output, *plan, *more)


def run_export(folder, path, *more):
    export.main([f"{folder}/in.safetensors", "--output", str(path), "--no-check", *more])


def run_latency(folder, path, *more):
    quick = ["--repeats", "1", "--warmup", "0", "--threads", "1"]
    latency.main([f"{folder}/in.safetensors", "--json", str(path), *quick, *more])


def run_plot(folder, path, *more):
    describe.main([f"{folder}/in.safetensors", "--plot", str(path), *more])


def run_survey(folder, path, *more):
    survey.main([f"{folder}/in.safetensors", "--json", str(path), *more])


# Every option that names a file to write: (what runs it, the option, a name, a name that lies)
COMMANDS = {
    "prune": (run_prune, "--output", "out.safetensors", "out.pth"),
    "prune, the plan": (save_plan, "--save-plan", "plan.json", "plan.safetensors"),
    "export, program": (run_export, "--output", "out.pt2", None),
    "export, ONNX": (run_export, "--output", "out.onnx", None),
    "latency": (run_latency, "--json", "out.json", "out.csv"),
    "describe": (run_plot, "--plot", "out.png", None),
    "survey": (run_survey, "--json", "out.json", "out.csv"),
}


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    save_model(tmp_path / "in.safetensors", build_model("cifar_resnet8", 10))
    return tmp_path


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(folder, call, *arguments):
    """The message of a command that leaves everything as it was."""
    before = contents(folder)
    with pytest.raises(UserError) as caught:
        call(folder, *arguments)
    assert contents(folder) == before and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", COMMANDS)
def test_nothing_that_is_there_is_lost(folder, name):
    run, option, good, lie = COMMANDS[name]
    path = folder / "new" / good
    path.parent.mkdir()
    path.write_text("an older file")
    said = f"{option} {path}: is there already; --overwrite replaces it"
    assert refused(folder, run, path) == said
    path.unlink()
    path.symlink_to("nowhere")
    assert refused(folder, run, path) == said
    path.unlink()
    path.mkdir()
    assert f"{option} {path}: is a folder; name a file" in refused(folder, run, path)
    path.rmdir()
    # Whatever it is called: a link to the input is the input.
    path.symlink_to(folder / "in.safetensors")
    for more in ((), ("--overwrite",)):
        assert "is an input, which stays" in refused(folder, run, path, *more)
    path.unlink()
    below = path.parent / "file" / good
    below.parent.write_text("x")
    said = f"{option} {below}: {below.parent} is a file, not a folder"
    assert refused(folder, run, below) == said
    if lie is not None:
        said = refused(folder, run, path.with_name(lie))
        assert f" says {'safetensors' if 'plan' in name else 'a '}" in said


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("umask", [0o002, 0o027])
def test_permissions_are_those_of_the_umask(folder, name, umask):
    run, _, good, _ = COMMANDS[name]
    path = folder / "new" / good
    before = os.umask(umask)
    try:
        run(folder, path)
        run(folder, path, "--overwrite")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    assert path.stat().st_size > 0
    for other in path.parent.iterdir():
        assert other == path


def test_so_are_those_of_what_training_resumes_from(tmp_path):
    before = os.umask(0o007)
    try:
        tensors = {"x": torch.zeros(3)}
        rest = {"state": {}, "param_groups": []}
        write_state(state_folder(tmp_path, 1), TrainingState(1, tensors, rest, {}, None))
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 4
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o660}


def test_safetensors_itself_shuts_others_out(tmp_path):
    """If that changes, what gives its files the umask's permissions can go."""
    before = os.umask(0o022)
    try:
        assert new_file(tmp_path / "x") == 0o644
        save_file({"x": torch.zeros(1)}, tmp_path / "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("x.pth", "a file of torch.save"),
        ("x.PT", "a file of torch.save"),
        ("x.onnx", "ONNX"),
        ("x.tar", "an archive"),
        ("x.json", "JSON"),
    ],
)
def test_a_name_does_not_lie(folder, name, what):
    said = refused(folder, run_prune, folder / name)
    suffix = Path(name).suffix
    assert said.endswith(f"it is safetensors, and {suffix} says {what}; call it x.safetensors")


@pytest.mark.parametrize("name", ["x", "x.st", "x.half", "resnet50.v2", "X.SAFETENSORS"])
def test_names_that_say_nothing_else_are_free(folder, name):
    run_prune(folder, folder / name)
    assert load_model(folder / name).layer1[0].conv1.out_channels == 8


def test_the_older_file_is_replaced_when_asked_for(folder):
    path = folder / "out.safetensors"
    path.write_text("an older file")
    run_prune(folder, path, "--overwrite")
    assert load_model(path).layer1[0].conv1.out_channels == 8
    with pytest.raises(UserError, match="--output and --save-plan are the same file"):
        run_prune(folder, folder / "a", "--save-plan", str(folder / "b" / ".." / "a"))
    assert json.loads(json.dumps(sorted(p.name for p in folder.iterdir()))) == [
        "in.safetensors",
        "out.safetensors",
    ]


def test_a_checkpoint_is_not_written_over_a_folder(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"out: cannot write the checkpoint: it is a folder; name"):
        save_model(tmp_path / "out", build_model("mlp7_linear", 10, width=3))


def test_devices_and_empty_names(tmp_path):
    rest = {"kind": "JSON", "ending": ".json", "overwrite": True}
    with pytest.raises(UserError, match="--json /dev/null: is no plain file"):
        check_output("--json", "/dev/null", **rest)
    with pytest.raises(UserError, match="is a folder"):
        check_output("--json", "", **rest)
    check_output("--json", tmp_path / "a" / "b" / "c.json", **rest)
    assert list(tmp_path.iterdir()) == []
    check_apart([("--a", tmp_path / "a"), ("--b", tmp_path / "b")])
