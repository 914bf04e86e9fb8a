"""Retraining schedules against the published values, tables of their own, and in runs."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from tpp.checkpoints.model_file import read_checkpoint
from train import schedules
from train.config.config import Config
from train.schedules import Dense, relative_damage

# A step schedule after a warm-up of 20 steps.
RECORDED = [0.005 * step for step in range(20)] + [0.1] * 80 + [0.01] * 60 + [0.001] * 40
DENSE = Dense(RECORDED.__getitem__, len(RECORDED), 20)


def test_llr_has_the_published_values():
    rate = schedules.llr(0.1, 100)
    expected = {0: 0.0, 5: 0.05, 10: 0.1, 55: 0.05, 99: 0.00111111}
    for step, value in expected.items():
        assert rate(step) == pytest.approx(value, abs=1e-8)


@given(st.integers(1, 400), st.floats(1e-4, 2))
def test_llr_by_its_recursion(steps, highest):
    """Each step of the decay takes the same off; each of the warm-up is its half cosine."""
    warmup, rate = int(0.1 * steps), schedules.llr(highest, steps)
    current = highest
    for step in range(steps):
        if step <= warmup and warmup:
            assert rate(step) == pytest.approx(highest * math.sin(math.pi * step / warmup / 2) ** 2)
        else:
            current = highest if step == warmup else current - highest / (steps - warmup)
            assert rate(step) == pytest.approx(current, abs=1e-9 * highest)
    assert min(map(rate, range(steps))) >= 0 and max(map(rate, range(steps))) <= highest


@pytest.mark.parametrize("steps", [1, 7, 50, 200, 333])
def test_the_others_against_tables(steps):
    warmup = int(0.1 * steps)
    rising = [0.1 * (1 - math.cos(math.pi * t / warmup)) / 2 for t in range(warmup)]
    left = steps - warmup
    # What the authors do to a recorded schedule: its warm-up is taken for the highest rate.
    flat = [0.1] * 20 + RECORDED[20:]
    scaled = [flat[j * len(flat) // left] for j in range(left)]
    cosine = [0.001 + 0.099 * (1 + math.cos(math.pi * j / left)) / 2 for j in range(left)]
    found = {
        "slr": (schedules.slr(DENSE, steps), rising + scaled),
        "clr": (schedules.clr(0.1, DENSE.lowest, steps), rising + cosine),
        "ft": (schedules.ft(DENSE), [0.001] * steps),
    }
    if steps <= len(RECORDED):
        found["lrw"] = (schedules.lrw(DENSE, steps), RECORDED[len(RECORDED) - steps :])
    for name, (rate, table) in found.items():
        assert [rate(step) for step in range(steps)] == pytest.approx(table), name
    assert DENSE.highest == 0.1 and DENSE.lowest == 0.001


def test_allr_is_llr_from_where_the_damage_says():
    steps = 60
    for damage, share, start in (
        (0.3, 0.1, 0.3),
        (0.3, 0.8, 0.8),
        (1.7, 0.1, 1.0),
        (0.0, 1.0, 1.0),
    ):
        adaptive = schedules.allr(0.1, steps, damage=damage, share=share)
        plain = schedules.llr(0.1 * start, steps)
        assert [adaptive(t) for t in range(steps)] == [plain(t) for t in range(steps)]


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=40), st.floats(0.05, 0.95))
def test_the_damage_of_the_smallest_weights_is_at_most_one(values, share):
    weights = torch.tensor(values, dtype=torch.float64)
    gone = max(1, int(share * len(values)))
    left = weights.clone()
    left[weights.abs().argsort()[:gone]] = 0
    found = relative_damage(weights.norm().item(), left.norm().item(), gone / len(values))
    whole = weights.norm()
    truth = (weights - left).norm() / (whole * math.sqrt(gone / len(values))) if whole else 0.0
    assert found == pytest.approx(float(truth), abs=1e-6)
    assert found <= 1 + 1e-6


def test_the_damage_of_equal_weights_is_one_and_of_none_nothing():
    assert relative_damage(math.sqrt(100), math.sqrt(37), 0.63) == pytest.approx(1)
    assert relative_damage(3.0, 3.0, 0.0) == relative_damage(0.0, 0.0, 0.5) == 0


def test_normal_weights_have_the_published_damage():
    torch.manual_seed(0)
    weights = torch.randn(200_000, dtype=torch.float64)
    order = weights.abs().argsort()
    for share, published in ((0.5, 0.386), (0.7, 0.565), (0.9, 0.794), (0.98, 0.936)):
        left = weights.clone()
        left[order[: int(share * len(weights))]] = 0
        found = relative_damage(weights.norm().item(), left.norm().item(), share)
        assert found == pytest.approx(published, abs=0.01)


@pytest.fixture
def retrained(tiny_config):
    """L1, and retraining like the dense stage."""
    stages = tiny_config["stages"]
    tiny_config["method"] = {"name": "l1"}
    tiny_config["stages"] = {
        "dense": {"epochs": 2, "optimizer": {"lr": 0.05, "schedule": "cosine"}},
        "prune": {},
        "finetune": {"epochs": 1, "optimizer": {"schedule": "allr", "like": "dense"}},
        "evaluate": stages["evaluate"],
    }
    return tiny_config


def logged_rates(folder, stage):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {
        line["step"]: line["lr"] for line in lines if line.get("stage") == stage and "lr" in line
    }


def test_like_is_written_out_with_the_learning_rate(retrained):
    found = Config.model_validate(retrained).stages["finetune"].optimizer
    assert found.lr == 0.05 and found.reference.epochs == 2
    assert found.reference.schedule == "cosine"
    retrained["stages"]["finetune"]["optimizer"] = {
        "schedule": "allr",
        "reference": {"lr": 0.05, "epochs": 2, "schedule": "cosine"},
    }
    assert Config.model_validate(retrained).stages["finetune"].optimizer == found


@pytest.mark.parametrize("masked", [False, True])
def test_allr_in_a_run_begins_where_what_was_lost_says(retrained, run_main, masked):
    """Against norms of the files."""
    taken = "prune"
    if masked:
        taken = "sparsify"
        stages = {
            ("sparsify" if name == "prune" else name): stage
            for name, stage in retrained["stages"].items()
        }
        stages["sparsify"] = {"sparsify": {"sparsity": 0.7}}
        retrained["stages"] = stages
    run_main(retrained)
    folder = Path(retrained["output"])
    before = load_file(folder / "dense" / "model.safetensors")
    after, _, _ = read_checkpoint(folder / taken / "model.safetensors")

    def trained(tensors):
        return [t.double() for key, t in tensors.items() if "running" not in key and t.dim()]

    def norm(tensors):
        return math.sqrt(sum(float(t.square().sum()) for t in trained(tensors)))

    def weights(tensors):
        return sum(int((t != 0).sum()) for t in trained(tensors) if t.dim() > 1)

    share = 1 - weights(after) / weights(before)
    lost = math.sqrt(norm(before) ** 2 - norm(after) ** 2) / (norm(before) * math.sqrt(share))
    start = 0.05 * min(1.0, max(lost, 0.5))
    steps = 6  # an epoch
    rate = schedules.llr(start, steps)
    found = logged_rates(folder, "finetune")
    assert found == {step: pytest.approx(rate(step - 1), rel=1e-6) for step in (2, 4, 6)}


def test_every_name_runs(retrained, run_main):
    stages = retrained["stages"]
    retrain = stages.pop("finetune")
    stages.pop("evaluate")
    for name in ("linear", "llr", "slr", "clr", "lrw", "ft"):
        like = {"lr": 0.05} if name == "linear" else {"like": "dense"}
        stages[name] = {
            **retrain,
            "kind": "finetune",
            "input": "prune",
            "optimizer": {"schedule": name, **like},
        }
    run_main(retrained)
    folder = Path(retrained["output"])
    dense = [0.05 * (1 + math.cos(math.pi * step / 12)) / 2 for step in range(12)]
    assert logged_rates(folder, "linear")[4] == pytest.approx(0.05 * (1 - 3 / 6))
    assert logged_rates(folder, "llr")[4] == pytest.approx(schedules.llr(0.05, 6)(3))
    assert logged_rates(folder, "lrw")[4] == pytest.approx(dense[6 + 3])
    assert logged_rates(folder, "ft")[4] == pytest.approx(dense[-1])
    assert logged_rates(folder, "slr")[4] == pytest.approx(dense[6])
    assert logged_rates(folder, "clr")[2] > logged_rates(folder, "clr")[6] > dense[-1]


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ({"schedule": "allr", "lr": 0.1}, "like: STAGE names its stage, or reference"),
        ({"schedule": "ft", "like": "prune"}, "no earlier stage that trains; there are: dense"),
        ({"schedule": "ft", "like": ["dense"]}, "is no earlier stage that trains"),
        ({"schedule": "cosine", "lr": 0.1, "like": "dense"}, "like: goes with schedule: llr"),
        ({"lr": 0.1, "like": "dense"}, "like: goes with schedule: llr"),
        ({"schedule": "step", "lr": 0.1, "milestones": [1], "reference": {"lr": 1.0, "epochs": 1}},
            "reference goes with schedule: llr"),
        ({"schedule": "llr", "like": "dense", "min_lr": 0.01}, "min_lr: schedule llr has its own"),
        ({"schedule": "ft", "like": "dense", "lr": 0.3}, r"lr: schedule ft has the learning rates"),
        ({"schedule": "llr", "like": "dense", "reference": {"lr": 1.0}}, "goes without"),
        ({"schedule": "ft", "reference": {"lr": 0.1}}, r"reference\.epochs"),
        ({"schedule": "llr"}, "lr"),
    ],
)  # fmt: skip
def test_mistakes_name_the_key(retrained, optimizer, message):
    retrained["stages"]["finetune"]["optimizer"] = optimizer
    with pytest.raises(ValueError, match=message):
        Config.model_validate(retrained)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"input": "dense"},
            "allr goes by what a stage before it took, and none before 'finetune'",
        ),
        (
            {"epochs": 3, "optimizer": {"schedule": "lrw", "like": "dense"}},
            "lrw goes through the last 3 epochs of the dense network's training, which had 2",
        ),
    ],
)
def test_what_a_schedule_lacks_is_found_before_anything_is_trained(
    retrained, run_main, change, message
):
    retrained["stages"]["finetune"] |= change
    done = run_main(retrained, expect=2)
    assert message in done.stderr and done.stderr.startswith("error: stages.finetune.optimizer.")
    assert not Path(retrained["output"]).exists()


def test_the_reference_follows_the_batch(retrained):
    retrained["training"] |= {"batch": "reference", "reference_batch_size": 8}
    config = Config.model_validate(retrained)
    found = config.stage_optimizer("finetune")
    assert found.lr == found.reference.lr == 0.1 and found.reference.epochs == 2
    assert not found.warmup_epochs
