"""Moving averages of weights: what they are, where they go, and what they leave alone."""

import copy
import json
import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import tpp
from tpp.channels.cuts import cut_tensors
from tpp.channels.removal import pruned_on_meta
from tpp.checkpoints.model_file import read_checkpoint
from tpp.common.errors import UserError
from tpp.plan import PruningPlan
from train.config.config import load_config
from train.config.ema import EmaSection
from train.loop.average import WeightAverage
from train.report import main as report


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double()


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("warmup", [False, True])
def test_the_average_is_the_weighted_sum_of_all_weights(every, warmup):
    """Of every update's weights, each with what the later updates have left of it."""
    network = small_network()
    settings = EmaSection(decay=0.7, warmup=warmup, warmup_power=0.6, every=every)
    average = WeightAverage(network, settings)
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in network.state_dict()}
    for step in range(1, 14):
        with torch.no_grad():
            for tensor in network.state_dict().values():
                tensor.copy_(torch.randn(tensor.shape).abs() * 10)
        average.update(step)
        if step % every == 0:
            for name, tensor in network.state_dict().items():
                seen[name].append(tensor.clone())
    count = len(seen["0.weight"])
    decays = [0.0]  # the first update takes the weights as they are
    for update in range(1, count):
        decays.append(min(0.7, 1 - (1 + update) ** -0.6) if warmup else 0.7)
    shares = [(1 - decays[number]) * math.prod(decays[number + 1 :]) for number in range(count)]
    assert sum(shares) == pytest.approx(1) and count == 13 // every
    for name, found in average.state_dict().items():
        if not found.is_floating_point():
            assert found.equal(seen[name][-1]), "whole numbers are copied"
            continue
        truth = sum(share * tensor for share, tensor in zip(shares, seen[name], strict=True))
        torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-14)


def test_what_is_swapped_in_comes_out_bit_for_bit():
    network = small_network()
    average = WeightAverage(network, EmaSection(decay=0.5, warmup=False))
    with torch.no_grad():
        network[0].weight[0, 0, 0, 0] = -0.0
        network[0].weight[0, 0, 0, 1] = float("nan")
        network[1].num_batches_tracked += 2**40 + 1
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with average.in_place():
        assert not network[0].weight.isnan().any()
    for name, tensor in network.state_dict().items():
        assert tensor.view(torch.int64).equal(before[name].view(torch.int64)), name


def test_a_run_with_averages_is_the_run_without_them(tiny_config, run_inside, tmp_path):
    """Its raw weights are; both are measured, saved and pruned along."""
    tiny_config["method"]["remove_at_zero"] = False  # so that the prune stage has them to remove
    plain = copy.deepcopy(tiny_config)
    plain["output"] += "-plain"
    stages = tiny_config["stages"]
    stages["dense"]["ema"] = {"decay": 0.9, "evaluate": "raw"}
    stages["regularize"]["ema"] = {"decay": 0.9}
    stages["finetune"]["ema"] = {"decay": 0.8, "warmup": False}
    run_inside(plain)
    run_inside(tiny_config)
    run, without = Path(tiny_config["output"]), Path(plain["output"])

    def file(stage: str) -> Path:
        return run / stage / "model.safetensors"

    for stage, raw in (("dense", ""), ("regularize", ""), ("finetune", "raw:")):
        found, truth = load_file(file(stage)), load_file(without / stage / "model.safetensors")
        assert all(found[raw + name].equal(tensor) for name, tensor in truth.items()), stage
        other = "" if raw else "ema:"
        assert not all(found[other + name].equal(tensor) for name, tensor in truth.items())

    results = json.loads((run / "results.json").read_text())["stages"]
    reference = json.loads((without / "results.json").read_text())["stages"]
    for stage in ("dense", "regularize"):
        assert results[stage]["loss"] == reference[stage]["loss"] != results[stage]["ema"]["loss"]
    assert results["finetune"]["raw"]["loss"] == reference["finetune"]["loss"]
    # What was measured is what the file holds, and what the next stage begins with.
    assert results["evaluate"]["loss"] == pytest.approx(results["finetune"]["loss"], rel=1e-6)
    assert results["finetune"]["loss"] != results["finetune"]["raw"]["loss"]
    assert "raw" not in results["prune"] and "ema" not in results["prune"]

    # The average of what stays is what stays of the average.
    _, companions, _ = read_checkpoint(file("regularize"))
    plan = PruningPlan.load(run / "plan.json")
    model = tpp.load_model(file("regularize"))
    cuts, _, _ = pruned_on_meta(model, plan, model.state_dict())
    truth = cut_tensors(companions["ema"], cuts)
    _, pruned, _ = read_checkpoint(file("prune"))
    assert pruned["ema"].keys() == truth.keys()
    assert all(pruned["ema"][name].equal(tensor) for name, tensor in truth.items())
    raw = tpp.load_model(file("finetune"), companion="raw")
    assert raw.conv1.weight.equal(load_file(file("finetune"))["raw:conv1.weight"])

    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert {e["event"] for e in log if e["stage"] == "finetune"} >= {"evaluate", "evaluate_raw"}


def test_the_report_has_a_row_for_either_weights(tiny_config, run_inside, monkeypatch, capsys):
    stages = tiny_config["stages"]
    stages["dense"]["ema"] = {"decay": 0.9}
    stages["finetune"]["ema"] = {"decay": 0.9, "evaluate": "raw"}
    run_inside(tiny_config)
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["report", tiny_config["output"]])
    report()
    table = capsys.readouterr().out
    assert "Dense, raw weights" in table and "TPP, averaged weights" in table


@pytest.mark.parametrize(
    ("stage", "ema", "why"),
    [
        ("regularize", {"evaluate": "ema"}, "stages.regularize: ema.evaluate: ema is not possible"),
        ("prune", {}, "stages.prune: stages of kind prune take no ema"),
        ("finetune", {"decay": 1.0}, "stages.finetune.ema.decay"),
        ("finetune", {"every": 0}, "stages.finetune.ema.every"),
        ("finetune", {"decai": 0.9}, "did you mean 'decay'"),
    ],
)
def test_what_makes_no_sense_is_refused(tiny_config, tmp_path, stage, ema, why):
    tiny_config["stages"][stage]["ema"] = ema
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(tiny_config))
    with pytest.raises(UserError) as refused:
        load_config(path)
    assert why in str(refused.value)


def test_a_larger_batch_reaches_back_over_as_many_images():
    settings = EmaSection(decay=0.999)
    assert settings.for_batch(Fraction(4)).decay == pytest.approx(0.999**4, rel=1e-15)
    assert settings.for_batch(Fraction(1, 2)).decay ** 2 == pytest.approx(0.999, rel=1e-15)
    assert settings.for_batch(Fraction(1)) is settings
