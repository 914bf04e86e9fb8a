"""Evaluation against a loop over single images, and against a known network's known figure."""

import json
import os
import re
import sys
import tarfile

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.models._hub import save_for_hf

from data_pipelines.images.batch import LoaderSettings
from data_pipelines.images.image_index import scan_class_folders
from data_pipelines.loaders import eval_batches
from data_pipelines.loading.augment import ImageTransform
from tpp.common.errors import UserError
from tpp.models.architecture import build_model
from train import evaluate
from train.tasks import make_task


def test_evaluation_equals_a_loop_over_single_images(tiny_data):
    torch.manual_seed(0)
    model = build_model("cifar_resnet8", 4).eval()
    index = scan_class_folders(tiny_data / "val")
    right, loss = 0, 0.0
    for file, label in zip(index.files, index.labels, strict=True):
        pixels = np.array(Image.open(index.root / file).convert("RGB"), dtype=np.float32)
        image = torch.from_numpy((pixels / 255 - 0.5) / 0.25).permute(2, 0, 1)[None]
        logits = model(image)
        right += int(logits.argmax() == label)
        loss += F.cross_entropy(logits, torch.tensor([int(label)])).item()
    transform = ImageTransform(
        image_size=32, resize=None, augmentation="none", mean=(0.5,) * 3, std=(0.25,) * 3
    )
    batches = eval_batches(index, transform, 7, LoaderSettings("dali", 1, torch.device("cpu")))
    task = make_task({"kind": "classification"})
    found = task.evaluate(model, batches, device=torch.device("cpu"))
    assert found.images == len(index.files) == 40
    assert found.values["top1"] == pytest.approx(100 * right / 40)
    assert found.values["top5"] == 100  # of four classes
    assert found.values["loss"] == pytest.approx(loss / 40, rel=1e-4)


def test_a_known_network_reaches_its_known_accuracy(shared_data, tmp_path, run_main):
    """83.2% on the JPEG test set, to 0.2, for weights that reach 93.6% on lossless images."""
    with tarfile.open(shared_data("cifar10-jpeg.tar.gz")) as archive:
        members = [m for m in archive.getmembers() if m.name.startswith("cifar10/test/")]
        archive.extractall(tmp_path, members, filter="data")
    top1 = []
    for loader in ("dali", "torchvision"):
        result = run_main(
            None, "--checkpoint", str(shared_data("resnet56-cifar10.th")),
            "--model", "cifar_resnet56",
            "--data", str(tmp_path / "cifar10" / "test"), "--batch-size", "50", "--threads", "2",
            "--loader", loader, script="train.evaluate",
        )  # fmt: skip
        found = re.search(r"top-1 ([\d.]+)%.* over ([\d,]+) images", result.stdout)
        assert found is not None and found[2] == "10,000"
        top1.append(float(found[1]))
    assert top1[0] == pytest.approx(83.2, abs=0.2)
    assert top1[0] == pytest.approx(top1[1], abs=0.1)


def test_mistakes_are_one_line(shared_data, tiny_data, run_main):
    weights = str(shared_data("resnet56-cifar10.th"))
    command = ["--checkpoint", weights, "--data", str(tiny_data / "val")]
    unnamed = run_main(None, *command, script="train.evaluate", expect=2)
    assert unnamed.stderr.endswith("does not say which network it holds; name it with --model\n")
    assert unnamed.stderr.count("\n") == 1


def test_a_folder_says_its_network(tiny_data, tmp_path, monkeypatch, capsys):
    """One of Hugging Face, as timm writes it."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=4).eval()
    save_for_hf(model, tmp_path / "hub", safe_serialization=True)
    torch.save(model.state_dict(), tmp_path / "plain.pth")
    said = []
    for file, more in (("hub", []), ("plain.pth", ["--model", "timm:test_resnet"])):
        command = ["--checkpoint", str(tmp_path / file), "--data", str(tiny_data / "val")]
        command += ["--device", "cpu", "--json", str(tmp_path / f"{file}.json")]
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
        monkeypatch.setattr(sys, "argv", ["evaluate", *command, "--threads", "1", *more])
        evaluate.main()
        said.append(capsys.readouterr().out.splitlines()[-1].partition(": ")[2])
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert said[0] == said[1] and "over 40 images" in said[0]
    found = json.loads((tmp_path / "hub.json").read_text())
    assert found["checkpoint"] == str(tmp_path / "hub") and found["images"] == 40
    assert f"top-1 {found['top1']:.2f}%" in said[0]
    with pytest.raises(UserError, match=r"hub.json: is there already; --overwrite replaces it"):
        evaluate.main([*command[:-1], str(tmp_path / "hub.json")])
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"^--device cuda: PyTorch finds no CUDA GPU"):
            evaluate.main([*command[:4], "--device", "cuda"])
