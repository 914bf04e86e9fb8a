"""STAMP in whole runs: meta-training in episodes, adaptation to other classes, and what is left."""

import copy
import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_run import make_tiny_data

import tpp
from tpp.common.errors import UserError
from train.config.config import load_config
from train.dry_run import dry_run
from train.run_folder.same_run import stage_settings

ZERO1 = Path(__file__).resolve().parents[2] / "launch" / "deepspeed" / "zero1.json"
WORKER = Path(__file__).with_name("stamp_worker.py")
SMALL = {"set_size": 12, "width": 6, "hidden": 5, "refresh": 3}


@pytest.fixture
def meta(tiny_config):
    """Twelve steps in episodes of two of four classes, in micro-batches."""
    method = {"name": "stamp", **SMALL}
    tiny_config["model"]["num_classes"] = 4
    tiny_config["training"] |= {"accumulation": 2}
    tiny_config["checkpoints"] = {"every": "1 step"}
    tiny_config["stages"] = {
        "dense": {
            "epochs": 2,
            "method": method,
            "episodes": {"classes": 2, "steps": 3},
            "optimizer": {"lr": 0.05, "weight_decay": 1e-3},
            "ema": {"decay": 0.5},
        },
    }
    return tiny_config


def folder_of(config, stage):
    return Path(config["output"]) / stage


def weights(config, stage):
    return load_file(folder_of(config, stage) / "model.safetensors")


def logged(config, stage):
    lines = map(json.loads, (Path(config["output"]) / "log.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == "train" and line["stage"] == stage]


def same_files(one, other):
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert torch.equal(tensor, other[key]), key


def adapted(meta, other_data, **changes):
    """The run on three other classes that goes on from the meta-training's file."""
    config = copy.deepcopy(meta)
    config["output"] += "-target"
    config["data"]["root"] = str(other_data)
    file = folder_of(meta, "dense") / "model.safetensors"
    config["model"] |= {"checkpoint": str(file), "head": "new", "num_classes": 3}
    config["method"] = meta["stages"]["dense"]["method"] | {"fixed": 0.5} | changes
    optimizer = {"lr": 0.02}
    config["stages"] = {
        "regularize": {"epochs": 2, "optimizer": optimizer},
        "prune": {},
        "evaluate": {},
    }
    return config


@pytest.fixture(scope="session")
def other_data(tmp_path_factory):
    """Three classes that are called otherwise."""
    root = make_tiny_data(tmp_path_factory.mktemp("data") / "other")
    for part in ("train", "val"):
        *kept, last = sorted((root / part).iterdir())
        for image in last.iterdir():
            image.unlink()
        last.rmdir()
        for folder in kept:
            folder.rename(folder.with_name(f"other_{folder.name}"))
    return root


@pytest.mark.parametrize("deepspeed", [None, ZERO1], ids=["DDP", "ZeRO 1"])
def test_killed_meta_training_goes_on_to_the_bit_and_keeps_the_generator(meta, run_main, deepspeed):
    if deepspeed is not None:
        meta["training"]["deepspeed"] = str(deepspeed)
    broken = copy.deepcopy(meta)
    broken["output"] += "-broken"
    run_main(meta, ranks=2)
    # In the middle of an episode: its set is what the checkpoint holds.
    checkpoint = folder_of(broken, "dense") / "checkpoints" / "step-00000005"
    run_main(broken, ranks=2, kill_when=checkpoint, expect=None)
    assert "resumed after" in run_main(broken, ranks=2).stdout
    whole = weights(meta, "dense")
    same_files(whole, weights(broken, "dense"))
    generator = {key for key in whole if key.startswith("generator:")}
    assert len(generator) == 2 + 3 * 4
    assert not any("gate" in key or "encoder" in key for key in whole.keys() - generator)
    told = logged(meta, "dense")
    assert {"loss/budget", "macs_expected", "keep"} <= told[-1].keys()
    assert all(0 < line["loss/task"] < 5 for line in told)
    results = json.loads((Path(meta["output"]) / "results.json").read_text())["stages"]
    assert results["dense"]["method"] == "stamp"


def test_two_ranks_have_the_same_masks_to_the_bit(forks, tmp_path):
    done = forks.run(2, WORKER, [str(tmp_path)], tmp_path, 240)
    assert done.returncode == 0, done.stdout + done.stderr
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1))
    assert torch.equal(one["masks"], other["masks"]) and torch.equal(one["set"], other["set"])
    assert one["plan"] == other["plan"] and one["plan"] is not None
    assert len({*one["set"].sum(1).tolist()}) == 7, "of both ranks' images"
    opened = one["masks"].mean(1)
    assert opened[0] == opened[3] == 1 and 0 < opened[1] < 1 and opened[5] == 0.5
    assert not torch.equal(one["masks"][1], one["masks"][2])


def test_killed_adaptation_goes_on_to_the_bit_and_pruning_changes_nothing(
    meta, other_data, run_main, run_inside
):
    meta["training"] |= {"accumulation": 1}
    meta["stages"]["dense"] |= {"epochs": 1}
    run_inside(meta)
    target = adapted(meta, other_data)
    broken = copy.deepcopy(target)
    broken["output"] += "-broken"
    run_main(target, ranks=2)
    for step in (2, 6):  # before masks are fixed, and after
        checkpoint = folder_of(broken, "regularize") / "checkpoints" / f"step-{step:08}"
        run_main(broken, ranks=2, kill_when=checkpoint, expect=None)
        assert not (folder_of(broken, "regularize") / "done.json").exists()
    run_main(broken, ranks=2)
    same_files(weights(target, "regularize"), weights(broken, "regularize"))
    plan = tpp.PruningPlan.load(folder_of(target, "regularize") / "plan.json")
    assert {n: len(gone) for n, gone in plan.pruned.items()} == {
        "layer1.0.conv1": 8,
        "layer2.0.conv1": 16,
        "layer3.0.conv1": 32,
    }
    stages = json.loads((Path(target["output"]) / "results.json").read_text())["stages"]
    assert stages["evaluate"]["top1"] == stages["regularize"]["top1"]
    assert stages["evaluate"]["loss"] == pytest.approx(stages["regularize"]["loss"], rel=1e-5)
    small = tpp.load_model(folder_of(target, "prune") / "model.safetensors")
    assert small(torch.zeros(1, 3, 32, 32)).shape == (1, 3)


def loaded(config, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return load_config(path)


def test_it_is_a_reconstruction_and_episodes_decide_an_outcome(meta, tmp_path, capsys):
    config = loaded(meta, tmp_path)
    dry_run(config)
    assert "STAMP: a reconstruction" in capsys.readouterr().out
    settings = stage_settings(config, "dense")["stages"]["dense"]
    assert settings["episodes"] == {"classes": 2, "steps": 3}
    del meta["stages"]["dense"]["episodes"]
    assert "episodes" not in stage_settings(loaded(meta, tmp_path), "dense")["stages"]["dense"]


def test_a_file_for_other_classes_says_how_it_is_started_from(
    meta, other_data, tmp_path, run_inside, capsys
):
    meta["training"] |= {"accumulation": 1}
    meta["stages"]["dense"] |= {"epochs": 0.2, "ema": None}
    run_inside(meta)
    target = adapted(meta, other_data)
    target["model"]["head"] = "keep"
    with pytest.raises(UserError, match=r"model\.head=new gives it a classifier of its own"):
        dry_run(loaded(target, tmp_path))
    # Another generator than the settings say is found as the stage begins.
    run_inside(adapted(meta, other_data, width=7), expect=2)
    assert "has a generator of another shape" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages.dense.episodes": {"classes": 5}}, "episodes.classes: 5, and model.num_classes"),
        ({"stages.dense.episodes": {"classes": 1}}, "greater than or equal to 2"),
        ({"data.shuffle_window": 8}, "goes without data.shuffle_window"),
        ({"stages.dense.distill": {"teacher": "dense"}}, "leave distill out"),
        ({"stages.later": {"kind": "evaluate", "episodes": {"classes": 2}}}, "no episodes"),
    ],
)
def test_mistakes_about_episodes_are_one_line(meta, tmp_path, changes, message):
    for key, value in changes.items():
        *way, last = key.split(".")
        section = meta
        for part in way:
            section = section[part]
        section[last] = value
    with pytest.raises(UserError, match=message):
        loaded(meta, tmp_path)


def test_more_classes_than_there_are_is_found_with_the_images(meta, tmp_path):
    del meta["model"]["num_classes"]
    meta["stages"]["dense"]["episodes"]["classes"] = 9
    with pytest.raises(UserError, match=r"stages\.dense\.episodes\.classes: 9, and .* 4 classes"):
        dry_run(loaded(meta, tmp_path))
