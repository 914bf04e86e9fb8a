"""What lies in a data set's folder and is not taken is said, and can be taken."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from data_pipelines import index as index_command
from data_pipelines import shards as shards_command
from data_pipelines.images.folders import FURTHER_SUFFIXES, IMAGE_SUFFIXES
from data_pipelines.images.header import find_damage
from data_pipelines.images.image_index import (
    INDEX_FILE,
    check_fits,
    load_index,
    open_images,
    parts_of,
    scan_class_folders,
)
from tpp.common.errors import UserError, run_command

Run = Callable[..., tuple[int, str, str]]
NAMES = ["a.jpg", "b.JPG", "c.jpeg", "d.webp", "e.bmp", "f.TIF", "g.jfif", "h.jpe", "sub/i.jpg"]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process: exit code, standard output and standard error."""

    def run_it(command: Callable[[], None], *arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["command", *map(str, arguments)])
        code = 0
        try:
            run_command(command)
        except SystemExit as ended:
            code = int(ended.code or 0)
        return code, *capsys.readouterr()

    return run_it


def _write(root: Path, *names: str) -> Path:
    formats = {".webp": "WEBP", ".bmp": "BMP", ".tif": "TIFF"}
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.new("RGB", (16, 16), (number * 9 % 256, 99, 30))
        image.save(path, formats.get(path.suffix.lower(), "JPEG"))
    return root


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Two classes with images of every ending, and two loose ones."""
    names = [f"{label}/{name}" for label in ("cat", "dog") for name in NAMES]
    _write(tmp_path / "data", *names, "loose.jpg")
    (tmp_path / "data" / "cat" / "labels.xml").write_text("x")
    (tmp_path / "data" / "cat" / "README").write_text("x")
    (tmp_path / "data" / "cat" / ".hidden.webp").write_text("x")
    return tmp_path / "data"


def _fact(out: str, name: str) -> str:
    (line,) = [line for line in out.splitlines() if line.startswith(name)]
    return line.removeprefix(name).strip()


COUNTS = {".webp": 2, ".bmp": 2, ".tif": 2, ".jfif": 2, ".jpe": 2, "in sub-folders": 2}
COUNTS |= {".xml": 1, "": 1, "beside the class folders": 1}


def test_it_is_counted_by_ending_and_place(mixed: Path, run: Run) -> None:
    index = scan_class_folders(mixed)
    assert len(index) == 6
    assert {what: count for what, count, _ in index.passed_over} == COUNTS
    assert all((mixed / example).exists() for _, _, example in index.passed_over)
    code, out, _ = run(index_command.main, mixed)
    assert code == 0
    said = _fact(out, "passed over")
    for what, count in COUNTS.items():
        assert f"{count} {what or 'without an ending'} (" in said
    assert _fact(out, "to take them") == "index again with --also jpe,jfif,webp,bmp,tif --nested"


def test_the_options_that_are_offered_take_what_torchvision_and_timm_take(
    mixed: Path, run: Run
) -> None:
    run(index_command.main, mixed)
    few = open_images(mixed)
    (mixed / "cat" / ".hidden.webp").unlink()  # which they would take
    code, out, _ = run(index_command.main, mixed, "--also", "jpe,jfif,webp,bmp,tif", "--nested")
    assert code == 0
    assert "to take them" not in out
    index = open_images(mixed)
    theirs = {str(Path(path).relative_to(mixed)) for path, _ in ImageFolder(str(mixed)).samples}
    assert theirs | {f"{c}/{n}" for c in ("cat", "dog") for n in ("g.jfif", "h.jpe")} == {
        *index.files
    }
    assert index.fingerprint != few.fingerprint  # a run that was begun notices
    assert not index.broken.any()
    assert {what for what, _, _ in index.passed_over} == {".xml", "", "beside the class folders"}


def test_an_index_is_compared_by_its_own_endings(mixed: Path, run: Run) -> None:
    run(index_command.main, mixed, "--also", "WEBP, .bmp", "--nested")
    index = load_index(mixed / INDEX_FILE, mixed)
    check_fits(index)
    assert index.wanted.suffixes == (*IMAGE_SUFFIXES, ".webp", ".bmp")
    _write(mixed, "cat/sub/deeper/new.webp")
    with pytest.raises(UserError, match=r"cat/sub/deeper/new\.webp is new"):
        check_fits(index)
    (mixed / "cat/sub/deeper/new.webp").rename(mixed / "cat" / "new.tif")
    check_fits(index)  # of an ending that it does not take


def test_an_index_that_has_nothing_to_say_is_as_it_always_was(tmp_path: Path, run: Run) -> None:
    run(index_command.main, _write(tmp_path, "a/1.jpg", "b/1.jpg"))
    text = (tmp_path / INDEX_FILE).read_bytes()
    assert b"wanted" not in text
    assert b"passed_over" not in text
    assert open_images(tmp_path).said_of_the_rest() is None


def test_shards_say_it_and_hand_it_on(mixed: Path, run: Run, tmp_path: Path) -> None:
    code, out, _ = run(shards_command.main, mixed, "--output", tmp_path / "shards")
    assert code == 0
    assert f"{mixed}: passed over: 2 .bmp" in out
    assert f"tpp index {mixed} --also " in out
    said = open_images(tmp_path / "shards").said_of_the_rest()
    assert said is not None
    assert "2 .webp (cat/d.webp)" in said
    assert "--also" not in said


@pytest.mark.parametrize("command", ["index", "shards"])
def test_a_part_without_class_folders_is_named(tmp_path: Path, run: Run, command: str) -> None:
    data = _write(tmp_path / "data", "train/a/1.jpg", "train/b/1.jpg", "val/1.jpg", "val/2.webp")
    if command == "index":
        code, out, _ = run(index_command.main, data)
    else:
        code, out, _ = run(shards_command.main, data, "--output", tmp_path / "shards")
    assert code == 0
    assert f"{data}/val: left out: it holds 2 images but no class folders" in out
    with pytest.raises(UserError, match=r"val: no class folders; .*; its 2 images lie beside"):
        scan_class_folders(data / "val")


def test_a_part_with_a_stray_image_is_a_part_all_the_same(tmp_path: Path) -> None:
    _write(tmp_path, "train/a/1.jpg", "val/a/1.jpg", "val/stray.jpg")
    assert parts_of(tmp_path) == [tmp_path / "train", tmp_path / "val"]
    assert scan_class_folders(tmp_path / "val").passed_over[0][:2] == (
        "beside the class folders",
        1,
    )


def test_a_class_of_other_endings_says_how_to_take_them(tmp_path: Path) -> None:
    _write(tmp_path, "a/1.jpg", "b/1.webp", "b/2.webp")
    with pytest.raises(UserError) as caught:
        scan_class_folders(tmp_path)
    assert "b: class folder without images (it holds 2 .webp (b/1.webp); " in str(caught.value)
    assert "--also webp" in str(caught.value)


def test_an_ending_that_is_no_image_s_is_refused(tmp_path: Path, run: Run) -> None:
    code, _, err = run(index_command.main, _write(tmp_path, "a/1.jpg"), "--also", "webp,heic")
    assert code == 2
    assert err.startswith("error: --also: .heic is no ending of images that are read; there are ")
    assert err.count("\n") == 1


def test_links_in_a_circle_are_followed_once(tmp_path: Path) -> None:
    _write(tmp_path, "a/1.jpg", "a/sub/2.jpg")
    (tmp_path / "a" / "sub" / "up").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "gone.jpg").symlink_to(tmp_path / "nowhere")  # a file that cannot be read
    index = scan_class_folders(tmp_path)
    assert [*index.files] == ["a/1.jpg", "a/gone.jpg"]
    assert index.passed_over == (("in sub-folders", 1, "a/sub/2.jpg"),)


@pytest.mark.parametrize("ending", FURTHER_SUFFIXES)
def test_every_ending_that_is_offered_is_read(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"image{ending}"
    formats = {".jpe": "JPEG", ".jfif": "JPEG"}
    pixels = np.zeros((8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(path, formats.get(ending))
    assert find_damage(path.read_bytes(), decode=True) is None


def test_the_page_names_every_ending() -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    for ending in (*IMAGE_SUFFIXES, *FURTHER_SUFFIXES):
        assert re.search(rf"`\{ending}`", page), ending
