"""Parquet and Arrow files of Hugging Face, as its own package writes them, become shards."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from other_forms import classes_in, images_in, refused
from tiny_run import tiny_run

from data_pipelines import shards as shards_command
from data_pipelines.images.image_index import ImageIndex, scan_class_folders
from data_pipelines.images.source import read_bytes
from data_pipelines.sets import table_images
from data_pipelines.sets.division import prepare_split
from data_pipelines.sets.inputs import Input, open_input, open_tables
from data_pipelines.sets.table_files import find_tables
from data_pipelines.sets.table_images import UNPACKED, ImageTables
from launch.check import check_data
from tpp.common.errors import UserError, run_command
from train.config.config import Config
from train.data import look_at_images

datasets = pytest.importorskip("datasets")
datasets.disable_progress_bars()


def as_dataset(folder: Path, classes: list[str]) -> Any:
    """Class folders as a data set whose images are in it, with their names."""
    images = images_in(folder)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=classes)}
    )
    columns = {
        "image": [{"bytes": path.read_bytes(), "path": path.name} for _, path in images],
        "label": [classes.index(name) for name, _ in images],
    }
    return datasets.Dataset.from_dict(columns, features=features)


def write_parquet(data: Any, folder: Path, split: str, count: int) -> Path:
    """As ``push_to_hub`` lays it out; images are dealt out in turn, so that classes are mixed."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        name = f"{split}-{number:05}-of-{count:05}.parquet"
        data.shard(count, number, contiguous=False).to_parquet(folder / name)
    return folder


@pytest.fixture(scope="module")
def hub(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set as the Hub has many: of its test split nobody knows the labels."""
    root = tmp_path_factory.mktemp("hub")
    train = as_dataset(folders, classes_in(folders))
    write_parquet(train, root / "data", "train", 3)
    write_parquet(as_dataset(folders.parent / "val", classes_in(folders)), root / "data", "val", 1)
    unknown = train.select(range(5)).map(lambda row: {**row, "label": -1})
    write_parquet(unknown, root / "data", "test", 1)
    (root / "README.md").write_text("---\n---\n")
    return root


@pytest.fixture
def pack(monkeypatch: Any, capsys: Any) -> Callable[..., str]:
    """Run ``tpp shards``; what it prints."""

    def command(*words: object) -> str:
        monkeypatch.setattr("sys.argv", ["shards", *map(str, words), "--threads", "2"])
        run_command(shards_command.main)
        return str(capsys.readouterr().out)

    return command


def _same_images(one: ImageIndex, other: ImageIndex) -> None:
    assert (one.classes, [*one.files]) == (other.classes, [*other.files])
    assert one.labels.tolist() == other.labels.tolist()
    for image in range(len(one)):
        theirs = read_bytes(other.location(image)).tobytes()
        assert read_bytes(one.location(image)).tobytes() == theirs


def _tables(place: Path, **more: Any) -> ImageTables:
    found = open_tables(Input(place, **more))
    assert found is not None
    return found


def _no_tables(place: Path, **more: Any) -> str:
    with pytest.raises(UserError) as caught:
        open_tables(Input(place, **more))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def _write(path: Path, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def test_a_set_of_the_hub_becomes_the_shards_of_class_folders(
    hub: Path, folders: Path, tmp_path: Path, pack: Callable[..., str]
) -> None:
    said = pack(hub, "--output", tmp_path / "out")
    assert f"left out: {hub}/data/test-00000-of-00001.parquet: 5 of its 5 rows have no" in said
    assert "96 images in 3 Parquet or Arrow files, labels from column label" in said
    for part in ("train", "val"):
        truth = scan_class_folders(folders.parent / part)
        made = open_input(Input(tmp_path / "out" / part))
        _same_images(made, truth)
        assert made.fingerprint == truth.fingerprint  # so that runs go on with the other
        assert not (tmp_path / "out" / part / UNPACKED).exists()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["train", "val"]
    assert "96, all as they should be" in pack(hub, "--output", tmp_path / "out", "--verify")
    # The same shards and index, to the bit, as of the folders: no run can tell them apart.
    pack(folders, "--output", tmp_path / "truth")
    for name in ("shard-000000.tar", "shard-000000.idx"):
        theirs = (tmp_path / "truth" / name).read_bytes()
        assert (tmp_path / "out" / "train" / name).read_bytes() == theirs
    made, truth = (
        open_input(Input(place)) for place in (tmp_path / "out/train", tmp_path / "truth")
    )
    for array in ("sizes", "byte_sizes", "offsets", "container", "marks"):
        assert getattr(made, array).tolist() == getattr(truth, array).tolist()
    assert made.containers == truth.containers and made.said_of_form() is None


def test_a_set_saved_to_disk(folders: Path, tmp_path: Path) -> None:
    """Images from outside of it are put into it, and classes keep an order of their own."""
    names = [*reversed(classes_in(folders))]
    images = [(names.index(name), str(path)) for name, path in images_in(folders)]
    features = datasets.Features(
        {"photo": datasets.Image(), "label": datasets.ClassLabel(names=names)}
    )
    columns = {"photo": [path for _, path in images], "label": [label for label, _ in images]}
    data = datasets.Dataset.from_dict(columns, features=features)
    splits = datasets.DatasetDict({"train": data, "validation": data.select(range(8))})
    splits.save_to_disk(tmp_path / "saved", num_shards={"train": 2, "validation": 1})
    found = find_tables(tmp_path / "saved")
    assert found is not None
    assert {name: len(files) for name, files in found.parts.items()} == {"train": 2, "val": 1}
    with _tables(tmp_path / "saved" / "train").unpacked(tmp_path / "out") as index:
        truth = scan_class_folders(folders)
        places = [names.index(name) for name in truth.classes]
        _same_images(index, truth.with_classes(names, places))
    # Only paths are in what to_parquet makes of it.
    data.to_parquet(tmp_path / "paths.parquet")
    tables = _tables(tmp_path / "paths.parquet")
    with (
        pytest.raises(
            UserError,
            match=r"paths.parquet, row 0: .*: Dataset.to_parquet keeps paths only; write the",
        ),
        tables.unpacked(tmp_path / "none"),
    ):
        pass
    assert not (tmp_path / "none").exists()
    # The last file, cut off between two batches, reads as a shorter one.
    arrow = next((tmp_path / "saved" / "validation").glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:-8])
    assert _no_tables(arrow).startswith(f"{arrow}: no whole Arrow file")


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()])
def test_plain_bytes_and_text_labels(tmp_path: Path, kind: pa.DataType) -> None:
    """Names are made up where there are none, with an ending that is true."""
    images = [b"\xff\xd8 one", b"\x89PNG two", b"RIFF1234WEBP", b"\xff\xd8 four"]
    file = _write(
        tmp_path / "a.parquet",
        id=[1, 2, 3, 4],
        jpg=pa.array(images, kind),
        species=pa.array(["dog", "cat", "dog", "cat"]).dictionary_encode(),
    )
    with _tables(file, label_key="species").unpacked(tmp_path / "out") as index:
        assert [*index.files] == [
            *("cat/a-0000001.png", "cat/a-0000003.jpg"),
            *("dog/a-0000000.jpg", "dog/a-0000002.webp"),
        ]
        found = [read_bytes(index.location(image)).tobytes() for image in range(4)]
        assert found == [images[1], images[3], images[0], images[2]]
        assert index.name(0) == f"{file}: cat/a-0000001.png"


def test_images_of_one_name_keep_apart(tmp_path: Path) -> None:
    struct = pa.struct([("path", pa.string()), ("bytes", pa.binary())])
    images = pa.array([{"bytes": b"1", "path": "x.png"}, {"bytes": b"2", "path": "x.png"}], struct)
    for name in ("1", "2"):
        _write(tmp_path / name / "t.parquet", image=images, label=[0, 0])
    tables = _tables(tmp_path / "*" / "t.parquet")
    assert len({*tables.names}) == 4


def test_a_row_group_is_read_page_by_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other writers make one of a million rows; here, of 32 MB, in pages of 4 MB."""
    images = [bytes([n % 256]) * 4_000 for n in range(8_000)]
    table = pa.table({"image": pa.array(images), "label": [0] * len(images)})
    pq.write_table(table, tmp_path / "a.parquet", compression="none", use_dictionary=False)
    assert pq.read_metadata(tmp_path / "a.parquet").num_row_groups == 1
    del images, table
    held, true = [0], table_images._contents

    def contents(*asked: Any) -> Iterator[Any]:
        before = pa.total_allocated_bytes()
        for number, content in enumerate(true(*asked)):
            if number % 100 == 0:
                held.append(pa.total_allocated_bytes() - before)
            yield content

    monkeypatch.setattr(table_images, "_contents", contents)
    with _tables(tmp_path / "a.parquet").unpacked(tmp_path / "out") as index:
        assert int(index.byte_sizes.sum()) == 32_000_000
    assert 0 < max(held) < 10_000_000


IMAGE = pa.array([{"bytes": b"1", "path": "1.png"}] * 2)
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no image": ({"label": [0, 0]}, "which column is the image? it has label; name one with"),
    "no label": ({"image": IMAGE}, "which column is the label? it has image; name one with"),
    "text": ({"image": ["a", "b"], "label": [0, 0]}, "'image' holds text, and no images"),
    "pixels": (
        {"image": [[1, 2], [3]], "label": [0, 0]},
        "'image' holds list<element: int64>, and no",
    ),
    "several": ({"image": IMAGE, "label": [[0], [1, 2]]}, "'label' holds several labels for an"),
    "real": ({"image": IMAGE, "label": [0.5, 1.0]}, "'label' holds double; expected a whole"),
    "null": ({"image": IMAGE, "label": [0, None]}, "1 of its 2 rows have no label (-1 or null"),
    "gap": ({"image": IMAGE, "label": [0, 2]}, "row 1: its label is 2, and no image has 1"),
    "empty": ({"image": IMAGE[:0], "label": pa.array([], pa.int64())}, "no rows in it"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_told_in_one_line(tmp_path: Path, case: str) -> None:
    columns, said = BAD[case]
    file = _write(tmp_path / "a.parquet", **columns)
    message = _no_tables(tmp_path)
    assert message.startswith(str(file)) and said in message


def test_two_kinds_of_labels_have_to_be_told_apart(folders: Path, tmp_path: Path) -> None:
    """As CIFAR-100's are; and none is out of the classes' range."""
    data = as_dataset(folders, classes_in(folders)).rename_columns({"image": "img"})
    data = data.rename_column("label", "fine").add_column("coarse", data["label"])
    data = data.cast_column("coarse", datasets.ClassLabel(names=["a", "b", "c", "d"]))
    data.to_parquet(tmp_path / "train.parquet")
    assert "columns fine, coarse may be it; name one with --label-key" in _no_tables(tmp_path)
    assert _tables(tmp_path, label_key="coarse").classes == ["a", "b", "c", "d"]
    assert "no column 'x', which --image-key says; it has img, fine" in _no_tables(
        tmp_path, label_key="fine", image_key="x"
    )
    table = pq.read_table(tmp_path / "train.parquet")
    beyond = table.set_column(2, table.schema.field("coarse"), pa.array([4] * len(table)))
    pq.write_table(beyond, tmp_path / "train.parquet")
    assert "row 0: its label 4 is none of the 4 classes" in _no_tables(tmp_path, label_key="coarse")


def test_damage_is_told_in_one_line(hub: Path, tmp_path: Path) -> None:
    whole = next((hub / "data").glob("train-00001*")).read_bytes()
    file = tmp_path / "a.parquet"
    for content, said in (
        (whole[: len(whole) // 2], "if it is truncated or damaged, get it once more"),
        (b"", "if it is truncated or damaged, get it once more"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
    ):
        file.write_bytes(content)
        message = _no_tables(file)
        assert message.startswith(f"{file}: ") and said in message
    file.write_bytes(whole)
    (tmp_path / "b.parquet").write_bytes(whole)
    _write(tmp_path / "b.parquet", image=IMAGE, label=[0, 0])
    message = _no_tables(tmp_path / "*.parquet")
    assert message.startswith(f"{tmp_path}/b.parquet: is of another form")


def test_splits_of_all_layouts(tmp_path: Path) -> None:
    def parts(*names: str) -> dict[str, list[str]]:
        folder = tmp_path / str(len([*tmp_path.iterdir()]))
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
        found = find_tables(folder)
        assert found is not None
        return {
            part: [path.relative_to(folder).as_posix() for path in files]
            for part, files in found.parts.items()
        }

    old = "data/train-00000-of-00001-0123456789abcdef.parquet"
    assert parts(old, "data/valid-00000-of-00001.parquet") == {
        "train": [old],
        "val": ["data/valid-00000-of-00001.parquet"],
    }
    converted = ("default/train/0001.parquet", "default/train/0000.parquet")
    assert parts(*converted, "default/test/0000.parquet") == {
        "train": [*reversed(converted)],
        "test": ["default/test/0000.parquet"],
    }
    assert parts("my_train.parquet", "my_dev.parquet").keys() == {"train", "val"}
    assert parts("photos.parquet") == {"": ["photos.parquet"]}
    # What lies beside class folders is not of them.
    beside = tmp_path / "beside"
    (beside / "cat").mkdir(parents=True)
    for name in ("cat/1.jpg", "cat/metadata.parquet", "notes.parquet", "state.json"):
        (beside / name).touch()
    (beside / "cat" / "2.jpg").symlink_to(tmp_path / "nowhere")  # for others to complain of
    assert find_tables(beside) is None
    assert open_tables(Input(beside)) is None and len(open_input(Input(beside))) == 2
    for names, said in (
        (("train-00000-of-00002.parquet",), "file 00001 of the 2 files of 'train' is missing"),
        (("a/train-00000-of-00001.parquet", "b/train-00000-of-00001.parquet"), "2 configurations"),
        (("default/partial-train/0000.parquet",), "converted in part only"),
        (("x-00000-of-00001.parquet", "y-00000-of-00001.parquet"), "splits 'x', 'y', none of"),
        (("train-00000-of-00001.parquet", "train.parquet"), "from several times"),
        (("val.parquet", "dev-00000-of-00001.parquet"), "is not the only split that would be"),
    ):
        with pytest.raises(UserError, match=said):
            parts(*names)


def test_what_was_unpacked_is_not_unpacked_again(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that ended with its second file goes on there, and notices a file that has changed."""
    place = tmp_path / "train"
    place.mkdir()
    for file in (hub / "data").glob("train-*"):
        (place / file.name).write_bytes(file.read_bytes())
    read: list[str] = []
    true = table_images._contents

    def contents(path: Path, *more: Any) -> Iterator[Any]:
        read.append(path.name[:11])
        if ends and "00001" in path.name:
            raise KeyboardInterrupt
        return true(path, *more)

    monkeypatch.setattr(table_images, "_contents", contents)
    ends = True
    with pytest.raises(KeyboardInterrupt), _tables(place).unpacked(tmp_path / "out", 1):
        pass
    assert read[:2] == ["train-00000", "train-00001"]
    ends = False
    read.clear()
    last = place / "train-00002-of-00003.parquet"
    with _tables(place).unpacked(tmp_path / "out", 1) as index:
        assert "train-00000" not in read and read[0] == "train-00001" and len(index) == 96
        assert sum(index.marks) == sum(index.byte_sizes)
    last.unlink()
    assert "file 00002 of the 3 files of 'train' is missing" in _no_tables(place)


def test_parquet_files_are_divided_into_class_folders(
    hub: Path, folders: Path, tmp_path: Path
) -> None:
    source = Input(hub / "data" / "train-*.parquet")
    made = prepare_split(tmp_path / "out", source, share=0.25)
    assert [(part.split, part.images) for part in made] == [("train", 72), ("val", 24)]
    truth = {f"{name}/{path.name}": path.read_bytes() for name, path in images_in(folders)}
    found = [path for part in made for path in (tmp_path / "out" / part.split).glob("*/*")]
    assert {f"{p.parent.name}/{p.name}": p.read_bytes() for p in found} == truth
    assert not (tmp_path / "out" / UNPACKED).exists()
    with pytest.raises(UserError, match="is divided already, into train, val, test; give the"):
        prepare_split(tmp_path / "other", Input(hub))


def test_training_says_what_makes_shards_of_it(hub: Path, tmp_path: Path) -> None:
    wanted = f"{hub}: Parquet files, out of which no image can be read by itself; make shards of "
    wanted += f"them: tpp shards {hub} --output DIR, and then use DIR"
    assert refused(Input(hub / "train")) == wanted
    assert refused(Input(hub)) == wanted
    with pytest.raises(UserError, match="tpp shards"):
        check_data(Config.model_validate(tiny_run(hub, tmp_path)))
    file = next((hub / "data").glob("train-00001*"))
    assert refused(Input(file)).startswith(f"{file}: Parquet files, out of which")


@pytest.mark.parametrize("form", ["saved to disk", "converted by the Hub"])
def test_what_training_says_keeps_both_splits(
    folders: Path, tmp_path: Path, pack: Callable[..., str], form: str
) -> None:
    """A run looks into ``data.root/train``; shards of that folder alone would have no val."""
    root = tmp_path / "set"
    train = as_dataset(folders, classes_in(folders))
    val = as_dataset(folders.parent / "val", classes_in(folders))
    if form == "saved to disk":
        datasets.DatasetDict({"train": train, "validation": val}).save_to_disk(root)
    else:
        for split, data in (("train", train), ("validation", val)):
            (root / split).mkdir(parents=True)
            data.to_parquet(root / split / "0000.parquet")
    with pytest.raises(UserError) as caught:
        look_at_images(Config.model_validate(tiny_run(root, tmp_path)))
    kind = "Arrow" if form == "saved to disk" else "Parquet"
    assert f"{root}: {kind} files, out of which no image" in str(caught.value)
    assert f"tpp shards {root} --output DIR, and then use DIR" in str(caught.value)
    if form == "saved to disk":
        assert refused(Input(next((root / "train").glob("*.arrow")))).count("Arrow files") == 1
    pack(root, "--output", tmp_path / "out")  # word for word
    look_at_images(Config.model_validate(tiny_run(tmp_path / "out", tmp_path)))


def test_one_data_set_saved_to_disk_is_named_itself(folders: Path, tmp_path: Path) -> None:
    saved = tmp_path / "train"
    as_dataset(folders, classes_in(folders)).save_to_disk(saved)
    assert refused(Input(saved)).startswith(f"{saved}: Arrow files, out of which")


def test_without_pyarrow(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    message = _no_tables(hub / "data" / "train-*.parquet")
    assert message.endswith("needs pyarrow to be read: pip install pyarrow")
