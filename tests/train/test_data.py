"""How whole runs deal with their images: bad ones, indices, shards, augmentation, ranks."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_pipelines import index as index_command
from data_pipelines.images.image_index import INDEX_FILE, save_index, scan_class_folders
from data_pipelines.images.order import permutation
from data_pipelines.sets.inputs import Input
from data_pipelines.sets.shard_writer import write_shards
from data_pipelines.settings import (
    AugmentSection,
    ColorJitter,
    DataSection,
    ProgressiveResizing,
    RandAugment,
)
from train.config.config import Config
from train.data import RunData, image_transform, open_for_all_ranks, stage_transform
from train.run_folder.same_run import stage_settings

ALL = {
    "color_jitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1},
    "rand_augment": {"operations": 2, "magnitude": 9},
    "random_erasing": 0.5,
    "mixup": 0.2,
    "cutmix": 1.0,
    "repeats": 2,
}


@pytest.fixture
def dense(tiny_config: dict[str, Any], tiny_data: Path, tmp_path: Path) -> dict[str, Any]:
    """Dense training alone, on a copy of the images that may be spoilt."""
    shutil.copytree(tiny_data, tmp_path / "images")
    tiny_config["data"]["root"] = str(tmp_path / "images")
    tiny_config["stages"] = {"dense": {"epochs": 2, "optimizer": {"lr": 0.05}}}
    return tiny_config


def _weights(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    return load_file(Path(config["output"]) / "dense" / "model.safetensors")


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def _log(config: dict[str, Any], event: str) -> list[dict[str, Any]]:
    lines = (Path(config["output"]) / "log.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry["event"] == event]


def _another(config: dict[str, Any], name: str) -> dict[str, Any]:
    other = copy.deepcopy(config)
    other["output"] += f"-{name}"
    return other


@pytest.fixture
def make_index(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run the index command."""

    def make(folder: Path, *options: str) -> None:
        monkeypatch.setattr("sys.argv", ["index", str(folder), *options])
        index_command.main()

    return make


@pytest.mark.parametrize(("loader", "ranks"), [("dali", 2), ("torchvision", 1)])
def test_bad_images_are_skipped_counted_and_told_once(dense, run_main, loader, ranks):
    root = Path(dense["data"]["root"])
    train, val = (scan_class_folders(root / name) for name in ("train", "val"))
    # Two that another one of two ranks meets in the second epoch: they are not told again.
    epochs = [np.argsort(permutation(0, epoch, 96)) for epoch in range(2)]
    turning = np.flatnonzero(epochs[0] % 2 != epochs[1] % 2)
    bad = [f"train/{train.files[int(image)]}" for image in turning[[3, 9]]]
    bad += [f"val/{val.files[3]}"]
    (root / bad[0]).write_bytes(b"")
    (root / bad[1]).unlink()
    (root / bad[2]).write_text("no image\n" * 100)
    dense["data"] |= {"loader": loader, "on_error": "skip", "max_skipped": 0.1}
    dense["stages"]["dense"]["epochs"] = 3
    (root / bad[1]).symlink_to("nowhere.jpg")
    printed = run_main(dense, ranks=ranks).stdout
    told = _log(dense, "skipped")
    assert sorted(entry["file"] for entry in told) == sorted(f"{root}/{file}" for file in bad)
    for entry in told:
        assert printed.count(f"skipped: {entry['file']} ({entry['reason']})") == 1
    results = json.loads((Path(dense["output"]) / "results.json").read_text())
    assert results["stages"]["dense"]["images"] == 39
    events = EventAccumulator(str(Path(dense["output"]) / "dense")).Reload()
    assert [e.value for e in events.Scalars("data/skipped_images")][-1] == 3
    assert all(0 <= e.value <= 1 for e in events.Scalars("train/data_wait"))

    refused = run_main(_another(dense, "b"), "data.max_skipped=0.01", ranks=ranks, expect=None)
    assert refused.returncode != 0
    assert "data.max_skipped allows a share of 0.01" in refused.stderr
    failed = run_main(_another(dense, "c"), "data.on_error=fail", ranks=ranks, expect=None)
    assert failed.returncode != 0
    assert f"error: {root}/{bad[0]}: cannot read this image" in failed.stderr


def test_an_index_that_does_not_fit_is_told_once_by_any_rank(dense, run_main, make_index):
    root = Path(dense["data"]["root"])
    make_index(root)
    extra = next((root / "train").glob("*/*.jpg"))
    shutil.copy(extra, extra.with_name("another.jpg"))
    result = run_main(dense, ranks=2, expect=None)
    assert result.returncode != 0
    assert result.stderr.count("this index no longer fits") == 1
    assert f"{extra.parent.name}/another.jpg is new" in result.stderr
    assert f"tpp index {root / 'train'}" in result.stderr
    assert "rank 1" not in result.stderr.split("no longer fits")[0].splitlines()[-1]
    assert not Path(dense["output"]).exists()


NODE = """
import os, sys
from pathlib import Path
from accelerate import Accelerator
from tpp.common.errors import UserError
from data_pipelines.sets.inputs import Input
from train.data import open_for_all_ranks
os.chdir(f"node{os.environ['RANK']}")
file = Path("index.safetensors") if sys.argv[1] == "indexed" else None
accelerator = Accelerator(cpu=True)
try:
    index = open_for_all_ranks(Input(Path("images"), index_file=file), accelerator)
    said = f"{len(index)} images, {index.fingerprint}"
except UserError as error:
    said = str(error)
Path("said").write_text(said)
accelerator.end_training()
"""


@pytest.mark.parametrize("way", ["indexed", "listed"])
def test_what_one_node_lacks_is_told_by_all(tiny_data, tmp_path, run_main, make_index, way):
    script = tmp_path / "node.py"
    script.write_text(NODE)
    for node in ("node0", "node1"):
        shutil.copytree(tiny_data / "val", tmp_path / node / "images")
        if node == "node1":
            next((tmp_path / node / "images").glob("*/*.jpg")).unlink()
        make_index(tmp_path / node / "images", "--output", str(tmp_path / node))
        (tmp_path / node / "images.safetensors").rename(tmp_path / node / "index.safetensors")
    run_main(None, way, ranks=2, script=script)
    said = [(tmp_path / node / "said").read_text() for node in ("node0", "node1")]
    assert said[0] == said[1]
    if way == "indexed":
        assert said[0].startswith("rank 1: index.safetensors: this node's index is of other images")
    else:  # whoever lacks a file will say so when its turn comes
        listed = scan_class_folders(tmp_path / "node0" / "images")
        assert said[0] == f"40 images, {listed.fingerprint}"


def test_settings_that_are_as_they_always_were_are_not_written_down(dense):
    """A run that was begun before these settings existed goes on."""
    settings = stage_settings(Config.model_validate(dense), "dense")
    assert "augment" not in settings["stages"]["dense"]
    assert settings["data"] == {
        key: value
        for key, value in dense["data"].items()
        if key not in ("root", "threads") and value != DataSection.model_fields[key].default
    }
    assert {"augmentation", "image_size", "resize"} <= settings["data"].keys()


def test_folder_index_and_shards_end_in_the_same_weights(dense, run_main, make_index, tmp_path):
    root = Path(dense["data"]["root"])
    run_main(dense)
    truth = _weights(dense)
    for name in ("train", "val"):
        write_shards(
            scan_class_folders(root / name), tmp_path / "shards" / name, shard_bytes=40_000
        )
    make_index(root, "--output", str(tmp_path / "indices"))
    assert len(list((tmp_path / "shards" / "train").glob("*.tar"))) > 2
    indexed, shards = _another(dense, "indexed"), _another(dense, "shards")
    run_main(indexed, f"data.index={tmp_path / 'indices'}")
    run_main(shards, f"data.root={tmp_path / 'shards'}")
    assert _same(truth, _weights(indexed))
    assert _same(truth, _weights(shards))
    windowed = _another(shards, "windowed")
    run_main(windowed, f"data.root={tmp_path / 'shards'}", "data.shuffle_window=40")
    assert not _same(truth, _weights(windowed))


@pytest.mark.parametrize("loader", ["dali", "torchvision"])
def test_a_killed_run_goes_on_with_the_same_augmentation(dense, run_main, loader):
    dense["data"] |= {"loader": loader, "augmentation": "imagenet", "image_size": 64}
    dense["stages"]["dense"] |= {"epochs": 4, "label_smoothing": 0.1}
    progressive = {"start_size": 32, "start_epoch": 1, "end_epoch": 3}
    dense["data"]["augment"] = {**ALL, "progressive": progressive}
    undisturbed = _another(dense, "undisturbed")
    run_main(undisturbed)
    checkpoints = Path(dense["output"]) / "dense" / "checkpoints"
    run_main(dense, kill_when=checkpoints / "step-00000010")
    refused = run_main(dense, "data.augment.mixup=0.3", expect=2)
    assert "stages.dense.augment.mixup was 0.2 and is 0.3" in refused.stderr
    assert "dense: resumed after" in run_main(dense).stdout
    assert _same(_weights(undisturbed), _weights(dense))


def test_a_stage_is_fed_as_its_configuration_says(dense):
    dense["data"] |= {"augmentation": "imagenet", "image_size": 64}
    dense["data"]["augment"] = {**ALL, "mixup": 0.0, "cutmix": 0.0}
    progressive = {"start_size": 32, "start_epoch": 0.5, "end_epoch": 1.5}
    dense["stages"]["again"] = {
        "kind": "finetune",
        "epochs": 2,
        "optimizer": {"lr": 0.1},
        "augment": {"mixup": 0.4, "progressive": progressive},
    }
    dense["training"]["channels_last"] = True
    config = Config.model_validate(dense)
    data = RunData(config, Accelerator(cpu=True))
    first, again = (stage_transform(config, name) for name in ("dense", "again"))
    jitter = ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
    rand = RandAugment(operations=2, magnitude=9)
    assert (first.augment.color_jitter, first.augment.rand_augment) == (jitter, rand)
    assert (first.augment.random_erasing, first.image_size) == (0.5, 64)
    assert again.augment == AugmentSection(
        mixup=0.4, progressive=ProgressiveResizing(start_size=32, start_epoch=0.5, end_epoch=1.5)
    )
    assert first.plain() == again.plain() == image_transform(config).plain()

    repeated = [labels for _, labels in data.train_batches("dense", 0, 2)]
    order = permutation(0, 0, 96)[:16]
    assert torch.cat(repeated).tolist() == data.train.index.labels[order].repeat(2).tolist()

    batches = list(data.train_batches("again", 0, 12))  # 6 steps of 16 images make an epoch
    assert [images.shape[2] for images, _ in batches] == [32] * 4 + [32, 32, 64, 64, 64] + [64] * 3
    images, shares = batches[0]
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert shares.shape == (16, 4) and len(shares.unique()) > 1 and shares.sum() == 16
    later = list(data.train_batches("again", 11, 1))
    assert torch.equal(later[0][0], batches[11][0])


def test_a_resumed_run_must_have_the_same_images(dense, run_main):
    checkpoints = Path(dense["output"]) / "dense" / "checkpoints"
    run_main(dense, kill_when=checkpoints / "step-00000005")
    extra = next((Path(dense["data"]["root"]) / "train").glob("*/*.jpg"))
    shutil.copy(extra, extra.with_name("another.jpg"))
    refused = run_main(dense, expect=2)
    assert "stage 'dense' was begun with other images: the fingerprint of" in refused.stderr
    extra.with_name("another.jpg").unlink()
    assert "dense: resumed after" in run_main(dense).stdout


def test_evaluation_is_the_same_on_one_two_and_three_ranks(dense, run_main):
    run_main(dense)
    checkpoint = str(Path(dense["output"]) / "dense" / "model.safetensors")
    data = str(Path(dense["data"]["root"]) / "train")  # 96 images: 32 on each of three ranks
    (Path(data) / scan_class_folders(data).files[0]).unlink()  # and now one less
    said = set()
    for ranks, batch in ((1, 32), (1, 7), (2, 10), (3, 96)):
        command = ["--checkpoint", checkpoint, "--data", data, "--batch-size", str(batch)]
        done = run_main(None, *command, ranks=ranks, script="train.evaluate")
        said.add(done.stdout.split(": ", 1)[1])
    (line,) = said
    assert line.endswith("over 95 images\n")


def test_evaluation_leaves_out_what_cannot_be_read_if_told_to(dense, run_main):
    run_main(dense)
    root = Path(dense["data"]["root"]) / "val"
    (root / scan_class_folders(root).files[7]).write_bytes(b"\xff\xd8\xff")
    command = ["--data", str(root), "--checkpoint"]
    command += [str(Path(dense["output"]) / "dense" / "model.safetensors")]
    failed = run_main(None, *command, script="train.evaluate", expect=2)
    assert failed.stderr.count("\n") == 1
    options = ["--on-error", "skip", "--max-skipped", "0.05"]
    done = run_main(None, *command, *options, script="train.evaluate")
    assert done.stdout.startswith(f"skipped: {root}/") and "over 39 of 40 images" in done.stdout


def test_a_run_says_first_what_it_passes_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a/1.png", "b/1.png", "b/2.webp", "b/sub/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    for listed in ("the folder", "its index"):
        index = open_for_all_ranks(Input(tmp_path), Accelerator(cpu=True))
        assert len(index) == 2
        said = capsys.readouterr().out
        assert said.startswith(f"{tmp_path}: passed over: 1 "), listed
        assert "1 .webp (b/2.webp)" in said and "1 in sub-folders (b/sub/3.png)" in said
        assert said.endswith(f"tpp index {tmp_path} --also webp --nested\n")
        save_index(index, tmp_path / INDEX_FILE)
