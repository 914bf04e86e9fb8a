"""Runs of a network of one's own: the page's example as it stands; killed and resumed."""

import copy
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from own_page import blocks, write_example
from safetensors.torch import load_file

from tpp import export
from tpp.common.errors import UserError, run_command
from tpp.common.own_code import load_own
from tpp.models.architecture import Architecture
from train import evaluate
from train.config.config import load_config, save_config
from train.dry_run import dry_run
from train.main import main
from train.run_folder.same_run import stage_settings
from train.weights import load_starting_weights

ZEROS = Path(__file__).resolve().parents[2] / "launch" / "deepspeed"


@pytest.fixture
def page(tmp_path, monkeypatch):
    write_example(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "net", raising=False)
    yield tmp_path
    sys.modules.pop("net", None)


def test_the_page_from_beginning_to_end(page, monkeypatch, capsys):
    commands = [line.split("#")[0].split() for text in blocks("bash") for line in text.splitlines()]
    for command in (words for words in commands if words[:2] == ["tpp", "train"]):
        main(command[2:])
    printed = capsys.readouterr().out
    assert "speedup: 1.9124x fewer MACs" in printed, "of the dry run"
    results = json.loads(Path("runs/own/results.json").read_text())
    assert results["status"] == "finished" and results["model"] == "net.py:MyNet"
    # No stage keeps a path of this machine but the resolved configuration, which runs by it.
    for file in Path("runs/own").rglob("*.safetensors"):
        assert str(page).encode() not in file.read_bytes()
    assert str(page) not in Path("runs/own/dense/done.json").read_text()

    (exporting,) = (words for words in commands if words[:2] == ["tpp", "export"])
    export.main(exporting[2:])
    assert "checked in onnxruntime" in capsys.readouterr().out
    sys.path.append(str(page))
    found: dict = {}
    exec(blocks("python")[1], found)
    assert found["model"].blocks[0].near.out_channels == 8

    file = "runs/own/finetune/model.safetensors"
    command = ["evaluate", "--checkpoint", file, "--data", "images/val", "--model", "net.py:MyNet"]
    monkeypatch.setattr(sys, "argv", command)
    evaluate.main()
    top1 = results["stages"]["evaluate"]["top1"]
    assert f"{file}: top-1 {top1:.2f}%" in capsys.readouterr().out

    # The resolved configuration goes on where the run was; and so does the project, moved.
    monkeypatch.setattr(sys, "argv", ["main.py", "--config", "runs/own/config.yaml"])
    main()
    shutil.copytree(page, moved := page / "elsewhere" / "moved", ignore=lambda *_: ["elsewhere"])
    monkeypatch.chdir(moved)
    monkeypatch.setattr(sys, "argv", ["main.py", "--config", "own.yaml"])
    main()
    assert capsys.readouterr().out.count("dense: done before, skipped") == 2


def test_killed_and_resumed_on_two_ranks(tiny_config, tmp_path, run_main):
    write_example(tmp_path)
    tiny_config["model"] = {"name": "net.py:MyNet", "args": {"width": 8}}
    tiny_config["pruning"] = {"ratios": {"blocks.*.near": 0.5, "stem": 0.25}, "coupled": True}
    tiny_config["method"]["stabilize_steps"] = 40
    for name in ("dense", "evaluate"):
        del tiny_config["stages"][name]
    tiny_config["stages"]["regularize"]["optimizer"]["lr"] = 0.001
    undisturbed = copy.deepcopy(tiny_config)
    undisturbed["output"] += "-undisturbed"
    run_main(undisturbed, ranks=2)
    checkpoints = Path(tiny_config["output"]) / "regularize" / "checkpoints"
    run_main(tiny_config, ranks=2, kill_when=checkpoints / "step-00000015")
    resumed = run_main(tiny_config, ranks=2)
    assert "regularize: resumed after" in resumed.stdout
    one, other = (
        load_file(Path(config["output"]) / "finetune" / "model.safetensors")
        for config in (undisturbed, tiny_config)
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert one["blocks.0.near.weight"].shape == (4, 6, 3, 3)
    assert all(tensor.isfinite().all() for tensor in one.values())


def test_where_the_path_begins(page):
    (page / "sub").mkdir()
    (page / "sub" / "child.yaml").write_text("extends: ../own.yaml\nname: child\n")
    config = load_config("sub/child.yaml")
    assert config.model.name == f"{page}/net.py:MyNet" and config.model.network == "net.py:MyNet"
    save_config(config, page / "sub" / "saved.yaml")
    assert load_config("sub/saved.yaml") == config
    # On the command line by where it runs.
    shutil.copy("net.py", page / "sub" / "net.py")
    other = load_config("own.yaml", ["model.name=sub/net.py:MyNet", "name=child"])
    assert other.model.name == f"{page}/sub/net.py:MyNet"
    # And what a stage was done with does not know where that is.
    assert stage_settings(other, "dense") == stage_settings(config, "dense")
    assert stage_settings(other, "dense")["model"]["name"] == "net.py:MyNet"


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("model.name=net.py:Net", "override 'model.name=net.py:Net': model.name: {page}/net.py has "
         "no Net; it has Block, MyNet"),
        ("model.args={widht: 3}", "model 'net.py:MyNet': got an unexpected keyword argument "
         "'widht'; it takes num_classes, width, blocks, and model.args says what they are"),
        ("model.args={width: -3}", "model 'net.py:MyNet' cannot be built with"),
        ("data.image_size=64", "net.py:MyNet does not run on images of 3x64x64 without memory"),
        ("pruning.ratios={'blocks.*.gate': 0.5}", "blocks.0.gate: its filters only gate"),
        ("task={kind: super_resolution, scale: 2}", "super_resolution"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_before_anything_is_trained(
    page, monkeypatch, capsys, override, line
):
    monkeypatch.setattr(
        sys,
        "argv",
        ["main.py", "--config", "own.yaml", "--dry-run", "model.num_classes=4", override],
    )
    with pytest.raises(SystemExit) as ended:
        run_command(main)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert line.replace("{page}", str(page)) in said and said.count("\n") == 1, said
    assert not Path("runs").exists()


def test_starting_weights_and_a_new_head(page):
    """Of a state_dict, and for other classes; where their number is fixed no head is found."""
    torch.manual_seed(0)
    seven = load_own("net.py:MyNet")[0](7)
    torch.save(seven.state_dict(), "seven.pth")
    content = yaml.safe_load(Path("own.yaml").read_text())
    content["model"] |= {"checkpoint": "seven.pth", "head": "new", "num_classes": 4}
    Path("own.yaml").write_text(yaml.safe_dump(content))
    config = load_config("own.yaml")
    architecture = config.make_task().architecture(config.model)
    assert architecture == Architecture("net.py:MyNet", 4, {"width": 16})
    model = load_starting_weights(config.model, architecture, seed=0)
    assert model.head.weight.shape == (4, 16 * 16 * 16)
    assert torch.equal(model.blocks[1].mix.weight, seven.blocks[1].mix.weight)
    fixed = "\n\ndef fixed(width):\n    return MyNet(4, width)\n"
    Path("other.py").write_text(Path("net.py").read_text() + fixed)
    with pytest.raises(UserError, match=r"takes no num_classes, so there is no telling which"):
        dry_run(load_config("own.yaml", ["model.name=other.py:fixed"]), ranks=1)


@pytest.mark.parametrize(
    ("settings", "ranks", "apart"),
    [
        ({"deepspeed": "zero2", "accumulation": 2}, 2, 1e-3),
        ({"precision": "bf16", "accumulation": 2}, 1, 5e-2),
        ({"precision": "bf16", "deepspeed": "zero1"}, 2, 5e-2),
    ],
    ids=["zero2-accumulated", "bf16-accumulated", "zero1-bf16"],
)
def test_by_whatever_engine_the_same_network(
    tiny_config, tmp_path, run_main, settings, ranks, apart
):
    """Its final weights are those of one process in single precision, up to rounding."""
    text = write_example(tmp_path).read_text()
    # Statistics over a batch would differ with its parts.
    without = text.replace("nn.BatchNorm2d(2 * width)", "nn.GroupNorm(1, 2 * width)")
    assert without != text
    (tmp_path / "net.py").write_text(without)
    tiny_config["model"] = {"name": "net.py:MyNet", "args": {"width": 8}}
    tiny_config["pruning"] = {"ratios": {"blocks.*.near": 0.5}}
    tiny_config["stages"] = {"regularize": {"optimizer": {"lr": 0.001}}, "prune": {}}
    alone = copy.deepcopy(tiny_config)
    alone["output"] += "-alone"
    run_main(alone)
    if "deepspeed" in settings:
        settings = settings | {"deepspeed": str(ZEROS / f"{settings['deepspeed']}.json")}
    tiny_config["training"] |= settings
    run_main(tiny_config, ranks=ranks)
    one, other = (
        load_file(Path(config["output"]) / "prune" / "model.safetensors")
        for config in (alone, tiny_config)
    )
    assert {name: t.shape for name, t in one.items()} == {n: t.shape for n, t in other.items()}
    assert one["blocks.0.near.weight"].shape[0] == 4
    mine, its = (torch.cat([t.flatten() for t in found.values()]) for found in (other, one))
    distance = ((mine - its).norm() / its.norm()).item()
    assert 0 < distance < apart
