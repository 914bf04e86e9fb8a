"""Real photos for the tests of this folder."""

import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_run import make_tiny_data

from data_pipelines.images.image_index import ImageIndex, scan_class_folders
from tpp.common.errors import run_command

Run = Callable[..., str]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders of tiny images."""
    return make_tiny_data(tmp_path_factory.mktemp("tiny")) / "train"


@pytest.fixture(scope="session")
def unpack_photos(
    shared_data: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], ImageIndex]:
    """Unpack so many full-size ImageNet photos into class folders, grey ones among them."""

    def unpack(count: int) -> ImageIndex:
        root = tmp_path_factory.mktemp("photos")
        grey = ("acoustic_guitar", "beaker")
        with tarfile.open(shared_data("imagenet-sample-500.tar")) as archive:
            members = [member for member in archive.getmembers() if member.isfile()]
            few = [member for member in members if any(name in member.name for name in grey)]
            few += [member for member in members if member not in few][: count - len(grey)]
            archive.extractall(root, few, filter="data")
        index = scan_class_folders(root / "imagenet-sample")
        assert len(index) == count
        return index

    return unpack


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run ``tpp prepare`` here; what it prints."""
    from data_pipelines.prepare import main

    def command(*arguments: object) -> str:
        monkeypatch.setattr("sys.argv", ["prepare", *map(str, arguments)])
        capsys.readouterr()
        run_command(main)
        return capsys.readouterr().out

    return command


@pytest.fixture
def refused(run: Run, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command, which must end in one line of error; that line."""

    def command(*arguments: object) -> str:
        with pytest.raises(SystemExit) as caught:
            run(*arguments)
        assert caught.value.code == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1
        return err

    return command
