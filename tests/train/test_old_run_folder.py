"""A run folder of an earlier version (commit eccf3b2), stopped within its regularised stage."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from data_pipelines.demo import generate_demo
from data_pipelines.settings import DemoData
from train.run_folder.results import read_results

FOLDER = Path(__file__).with_name("old_run_folder")


@pytest.fixture
def old_run(tmp_path) -> dict:
    """The configuration that it was started with, on a copy of it, with the same images."""
    shutil.copytree(FOLDER, tmp_path / "run")
    config = yaml.safe_load((FOLDER / "given.yaml").read_text())
    config["output"], config["data"]["root"] = str(tmp_path / "run"), str(tmp_path / "data")
    demo = DemoData(classes=2, train_per_class=24, val_per_class=8, seed=1)
    generate_demo(tmp_path / "data", demo, image_size=8)
    return config


def test_it_goes_on_to_its_end(old_run, run_main):
    done = run_main(old_run)
    assert "dense: done before, skipped" in done.stdout
    assert "regularize: resumed after 11 steps" in done.stdout
    results = read_results(Path(old_run["output"]) / "results.json")
    assert results.status == "finished" and list(results.stages) == list(old_run["stages"])
    assert results.stages["prune"].removed_magnitude == 0
    log = (Path(old_run["output"]) / "log.jsonl").read_text().splitlines()
    steps = [
        e["step"]
        for e in map(json.loads, log)
        if (e["event"], e["stage"]) == ("train", "regularize")
    ]
    assert steps == sorted(set(steps)) and steps[0] == 2, "a step is logged twice, or is gone"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("training.batch_size=16", "training.batch_size was 8 and is 16"),
        ("method.delta=0.2", "stages.regularize.method.delta was 0.1 and is 0.2"),
        # Keys that did not exist then: at their default they are as it was, else they differ.
        (
            "training.clip_gradient_norm=1.0",
            "training.clip_gradient_norm was None and is 1.0",
        ),
        (
            "stages.regularize.pruning={ratios: {fc1: 0.5}}",
            "stages.regularize.pruning was None",
        ),
        ("data.augment.repeats=2", "stages.dense.augment.repeats was 1 and is 2"),
    ],
)
def test_another_setting_is_told(old_run, run_inside, capsys, change, says):
    run_inside(old_run, change, expect=2)
    assert says in capsys.readouterr().err


def test_what_may_differ_may_differ(old_run, run_main):
    done = run_main(old_run, "training.log_every=3", "data.prefetch=3", "training.rank_timeout=60")
    assert "regularize: resumed after 11 steps" in done.stdout
