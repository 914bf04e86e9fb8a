"""A regularised stage that is told how long it is: its method's steps are stretched to that."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_run import tiny_run

from train.config.batch_rule import describe_length
from train.config.config import Config, steps_for
from train.run_folder.same_run import stage_settings

# What the tiny run's images and batch make of an epoch.
IMAGES, BATCH = 96, 16


def told(epochs: float | None, **method: Any) -> Config:
    run = tiny_run(Path("data"), Path("run"))
    run["method"] |= method
    if epochs is not None:
        run["stages"]["regularize"]["epochs"] = epochs
    return Config.model_validate(run)


@settings(deadline=None, max_examples=20)
@given(
    name=st.sampled_from(["greg1", "tpp"]),
    epochs=st.floats(1.0, 400.0),
    images=st.integers(200, 2_000_000),
    delta=st.floats(1e-5, 0.1),
    interval=st.integers(1, 20),
    stabilize=st.integers(100, 50_000),
)
def test_length_and_shares(name, epochs, images, delta, interval, stabilize):
    method = {"name": name, "update_interval": interval, "stabilize_steps": stabilize}
    run = tiny_run(Path("data"), Path("run")) | {"method": method | {"delta": delta}}
    own = Config.model_validate(run).stage_method("regularize").steps()
    assert own is not None
    run["stages"]["regularize"]["epochs"] = epochs
    config = Config.model_validate(run)
    wanted = steps_for(epochs, images, BATCH)
    method = config.stage_method("regularize", images=images)
    before, after = method.settings, config.stage_method("regularize").settings
    steps = method.steps()
    assert steps is not None
    # Both phases are rounded up, growth to whole updates; so were the own ones, with a step more.
    slack = 2 + before.update_interval + (after.update_interval + 1) * wanted / own
    assert abs(steps - wanted) <= slack
    assert abs(before.stabilize_steps / wanted - after.stabilize_steps / own) <= 1 / wanted + 1e-9
    # Lambda per share of the stage.
    slope = before.delta / before.update_interval * wanted
    assert slope == pytest.approx(after.delta / after.update_interval * own, rel=1e-9)


def test_the_methods_own_length_changes_nothing() -> None:
    own = told(None).stage_method("regularize")
    steps = own.steps()
    assert steps == 20
    same = told(steps * BATCH / IMAGES).stage_method("regularize", images=IMAGES)
    assert same.settings == own.settings


def test_what_is_not_told_or_not_known_is_not_stretched() -> None:
    assert not told(None).is_stretched("regularize") and told(5).is_stretched("regularize")
    assert not told(5).is_stretched("finetune")
    assert describe_length(told(None), "regularize", IMAGES) is None
    assert describe_length(told(5), "regularize", None) is None
    assert told(5).stage_method("regularize").steps() == 20
    assert "epochs" not in stage_settings(told(None), "regularize")["stages"]["regularize"]


def test_a_run_is_as_long_as_it_is_told_and_says_what_it_chose(tiny_config, run_inside, capsys):
    tiny_config["stages"] = {name: tiny_config["stages"][name] for name in ("regularize", "prune")}
    tiny_config["stages"]["regularize"]["epochs"] = 10
    run_inside(tiny_config, "--dry-run")
    chosen = (
        "regularize: 10 epochs are 58 steps where the method's own are 20: "
        "update_interval 1 -> 3, stabilize_steps 9 -> 27, zero_out_interval 1 -> 3\n"
    )
    assert chosen in capsys.readouterr().out
    run_inside(tiny_config)
    assert chosen in capsys.readouterr().out
    results = json.loads((Path(tiny_config["output"]) / "results.json").read_text())
    assert results["stages"]["regularize"]["steps"] == 58


def test_one_that_is_too_short_is_refused_before_it_starts(tiny_config, run_inside, capsys):
    tiny_config["stages"]["regularize"]["epochs"] = 0.5
    for arguments in (["--dry-run"], []):
        run_inside(tiny_config, *arguments, expect=2)
        (error,) = capsys.readouterr().err.splitlines()
        assert error.startswith("error: stages.regularize.epochs: 0.5 epochs of 96 images are ")
        assert "too few to set every pruned layer to zero in turn" in error
        enough = int(error.partition("; say ")[2].split()[0])
    assert not (Path(tiny_config["output"]) / "dense").exists()
    tiny_config["stages"]["regularize"]["epochs"] = enough
    run_inside(tiny_config, "--dry-run")
    if enough > 1:
        tiny_config["stages"]["regularize"]["epochs"] = enough - 1
        run_inside(tiny_config, "--dry-run", expect=2)
        assert f"; say {enough} or more" in capsys.readouterr().err
