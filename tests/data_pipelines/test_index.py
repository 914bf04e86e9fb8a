from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import ImageFolder

from data_pipelines.index import main, scan_class_folders
from tpp.errors import UserError, run_command


def _touch(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def test_same_files_classes_and_labels_as_image_folder(tmp_path: Path) -> None:
    _touch(tmp_path, "b/2.JPEG", "b/10.jpg", "a/x.PNG", "a/é.jpeg", "a/notes.txt", "Z/1.jpg")
    index = scan_class_folders(tmp_path)
    folder = ImageFolder(str(tmp_path))
    assert index.classes == folder.classes
    theirs = [(str(Path(path).relative_to(tmp_path)), label) for path, label in folder.samples]
    assert list(zip(index.files, index.labels.tolist(), strict=True)) == theirs
    assert index.labels.dtype == np.int64
    assert len(index) == 5


def test_hidden_entries_and_loose_files_are_left_out(tmp_path: Path) -> None:
    _touch(tmp_path, "a/1.jpg", "a/._1.jpg", ".cache/2.jpg", "loose.jpg", "a/sub.jpg/3.jpg")
    index = scan_class_folders(tmp_path)
    assert index.files == ["a/1.jpg"]


def test_links_count_as_what_they_point_to(tmp_path: Path) -> None:
    real = _touch(tmp_path / "real", "1.jpg")
    root = _touch(tmp_path / "root", "a/1.jpg")
    (root / "b").symlink_to(real)
    assert scan_class_folders(root).files == ["a/1.jpg", "b/1.jpg"]


def test_fingerprint_follows_names_and_labels_only(tmp_path: Path) -> None:
    one = scan_class_folders(_touch(tmp_path / "one", "a/1.jpg", "b/2.jpg"))
    same = scan_class_folders(_touch(tmp_path / "same", "b/2.jpg", "a/1.jpg"))
    assert one.fingerprint == same.fingerprint
    renamed = scan_class_folders(_touch(tmp_path / "renamed", "a/1.jpg", "b/3.jpg"))
    more = scan_class_folders(_touch(tmp_path / "more", "a/1.jpg", "b/2.jpg", "b/3.jpg"))
    assert len({one.fingerprint, renamed.fingerprint, more.fingerprint}) == 3


@pytest.mark.parametrize(
    ("names", "named", "said"),
    [
        ([], "", "no class folders; expected class folders such as"),
        (["1.jpg"], "", "no class folders"),
        (["a/readme.txt", "b/readme.txt"], "", "no images in its 2 folders"),
        (["a/1.jpg", "b/readme.txt"], "/b", "class folder without images"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, names: list[str], named: str, said: str) -> None:
    _touch(tmp_path, *names)
    with pytest.raises(UserError) as caught:
        scan_class_folders(tmp_path)
    assert f"{tmp_path}{named}: " in str(caught.value)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_root_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent: cannot list .*No such file"):
        scan_class_folders(tmp_path / "absent")


def test_command_says_what_a_folder_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _touch(tmp_path, "cat/1.jpg", "dog/1.jpg", "dog/2.jpg")
    monkeypatch.setattr("sys.argv", ["index", str(tmp_path)])
    run_command(main)
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["classes", "2"],
        ["images", "3"],
        ["smallest", "cat", "(1", "images)"],
        ["largest", "dog", "(2", "images)"],
        ["fingerprint", scan_class_folders(tmp_path).fingerprint],
    ]


def test_command_ends_a_mistake_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["index", str(tmp_path / "absent")])
    with pytest.raises(SystemExit) as caught:
        run_command(main)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
