"""Runs with a teacher: broken off and gone on with, over ranks, and what is refused."""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from toy_methods.melting import Melting

from launch.check import Request, check
from tpp.checkpoints.model_file import save_model
from tpp.common.errors import UserError, run_command
from tpp.methods import available_methods
from tpp.models.architecture import build_model
from train.config.config import load_config
from train.main import main
from train.run_folder.networks import dense_network
from train.stages import teaching
from train.stages.training import TrainingStage

WORKER = Path(__file__).with_name("distillation_worker.py")
TEACHER = {"mean": [0.5] * 3, "std": [0.25] * 3, "channels": 3, "image_size": 32, "resize": None}


class _BrokenOffError(Exception):
    pass


def break_at(monkeypatch: pytest.MonkeyPatch, stage: str, step: int) -> None:
    """Let training end there without a word, as a crash does."""
    on_step = TrainingStage._on_step

    def dies(self: Any, done: int) -> bool:
        if self._name == stage and done == step:
            raise _BrokenOffError
        return on_step(self, done)

    monkeypatch.setattr(TrainingStage, "_on_step", dies)


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """A network of the same classes, wider resolutions and another normalisation."""
    torch.manual_seed(7)
    path = tmp_path / "teacher.safetensors"
    save_model(path, build_model("cifar_resnet14", 4), preprocessing=TEACHER)
    return path


@pytest.mark.parametrize("kind", ["logits", "features"])
def test_a_run_broken_off_ends_with_the_same_weights(
    tiny_config, run_inside, monkeypatch, capsys, teacher, kind
):
    tiny_config["checkpoints"] = {"every": "2 steps", "asynchronous": False}
    tiny_config["data"]["augment"] = {"mixup": 0.2}
    tiny_config["training"]["accumulation"] = 2
    if kind == "features":
        tiny_config["training"]["channels_last"] = True
    tiny_config["method"] = {"name": "l1"}
    dense, prune, finetune = (
        tiny_config["stages"][name] for name in ("dense", "prune", "finetune")
    )
    tiny_config["stages"] = {"dense": dense, "prune": prune, "finetune": finetune}
    finetune["distill"] = (
        {"kind": kind}
        if kind == "logits"
        else {
            "kind": kind,
            "teacher": str(teacher),
        }
    )
    whole = copy.deepcopy(tiny_config)
    whole["output"] += "-whole"
    run_inside(whole)
    with monkeypatch.context() as patch:
        break_at(patch, "finetune", 5)
        with pytest.raises(_BrokenOffError):
            run_inside(tiny_config)
    if kind == "features":
        kept = teacher.read_bytes()
        save_model(teacher, build_model("cifar_resnet14", 4), preprocessing=TEACHER)
        run_inside(tiny_config, expect=2)
        error = capsys.readouterr().err
        assert "stages.finetune.distill.teacher" in error and "is another network than" in error
        teacher.write_bytes(kept)
    run_inside(tiny_config)
    assert "finetune: resumed after 4 steps" in capsys.readouterr().out
    one, other = (
        load_file(Path(config["output"]) / "finetune" / "model.safetensors")
        for config in (whole, tiny_config)
    )
    assert all(one[key].equal(other[key]) for key in one)
    log = (Path(whole["output"]) / "log.jsonl").read_text().splitlines()
    steps = [e for e in map(json.loads, log) if (e["event"], e["stage"]) == ("train", "finetune")]
    share = 0.1 if kind == "logits" else 1.0
    for step in steps:
        expected = share * step["loss/task"] + step["loss/distillation"]
        assert step["loss"] == pytest.approx(expected, rel=1e-5) and step["loss/distillation"] > 0


def test_the_ranks_and_the_engines_have_the_gradient_of_the_whole_batch(forks, tmp_path):
    """Two ranks, accumulation; the worker compares, and says what it did."""
    done = forks.run(2, WORKER, [str(tmp_path)], tmp_path, 300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    compared = json.loads((tmp_path / "compared.json").read_text())
    assert compared == ["ddp logits", "ddp features", "zero1 logits", "zero1 features"]


@pytest.mark.parametrize(
    ("distill", "says"),
    [
        ({"weight": 1.5}, "finetune.distill: weight is the teacher's share of the loss, at most 1"),
        ({"layers": ["layer1"]}, "finetune.distill: layers go with kind: features"),
        ({"kind": "features", "temperature": 2.0}, "finetune.distill: temperature goes with"),
        ({"teacher": ""}, "finetune.distill: teacher: which one?"),
        ({"temperatur": 2.0}, "unknown key; did you mean 'temperature'?"),
        ({"teacher": "nowhere.safetensors"}, "finetune.distill.teacher: nowhere.safetensors: no"),
        ({"kind": "features", "layers": ["layr2"]}, "did you mean 'layer2'?"),
        ({"kind": "features", "layers": ["linear"]}, "linear of the network tells no places"),
        ({"teacher": "other.safetensors"}, "teacher: tells 7 classes apart, the network 4"),
        ({"teacher": "grey.safetensors"}, "takes images of 1 channels, the run's have 3"),
        ({"teacher": "large.safetensors"}, "distill.teacher: takes no images of 32x32"),
        ({"teacher": "broken.safetensors"}, "broken.safetensors"),
        ({"teacher": "foreign.pth"}, "foreign.pth"),
    ],
)
def test_what_does_not_go_together_is_one_line(
    tiny_config, tmp_path, monkeypatch, capsys, distill, says
):
    """Found before anything is trained."""
    monkeypatch.chdir(tmp_path)
    save_model("other.safetensors", build_model("cifar_resnet8", 7))
    save_model(
        "grey.safetensors",
        build_model("mlp7_linear", 4),
        preprocessing={**TEACHER, "mean": [0.5], "std": [0.25], "channels": 1, "image_size": 28},
    )
    save_model("large.safetensors", build_model("timm:vit_tiny_patch16_224", 4))
    Path("broken.safetensors").write_bytes(b"nothing")
    torch.save({"state_dict": {"conv1.weight": torch.zeros(3)}}, "foreign.pth")
    tiny_config["stages"]["finetune"]["distill"] = distill
    tiny_config["model"]["num_classes"] = 4
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tiny_config, sort_keys=False))
    for how in ([], ["--dry-run"]):
        missing = distill.get("teacher") == "nowhere.safetensors" and how
        monkeypatch.setattr(sys, "argv", ["main.py", "--config", str(path), *how])
        if missing:
            main()
            assert "not looked at: stages.finetune.distill.teacher" in capsys.readouterr().out
            continue
        with pytest.raises(SystemExit) as ended:
            run_command(main)
        printed = capsys.readouterr()
        assert ended.value.code == 2 and says in printed.err
        assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
        assert not Path(tiny_config["output"]).exists()
    if distill.get("teacher") != "foreign.pth":  # before the queue nothing is loaded
        with pytest.raises(UserError) as caught:
            check(load_config(path, []), Request(elsewhere=True))
        assert says in str(caught.value)


def test_a_network_that_shrinks_keeps_its_teacher(tiny_config, run_inside, monkeypatch):
    """In the regularised stage; the teacher is read once, and has its widths to the end."""
    monkeypatch.setitem(available_methods(), "toy_melting", Melting)
    read: list[Any] = []

    def counted(run: Any, name: str | None) -> Any:
        read.append(dense_network(run, name))
        return read[-1]

    monkeypatch.setattr(teaching, "dense_network", counted)
    regularize = {"epochs": 1, "optimizer": {"lr": 0.05}, "distill": {"kind": "features"}}
    regularize["method"] = {"name": "toy_melting"}
    tiny_config["stages"] = {"dense": tiny_config["stages"]["dense"], "regularize": regularize}
    run_inside(tiny_config)
    output = Path(tiny_config["output"])
    log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert [e["step"] for e in log if e["event"] == "shrink"] == [2, 4]
    assert all(
        e["loss/distillation"] > 0
        for e in log
        if (e["event"], e["stage"]) == ("train", "regularize")
    )
    (network,) = read
    dense = load_file(output / "dense" / "model.safetensors")
    assert all(value.equal(dense[key]) for key, value in network.state_dict().items())
