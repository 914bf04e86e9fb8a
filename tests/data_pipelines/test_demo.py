import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines.demo import CLASSES, SHAPES, TEXTURES, generate_demo, main
from data_pipelines.images.image_index import scan_class_folders
from data_pipelines.settings import DemoData
from tpp.common.errors import UserError, run_command

SMALL = DemoData(classes=3, train_per_class=4, val_per_class=2)


def _contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def _pixels(root: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    index = scan_class_folders(root / split)
    images = np.stack([np.asarray(Image.open(index.root / file)) for file in index.files])
    return images, index.labels


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("demo") / "data"
    generate_demo(root, DemoData(train_per_class=200, val_per_class=30))
    return root


def test_layout(demo: Path) -> None:
    for split, count in (("train", 200), ("val", 30)):
        index = scan_class_folders(demo / split)
        assert index.classes == sorted(CLASSES) == sorted({**SHAPES, **TEXTURES})
        assert np.bincount(index.labels).tolist() == [count] * 10
        image = Image.open(index.root / index.files[0])
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (32, 32))


def test_same_bytes_for_a_seed_and_others_for_another(tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        generate_demo(tmp_path / name, SMALL.model_copy(update={"seed": seed}))
    one, same, other = (_contents(tmp_path / name) for name in ("one", "same", "other"))
    assert one == same
    assert one.keys() == other.keys()
    assert all(one[file] != other[file] for file in one)


def test_an_image_does_not_depend_on_how_many_there_are(tmp_path: Path) -> None:
    generate_demo(tmp_path / "few", SMALL)
    generate_demo(tmp_path / "more", DemoData(classes=4, train_per_class=6, val_per_class=3))
    few, more = _contents(tmp_path / "few"), _contents(tmp_path / "more")
    assert all(few[file] == more[file] for file in few if file.endswith(".jpg"))


def test_no_image_is_there_twice(demo: Path) -> None:
    images = np.concatenate([_pixels(demo, split)[0] for split in ("train", "val")])
    assert len({image.tobytes() for image in images}) == 2300


def test_colour_does_not_give_the_class_away(demo: Path) -> None:
    # The best linear guess from colour averages and spreads; chance is 10%.
    def features(images: np.ndarray) -> np.ndarray:
        means = images.mean((1, 2)) / 255
        return np.concatenate([means, means**2, np.ones((len(images), 1))], axis=1)

    train, labels = _pixels(demo, "train")
    weights = np.linalg.lstsq(features(train), np.eye(10)[labels], rcond=None)[0]
    val, val_labels = _pixels(demo, "val")
    assert ((features(val) @ weights).argmax(1) == val_labels).mean() < 0.2


def test_written_once_and_left_alone(tmp_path: Path) -> None:
    root = tmp_path / "deep" / "demo"
    generate_demo(root, SMALL)
    image = next(root.rglob("*.jpg"))
    image.write_bytes(b"touched")
    generate_demo(root, SMALL)
    assert image.read_bytes() == b"touched"
    assert [path.name for path in root.parent.iterdir()] == ["demo"]


def test_several_writers_at_once_make_one_folder(tmp_path: Path) -> None:
    root = tmp_path / "demo"
    with ThreadPoolExecutor(4) as pool:
        writers = [pool.submit(generate_demo, root, SMALL) for _ in range(4)]
    assert [writer.result() for writer in writers] == [None] * 4
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]
    assert len(list(root.rglob("*.jpg"))) == 18


def test_an_unwritable_place_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"demo: cannot write the demo data \(File exists\)"):
        generate_demo(tmp_path / "file" / "demo", SMALL)


def test_other_settings_or_other_data_are_a_mistake(tmp_path: Path) -> None:
    generate_demo(tmp_path / "demo", SMALL)
    with pytest.raises(UserError, match=r"demo: holds demo data with other settings"):
        generate_demo(tmp_path / "demo", SMALL.model_copy(update={"seed": 1}))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(UserError, match=r"mine: exists and is not demo data"):
        generate_demo(tmp_path / "mine", SMALL)
    assert _contents(tmp_path / "mine") == {"thesis.txt": b""}


def test_more_classes_than_there_are_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="demo data: classes must be 2 to 10, not 11"):
        generate_demo(tmp_path / "demo", DemoData(classes=11))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("classes", "1", "classes must be 2 to 10, not 1"),
        ("classes", "11", "classes must be 2 to 10, not 11"),
        ("train-per-class", "0", "needs 1 image per class or more, of 8 pixels or more"),
        ("image-size", "7", "needs 1 image per class or more, of 8 pixels or more"),
    ],
)
def test_options_out_of_range_are_a_mistake(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    option: str,
    value: str,
    said: str,
) -> None:
    monkeypatch.setattr("sys.argv", ["demo", str(tmp_path / "demo"), f"--{option}", value])
    with pytest.raises(SystemExit):
        run_command(main)
    assert capsys.readouterr().err == f"error: demo data: {said}\n"
    assert list(tmp_path.iterdir()) == []


def test_command_writes_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "demo"
    arguments = ["--classes", "2", "--train-per-class", "3", "--val-per-class", "1"]
    monkeypatch.setattr("sys.argv", ["demo", str(root), *arguments])
    run_command(main)
    said = f"{root}: 2 classes, 6 training and 2 validation images\n"
    assert capsys.readouterr().out == said
    assert json.loads((root / "demo.json").read_text())["classes"] == 2
