"""Real photos for the tests of this folder."""

import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipelines.images.image_index import ImageIndex, scan_class_folders


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
