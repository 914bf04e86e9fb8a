"""Larger and smaller global batches: the same run in images seen."""

import copy
import json
import math
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_run import tiny_run

from tpp.common.errors import UserError, run_command
from tpp.methods import available_methods, method_class
from tpp.methods.base import Settings
from tpp.regularization.schedule import GrowthSchedule
from train.config.batch_rule import describe
from train.config.config import Config, load_config, save_config
from train.config.optimizer import OptimizerSection
from train.config.sections import TrainingSection
from train.distributed.accelerator import check_batch_size
from train.loop.optim import learning_rate
from train.main import main
from train.run_folder.same_run import stage_settings

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
GROWING = ["greg1", "greg2", "tpp"]

batches = st.integers(1, 8192)
intervals = st.integers(1, 40)
deltas = st.floats(1e-5, 0.5)


def tiny(batch: int, reference: int | None, **method: Any) -> Config:
    settings = tiny_run(Path("data"), Path("run"))
    settings["training"] |= {"batch_size": batch}
    if reference is not None:
        settings["training"] |= {"batch": "reference", "reference_batch_size": reference}
    settings["method"] |= method
    return Config.model_validate(settings)


def settings_of(name: str, factor: Fraction, **given: float) -> tuple[Any, Any]:
    """A method's settings as they are given, and for a batch of ``factor`` times the reference."""
    settings = method_class(name).settings_type(**given)
    return settings, settings.for_batch(factor)


# Lambda


@settings(deadline=None)
@given(batch=batches, reference=batches, interval=intervals, delta=deltas, data=st.data())
def test_lambda_is_the_same_line_over_images(batch, reference, interval, delta, data):
    given = {"delta": delta, "tau": 1.0, "update_interval": interval}
    old, new = settings_of(data.draw(st.sampled_from(GROWING)), Fraction(batch, reference), **given)
    assert (new.tau, new.growth.tau) == (1.0, 1.0)
    update = data.draw(st.integers(0, new.growth.growth_steps // new.update_interval - 1))
    images = update * new.update_interval * batch
    line = delta * images / (interval * reference)
    assert new.growth.strength(update * new.update_interval) == pytest.approx(line, rel=1e-12)

    # Where both schedules have an update after the same number of images.
    together = math.lcm(interval * reference, new.update_interval * batch)
    images = data.draw(st.integers(0, 50)) * together
    ours, theirs = (s.growth.strength(images // b) for s, b in ((new, batch), (old, reference)))
    assert ours == pytest.approx(theirs, rel=1e-12)


@settings(deadline=None)
@given(batch=batches, reference=batches, interval=intervals, delta=deltas)
def test_lambda_between_updates_is_never_more_than_one_off(batch, reference, interval, delta):
    """Against the reference at every image, by its own step function."""
    given = {"delta": delta, "update_interval": interval}
    old, new = settings_of("tpp", Fraction(batch, reference), **given)
    for step in range(0, new.growth.growth_steps, max(1, new.growth.growth_steps // 50)):
        theirs = old.growth.strength(step * batch // reference)
        off = abs(new.growth.strength(step) - theirs)
        assert off <= max(old.delta, new.delta) * (1 + 1e-9)


@settings(deadline=None)
@given(
    *(batches, batches, intervals, deltas, st.integers(1, 50_000)),
    st.sampled_from(GROWING),
)
def test_the_stage_is_as_long_in_images(batch, reference, interval, delta, stabilize, name):
    given = {"delta": delta, "update_interval": interval, "stabilize_steps": stabilize}
    old, new = settings_of(name, Fraction(batch, reference), **given)
    assert 0 <= new.stabilize_steps * batch - stabilize * reference < batch
    # Growth ends with an update, of one schedule or the other.
    one_update = max(interval * reference, new.update_interval * batch)
    grown = [s.growth.growth_steps * b for s, b in ((new, batch), (old, reference))]
    assert abs(grown[0] - grown[1]) < one_update
    if new.update_interval * batch == interval * reference:
        assert (new.delta, grown[0]) == (delta, grown[1])


@settings(deadline=None)
@given(batch=batches, reference=batches, every=st.integers(1, 200), layer=st.integers(0, 60))
def test_every_layer_still_gets_its_turn_and_no_later(batch, reference, every, layer):
    needed = (layer + 1) * every + 1
    given = {"zero_out_interval": every, "stabilize_steps": needed}
    old, new = settings_of("tpp", Fraction(batch, reference), **given)
    old.growth.check_zero_out(layer)
    if every * reference >= batch:
        new.growth.check_zero_out(layer)
        assert new.zero_out_interval * batch <= every * reference
    else:
        assert new.zero_out_interval == 1


@settings(deadline=None)
@given(batch=batches, reference=batches, interval=intervals, pick=st.floats(1e-5, 1e-2))
def test_greg2_picks_after_as_many_images(batch, reference, interval, pick):
    given = {"pick_delta": pick, "pick_ceiling": 0.01, "update_interval": interval}
    old, new = settings_of("greg2", Fraction(batch, reference), **given)
    one_update = max(interval * reference, new.update_interval * batch)
    picked = [s.picking.growth_steps * b for s, b in ((new, batch), (old, reference))]
    assert abs(picked[0] - picked[1]) < one_update
    assert (new.kept_decay, new.pick_ceiling) == (old.kept_decay, old.pick_ceiling)
    # Growth goes on where picking has left off.
    method = method_class("greg2")(new)
    start = new.picking.growth_steps + method._offset
    assert 0.01 - new.delta * 1.001 <= new.growth.strength(start) <= 0.01 * 1.001


def test_what_is_not_counted_in_steps_stays():
    for name, method in available_methods().items():
        settings_type = method.settings_type
        if settings_type.for_batch is Settings.for_batch:
            assert name not in GROWING
            settings = settings_type.model_construct()  # some may have no default
            assert settings.for_batch(Fraction(4)) is settings
    new = settings_of("tpp", Fraction(4), gram_weight=7.0, tau=0.5)[1]
    assert (new.gram_weight, new.tau) == (7.0, 0.5)


def test_the_published_imagenet_row_at_1024():
    config = load_config(
        CONFIGS / "imagenet" / "resnet50_tpp_2.31x.yaml", ["training.batch_size=1024"]
    )
    settings = config.stage_method("regularize").settings
    assert (settings.update_interval, settings.delta) == (1, pytest.approx(8e-5))
    assert (settings.stabilize_steps, settings.zero_out_interval) == (10_000, 25)
    assert config.stage_method("regularize").steps() == 22_501
    assert config.stage_optimizer("finetune").lr == pytest.approx(0.04)
    assert config.stages["finetune"].optimizer.milestones == [30, 60, 75]
    published = GrowthSchedule(1e-4, 1.0, 5, 40_000, 100)
    for step in range(0, 22_500, 500):
        assert settings.growth.strength(step) == pytest.approx(published.strength(4 * step))
        assert settings.growth.phase(step) == published.phase(4 * step)
        for layer in (0, 17, 52):
            assert settings.growth.zeroed(layer, step) == published.zeroed(layer, 4 * step)


# Learning rates


def by_hand(
    k: float, steps: int, per_epoch: float, warmup: float, *, own: float, schedule: str
) -> Iterator[float]:
    """Climb from the reference's 0.1 to k times it, in a loop; milestones at 6 and 9 of 12."""
    for step in range(steps):
        epoch = step / per_epoch
        rate = 0.1
        if schedule == "step":
            rate *= 0.01 if epoch >= 9 else 0.1 if epoch >= 6 else 1.0
        elif schedule == "cosine":
            rate *= (1 + math.cos(math.pi * epoch / 12)) / 2
        if own:
            yield k * rate * min(1.0, epoch / own)
        elif k > 1 and epoch < warmup:
            yield rate + (k * rate - rate) * epoch / warmup
        else:
            yield k * rate


@pytest.mark.parametrize("schedule", ["constant", "step", "cosine"])
@pytest.mark.parametrize("own", [0.0, 3.0])
@pytest.mark.parametrize("batch", [4, 12, 16, 17, 48, 512])
@pytest.mark.parametrize(("asked", "warmup"), [(2.5, 2.5), (5.0, 4.0), (0.0, 0.0)])
def test_learning_rate_at_every_step(schedule, own, batch, asked, warmup):
    """Of a stage of 12 epochs, so that 4 are the longest warm-up."""
    settings = tiny_run(Path("data"), Path("run"))
    settings["training"] |= {"batch_size": batch, "batch_warmup_epochs": asked}
    settings["training"] |= {"batch": "reference", "reference_batch_size": 16}
    optimizer = {"lr": 0.1, "schedule": schedule, "warmup_epochs": own}
    optimizer |= {"milestones": [6, 9]} if schedule == "step" else {}
    settings["stages"]["dense"] = {"epochs": 12, "optimizer": optimizer}
    scaled = Config.model_validate(settings).stage_optimizer("dense")
    per_epoch = 1600 / batch
    steps = math.ceil(12 * per_epoch)
    rates = [learning_rate(scaled, step / per_epoch, 12) for step in range(steps)]
    truth = by_hand(batch / 16, steps, per_epoch, warmup, own=own, schedule=schedule)
    assert rates == pytest.approx(list(truth), rel=1e-12)


def test_length_of_the_warmup():
    config = tiny(64, 16)
    assert config.stage_optimizer("dense").warmup_epochs == pytest.approx(1 / 3)  # of 1 epoch
    assert config.stage_optimizer("regularize", 18.0).warmup_epochs == 5
    assert config.stage_optimizer("regularize", 6.0).warmup_epochs == pytest.approx(2)
    assert config.stage_optimizer("regularize").warmup_epochs == 5
    assert config.stage_optimizer("regularize").warmup_from == 0.25
    assert tiny(8, 16).stage_optimizer("dense").warmup_epochs == 0
    assert config.stage_optimizer("dense").momentum == config.stages["dense"].optimizer.momentum


def test_the_reference_batch_changes_nothing():
    config = tiny(16, 16)
    assert config.stage_optimizer("dense") is config.stages["dense"].optimizer
    given = config.stage_method("regularize", as_given=True).settings
    assert config.stage_method("regularize").settings == given
    assert all(describe(config, name) is None for name in config.stages)
    # And so does a batch that is taken as it is given.
    aside = Config.model_validate({**config.model_dump(), "training": {"batch_size": 64}})
    assert aside.stage_optimizer("dense") is aside.stages["dense"].optimizer


# Configurations


def test_a_saved_configuration_is_not_scaled_twice(tmp_path):
    config = tiny(64, 16, stabilize_steps=90, update_interval=8)
    save_config(config, tmp_path / "once.yaml")
    again = load_config(tmp_path / "once.yaml")
    save_config(again, tmp_path / "twice.yaml")
    assert (tmp_path / "once.yaml").read_text() == (tmp_path / "twice.yaml").read_text()
    assert again.stage_optimizer("dense") == config.stage_optimizer("dense")
    assert again.stages["dense"].optimizer.lr == 0.05
    (settings, same) = (c.stage_method("regularize").settings for c in (config, again))
    assert settings == same and settings.update_interval == 2 and settings.stabilize_steps == 23


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (
            {"training": {"batch": "reference"}},
            "training: batch: reference needs reference_batch_size",
        ),
        (
            {"training": {"batch": "Reference"}},
            "training.batch: input should be 'reference' or 'as_given', not 'Reference'",
        ),
        (
            {"training": {"batch_warmup_epochs": -1.0}},
            "training.batch_warmup_epochs: input should be greater than or equal to 0",
        ),
        (
            {"stages": {"dense": {"optimizer": {"lr": 0.1, "warmup_from": 0.5}}}},
            "stages.dense.optimizer: warmup_from goes with warmup_epochs",
        ),
        (
            {"method": {"delta": 1e308}, "training": {"batch_size": 10**6}},
            "method.delta: input should be a finite number, not inf, for batch 1000000 where the "
            "reference is 16 (training.batch=as_given takes it as written)",
        ),
        (
            {"stages": {"dense": {"optimizer": {"lr": 1e308}}}, "training": {"batch_size": 4096}},
            "stages.dense.optimizer.lr: input should be a finite number, not inf, for batch 4096",
        ),
        (
            {"method": {"name": "greg2", "delta": 1e-320}},
            "method: with these settings 'greg2' never ends",
        ),
    ],
)
def test_mistakes_name_the_key(tmp_path, settings, line):
    config = tiny_run(tmp_path, tmp_path / "run")
    path = tmp_path / "base.yaml"
    if "batch" not in settings.get("training", {}):
        config["training"] |= {"batch": "reference", "reference_batch_size": 16}
    path.write_text(json.dumps(config))
    if settings.get("method", {}).get("name"):
        config["method"] = {}
    child = tmp_path / "child.yaml"
    child.write_text(json.dumps({"extends": "base.yaml", **settings}))
    with pytest.raises(UserError) as error:
        load_config(child)
    assert f"{child}: {line}" in str(error.value) and "\n" not in str(error.value)


def test_new_keys_count_only_where_they_change_something():
    """A run begun before the keys existed goes on; one at another batch is another run."""
    before = stage_settings(tiny(16, None), "finetune")
    assert not {"batch", "reference_batch_size", "batch_warmup_epochs"} & before["training"].keys()
    assert "warmup_from" not in before["stages"]["dense"]["optimizer"]
    assert stage_settings(tiny(16, 16), "finetune") == before
    as_given = stage_settings(tiny(32, None, stabilize_steps=18), "finetune")
    scaled = stage_settings(tiny(32, 16, stabilize_steps=18), "finetune")
    assert as_given != scaled
    assert scaled["stages"] == as_given["stages"]  # what differs is named once, by its key
    assert scaled != stage_settings(tiny(32, 8, stabilize_steps=18), "finetune")


# Runs


def weights(run: dict[str, Any], stage: str) -> dict[str, torch.Tensor]:
    return load_file(Path(run["output"]) / stage / "model.safetensors")


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def apart(run: dict[str, Any], name: str) -> dict[str, Any]:
    other = copy.deepcopy(run)
    other["output"] += f"-{name}"
    return other


def test_the_reference_batch_gives_the_same_bits(tiny_config, run_inside, capsys):
    ruled = apart(tiny_config, "ruled")
    ruled["training"] |= {"batch": "reference", "reference_batch_size": 16}
    run_inside(tiny_config)
    run_inside(ruled)
    assert "the reference" not in capsys.readouterr().out
    for stage in ("dense", "regularize", "finetune"):
        assert same_bits(weights(tiny_config, stage), weights(ruled, stage))


def test_twice_the_batch_is_what_one_would_write_by_hand(tiny_config, run_inside, capsys):
    tiny_config["method"] |= {"stabilize_steps": 20, "zero_out_interval": 2, "update_interval": 2}
    tiny_config["training"] |= {"batch": "reference", "reference_batch_size": 16}
    small, by_hand = apart(tiny_config, "small"), apart(tiny_config, "by-hand")
    run_inside(small)
    capsys.readouterr()
    tiny_config["training"]["batch_size"] = 32
    run_inside(tiny_config)
    printed = capsys.readouterr().out.splitlines()
    assert (
        "regularize: batch 32 is 2 x the reference 16: learning rate 0.01 -> 0.02 after 2.33 "
        "epochs of warm-up, update_interval 2 -> 1, stabilize_steps 20 -> 10, zero_out_interval "
        "2 -> 1 (training.batch=as_given turns this off)"
    ) in printed
    assert (
        "finetune: batch 32 is 2 x the reference 16: learning rate 0.02 -> 0.04 after 0.333 "
        "epochs of warm-up (training.batch=as_given turns this off)"
    ) in printed

    steps = [
        {name: stage["steps"] for name, stage in results["stages"].items() if stage["steps"]}
        for run in (small, tiny_config)
        for results in [json.loads((Path(run["output"]) / "results.json").read_text())]
    ]
    assert steps[0] == {"dense": 6, "regularize": 41, "finetune": 6}
    assert steps[1] == {"dense": 3, "regularize": 21, "finetune": 3}

    by_hand["training"] |= {"batch_size": 32, "batch": "as_given"}
    by_hand["method"] |= {"stabilize_steps": 10, "zero_out_interval": 1, "update_interval": 1}
    for name, epochs in (("dense", 1.0), ("regularize", 21 * 32 / 96), ("finetune", 1.0)):
        optimizer = by_hand["stages"][name]["optimizer"]
        optimizer |= {"lr": 2 * optimizer["lr"], "warmup_epochs": epochs / 3, "warmup_from": 0.5}
    run_inside(by_hand)
    assert "the reference" not in capsys.readouterr().out
    for stage in ("dense", "regularize", "finetune"):
        assert same_bits(weights(tiny_config, stage), weights(by_hand, stage))
        assert not same_bits(weights(tiny_config, stage), weights(small, stage))

    # What is done was done by the rule: without it, it is another run.
    saved = Path(tiny_config["output"]) / "config.yaml"
    before = saved.read_text()
    run_inside(tiny_config)
    assert "dense: done before, skipped" in capsys.readouterr().out
    assert saved.read_text() == before
    run_inside(tiny_config, "training.batch=as_given", expect=2)
    error = capsys.readouterr().err
    assert "stage 'dense' was run with other settings: training.batch was 'reference'" in error


def test_a_stage_that_gets_too_short_is_refused_before_it_starts(tiny_config, run_inside, capsys):
    tiny_config["training"] |= {"batch": "reference", "reference_batch_size": 4}
    run_inside(tiny_config, expect=2)
    error = capsys.readouterr().err
    assert error.count("error:") == 1 and "stabilize_steps (K_s) is 3, too short" in error
    assert "; batch 16 is 4 x the reference 4: delta 0.1 -> 0.4, stabilize_steps 9 -> 3 (" in error
    assert not Path(tiny_config["output"]).exists()


def test_dry_run_says_what_becomes_of_the_settings(monkeypatch, capsys):
    arguments = ["--config", str(CONFIGS / "imagenet" / "resnet50_tpp_2.31x.yaml")]
    printed = []
    for overrides in (
        ["training.batch_size=1024"],
        [],
        ["training.batch_size=1024", "training.batch=as_given"],
    ):
        monkeypatch.setattr(sys, "argv", ["main.py", "--dry-run", *arguments, *overrides])
        run_command(main)
        printed.append(capsys.readouterr().out)
    assert (
        "\nregularize: batch 1024 is 4 x the reference 256: learning rate 0.001 -> 0.004 after 5 "
        "epochs of warm-up (at most a third of the stage), delta 0.0001 -> 8e-05, update_interval "
        "5 -> 1, stabilize_steps 40,000 -> 10,000, zero_out_interval 100 -> 25 "
        "(training.batch=as_given turns this off)\n"
        "finetune: batch 1024 is 4 x the reference 256: learning rate 0.01 -> 0.04 after 5 epochs "
        "of warm-up (training.batch=as_given turns this off)\n"
    ) in printed[0]
    assert "the reference" not in printed[1] + printed[2]


def test_configurations_are_for_their_batch():
    for path in (*(CONFIGS / "imagenet").glob("*x.yaml"), *(CONFIGS / "cifar10").glob("*0.9.yaml")):
        training = load_config(path).training
        assert training.batch == "reference"
        assert training.batch_size == training.reference_batch_size


# Batches that do not split


@pytest.mark.parametrize(
    ("batch", "accumulation", "ranks", "advice"),
    [
        (256, 1, 3, "use 255 or 258, or 2 or 4 rank(s)"),
        (256, 3, 1, "use 255 or 258"),
        (256, 2, 3, "use 252 or 258, or 2 or 4 rank(s)"),
        (15, 1, 2, "use 14 or 16, or 1 or 3 rank(s)"),
        (2, 1, 8, "use 8, or 2 rank(s)"),
        (2**61 - 1, 1, 3, f"use {2**61 - 2} or {2**61 + 1}, or 1 rank(s)"),
    ],
)
def test_a_batch_that_does_not_split_names_what_does(batch, accumulation, ranks, advice):
    training = TrainingSection(batch_size=batch, accumulation=accumulation)
    with pytest.raises(UserError) as error:
        check_batch_size(training, ranks)
    message = f"training.batch_size: {batch} is not divisible by {ranks} rank(s) x accumulation "
    assert str(error.value) == f"{message}{accumulation}; {advice}"


def test_a_warmup_of_ones_own_may_begin_above_zero():
    section = OptimizerSection(lr=0.4, warmup_epochs=4.0, warmup_from=0.25)
    rates = [learning_rate(section, epoch, 9) for epoch in (0, 1, 2, 4, 8)]
    assert rates == pytest.approx([0.1, 0.175, 0.25, 0.4, 0.4])
