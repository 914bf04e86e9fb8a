"""Tars that others made for WebDataset, read without being packed again."""

import gzip
import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from other_forms import as_tars, refused, write_tar

from data_pipelines import index as index_command
from data_pipelines import shards as shards_command
from data_pipelines.images.batch import LoaderSettings
from data_pipelines.images.image_index import INDEX_FILE, ImageIndex, scan_class_folders
from data_pipelines.images.order import Steps
from data_pipelines.images.source import BadImages, read_bytes
from data_pipelines.loaders import train_batches, training_order
from data_pipelines.loading.augment import ImageTransform
from data_pipelines.sets.foreign_tars import expand
from data_pipelines.sets.inputs import Input, input_parts, open_input
from tpp.common.errors import UserError, run_command


def _names(folder: Path, names: list[str]) -> Path:
    path = folder / "classes.txt"
    path.write_text("\n".join(names) + "\n")
    return path


def _same_images(one: ImageIndex, other: ImageIndex) -> None:
    assert (one.classes, [*one.files]) == (other.classes, [*other.files])
    assert one.labels.tolist() == other.labels.tolist()
    assert one.fingerprint == other.fingerprint
    for image in range(len(one)):
        theirs = read_bytes(other.location(image)).tobytes()
        assert read_bytes(one.location(image)).tobytes() == theirs


def test_the_same_index_as_of_class_folders(folders: Path, tmp_path: Path) -> None:
    truth = scan_class_folders(folders)
    tars = as_tars(folders, tmp_path / "cls")
    names = _names(tmp_path, truth.classes)
    _same_images(open_input(Input(tars, class_names=names)), truth)
    named = as_tars(folders, tmp_path / "json", label="class_name")
    _same_images(open_input(Input(named)), truth)
    key = as_tars(folders, tmp_path / "key", label="species of it")
    _same_images(open_input(Input(key, label_key="species of it")), truth)
    pattern = tars / "shard-{000000..000002}.tar"
    _same_images(open_input(Input(pattern, class_names=names)), truth)
    _same_images(open_input(Input(tars / "*.tar", class_names=names)), truth)
    assert open_input(Input(tars / "shard-000001.tar")).classes == ["0", "1", "2", "3"]


@pytest.mark.processes
@pytest.mark.parametrize("loader", ["dali", "torchvision"])
def test_both_loaders_give_what_class_folders_give(
    folders: Path, tmp_path: Path, loader: str
) -> None:
    names = _names(tmp_path, scan_class_folders(folders).classes)
    tars = open_input(Input(as_tars(folders, tmp_path / "tars"), class_names=names))
    transform = ImageTransform(
        augmentation="imagenet", image_size=32, resize=32, mean=(0.5,) * 3, std=(0.5,) * 3
    )
    made = LoaderSettings(loader=loader, threads=1, device=torch.device("cpu"))
    found: list[list[Any]] = []
    for index in (scan_class_folders(folders), tars):
        order = training_order(index, 3)
        found.append([*train_batches(index, transform, order, Steps(16, 1, 5, 3), made)])
    assert len(found[0]) == len(found[1]) == 3
    for (images, labels), (theirs, their_labels) in zip(*found, strict=True):
        assert torch.equal(images, theirs)
        assert torch.equal(labels, their_labels)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6), tars=st.integers(1, 4))
def test_members_in_any_order_and_any_tars(tmp_path_factory: Any, seed: int, tars: int) -> None:
    """Beside an own account of what each sample is; pairs need not follow each other."""
    folder = tmp_path_factory.mktemp("any")
    shuffle = random.Random(seed)
    truth = {f"k{n}": (shuffle.randrange(12), f"image {n}".encode()) for n in range(30)}
    for label in range(12):  # none is missing
        truth[f"k{30 + label}"] = (label, b"more")
    held: list[list[tuple[str, bytes]]] = [[] for _ in range(tars)]
    for key, (label, content) in truth.items():
        place = shuffle.randrange(tars)
        ending = shuffle.choice(["jpg", "JPEG", "png", "webp"])
        held[place] += [(f"./{key}.{ending}", content), (f"./{key}.cls", f"{label}\n".encode())]
        held[place] += [(f"./{key}.seg.png", b"a mask"), (f"./{key}.txt", b"words")]
    for number, members in enumerate(held):
        shuffle.shuffle(members)
        write_tar(folder / f"{number}.tar", members)
    index = open_input(Input(folder))
    assert index.classes == [str(number) for number in range(12)]
    assert np.all(np.diff(index.labels) >= 0)
    found = {
        name.partition(".")[0]: (int(label), read_bytes(index.location(image)).tobytes())
        for image, (name, label) in enumerate(zip(index.files, index.labels, strict=True))
    }
    assert found == truth


def test_keys_that_begin_anew_in_each_tar(tmp_path: Path) -> None:
    for number in range(2):
        label = str(number).encode()
        write_tar(tmp_path / f"{number}.tar", [("0.jpg", b"i" + label), ("0.cls", label)])
    index = open_input(Input(tmp_path))
    assert [*index.files] == ["0.tar/0.jpg", "1.tar/0.jpg"]
    assert [read_bytes(index.location(n)).tobytes() for n in (0, 1)] == [b"i0", b"i1"]


PAIR = [("a.jpg", b"1"), ("a.cls", b"0")]
BAD: dict[str, tuple[list[tuple[str, bytes]], str]] = {
    "no label": ([*PAIR, ("b.jpg", b"1")], "sample 'b' has no label, only b.jpg; expected b.cls"),
    "no image": ([*PAIR, ("b.cls", b"0")], "sample 'b' has no image, only b.cls; expected b.jpg"),
    "two images": ([*PAIR, ("a.png", b"1")], "sample 'a' has 2 images, a.jpg and a.png"),
    "twice": ([*PAIR, ("b.jpg", b"1"), ("a.jpg", b"2")], "a.jpg is in it twice"),
    "dots": (
        [*PAIR, ("b.1.jpg", b"1"), ("b.1.cls", b"0")],
        "so b.1.jpg is field '1.jpg' of 'b'; use keys without dots",
    ),
    "no text": ([*PAIR, ("b.jpg", b"1"), ("b.cls", b"\xff\x00")], "b.cls: is no text"),
    "empty": ([*PAIR, ("b.jpg", b"1"), ("b.cls", b" \n")], "b.cls: ' \\n' is no label"),
    "name among numbers": (
        [*PAIR, ("b.jpg", b"1"), ("b.cls", b"cat")],
        "b.jpg: its label is 'cat', that of",
    ),
    "gap": ([*PAIR, ("b.jpg", b"1"), ("b.cls", b"2")], "b.jpg: its label is 2, and no image has 1"),
    "negative": ([*PAIR, ("b.jpg", b"1"), ("b.cls", b"-1")], "b.jpg: its label -1 is no class"),
    "json list": ([("a.jpg", b"1"), ("a.json", b"[1]")], "a.json: expected a JSON object"),
    "no JSON": ([("a.jpg", b"1"), ("a.json", b"{")], "a.json: not JSON"),
    "other keys": (
        [("a.jpg", b"1"), ("a.json", b'{"caption": "x", "url": "y"}')],
        "its keys are caption, url: name one with data.label_key",
    ),
    "a key less": (
        [("a.jpg", b"1"), ("a.json", b'{"label": 0}'), ("b.jpg", b"1"), ("b.json", b"{}")],
        "b.json has no key 'label'",
    ),
    "true": ([("a.jpg", b"1"), ("a.json", b'{"label": true}')], "a.json: True is no label"),
    "outside": ([("../a.jpg", b"1"), ("../a.cls", b"0")], "would lie outside of the folder"),
    "nothing": ([("README", b"1")], "no samples in its 1 tars"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_tar_is_told_in_one_line(tmp_path: Path, case: str) -> None:
    members, said = BAD[case]
    write_tar(tmp_path / "one.tar", members)
    message = refused(Input(tmp_path))
    assert said in message
    assert message.startswith(str(tmp_path))


def test_labels_have_to_fit_the_class_names(tmp_path: Path) -> None:
    members = [*PAIR, ("b.jpg", b"1"), ("b.cls", b"3")]
    write_tar(tmp_path / "tars" / "one.tar", members)
    source = Input(tmp_path / "tars", class_names=_names(tmp_path, ["cat", "dog", "cow"]))
    assert refused(source).endswith(
        f"one.tar: b.jpg: its label '3' is no class of {tmp_path}/classes.txt, whose 3 classes "
        "have the numbers 0 to 2"
    )
    _names(tmp_path, ["cat", "dog", "cow", "hen"])
    index = open_input(source)
    assert (index.classes, index.labels.tolist()) == (["cat", "dog", "cow", "hen"], [0, 3])
    said = index.said_of_form()
    assert said is not None and said.endswith(
        "2 images in 1 tar, labels from .cls, of 2 of the classes"
    )


@pytest.mark.parametrize("name", ["one.tar.gz", "one.tar"])
def test_a_compressed_tar_is_refused(tmp_path: Path, name: str) -> None:
    plain = write_tar(tmp_path / "plain", PAIR).read_bytes()
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / name).write_bytes(gzip.compress(plain))
    for place in (tmp_path / "tars", tmp_path / "tars" / name):
        message = refused(Input(place))
        assert message.startswith(f"{tmp_path}/tars/{name}: compressed")
        assert message.endswith("no image in it can be read by itself; unpack it to a plain .tar")


def test_a_tar_that_is_cut_off_or_absent(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "one.tar", PAIR)
    os.truncate(tar, 700)
    assert "one.tar: no such archive as expected here, truncated" in refused(Input(tmp_path))
    message = refused(Input(tmp_path / "s-{0..1}.tar"))
    assert message.startswith(f"{tmp_path}/s-0.tar: there is no such file")
    assert "there is no such file" in refused(Input(tmp_path / "s-*.tar"))
    assert "its braces do not pair" in refused(Input(tmp_path / "s-{0..1.tar"))


def test_patterns() -> None:
    names = [str(path) for path in expand("/d/{a,b}-{08..11}.tar")]
    assert names == [f"/d/{letter}-{n}.tar" for letter in "ab" for n in ("08", "09", "10", "11")]
    assert [str(path) for path in expand("{8..10}")] == ["8", "9", "10"]
    with pytest.raises(UserError, match="does not count up"):
        expand("{3..1}")


@pytest.mark.processes
def test_an_index_of_tars(folders: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    tars = as_tars(folders, tmp_path / "train")
    source = Input(tars, class_names=_names(tmp_path, scan_class_folders(folders).classes))
    listed = open_input(source)
    monkeypatch.setattr("sys.argv", ["index", str(tmp_path), "--decode", "--threads", "1"])
    index_command.main()
    assert "images       96\n" in capsys.readouterr().out
    indexed = open_input(source)
    assert indexed.file == tars / INDEX_FILE
    assert (indexed.sizes == 32).all()
    _same_images(indexed, listed)
    assert "make it anew" in refused(Input(tars, label_key="label"))
    (tars / "shard-000002.tar").rename(tars / "shard-000003.tar")
    assert f"tpp index {tars}" in refused(source)
    (tars / "shard-000003.tar").rename(tars / "shard-000002.tar")
    write_tar(tars / "shard-000004.tar", PAIR)
    assert "shard-000004.tar is new; make it anew" in refused(source)


def test_more_than_ten_numbers_keep_the_index_in_its_file(tmp_path: Path, monkeypatch: Any) -> None:
    """Sorted as text, 10 would come before 2, and every start would sort a million images."""
    pairs = [(f"{n}.jpg", f"{n}.cls", str(n).encode()) for n in range(12)]
    members = [(name, text) for jpg, cls, text in pairs for name in (jpg, cls)]
    write_tar(tmp_path / "one.tar", members)
    monkeypatch.setattr("sys.argv", ["index", str(tmp_path)])
    index_command.main()
    index = open_input(Input(tmp_path))
    assert index.file is not None
    assert index.classes == [str(number) for number in range(12)]


def test_broken_images_in_tars_are_found(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    write_tar(tmp_path / "one.tar", [*PAIR, ("b.jpg", b"no image"), ("b.cls", b"1")])
    monkeypatch.setattr("sys.argv", ["index", str(tmp_path)])
    index_command.main()
    assert open_input(Input(tmp_path)).broken.all()
    report = (tmp_path / ".index-report.tsv").read_text()
    assert f"{tmp_path}/one.tar: b.jpg\t" in report


@pytest.mark.parametrize("apart", [False, True])
def test_a_run_names_the_member_that_the_index_says_is_broken(
    tmp_path: Path, monkeypatch: Any, capsys: Any, apart: bool
) -> None:
    tars, indices = tmp_path / "tars", tmp_path / "indices"
    write_tar(tars / "one.tar", [*PAIR, ("b.jpg", b"no image"), ("b.cls", b"1")])
    monkeypatch.setattr("sys.argv", ["index", str(tars)] + ["--output", str(indices)] * apart)
    index_command.main()
    file = indices / "tars.safetensors" if apart else tars / INDEX_FILE
    report = indices / "tars-report.tsv" if apart else tars / ".index-report.tsv"
    index = open_input(Input(tars, index_file=file))
    said = f"{file}: says that 2 of 2 images are broken (first: {tars}/one.tar: a.jpg"
    with pytest.raises(UserError) as caught:
        BadImages(index)
    assert str(caught.value).startswith(f"{said}; all of them: {report}); mend or delete")
    # Each by itself, or they would be counted as one.
    found = BadImages(index, on_error="skip", limit=1.0).take_new()
    assert [path for path, _ in found] == [f"{tars}/one.tar: {name}.jpg" for name in "ab"]
    report.unlink()
    with pytest.raises(UserError) as caught:
        BadImages(index)
    assert str(caught.value).startswith(f"{said}); mend or delete")


def test_tars_are_packed_anew(folders: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    truth = scan_class_folders(folders)
    names = [*reversed(truth.classes)]  # an order of its own is kept
    numbers = {name: number for number, name in enumerate(names)}
    (tmp_path / "classes.json").write_text(json.dumps(numbers))
    for part in ("train", "val"):
        as_tars(folders, tmp_path / "data" / part, label="label")
    assert input_parts(tmp_path / "data") == [tmp_path / "data" / p for p in ("train", "val")]
    command = [str(tmp_path / "data"), "--output", str(tmp_path / "out")]
    command += ["--class-names", str(tmp_path / "classes.json"), "--threads", "1"]
    for more in ([], ["--verify"]):
        monkeypatch.setattr("sys.argv", ["shards", *command, *more])
        run_command(shards_command.main)
    assert "96, all as they should be" in capsys.readouterr().out
    packed = open_input(Input(tmp_path / "out" / "train"))
    assert packed.classes == names
    assert packed.said_of_form() is None
    labels = {
        file: truth.classes[label] for file, label in zip(truth.files, truth.labels, strict=True)
    }
    assert {f: names[n] for f, n in zip(packed.files, packed.labels, strict=True)} == labels


def test_shards_of_this_package_that_are_not_finished(tmp_path: Path) -> None:
    (tmp_path / ".shards.json").write_text("{}")
    write_tar(tmp_path / "shard-000000.tar", PAIR)
    assert "unfinished shards" in refused(Input(tmp_path))
