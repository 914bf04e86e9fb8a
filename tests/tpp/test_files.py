import os
import threading
from pathlib import Path

import pytest

from tpp.common import files


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    files.write_whole(path, "new é")
    assert path.read_bytes() == "new é".encode()
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("old")

    def full(_: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "sync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_whole(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_rename_that_is_seen_late_or_answered_with_an_error(tmp_path, monkeypatch):
    replace, path = os.replace, tmp_path / "file"
    timers = []

    def late(source, target):
        timers.append(threading.Timer(0.2, replace, (source, target)))
        timers[-1].start()

    def lost(source, target):
        replace(source, target)
        raise FileNotFoundError(2, "No such file or directory")

    for way, content in ((late, "first"), (late, "second"), (lost, "third")):
        monkeypatch.setattr(os, "replace", way)
        files.write_whole(path, content)
        assert path.read_text() == content
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_rename_that_never_comes(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr(os, "replace", lambda source, target: None)
    with pytest.raises(OSError, match="renamed into place, but is not there"):
        files.write_whole(tmp_path / "file", "new")
    assert list(tmp_path.iterdir()) == []


def test_a_rename_in_a_folder_that_vanished_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_PATIENCE_SECONDS", 1e9)
    gone = tmp_path / "gone"
    with pytest.raises(FileNotFoundError):
        files.move(gone / "aside", gone / "file", lambda: False)


def test_what_is_aside_is_told_by_its_name(tmp_path):
    assert files.is_aside(files.aside_of(tmp_path / "model.safetensors"))
    assert files.is_aside(files.aside_of(tmp_path / "two\nlines"))
    for name in ("model.12.tmp", ".model.tmp", ".model.x.tmp", ".12.tmp", ".model.12.tmp.x"):
        assert not files.is_aside(tmp_path / name)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (205_140_000, "205.1 MB")],
)
def test_bytes_in_words(count, text):
    assert files.in_bytes(count) == text


def test_a_forgotten_file_is_still_the_same(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 10_000)
    files.sync(path)
    files.forget(path)
    assert path.read_bytes() == b"x" * 10_000
