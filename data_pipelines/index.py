"""The images of a data set in class folders: ROOT/<class>/<image>.jpg.

``python -m data_pipelines.index DIR`` prints what a folder holds.
"""

import argparse
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tpp.errors import UserError, run_command

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
# Listing a folder of a network file system is all waiting; local ones do not mind.
_SCAN_THREADS = 16


@dataclass(frozen=True, eq=False)
class ImageIndex:
    """Every image of a data set, in an order that depends on the names alone.

    Attributes:
        root: the folder that holds the class folders.
        files: paths relative to ``root``, by class and then by name.
        labels: class number of each file, int64, shape (len(files),).
        classes: names of the class folders, sorted; the label is the position in this list.
    """

    root: Path
    files: list[str]
    labels: NDArray[np.int64]
    classes: list[str]

    def __len__(self) -> int:
        return len(self.files)

    @cached_property
    def fingerprint(self) -> str:
        """12 hex digits that change when a file or a label does; independent of ``root``."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(os.fsencode(file) + b"\0")
        digest.update(self.labels.astype("<i8").tobytes())
        return digest.hexdigest()[:12]


def scan_class_folders(root: str | os.PathLike[str]) -> ImageIndex:
    """List the images (.jpg, .jpeg, .png in any case) of the class folders in ``root``.

    Classes are the sorted folder names, as in torchvision's ImageFolder. Hidden files and folders
    are left out. No file is opened.

    Raises:
        UserError: ``root`` is not a readable folder, holds no class folders or no images, or a
            class folder has no images.
    """
    root = Path(root)
    layout = f"expected class folders such as {root}/<class>/<image>.jpg"
    classes = _visible(root, folders=True)
    if not classes:
        raise UserError(f"{root}: no class folders; {layout}")
    with ThreadPoolExecutor(_SCAN_THREADS) as pool:
        images = list(pool.map(lambda name: _image_names(root / name), classes))
    if not any(images):
        raise UserError(f"{root}: no images in its {len(classes)} folders; {layout}")
    for name, found in zip(classes, images, strict=True):
        if not found:
            raise UserError(
                f"{root / name}: class folder without images; "
                f"expected {', '.join(IMAGE_SUFFIXES)} files, or no such folder"
            )
    files = [
        f"{name}/{image}" for name, found in zip(classes, images, strict=True) for image in found
    ]
    counts = [len(found) for found in images]
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), counts)
    return ImageIndex(root, files, labels, classes)


def _image_names(folder: Path) -> list[str]:
    names = _visible(folder, folders=False)
    return [name for name in names if name.lower().endswith(IMAGE_SUFFIXES)]


def _visible(folder: Path, *, folders: bool) -> list[str]:
    """Sorted names of the folders, or else of the files, in ``folder`` that are not hidden."""
    try:
        with os.scandir(folder) as entries:
            return sorted(
                entry.name
                for entry in entries
                if not entry.name.startswith(".") and entry.is_dir() == folders
            )
    except OSError as error:
        raise UserError(f"{folder}: cannot list the data folder ({error.strerror})") from None


def main() -> None:
    """Print the number of classes and images of a folder and its fingerprint."""
    parser = argparse.ArgumentParser(
        prog="python -m data_pipelines.index", description="Say what a folder of images holds."
    )
    parser.add_argument("folder", metavar="DIR", help="folder with one folder of images per class")
    index = scan_class_folders(parser.parse_args().folder)
    counts = np.bincount(index.labels)
    smallest, largest = int(counts.argmin()), int(counts.argmax())
    print(f"classes      {len(index.classes)}")
    print(f"images       {len(index)}")
    print(f"smallest     {index.classes[smallest]} ({counts[smallest]} images)")
    print(f"largest      {index.classes[largest]} ({counts[largest]} images)")
    print(f"fingerprint  {index.fingerprint}")


if __name__ == "__main__":
    run_command(main)
