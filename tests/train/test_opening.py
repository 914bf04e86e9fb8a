"""What a run says it is, before it begins."""

import json
from pathlib import Path

import torch
import yaml

from tpp.models.architecture import build_model


def test_a_run_begins_with_what_it_is_and_the_dry_run_too(tiny_config, run_inside, capsys):
    dense = tiny_config["stages"]["dense"]
    tiny_config["stages"] = {"dense": dense, "again": {"kind": "evaluate"}}
    run_inside(tiny_config, "--dry-run")
    lines = capsys.readouterr().out.splitlines()
    expected = [
        f"run folder  {tiny_config['output']}",
        "network     cifar_resnet8, 74,900 parameters, 12,239,104 MACs for a 3x32x32 image, from "
        "random weights",
        "images      96 for training and 40 for evaluation of 4 classes, in "
        f"{tiny_config['data']['root']}",
        "            evaluated as they are, cut to 32x32",
        "stages      dense (6 steps) > again",
    ]
    assert lines[:5] == expected
    place = lines.index("the configuration, resolved:")
    resolved = yaml.safe_load("\n".join(lines[place + 1 :]))
    assert resolved["model"]["name"] == "cifar_resnet8"

    run_inside(tiny_config)
    lines = capsys.readouterr().out.splitlines()
    ranks = "ranks       1 rank on cpu, fp32, one process; 16 images each in a step"
    assert lines[:6] == [expected[0], ranks, *expected[1:]]


def test_it_says_how_little_of_an_image_is_evaluated(tiny_config, run_inside, capsys):
    tiny_config["data"] |= {"image_size": 16, "resize": 64}
    run_inside(tiny_config, "--dry-run")
    said = "evaluated scaled to 64 (bilinear), cut to 16x16: the middle 25% of the shorter side; "
    assert said in capsys.readouterr().out


def test_steps_that_take_the_images_to_know_are_epochs(tiny_config, run_inside, capsys):
    tiny_config["data"]["root"] = str(Path(tiny_config["output"]) / "nowhere")
    tiny_config["model"]["num_classes"] = 4
    run_inside(tiny_config, "--dry-run")
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == (
        "stages      dense (1 epoch) > regularize (TPP, 20 steps) > prune > "
        "finetune (1 epoch) > evaluate"
    )


def test_a_run_that_begins_with_pruning_measures_the_dense_network(
    tiny_config, tmp_path, run_inside, capsys
):
    torch.manual_seed(5)
    torch.save(build_model("cifar_resnet8", 4).state_dict(), tmp_path / "public.pth")
    tiny_config["model"]["checkpoint"] = str(tmp_path / "public.pth")
    tiny_config["method"] = {"name": "l1"}
    said = []
    for name, stages in (
        ("told", {"dense": {"kind": "evaluate"}, "prune": {}}),
        ("not_told", {"prune": {}, "evaluate": {}}),
        ("random", {"prune": {}, "evaluate": {}}),
    ):
        run = tiny_config | {"stages": stages, "output": str(tmp_path / name)}
        if name == "random":
            run["model"] = {"name": "cifar_resnet8"}
        run_inside(run)
        results = json.loads((tmp_path / name / "results.json").read_text())
        said.append(results["dense"].get("top1"))
        printed = capsys.readouterr().out
        assert ("prune: before it, top-1" in printed) == (name == "not_told")
    assert said[0] == said[1] is not None and said[2] is None
