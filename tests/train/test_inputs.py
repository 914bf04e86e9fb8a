"""Images as others lay them out end in the weights and scores of class folders."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from other_forms import as_list, as_tars, classes_in
from safetensors.torch import load_file

from tpp.common.errors import UserError
from train.config.config import Config
from train.data import input_of, look_at_images
from train.dry_run import dry_run


@pytest.fixture
def dense(tiny_config: dict[str, Any]) -> dict[str, Any]:
    """Dense training alone."""
    tiny_config["stages"] = {"dense": {"epochs": 2, "optimizer": {"lr": 0.05}}}
    return tiny_config


def _other(config: dict[str, Any], name: str, **data: str) -> dict[str, Any]:
    other = copy.deepcopy(config)
    other["output"] += f"-{name}"
    other["data"] |= data
    return other


def _tars(root: Path, out: Path) -> dict[str, str]:
    for part in ("train", "val"):
        as_tars(root / part, out / part)
    (out / "classes.txt").write_text("\n".join(classes_in(root / "train")) + "\n")
    return {"root": str(out), "class_names": "classes.txt"}


def _lists(root: Path, out: Path) -> dict[str, str]:
    out.mkdir()
    for part in ("train", "val"):
        as_list(root / part, out / f"{part}.csv")
    return {f"{part}_list": str(out / f"{part}.csv") for part in ("train", "val")}


def _weights(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    return load_file(Path(config["output"]) / "dense" / "model.safetensors")


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_tars_and_lists_end_in_the_weights_of_class_folders(
    dense: dict[str, Any], run_main: Callable[..., Any], tmp_path: Path
) -> None:
    root = Path(dense["data"]["root"])
    run_main(dense)
    truth = _weights(dense)
    lists = _other(dense, "lists", **_lists(root, tmp_path / "lists"))
    run_main(lists)
    assert _same(truth, _weights(lists))
    # Begun with class folders, gone on with by tars of the same images.
    begun = _other(dense, "tars")
    run_main(begun, kill_when=Path(begun["output"]) / "dense" / "checkpoints" / "step-00000005")
    done = run_main(_other(dense, "tars", **_tars(root, tmp_path / "tars")))
    assert "dense: resumed after" in done.stdout
    assert f"{tmp_path}/tars/train: 96 images in 3 tars, labels from .cls" in done.stdout
    assert _same(truth, _weights(begun))


def test_every_form_is_evaluated(
    dense: dict[str, Any], run_main: Callable[..., Any], tmp_path: Path
) -> None:
    root = Path(dense["data"]["root"])
    run_main(dense)
    model = str(Path(dense["output"]) / "dense" / "model.safetensors")
    tars = Path(_tars(root, tmp_path / "tars")["root"]) / "val"
    numbers = as_list(root / "val", tmp_path / "val.txt", f"{root}/val/{{path}} {{number}}")
    columns = as_list(root / "val", tmp_path / "columns.csv", "{number},{path},{label}")
    columns.write_text("id,photo,species\n" + columns.read_text())
    listed = ("--list", str(columns), "--path-key", "photo", "--label-key", "species")
    said = set()
    for place, ranks, *more in (
        *((root / "val", 1), (tars, 2), (tars / "*.tar", 1), (numbers, 1)),
        (root / "val", 1, *listed),
    ):
        command = [model, "--data", str(place), *more]
        done = run_main(None, *command, ranks=ranks, script="train.evaluate")
        said.add(done.stdout.splitlines()[-1])
    (line,) = said
    assert line.endswith("over 40 images")


def test_sides_of_two_forms_have_the_classes_of_training(
    dense: dict[str, Any], tmp_path: Path
) -> None:
    root = Path(dense["data"]["root"])
    names = [*reversed(classes_in(root / "train"))]
    (tmp_path / "classes.json").write_text(json.dumps({n: i for i, n in enumerate(names)}))
    numbers = as_list(root / "val", tmp_path / "val.csv", "{path},{number}")
    dense["data"]["val_list"] = str(numbers)
    with pytest.raises(UserError, match=r"class '0' is in only one of 'train' and '.*val.csv'; "):
        look_at_images(Config.model_validate(dense))
    dense["data"]["class_names"] = str(tmp_path / "classes.json")
    train, val = look_at_images(Config.model_validate(dense))
    assert train.classes == val.classes == names
    for file, label in zip(val.files, val.labels.tolist(), strict=True):
        # Of the folder with this number in the list, which the names call otherwise.
        assert file.startswith(f"{classes_in(root / 'val')[label]}/")


def test_classes_of_numbers_are_in_the_order_of_training(
    dense: dict[str, Any], tmp_path: Path
) -> None:
    """Class folders are sorted as text, 10 before 2, and numbers of a list by size."""
    for part in ("train", "val"):
        for label in range(11):
            (tmp_path / "data" / part / str(label)).mkdir(parents=True)
            (tmp_path / "data" / part / str(label) / "1.jpg").touch()
    as_list(tmp_path / "data" / "val", tmp_path / "data" / "val.csv", "val/{path},{label}")
    dense["data"] |= {"root": str(tmp_path / "data"), "val": "val.csv"}
    train, val = look_at_images(Config.model_validate(dense))
    assert train.classes == val.classes == sorted(map(str, range(11)))
    assert all(
        name == f"val/{val.classes[label]}/1.jpg"
        for name, label in zip(val.files, val.labels.tolist(), strict=True)
    )


def test_a_dry_run_says_what_is_read(
    dense: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(dense["data"]["root"])
    dense["data"] |= {**_tars(root, tmp_path / "tars"), "train": "train/shard-{000000..000001}.tar"}
    dense["data"] |= {
        "val": str(root / "val"),
        "val_list": str(as_list(root / "val", tmp_path / "v.csv")),
    }
    dry_run(Config.model_validate(dense))
    out = capsys.readouterr().out
    assert f"{tmp_path}/tars/train: 64 images in 2 tars, labels from .cls\n" in out
    assert f"{root}/val: 40 images of the list {tmp_path}/v.csv\n" in out


def test_what_is_not_there_is_told_before_the_queue(dense: dict[str, Any], tmp_path: Path) -> None:
    from launch.check import check_data

    root = Path(dense["data"]["root"])
    dense["data"] |= _tars(root, tmp_path / "tars")
    dense["data"]["train"] = "train/shard-{000000..000002}.tar"
    config = Config.model_validate(dense)
    check_data(config)
    assert input_of(config, "train").class_names == tmp_path / "tars" / "classes.txt"
    dense["data"]["val_list"] = "val.csv"
    with pytest.raises(UserError, match=rf"there is no list {tmp_path}/tars/val.csv on this"):
        check_data(Config.model_validate(dense))
