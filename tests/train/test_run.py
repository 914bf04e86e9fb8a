"""Whole runs of train/main.py on tiny data: what they leave behind, and what must be equal."""

import copy
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from fork_server import BARE
from safetensors.torch import load_file

import tpp
from tpp.common.errors import run_command
from tpp.models.architecture import build_model
from tpp.plan import PruningPlan
from train.main import main

ROOT = Path(__file__).resolve().parents[2]


def weights(config: dict, stage: str) -> dict[str, torch.Tensor]:
    return load_file(Path(config["output"]) / stage / "model.safetensors")


def results(config: dict) -> dict:
    return json.loads((Path(config["output"]) / "results.json").read_text())


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[k].double() - other[k].double()).abs().max().item() for k in one)


def test_the_whole_road(tiny_config, run_main):
    tiny_config["method"]["remove_at_zero"] = False  # so that the prune stage has them to remove
    printed = run_main(tiny_config).stdout
    run = Path(tiny_config["output"])
    found = results(tiny_config)
    assert found["status"] == "finished"
    assert list(found["stages"]) == ["dense", "regularize", "prune", "finetune", "evaluate"]

    # Just before removal the filters are exactly zero, and removing them changes no prediction.
    plan = PruningPlan.load(run / "plan.json")
    before = weights(tiny_config, "regularize")
    assert plan.active_layers == ["layer1.0.conv1", "layer2.0.conv1", "layer3.0.conv1"]
    for layer in plan.active_layers:
        gone = plan.pruned[layer]
        assert before[f"{layer}.weight"][gone].abs().max() == 0
        assert before[f"{layer}.weight"][plan.kept(layer)].abs().max() > 0
        for name in ("weight", "bias"):
            assert before[f"{layer.replace('conv', 'bn')}.{name}"][gone].abs().max() == 0
    stages = found["stages"]
    assert stages["prune"]["removed_magnitude"] == 0
    assert stages["prune"]["top1"] == stages["regularize"]["top1"]
    assert stages["prune"]["loss"] == pytest.approx(stages["regularize"]["loss"], rel=1e-5)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    logits = tpp.load_model(run / "regularize" / "model.safetensors")(images)
    after = tpp.load_model(run / "prune" / "model.safetensors")(images)
    assert (logits - after).abs().max() < 1e-5

    # The finished network loads from its file alone and is the one that was evaluated.
    small = tpp.load_model(run / "finetune" / "model.safetensors")
    assert small.get_submodule("layer1.0.conv1").out_channels == 8
    assert stages["evaluate"]["top1"] == stages["finetune"]["top1"]
    assert stages["evaluate"]["parameters"] == sum(p.numel() for p in small.parameters())
    assert stages["finetune"]["speedup"] > 1.3
    assert "TPP" in printed and "tensorboard --logdir" in printed

    # What a person watches.
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    regularized = [e for e in lines if e["event"] == "train" and e["stage"] == "regularize"]
    assert regularized[-1]["step"] == 20 and regularized[-1]["lambda"] == 1.0
    assert {"loss/task", "loss/gram", "loss/decay", "lr", "step_time"} <= regularized[-1].keys()
    layers = [e for e in lines if e["event"] == "layers"]
    assert layers[-1]["layers"]["layer2.0.conv1"]["correlation"] == 0
    assert layers[0]["layers"]["layer2.0.conv1"]["correlation"] > 0
    assert list((run / "regularize").glob("events.out.tfevents.*"))


def test_a_done_stage_is_skipped_and_other_settings_are_refused(tiny_config, run_main):
    del tiny_config["stages"]["finetune"], tiny_config["stages"]["evaluate"]
    run_main(tiny_config)
    before = weights(tiny_config, "prune")
    stamp = (Path(tiny_config["output"]) / "regularize" / "model.safetensors").stat().st_mtime_ns
    again = run_main(tiny_config, "training.log_every=7", "data.threads=2")
    assert again.stdout.count("done before, skipped") == 3
    assert largest_difference(before, weights(tiny_config, "prune")) == 0
    after = (Path(tiny_config["output"]) / "regularize" / "model.safetensors").stat().st_mtime_ns
    assert stamp == after
    refused = run_main(tiny_config, "stages.regularize.optimizer.lr=0.5", expect=2)
    assert "stages.regularize.optimizer.lr was 0.01 and is 0.5" in refused.stderr
    assert refused.stderr.count("error:") == 1 and "Traceback" not in refused.stderr


@pytest.mark.parametrize("loader", ["dali", "torchvision"])
def test_a_killed_run_ends_with_the_same_weights(tiny_config, run_main, loader):
    tiny_config["data"]["loader"] = loader
    tiny_config["method"]["stabilize_steps"] = 40
    tiny_config["stages"] = {"regularize": tiny_config["stages"]["regularize"]}
    undisturbed = copy.deepcopy(tiny_config)
    undisturbed["output"] += "-undisturbed"
    run_main(undisturbed)
    checkpoints = Path(tiny_config["output"]) / "regularize" / "checkpoints"
    run_main(tiny_config, kill_when=checkpoints / "step-00000015")
    newest = max(checkpoints.glob("step-*"))
    assert not (checkpoints.parent / "model.safetensors").exists()
    # The newest checkpoint is damaged, so the one before it is taken up.
    content = bytearray((newest / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (newest / "model.safetensors").write_bytes(content)
    refused = run_main(tiny_config, "seed=1", expect=2)
    assert "seed was 0 and is 1" in refused.stderr
    resumed = run_main(tiny_config)
    assert f"{newest.name}/model.safetensors: damaged: its sha256" in resumed.stdout
    assert f"regularize: resumed after {int(newest.name[5:]) - 5} steps" in resumed.stdout
    truth = weights(undisturbed, "regularize")
    assert largest_difference(truth, weights(tiny_config, "regularize")) == 0
    lines = (Path(tiny_config["output"]) / "log.jsonl").read_text().splitlines()
    steps = [e["step"] for e in map(json.loads, lines) if e["event"] == "train"]
    assert steps == [*range(2, 51, 2), 51], "steps missing or logged twice"
    assert not checkpoints.exists(), "a stage that is done keeps none"


def test_a_run_broken_off_before_its_first_checkpoint_plans_anew(tiny_config, run_main):
    """The plan on the disk was made with other ratios; only a checkpoint makes it binding."""
    tiny_config["method"]["remove_at_zero"] = False
    tiny_config["stages"] = {"regularize": tiny_config["stages"]["regularize"]}
    plan = Path(tiny_config["output"]) / "regularize" / "plan.json"
    run_main(tiny_config, kill_when=plan)
    half = PruningPlan.load(plan)
    tiny_config["pruning"] = {"ratios": {"layer*.conv1": 0.25}}
    run_main(tiny_config)
    quarter = PruningPlan.load(plan)
    assert [len(gone) for gone in half.pruned.values()] == [8, 16, 32]
    assert [len(gone) for gone in quarter.pruned.values()] == [4, 8, 16]
    assert PruningPlan.load(Path(tiny_config["output"]) / "plan.json") == quarter
    weight = weights(tiny_config, "regularize")["layer3.0.conv1.weight"]
    zero = (weight.abs().amax((1, 2, 3)) == 0).nonzero().flatten().tolist()
    assert zero == quarter.pruned["layer3.0.conv1"]


def logged_losses(config: dict) -> torch.Tensor:
    lines = (Path(config["output"]) / "log.jsonl").read_text().splitlines()
    entries = [entry for entry in map(json.loads, lines) if entry["event"] == "train"]
    terms = ("loss/task", "loss/gram", "loss/decay")  # the last two end with the filters
    assert "loss/gram" in entries[0] and "loss/gram" not in entries[-1]
    return torch.tensor([[e.get(term, 0.0) for term in terms] for e in entries])


def test_one_rank_and_two_ranks_give_the_same_trajectory(tiny_config, run_main):
    """With BatchNorm over all ranks; augmentation is on, and the penalty is shared out."""
    tiny_config["training"] |= {"sync_batchnorm": True}
    # A low learning rate keeps 19 steps from amplifying the last bit of float32 into chaos.
    tiny_config["stages"] = {"regularize": {"optimizer": {"lr": 0.001}}}
    tiny_config["seed"] = 3
    two = copy.deepcopy(tiny_config)
    two["output"] += "-two"
    run_main(tiny_config)
    run_main(two, ranks=2)
    one_rank, two_ranks = weights(tiny_config, "regularize"), weights(two, "regularize")
    assert 0 < largest_difference(one_rank, two_ranks) < 2e-4
    assert torch.allclose(logged_losses(tiny_config), logged_losses(two), rtol=1e-4, atol=1e-6)


def test_two_ranks_measure_the_network_that_they_save(tiny_config, run_main):
    """Each rank's BatchNorm has its own statistics; rank 0's are saved, and must be measured."""
    tiny_config["stages"] = {"dense": tiny_config["stages"]["dense"], "evaluate": {}}
    run_main(tiny_config, ranks=2)
    stages = results(tiny_config)["stages"]
    assert stages["dense"]["top1"] == stages["evaluate"]["top1"]
    assert stages["dense"]["loss"] == pytest.approx(stages["evaluate"]["loss"], rel=1e-6)
    assert stages["evaluate"]["images"] == 40


def test_accumulation_equals_one_large_batch_without_batchnorm(tiny_config, run_main):
    tiny_config["model"] = {"name": "mlp7_linear"}
    tiny_config["data"] |= {
        "image_size": 28,
        "resize": 28,
        "channels": 1,
        "mean": [0.5],
        "std": [0.5],
    }
    tiny_config["pruning"] = {"ratios": {"*": 0.5, "fc7": 0.0}}
    tiny_config["stages"] = {"regularize": {"optimizer": {"lr": 0.001}}}
    split = copy.deepcopy(tiny_config)
    split["output"] += "-split"
    split["training"]["accumulation"] = 2
    two = copy.deepcopy(split)
    two["output"] += "-two"
    run_main(tiny_config)
    run_main(split)
    run_main(two, ranks=2)
    whole = weights(tiny_config, "regularize")
    assert largest_difference(whole, weights(split, "regularize")) < 1e-5
    assert largest_difference(whole, weights(two, "regularize")) < 1e-5


def test_l1_and_scratch(tiny_config, run_main):
    tiny_config["stages"] = {
        "dense": tiny_config["stages"]["dense"],
        "l1_prune": {"kind": "prune", "method": {"name": "l1"}},
        "scratch_prune": {"kind": "prune", "input": "dense", "method": {"name": "scratch"}},
        "scratch": {
            "kind": "finetune",
            "method": {"name": "scratch"},
            "epochs": 0.5,
            "optimizer": {"lr": 0.02},
        },
    }
    run_main(tiny_config, "training.precision=bf16", "training.channels_last=true")
    dense, l1 = weights(tiny_config, "dense"), weights(tiny_config, "l1_prune")
    scratch = weights(tiny_config, "scratch_prune")
    plan = PruningPlan.load(Path(tiny_config["output"]) / "l1_prune" / "plan.json")
    layer = "layer1.0.conv1"
    assert torch.equal(l1[f"{layer}.weight"], dense[f"{layer}.weight"][plan.kept(layer)])
    norms = dense[f"{layer}.weight"].abs().mean((1, 2, 3))
    assert norms[plan.pruned[layer]].max() <= norms[plan.kept(layer)].min()
    assert scratch[f"{layer}.weight"].shape == l1[f"{layer}.weight"].shape
    assert not torch.isclose(scratch[f"{layer}.weight"], l1[f"{layer}.weight"]).any()
    stages = results(tiny_config)["stages"]
    assert stages["l1_prune"]["macs"] == stages["scratch_prune"]["macs"]
    assert stages["scratch_prune"]["top1"] is not None, "measured when finetuning began"


def test_pruning_straight_from_foreign_weights(tiny_config, tmp_path, run_main):
    """A state_dict with a wrapper's prefixes, inside a dict, as public weights often come."""
    torch.manual_seed(5)
    network = build_model("cifar_resnet8", 4)
    tensors = {f"module.{name}": tensor for name, tensor in network.state_dict().items()}
    torch.save({"state_dict": tensors, "best_prec1": 50.0}, tmp_path / "public.th")
    tiny_config["model"]["checkpoint"] = str(tmp_path / "public.th")
    tiny_config["method"] = {"name": "l1"}
    kept = {name: tiny_config["stages"][name] for name in ("prune", "finetune", "evaluate")}
    tiny_config["stages"] = {"dense": {"kind": "evaluate"}, **kept}
    run_main(tiny_config)
    found = results(tiny_config)
    assert found["dense"]["top1"] == found["stages"]["dense"]["top1"] is not None
    gone = PruningPlan.load(Path(tiny_config["output"]) / "plan.json").pruned["layer1.0.conv1"]
    norms = network.get_parameter("layer1.0.conv1.weight").abs().mean((1, 2, 3))
    assert gone == sorted(norms.argsort()[:8].tolist())
    assert found["stages"]["prune"]["removed_magnitude"] > 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.root=/nowhere"], "/nowhere"),
        (["training.batch_size=15", "training.accumulation=2"], "training.batch_size: 15"),
        (['pruning.ratios={"conv99*": 0.5}'], "'conv99*' matches no Conv2d or Linear layer"),
        (['pruning.ratios={"layer1.0.conv2": 0.5}'], "cannot be removed alone"),
        (["method.stabilize_steps=3"], "stabilize_steps (K_s) is 3"),
        (["model.num_classes=7"], "model.num_classes is 7"),
        (["model.name=resnet5O"], "resnet50"),
        (["model.checkpoint=/nowhere.pth"], "model.checkpoint: /nowhere.pth"),
        (["training.precision=fp16"], "fp16 needs a GPU"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    tiny_config, tmp_path, monkeypatch, capsys, overrides, message
):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tiny_config, sort_keys=False))
    monkeypatch.setattr(sys, "argv", ["main.py", "--config", str(path), *overrides])
    with pytest.raises(SystemExit) as exit_:
        run_command(main)
    assert exit_.value.code == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1, printed.err
    assert message in printed.err
    assert printed.out == ""
    assert not Path(tiny_config["output"]).exists()


def test_a_mistake_on_two_ranks_is_told_once(tiny_config, run_main):
    result = run_main(tiny_config, "training.batch_size=15", ranks=2, expect=None)
    assert result.returncode != 0
    assert result.stderr.count("error: training.batch_size: 15 is not divisible by 2") == 1


def test_a_rank_does_not_end_before_the_one_that_speaks(tiny_config, forks, tmp_path):
    """Launchers end all ranks with the first, and rank 0 may still be at its imports."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**tiny_config, "seed": "x"}, sort_keys=False))
    environment = {**os.environ, **BARE, "RANK": "1", "WORLD_SIZE": "2"}
    rank = forks.start(ROOT / "train" / "main.py", ["--config", str(path)], tmp_path, environment)
    time.sleep(5)
    assert rank.poll() is None
    os.kill(rank.pid, signal.SIGTERM)
    assert rank.wait(60) == -signal.SIGTERM
    assert rank.output() == ("", "")
