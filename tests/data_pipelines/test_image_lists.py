"""Lists of images and their classes, in the forms that are about."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from other_forms import as_list, as_tars, classes_in, images_in, refused
from tiny_run import tiny_run

from data_pipelines import shards as shards_command
from data_pipelines.images.image_index import ImageIndex, scan_class_folders
from data_pipelines.images.source import read_bytes
from data_pipelines.sets.class_names import read_class_names
from data_pipelines.sets.image_lists import LIST_SUFFIXES
from data_pipelines.sets.inputs import Input, open_input
from tpp.common.errors import UserError, run_command
from train.config.config import Config
from train.data import look_at_images


def _same(index: ImageIndex, truth: ImageIndex) -> None:
    """The same images in the same order, of the same classes."""
    assert index.classes == truth.classes
    assert index.labels.tolist() == truth.labels.tolist()
    for image in range(len(truth)):
        assert Path(index.location(image).path).samefile(truth.location(image).path)


FORMS = {
    "train.csv": "{path},{label}",
    "quoted.csv": '"{path}","{label}"',
    "semicolons.csv": "{path};{label}",
    "train.tsv": "{path}\t{label}",
    "train.txt": "{path} {label}",
    "commas.txt": "{path},{label}",
    "train.lst": "{path}   {label}  ",
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_what_the_class_folders_are(folders: Path, tmp_path: Path, name: str) -> None:
    truth = scan_class_folders(folders)
    listing = as_list(folders, tmp_path / name, FORMS[name])
    index = open_input(Input(folders, listing=listing))
    _same(index, truth)
    assert index.fingerprint == truth.fingerprint  # so that a run may go on with the other form
    assert index.said_of_form() == f"{folders}: 96 images of the list {listing}"


@pytest.mark.parametrize(
    ("line", "head"),
    [
        ("{label},9,{path}", "label,size,path"),
        ("9,{path},{number}", "Unnamed: 0,File,Target"),
        ("{path} {number}", "path label"),
        ("{number},{path}", "class_id,filename"),
        ("{number}.0,{path}", "class_id,filename"),
    ],
)
def test_columns_are_found_by_their_names(
    folders: Path, tmp_path: Path, line: str, head: str
) -> None:
    truth = scan_class_folders(folders)
    (tmp_path / "classes.txt").write_text("\n".join(truth.classes))
    listing = as_list(folders, tmp_path / ("all.csv" if "," in line else "all.txt"), line)
    listing.write_text("\ufeff" + head + "\r\n" + listing.read_text().replace("\n", "\r\n"))
    _same(open_input(Input(folders, listing, class_names=tmp_path / "classes.txt")), truth)


def test_columns_of_other_names(folders: Path, tmp_path: Path) -> None:
    listing = as_list(folders, tmp_path / "all.csv", "{path},{label},x")
    listing.write_text("Photo,Bird,note\n" + listing.read_text())
    source = Input(folders, listing, path_key="Photo", label_key="bird")
    _same(open_input(source), scan_class_folders(folders))
    message = refused(Input(folders, listing))
    assert "all.csv, line 1: 3 columns ('Photo', 'Bird', 'note')" in message
    assert "data.path_key and data.label_key" in message
    assert "no column 'Species'; it has 'Photo'" in refused(
        Input(folders, listing, path_key="Photo", label_key="Species")
    )


def test_kaggles_list_of_imagenet(folders: Path, tmp_path: Path) -> None:
    """Without endings; the class is followed by boxes. All images lie in one folder."""
    flat = tmp_path / "val"
    flat.mkdir()
    lines = ["ImageId,PredictionString"]
    for name, path in images_in(folders):
        shutil.copy(path, flat / f"ILSVRC_{name}_{path.stem}.JPEG")
        lines.append(f"ILSVRC_{name}_{path.stem},{name} 85 1 499 272 ")
    (tmp_path / "LOC_val_solution.csv").write_text("\n".join(lines) + "\n")
    index = open_input(Input(flat, tmp_path / "LOC_val_solution.csv"))
    assert index.classes == classes_in(folders)
    assert all(
        f"_{index.classes[label]}_" in name
        for name, label in zip(index.files, index.labels.tolist(), strict=True)
    )


def test_labels_alone_are_of_the_images_by_their_names(folders: Path, tmp_path: Path) -> None:
    """As ILSVRC2012_validation_ground_truth.txt has them; its numbers begin at 1."""
    flat = tmp_path / "images" / "val"
    flat.mkdir(parents=True)
    names = ["x", *classes_in(folders)]
    truth = []
    for number, (name, path) in enumerate(reversed(images_in(folders))):
        shutil.copy(path, flat / f"val_{number:08}.JPEG")
        truth.append(names.index(name))
    listing = tmp_path / "images" / "val.txt"
    listing.write_text("\n".join(map(str, truth)) + "\n")
    ids = {str(number): name for number, name in enumerate(names) if number}
    (tmp_path / "ids.json").write_text(json.dumps(ids))
    for source in (Input(flat, listing), Input(listing)):  # the folder beside it has its name
        assert "val.txt, line" in refused(source)
        index = open_input(Input(source.place, source.listing, class_names=tmp_path / "ids.json"))
        assert index.classes == names[1:]
        found = {
            name: label + 1 for name, label in zip(index.files, index.labels.tolist(), strict=True)
        }
        assert [found[name] for name in sorted(found)] == truth
    listing.write_text("\n".join(map(str, truth[1:])))
    assert f"95 labels without paths, and {flat} has 96 images" in refused(Input(flat, listing))


def test_paths_from_elsewhere(folders: Path, tmp_path: Path) -> None:
    """Relative to the list, out of its folder, and absolute."""
    truth = scan_class_folders(folders)
    (tmp_path / "lists").mkdir()
    (tmp_path / "images").symlink_to(folders)
    for start in ("../images/", f"{folders}/", "../lists/../images/./"):
        listing = as_list(folders, tmp_path / "lists" / "a.csv", start + "{path},{label}")
        index = open_input(Input(listing))
        _same(index, truth)
        assert not any(".." in name for name in index.files)


BAD = {
    "a label less": (
        "disc/x.jpg,cat\ndisc/y.jpg\n",
        "line 2: 1 fields, where the first line has 2",
    ),
    "no label": ("disc/x.jpg,cat\ndisc/y.jpg,\n", "line 2: '' is no label"),
    "no path": ("disc/x.jpg,cat\n,dog\n", "line 2: no path of an image"),
    "absent": ("disc/x.jpg,cat\n\ndisc/z.jpg,cat\n", "line 3: no image disc/z.jpg in "),
    "first absent": ("disc/z.jpg,cat\n", "line 1: no image disc/z.jpg in "),
    "twice": (
        "disc/x.jpg,cat\ndisc/y.jpg,cat\ndisc/x.jpg,dog\n",
        "line 3: disc/x.jpg is in line 1",
    ),
    "a number": ("disc/x.jpg,cat\ndisc/y.jpg,3\n", "line 1: its label is 'cat', that of "),
    "a gap": ("disc/x.jpg,0\ndisc/y.jpg,2\n", "line 2: its label is 2, and no image has 1"),
    "from one": ("disc/x.jpg,1\ndisc/y.jpg,2\n", "line 1: its label is 1, and no image has 0"),
    "negative": ("disc/x.jpg,-1\ndisc/y.jpg,0\n", "line 1: its label -1 is no class"),
    "a quote": ('disc/x.jpg,cat\n"disc/y.jpg,cat\n', "line 2: unexpected end of data"),
    "empty": ("\n \n", "an empty list; expected a path and a label in each line"),
    "binary": ("\0\0", "expected a path and a label in each line"),
    "columns": ("path,label,x\ndisc/x.jpg,cat\n", "line 2: 2 fields, where the first line has 3"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_list_is_told_with_its_line(tmp_path: Path, case: str) -> None:
    (tmp_path / "disc").mkdir()
    for name in ("x.jpg", "y.jpg"):
        (tmp_path / "disc" / name).touch()
    text, said = BAD[case]
    (tmp_path / "list.csv").write_text(text)
    message = refused(Input(tmp_path / "list.csv"))
    assert message.startswith(f"{tmp_path}/list.csv")
    assert said in message


def test_a_label_that_is_no_class(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").touch()
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    for label, known in (("cow", "which names 2 classes: 'cat', 'dog'"), ("2", "numbers 0 to 1")):
        (tmp_path / "list.csv").write_text(f"x.jpg,{label}\n")
        message = refused(Input(tmp_path / "list.csv", class_names=tmp_path / "classes.txt"))
        assert message.startswith(f"{tmp_path}/list.csv, line 1: its label '{label}' is no class")
        assert message.endswith(known)


def test_a_list_that_is_not_there(tmp_path: Path) -> None:
    message = refused(Input(tmp_path, tmp_path / "train.csv"))
    assert message == f"{tmp_path}/train.csv: cannot read the list of images (No such file or " + (
        "directory)"
    )


@pytest.mark.parametrize(
    ("text", "names", "numbers"),
    [
        ("cat\ndog\n", ["cat", "dog"], {0: 0, 1: 1}),
        ('["cat", "dog"]', ["cat", "dog"], {0: 0, 1: 1}),
        ('{"2": "dog", "1": "cat"}', ["cat", "dog"], {1: 0, 2: 1}),
        ('{"dog": 11, "cat": 2}', ["cat", "dog"], {2: 0, 11: 1}),
        ('{"0": ["n01", "tench"], "1": ["n02", "x"]}', ["n01", "n02"], {0: 0, 1: 1}),
    ],
)
def test_class_names(tmp_path: Path, text: str, names: list[str], numbers: dict[int, int]) -> None:
    (tmp_path / "names").write_text(text)
    found = read_class_names(tmp_path / "names")
    assert (found.names, found.numbers) == (names, numbers)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cat\n\ndog\n", "line 2: '' is no name of a class"),
        ("cat\ndog\ncat\n", "names class 'cat' twice"),
        ("[]", "expected class names"),
        ("[1, 2]", "expected class names"),
        ('{"a": "cat"}', "expected class names"),
        ('{"1": "cat", "01": "dog"}', "expected class names"),
        ("{", "not JSON"),
        ("", "line 1: '' is no name of a class"),
    ],
)
def test_bad_class_names(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "names").write_text(text)
    with pytest.raises(UserError) as caught:
        read_class_names(tmp_path / "names")
    assert str(caught.value).startswith(f"{tmp_path}/names") and said in str(caught.value)


def test_class_folders_in_the_order_of_class_names(folders: Path, tmp_path: Path) -> None:
    truth = scan_class_folders(folders)
    names = [*reversed(truth.classes), "none of them"]
    (tmp_path / "classes.txt").write_text("\n".join(names))
    index = open_input(Input(folders, class_names=tmp_path / "classes.txt"))
    assert index.classes == names
    for image in range(len(index)):
        assert Path(index.location(image).path).parent.name == names[index.labels[image]]
    (tmp_path / "classes.txt").write_text("\n".join(names[1:]))
    message = refused(Input(folders, class_names=tmp_path / "classes.txt"))
    assert message.startswith(f"{folders}/{names[0]}: its label '{names[0]}' is no class of ")


_words = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "Zs")), min_size=1)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        _words.map(lambda text: text.replace("/", "_").strip(". ")[:40].strip()).filter(bool),
        st.sampled_from(["a cat, black", 'a "dog"', "Kuh; bunt", "Wölfe"]),
        min_size=1,
        max_size=8,
    )
)
def test_any_names_survive_the_csv_module(
    tmp_path_factory: pytest.TempPathFactory, images: dict[str, str]
) -> None:
    import csv

    folder = tmp_path_factory.mktemp("csv")
    rows = [(f"{stem}.png", label) for stem, label in images.items()]
    for name, _ in rows:
        (folder / name).write_bytes(name.encode())
    with (folder / "all.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *rows])
    index = open_input(Input(folder / "all.csv"))
    found = {
        read_bytes(index.location(image)).tobytes().decode(): index.classes[label]
        for image, label in enumerate(index.labels.tolist())
    }
    assert found == dict(rows)


def test_a_list_is_packed_into_shards(
    folders: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    as_list(folders, tmp_path / "list.csv")
    command = ["shards", str(folders), "--list", str(tmp_path / "list.csv"), "--threads", "1"]
    for more in ([], ["--verify"]):
        monkeypatch.setattr("sys.argv", [*command, "--output", str(tmp_path / "out"), *more])
        run_command(shards_command.main)
    assert "96, all as they should be" in capsys.readouterr().out
    packed, truth = open_input(Input(tmp_path / "out")), scan_class_folders(folders)
    assert packed.fingerprint == truth.fingerprint
    assert packed.classes == truth.classes


def test_the_page_names_every_ending() -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    assert all(f"`{ending}`" in page for ending in LIST_SUFFIXES)


def _classes_refused(root: Path, out: Path, **data: str) -> str:
    config = tiny_run(root, out)
    config["data"] |= data
    with pytest.raises(UserError) as caught:
        look_at_images(Config.model_validate(config))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_class_of_one_side_is_named_with_its_line(folders: Path, tmp_path: Path) -> None:
    root, lists = folders.parent, {}
    for part in ("train", "val"):
        lists[f"{part}_list"] = str(as_list(root / part, tmp_path / f"{part}.csv"))
    train, val = Path(lists["train_list"]), Path(lists["val_list"])
    lines, odd = val.read_text().splitlines(), classes_in(folders)[0]
    # A header, the columns of which are named by the run: lines count from it.
    val.write_text("\n".join(["photo,kind", *lines[:4], f"{lines[4].split(',')[0]},zebra"]) + "\n")
    train.write_text("photo,kind\n" + train.read_text())
    keys = {"path_key": "photo", "label_key": "kind"}
    said = _classes_refused(root, tmp_path, **lists, **keys)
    assert said.startswith(f"{val}, line 6: class 'zebra' is not in {train}")
    # A class that only training has.
    val.write_text("\n".join(["photo,kind", *(line for line in lines if odd not in line)]) + "\n")
    said = _classes_refused(root, tmp_path, **lists, **keys)
    assert said.startswith(f"{train}, line 2: class {odd!r} is not in {val}")


def test_a_class_of_one_side_is_named_with_its_member_or_folder(
    folders: Path, tmp_path: Path
) -> None:
    root, odd = tmp_path / "data", classes_in(folders)[0]
    shutil.copytree(folders.parent, root)
    (root / "val" / odd).rename(root / "val" / "zebra")
    said = _classes_refused(root, tmp_path)
    assert (
        f"class folder 'zebra' is in only one of 'train' and 'val'; it is found at {root}/val/zebra"
        in said
    )
    for part in ("train", "val"):
        as_tars(root / part, tmp_path / "tars" / part, 1, label="label")
    said = _classes_refused(tmp_path / "tars", tmp_path)
    tar = tmp_path / "tars" / "val" / "shard-000000.tar"
    first = sorted((root / "val" / "zebra").iterdir())[0].name
    assert said.startswith(f"{tar}: zebra/{first}: class 'zebra' is not in {tmp_path}/tars/train")
