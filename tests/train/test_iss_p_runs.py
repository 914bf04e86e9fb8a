"""ISS-P on what it was made for: from random weights, over whole images, on any engine."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tpp.checkpoints.model_file import read_checkpoint

ZERO1 = Path(__file__).resolve().parents[2] / "launch" / "deepspeed" / "zero1.json"
MODEL = "model.safetensors"
SIZES = [(40, 33), (24, 71), (32, 32)]


@pytest.fixture
def pictures(tmp_path):
    """Twelve pictures to train on and three of other sizes to judge by, in two other folders."""
    numbers = np.random.default_rng(0)
    for folder, sizes in (("train/all", [(40, 48)] * 12), ("val/set", SIZES)):
        (tmp_path / "pictures" / folder).mkdir(parents=True)
        for place, (height, width) in enumerate(sizes):
            rough = numbers.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
            image = Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC)
            image.save(tmp_path / "pictures" / folder / f"{place}.png")
    (tmp_path / "pictures" / "val" / "more").mkdir()
    (tmp_path / "pictures" / "val" / "set" / "1.png").rename(
        tmp_path / "pictures" / "val" / "more" / "1.png"
    )
    return tmp_path / "pictures"


@pytest.fixture
def shrinking(pictures, tmp_path):
    """Soft shrinkage of an EDSR, its weights set to zero, finetuned with the same optimiser."""
    adam = {"name": "adam", "betas": [0.9, 0.99], "lr": 1e-3, "weight_decay": 0.0}
    constant = {**adam, "schedule": "constant"}
    return {
        "name": "shrinking",
        "output": str(tmp_path / "run"),
        "task": {"kind": "super_resolution", "scale": 2},
        "model": {"name": "edsr", "args": {"blocks": 1, "width": 8}},
        "data": {
            "root": str(pictures),
            "image_size": 16,
            "resize": None,
            "crop_mode": "whole",
            "augmentation": "patch",
            "mean": [0.0] * 3,
            "std": [1.0] * 3,
            "threads": 1,
        },
        "training": {"batch_size": 4, "accumulation": 2, "log_every": 2},
        "checkpoints": {"every": "3 steps", "asynchronous": False},
        "method": {"name": "iss_p", "alpha": 0.8, "sparsity": 0.75},
        "stages": {
            "regularize": {"epochs": 4, "optimizer": constant},
            "sparsify": {"sparsify": {"sparsity": 0.75, "scope": "layer"}},
            "finetune": {"epochs": 2, "optimizer": constant, "carry_optimizer": True},
            "evaluate": {},
        },
    }


def killed_and_gone_on(config, run_main, stage, step, ranks):
    kept = Path(config["output"]) / stage / "checkpoints" / f"step-{step:08d}"
    run_main(config, ranks=ranks, kill_when=kept)
    assert f"{stage}: resumed after" in run_main(config, ranks=ranks).stdout


def tensors(config, stage):
    return load_file(Path(config["output"]) / stage / MODEL)


def variant(config, name, **training):
    other = copy.deepcopy(config)
    other["output"] += f"-{name}"
    other["training"] |= training
    return other


@pytest.mark.parametrize("alpha", [0.8, 0.0])
def test_from_random_weights_to_a_sparse_network_killed_and_gone_on(shrinking, run_main, alpha):
    shrinking["method"]["alpha"] = alpha
    broken = variant(shrinking, "broken")
    run_main(shrinking)
    killed_and_gone_on(broken, run_main, "regularize", 6, 1)
    for stage in ("regularize", "sparsify", "finetune"):
        one, other = tensors(shrinking, stage), tensors(broken, stage)
        assert all(one[key].equal(other[key]) for key in one), stage

    run = Path(shrinking["output"])
    before, (after, companions, _) = (
        tensors(shrinking, "regularize"),
        read_checkpoint(run / "sparsify" / MODEL),
    )
    tuned = tensors(shrinking, "finetune")
    layers = [key for key in before if key in companions["mask"]]
    zeros = 0
    for key in layers:
        stays = companions["mask"][key].bool()
        zeros += int((~stays).sum())
        assert int((~stays).sum()) == round(0.75 * stays.numel())
        # What was made smaller in the last step is what goes.
        small, large = before[key][~stays].abs(), before[key][stays].abs()
        assert small.max() <= alpha * large.min() * (1 + 1e-6)
        assert after[key].equal(torch.where(stays, before[key], 0.0))
        assert (tuned[key] == 0).equal(~stays)
    stages = json.loads((run / "results.json").read_text())["stages"]
    assert not (run / "plan.json").exists()
    total = sum(before[key].numel() for key in layers)
    assert stages["finetune"]["sparsity"] == pytest.approx(zeros / total)
    assert stages["evaluate"]["psnr"] == stages["finetune"]["psnr"]
    assert stages["evaluate"]["images"] == len(SIZES)
    more, rest = stages["evaluate"]["folders"]
    assert [(one["folder"], one["images"]) for one in (more, rest)] == [("more", 1), ("set", 2)]
    for figure in ("psnr", "ssim", "loss"):
        mean = (more[figure] + 2 * rest[figure]) / 3
        assert stages["evaluate"][figure] == pytest.approx(mean)
    assert (stages["sparsify"]["norm_after"] == stages["sparsify"]["norm_before"]) == (alpha == 0)
    logged = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    shares = [e["smallest_norm_share"] for e in logged if "smallest_norm_share" in e]
    assert shares and all((share == 0) == (alpha == 0) for share in shares)


def test_two_ranks_and_zero_shrink_the_same_weights(shrinking, run_main):
    del shrinking["stages"]["evaluate"]
    zero, broken = (variant(shrinking, name, deepspeed=str(ZERO1)) for name in ("zero", "broken"))
    run_main(shrinking, ranks=2)
    run_main(zero, ranks=2)
    killed_and_gone_on(broken, run_main, "regularize", 6, 2)
    for stage in ("regularize", "finetune"):
        one, other, third = (tensors(config, stage) for config in (shrinking, zero, broken))
        for key, value in one.items():
            assert other[key].equal(third[key]), (stage, key)
            torch.testing.assert_close(value, other[key], rtol=1e-4, atol=1e-6, msg=key)


def test_swinir_under_zero_in_half_precision_killed_and_gone_on(shrinking, run_main):
    """Attention in shifted windows, layers skipped at random, images that windows do not divide."""
    args = {"width": 8, "depths": [2, 1], "heads": 2, "window": 4, "drop_path": 0.3}
    shrinking["model"] = {"name": "swinir_light", "args": args}
    shrinking["method"] = {"name": "iss_p", "alpha": 0.8, "pattern": "1:4"}
    shrinking["stages"]["sparsify"] = {"sparsify": {"pattern": "1:4"}}
    shrinking["training"] |= {"precision": "bf16", "deepspeed": str(ZERO1)}
    broken = variant(shrinking, "broken")
    run_main(shrinking, ranks=2)
    killed_and_gone_on(broken, run_main, "regularize", 6, 2)
    for stage in ("regularize", "sparsify", "finetune"):
        one, other = tensors(shrinking, stage), tensors(broken, stage)
        assert all(one[key].equal(other[key]) for key in one), stage
    qkv = one["layers.0.residual_group.blocks.1.attn.qkv.weight"].view(24, 2, 4)
    assert ((qkv != 0).sum(-1) == 1).all()
    results = json.loads((Path(shrinking["output"]) / "results.json").read_text())
    assert results["stages"]["evaluate"]["images"] == len(SIZES)
    assert results["stages"]["evaluate"]["psnr"] > 5
