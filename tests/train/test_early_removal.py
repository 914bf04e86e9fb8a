"""Filters at zero are removed in the middle of the stage, and nothing else changes by that."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import tpp
from tpp.channels.removal import prune_model
from tpp.channels.survey import survey_channels
from tpp.checkpoints.training_state import TrainingState
from tpp.methods import available_methods
from tpp.methods.base import TrainingContext
from tpp.methods.tpp import TPP, Settings
from tpp.models.architecture import build_model, example_input_for
from tpp.models.layers import filters_removed, prunable_layers
from tpp.plan import PruningPlan
from tpp.selection.selection import Selection
from train.config.config import Config
from train.config.ema import EmaSection
from train.config.optimizer import OptimizerSection
from train.distributed.engine import numbers_of, portable
from train.dry_run import dry_run
from train.loop.average import WeightAverage
from train.loop.optim import make_optimizer
from train.preflight import what_counts_zeros
from train.stages.shrinking import shrunk

GROWING = {"delta": 0.25, "update_interval": 1, "gram_weight": 10.0}
OPTIMIZERS = {
    "sgd": OptimizerSection(lr=0.02, momentum=0.9, nesterov=True, weight_decay=5e-3),
    "adamw": OptimizerSection(name="adamw", lr=1e-3, weight_decay=0.05),
}

NETWORKS = {
    "cifar_resnet8": lambda: build_model("cifar_resnet8", 4),
    "squeezenet1_1": lambda: build_model("squeezenet1_1", 4),
    "mlp7_linear": lambda: build_model("mlp7_linear", 4),
    "mobilenet_v3_small": lambda: build_model("mobilenet_v3_small", 4),
    "vit": lambda: build_model("timm:vit_tiny_patch16_224", 4, img_size=32, depth=2),
}
SIDES = {"squeezenet1_1": 48, "mlp7_linear": 28, "mobilenet_v3_small": 64}


class Stage:
    """A regularised stage in float64 without the ranks and files of a run."""

    def __init__(
        self,
        model: nn.Module,
        plan: PruningPlan,
        settings: Settings,
        optimizer: str,
        example: Tensor,
    ):
        self.plan, self.settings, self.kind = plan, settings, OPTIMIZERS[optimizer]
        self.example = example
        self.step = 0
        self._take(model, {}, None)

    def _take(self, model: nn.Module, average: dict[str, Tensor], optimizer: Any) -> None:
        self.model = model.train()
        self.optimizer = make_optimizer(model, self.kind)
        self.average = WeightAverage(model, EmaSection(decay=0.8, warmup=False))
        self.method = TPP(self.settings)
        context = TrainingContext("regularize", self.plan, Selection(), 0, 1, self.example)
        self.method.prepare(model, context)
        if optimizer is not None:
            self.optimizer.load_state_dict(optimizer)
            self.average.load_state_dict(average)

    def state(self) -> TrainingState:
        optimizer = portable(self.optimizer.state_dict(), numbers_of(self.model, self.optimizer))
        return TrainingState(
            self.step, self.model.state_dict(), optimizer, {}, average=self.average.state_dict()
        )

    def train(self) -> list[int]:
        """To the end; after how many steps filters were removed."""
        removed = []
        while not self.method.finished(self.step):
            torch.manual_seed(self.step)
            images = torch.randn(4, *self.example.shape[1:], dtype=torch.float64)
            self.method.before_step(self.step)
            outputs = self.model(images)
            loss = F.cross_entropy(outputs, torch.randint(0, outputs.shape[1], (4,)))
            (loss + sum(self.method.loss_terms().values())).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.method.after_step(self.step)
            self.step += 1
            self.average.update(self.step)
            if (plan := self.method.shrink(self.step)) is not None:
                removed.append(self.step)
                state = shrunk(self.state(), plan, self.model)
                smaller = prune_model(self.model, plan, example_input=self.example)
                smaller.load_state_dict(state.model)
                self._take(smaller, state.average, state.optimizer)
        return removed


# Families of layers that filters at zero must leave no trace in: ReLU, hard swish with squeeze and
# excitation, GELU and LayerNorm, residual and plain, convolutions and linear layers. Adam where no
# gradient is zero but for rounding, of which it makes steps (shifts before a BatchNorm, keys).
@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        ("cifar_resnet8", "sgd"),
        ("cifar_resnet8", "adamw"),
        ("squeezenet1_1", "sgd"),
        ("mlp7_linear", "sgd"),
        ("mobilenet_v3_small", "sgd"),
        ("vit", "sgd"),
    ],
)
def test_the_small_network_trains_as_the_dense_one_does(name, optimizer):
    torch.manual_seed(0)
    model = NETWORKS[name]().double()
    example = example_input_for(model, side=SIDES.get(name, 32)).double()
    found = survey_channels(model, example_input=example).channels
    exact = [layer for layer, channels in found.items() if not channels.inexact]
    plan = Selection(dict.fromkeys(exact[:4], 0.4)).select(model, example_input=example)
    assert plan.active_layers
    stages = {}
    for remove in (False, None):
        last = list(prunable_layers(model)).index(plan.active_layers[-1])
        settings = Settings(
            **GROWING, stabilize_steps=last + 8, zero_out_interval=1, remove_at_zero=remove
        )
        stages[remove] = stage = Stage(copy.deepcopy(model), plan, settings, optimizer, example)
        removed = stage.train()
        assert removed == ([] if remove is False else [settings.growth.steps_until_zero(last)])
        assert stage.step - settings.growth.steps_until_zero(last) == 7
    dense, small = stages[False], stages[None]
    assert filters_removed(small.model, plan) and not filters_removed(dense.model, plan)
    cut = shrunk(dense.state(), plan, dense.model)
    _equal(small.model.state_dict(), cut.model)
    _equal(small.state().average, cut.average)
    for number, entries in small.state().optimizer["state"].items():
        tensors = {key: value for key, value in entries.items() if isinstance(value, Tensor)}
        _equal(tensors, cut.optimizer["state"][number])


def _equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() <= expected.keys() and found
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-12, atol=1e-13, msg=name)


def _run(run_inside: Any, config: dict[str, Any], folder: Path, **method: Any) -> dict[str, Any]:
    config = copy.deepcopy(config)
    config["output"] = str(folder)
    config["method"] |= method
    run_inside(config)
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    results["shrunk"] = [entry["step"] for entry in log if entry["event"] == "shrink"]
    return results


# Ten steps of growth, then a turn of each of six layers, of which the last that loses filters is
# number 5, and the step after which that one is held at zero.
LAST = 10 + 6 + 1


def test_a_run_removes_by_default_and_ends_with_the_same_network(tiny_config, tmp_path, run_inside):
    tiny_config["method"]["stabilize_steps"] = 14
    tiny_config["stages"]["regularize"]["ema"] = {"decay": 0.8}
    early = _run(run_inside, tiny_config, tmp_path / "early")
    late = _run(run_inside, tiny_config, tmp_path / "late", remove_at_zero=False)
    assert (early["shrunk"], late["shrunk"]) == ([LAST], [])
    dense = load_file(tmp_path / "late" / "regularize" / "model.safetensors")
    small = load_file(tmp_path / "early" / "regularize" / "model.safetensors")
    assert sum(map(torch.numel, small.values())) < 0.8 * sum(map(torch.numel, dense.values()))
    one, other = (
        load_file(tmp_path / run / "prune" / "model.safetensors") for run in ("early", "late")
    )
    assert one.keys() == other.keys()
    assert any(name.startswith("ema:") for name in one)
    # But for float32's rounding, which six steps of training have made more of.
    floating = [name for name, tensor in one.items() if tensor.is_floating_point()]
    mine, its = (torch.cat([w[name].flatten() for name in floating]) for w in (one, other))
    assert (mine - its).norm() <= 1e-3 * its.norm()
    assert all(tensor.equal(small[name]) for name, tensor in one.items())
    for key in ("parameters", "macs", "removed_magnitude"):
        assert early["stages"]["prune"][key] == late["stages"]["prune"][key]
    assert early["stages"]["regularize"]["macs"] == early["stages"]["prune"]["macs"]
    assert late["stages"]["regularize"]["macs"] == early["stages"]["dense"]["macs"]
    # The plan is that of the dense network, which anyone may still prune by it.
    plan = PruningPlan.load(tmp_path / "early" / "plan.json")
    tpp.prune_checkpoint(
        tmp_path / "early" / "dense" / "model.safetensors", plan, tmp_path / "pruned.safetensors"
    )


class Spoilt(TPP):
    """The loss of the 16th step, the last but one before the removal, is not finite."""

    name = "spoilt"

    def before_step(self, step: int) -> bool:
        self._spoils = step == LAST - 2
        return super().before_step(step)

    def loss_terms(self) -> dict[str, Tensor]:
        terms = super().loss_terms()
        if self._spoils:
            terms["decay"] = terms["decay"] * float("nan")
        return terms


def test_a_bad_step_before_the_removal_is_named(tiny_config, run_inside, monkeypatch, capsys):
    """Though no report was due between the two."""
    monkeypatch.setitem(available_methods(), "spoilt", Spoilt)
    tiny_config["method"]["name"] = "spoilt"
    tiny_config["training"]["log_every"] = 100
    tiny_config["stages"] = {"regularize": {"optimizer": {"lr": 0.01}}, "prune": {}}
    run_inside(tiny_config, expect=2)
    assert capsys.readouterr().err.startswith(f"error: stage regularize: step {LAST - 1}: ")


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"training": {"clip_gradient_norm": 100.0}}, "training.clip_gradient_norm"),
        ({"training": {"max_gradient_norm": 1e4}}, "training.max_gradient_norm"),
        (
            {"stages": {"regularize": {"optimizer": {"name": "lamb", "lr": 0.001}}}},
            "stages.regularize.optimizer.name: lamb looks at whole tensors",
        ),
    ],
)
def test_filters_stay_where_something_counts_them(tiny_config, settings, why, capsys):
    for section, values in settings.items():
        for key, value in values.items():
            if isinstance(value, dict):
                tiny_config[section][key] |= value
            else:
                tiny_config[section][key] = value
    config = Config.model_validate(tiny_config)
    assert what_counts_zeros(config, "regularize").startswith(why)
    dry_run(config)
    said = capsys.readouterr().out
    assert f"regularize: filters at zero stay to its end, because of {why}" in said
    tiny_config["method"]["remove_at_zero"] = True
    dry_run(Config.model_validate(tiny_config))
    said = capsys.readouterr().out
    assert f"regularize: after {LAST} of 20 steps all filters that go are at zero" in said


def test_filters_stay_for_a_stage_that_would_pick_again(tiny_config):
    stages = tiny_config["stages"]
    between = {"kind": "finetune", "epochs": 1, "optimizer": {"lr": 0.02}}
    tiny_config["stages"] = {
        "regularize": stages["regularize"],
        "between": between,
        "prune": stages["prune"],
    }
    assert "between" in (what_counts_zeros(Config.model_validate(tiny_config), "regularize") or "")
    tiny_config["stages"] = {"regularize": stages["regularize"], "evaluate": {}, "prune": {}}
    assert what_counts_zeros(Config.model_validate(tiny_config), "regularize") is None


class Normed(nn.Module):
    """A LayerNorm over channels takes its mean over those at zero too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(16, 8), nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x.flatten(1))).relu())


@pytest.mark.parametrize(("wanted", "steps"), [(None, None), (True, 7), (False, None)])
def test_filters_stay_where_removal_is_not_the_same_as_zeroing(wanted, steps):
    model, plan = Normed().double(), PruningPlan({"first": 8}, {"first": [1, 2, 6]})
    example = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    settings = Settings(**GROWING, stabilize_steps=9, zero_out_interval=2, remove_at_zero=wanted)
    assert TPP(settings).removes_after(model, plan, example_input=example) == steps
    if not wanted:
        assert Stage(model, plan, settings, "sgd", example).train() == []
