"""Small archives of the official structures, made of real images."""

import gzip
import io
import tarfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.io import savemat

Files = Iterable[tuple[str, bytes]]


def member(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, to: str = "") -> bytes:
    """A tar header as such, of any name and kind."""
    header = tarfile.TarInfo(name)
    header.size, header.type, header.linkname = size, kind, to
    return header.tobuf(tarfile.GNU_FORMAT)


def tar_bytes(files: Files) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in files:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return made.getvalue()


def write_tar(path: Path, files: Files) -> Path:
    """A plain tar, or a .tar.gz if it is called so."""
    content = tar_bytes(files)
    path.write_bytes(gzip.compress(content, 1) if path.suffix in (".gz", ".tgz") else content)
    return path


def write_zip(path: Path, files: Files) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files:
            archive.writestr(zipfile.ZipInfo(name), content)
    return path


def write_train(path: Path, images: Mapping[str, Mapping[str, bytes]]) -> Path:
    """ILSVRC2012_img_train.tar: a tar in the tar for each class."""
    return write_tar(
        path, [(f"{wnid}.tar", tar_bytes(some.items())) for wnid, some in images.items()]
    )


def write_devkit(path: Path, counts: Mapping[str, int], truth: Iterable[str]) -> Path:
    """The devkit; its numbers of classes are not in the order of the names, as in the real one.

    Args:
        path: where to write it.
        counts: training images of each class.
        truth: class of each validation image.
    """
    wnids = sorted(counts, key=lambda wnid: wnid[::-1])
    rows = [(number, wnid, 0, counts[wnid]) for number, wnid in enumerate(wnids, 1)]
    rows.append((len(rows) + 1, "n00001740", len(rows), 0))
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O")]
    fields += [("num_children", "O"), ("children", "O"), ("wordnet_height", "O")]
    fields += [("num_train_images", "O")]
    synsets = np.zeros((len(rows), 1), fields)
    for place, (number, wnid, children, count) in enumerate(rows):
        below = np.arange(1, children + 1, dtype=np.uint16)
        synsets[place, 0] = (number, wnid, "words", "gloss", children, below, 1, count)
    mat = io.BytesIO()
    savemat(mat, {"synsets": synsets})
    numbers = {wnid: number for number, wnid, _, _ in rows}
    lines = "".join(f"{numbers[wnid]}\n" for wnid in truth)
    top = "ILSVRC2012_devkit_t12"
    return write_tar(
        path,
        [
            (f"{top}/readme.txt", b"see data/"),
            (f"{top}/data/meta.mat", mat.getvalue()),
            (f"{top}/data/ILSVRC2012_validation_ground_truth.txt", lines.encode()),
        ],
    )


def cifar_records(labels: NDArray[np.uint8], pixels: NDArray[np.uint8]) -> bytes:
    """CIFAR's binary format: label bytes (n, 1 or 2) before pixels (n, 32, 32, 3)."""
    planes = pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1)
    return np.concatenate([labels, planes], axis=1).astype(np.uint8).tobytes()


def idx_bytes(values: NDArray[np.uint8]) -> bytes:
    """MNIST's format, gzipped."""
    shape = np.array(values.shape, ">i4").tobytes()
    return gzip.compress(bytes([0, 0, 8, values.ndim]) + shape + values.tobytes())
