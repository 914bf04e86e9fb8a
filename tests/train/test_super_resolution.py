"""A second task, images in and images out, through all that the first one goes through."""

import copy
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from bicubic_reference import SET5, read_set5
from PIL import Image
from safetensors.torch import load_file

import tpp
from data_pipelines.images.bicubic import enlarge
from data_pipelines.images.image_index import scan_class_folders
from tpp.common.errors import UserError
from train.run_folder.results import read_results
from train.tasks import make_task

TASK = {"kind": "super_resolution", "scale": 2}


@pytest.fixture
def sr_config(tiny_config):
    """TPP on a small EDSR, on generated images of 32x32."""
    config = copy.deepcopy(tiny_config)
    config["task"] = TASK
    config["model"] = {"name": "edsr", "args": {"blocks": 2, "width": 8}}
    config["data"] |= {"augmentation": "none", "mean": [0.0] * 3, "std": [1.0] * 3}
    config["pruning"] = {"ratios": {"body.*.conv1": 0.5}}
    config["method"] |= {"stabilize_steps": 12}
    for stage in config["stages"].values():
        if "optimizer" in stage:
            stage["optimizer"]["lr"] = 0.01
    return config


def test_all_stages_and_the_commands(sr_config, run_main, tmp_path):
    done = run_main(sr_config)
    run = Path(sr_config["output"])
    results = read_results(run / "results.json")
    assert results.status == "finished"
    flat = json.loads((run / "results.json").read_text())
    assert flat["task"] == "super_resolution"
    for name, stage in flat["stages"].items():
        assert 5 < stage["psnr"] < 60 and "top1" not in stage, name
    assert flat["stages"]["evaluate"]["psnr"] == flat["stages"]["finetune"]["psnr"]
    assert flat["stages"]["prune"]["removed_magnitude"] == 0
    assert flat["stages"]["prune"]["parameters"] < flat["dense"]["parameters"]
    assert "PSNR" in done.stdout and "top-1" not in done.stdout
    logged = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert all("psnr" in e for e in logged if e["event"] in ("train", "evaluate"))

    # What was removed was at zero: the same images come out, and of a pruned file too.
    before = tpp.load_model(run / "regularize" / "model.safetensors")
    after = tpp.load_model(run / "prune" / "model.safetensors")
    images = torch.rand(2, 3, 17, 11)
    torch.testing.assert_close(after(images), before(images), rtol=1e-5, atol=1e-6)
    assert after(images).shape == (2, 3, 34, 22)
    assert after.get_submodule("body.0.conv1").out_channels == 4

    checkpoint = str(run / "finetune" / "model.safetensors")
    val = str(Path(sr_config["data"]["root"]) / "val")
    options = ["--checkpoint", checkpoint, "--data", val, "--threads", "1"]
    evaluated = run_main(None, *options, script="train.evaluate").stdout
    assert f"PSNR {flat['stages']['finetune']['psnr']:.2f} dB, SSIM" in evaluated
    described = run_main(None, checkpoint, script="tpp.describe").stdout
    assert "body.0.conv1" in described and "None" not in described
    reported = run_main(None, str(run), "--output", str(tmp_path), script="train.report").stdout
    assert "PSNR dB" in reported and "Top-1" not in reported
    dry = run_main(sr_config, "--dry-run").stdout
    assert "body.1.conv1" in dry and "speedup" in dry


def test_two_ranks_killed_and_gone_on_to_the_bit(sr_config, run_main):
    sr_config["stages"] = {k: sr_config["stages"][k] for k in ("dense", "regularize", "prune")}
    sr_config["training"]["accumulation"] = 2
    whole = copy.deepcopy(sr_config)
    whole["output"] += "-whole"
    run_main(whole, ranks=2)
    kept = Path(sr_config["output"]) / "regularize" / "checkpoints" / "step-00000010"
    run_main(sr_config, ranks=2, kill_when=kept)
    assert "regularize: resumed after" in run_main(sr_config, ranks=2).stdout
    for stage in sr_config["stages"]:
        one, other = (
            load_file(Path(config["output"]) / stage / "model.safetensors")
            for config in (whole, sr_config)
        )
        assert all(one[key].equal(other[key]) for key in one), stage


def y_of(pixels):
    """Y of 8-bit colours (3, h, w), in NumPy."""
    return 16 + (np.array([65.481, 128.553, 24.966])[:, None, None] * pixels).sum(0) / 255


def ssim_by_hand(one, other):
    """SSIM of (h, w), window by window, after Wang et al. 2004."""
    x = np.arange(11) - 5
    window = np.exp(-(x[:, None] ** 2 + x**2) / (2 * 1.5**2))
    window /= window.sum()
    found = []
    for top in range(one.shape[0] - 10):
        for left in range(one.shape[1] - 10):
            a, b = (image[top : top + 11, left : left + 11] for image in (one, other))
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            var_a = (window * (a - mean_a) ** 2).sum()
            var_b = (window * (b - mean_b) ** 2).sum()
            both = (window * (a - mean_a) * (b - mean_b)).sum()
            c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
            found.append(
                (2 * mean_a * mean_b + c1)
                * (2 * both + c2)
                / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
            )
    return np.mean(found)


def test_psnr_and_ssim_by_hand(tiny_data):
    """Image by image in NumPy: 8-bit values, Y, two pixels of edge left out."""
    index = scan_class_folders(tiny_data / "val")
    task = make_task(TASK)
    pixels = [np.array(Image.open(index.root / f).convert("RGB")) / 255 for f in index.files[:12]]
    # Sides that two does not divide: the last row and column are left out.
    images = torch.tensor(np.stack(pixels)).permute(0, 3, 1, 2).float()[:, :, :31, :29]

    def enlarge(small):  # a network that repeats every pixel
        return small.repeat_interleave(2, 2).repeat_interleave(2, 3) + 0.021

    labels = torch.zeros(len(images), dtype=torch.int64)
    batches = zip(images.split(7), labels.split(7), strict=True)
    found = task.evaluate(enlarge, batches, device=torch.device("cpu"))
    truth = []
    for image in images.double():
        small = task.inputs(image[None])[0].double().numpy()
        assert small.shape == (3, 15, 14)
        large = small.repeat(2, 1).repeat(2, 2) + 0.021
        shown = np.floor(np.clip(large, 0, 1) * 255 + 0.5)
        levels = np.round(image.numpy()[:, :30, :28] * 255)
        a, b = (y_of(one)[2:-2, 2:-2] for one in (shown, levels))
        psnr = 10 * np.log10(255**2 / ((a - b) ** 2).mean())
        truth.append((psnr, ssim_by_hand(a, b), np.abs(large - levels / 255).mean()))
    assert found.images == len(images) == 12
    names = [metric.name for metric in task.metrics]
    assert names == ["psnr", "ssim", "loss"]
    # An output within rounding of half a level may be either; none of these images has many.
    for name, value in zip(names, np.mean(truth, 0), strict=True):
        assert found.values[name] == pytest.approx(value, rel=1e-4), name


@pytest.mark.parametrize(("scale", "psnr"), [(2, 33.67), (3, 30.40), (4, 28.43)])
def test_bicubic_scores_on_set5_what_is_known_of_it(shared_data, scale, psnr):
    with tarfile.open(shared_data("set5.tar.gz")) as archive:
        images = [read_set5(archive, f"HR/{name}")[None] for name in SET5]
    task = make_task(TASK | {"scale": scale})
    batches = ((image, torch.zeros(1, dtype=torch.int64)) for image in images)
    found = task.evaluate(lambda x: enlarge(x, scale), batches, device=torch.device("cpu"))
    assert round(found.values["psnr"], 2) == psnr


def test_each_test_set_has_figures_of_its_own():
    task, sides = make_task(TASK), [(16, 20), (17, 31), (24, 18), (19, 19)]
    images = [torch.rand(1, 3, *side) for side in sides]
    labels = [torch.tensor([label]) for label in (2, 0, 2, 0)]

    def evaluate(places, **options):
        batches = [(images[place], labels[place]) for place in places]
        return task.evaluate(
            lambda x: enlarge(x, 2), batches, device=torch.device("cpu"), **options
        )

    found = evaluate(range(4), folders=["Set14", "Set5", "Urban100"])
    assert found.values == evaluate(range(4)).values and found.images == 4
    # Of the set in the middle no image could be read.
    assert found.folders == {"Set14": evaluate([1, 3]), "Urban100": evaluate([0, 2])}


def test_an_image_of_no_more_than_its_edge_is_one_line():
    task = make_task(TASK)
    batch = torch.rand(1, 3, 9, 5), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(UserError, match="an image of 9x5 pixels, of which 2 at every edge"):
        task.sums(lambda small: small.repeat_interleave(2, 2).repeat_interleave(2, 3), batch)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("task.scale=5", "task.scale: input should be 2, 3 or 4, not 5"),
        ("task.kind=super_resolutoin", "task.kind: unknown task 'super_resolutoin'; did you mean"),
        ("task.scael=2", "task.scael: unknown key; did you mean 'scale'?"),
        ("data.mean=[0.5, 0.5, 0.5]", "data.mean and data.std: super_resolution takes pixels"),
        ("data.image_size=33", "data.image_size (33) must be a multiple of task.scale (2)"),
        ("data.crop_mode=whole", "data.augmentation: none, with crop_mode: whole, would train on"),
        ("data={crop_mode: whole, resize: 64}", "data: resize (64): with crop_mode: whole it mus"),
        ("task={kind: classification}", "edsr"),
        ("model.num_classes=4", "model.num_classes: super_resolution has no classes"),
        ("model.args={scale: 3}", "model.args.scale is 3, but task.scale is 2"),
        ("stages.dense.label_smoothing=0.1", "stages.dense.label_smoothing: goes with classif"),
        ("stages.dense.loss=bce", "stages.dense.loss: goes with classification, not with super_"),
        ("stages.dense.distill={teacher: x}", "stages.dense.distill: goes with classification"),
        ("model={name: cifar_resnet8}", "cifar_resnet8"),
        ("task={kind: classification}", "edsr"),
    ],
)
def test_what_does_not_go_together_is_one_line(sr_config, run_inside, capsys, override, says):
    run_inside(sr_config, override, expect=2)
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
