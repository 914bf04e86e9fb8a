"""Images divided into some for training and some for validation, by their names alone.

Which image is of which part is a pure function of class, name and seed: the same for everyone, and
where images are added most of the others keep their part.
"""

import os
import re
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipelines.images.folders import byte_size
from data_pipelines.images.image_index import ImageIndex, scan_class_folders
from data_pipelines.images.names import Names
from data_pipelines.sets.claim import progress_bar
from data_pipelines.sets.foreign_tars import tars_in
from data_pipelines.sets.inputs import Input, open_input, open_tables
from data_pipelines.sets.preparation import Prepared, ShardSettings, Work
from tpp.common.errors import UserError, printable

SHARE = 0.1
_DIVISION = re.compile(
    r"(?P<name>.*)-(?P<images>[0-9a-f]{12})-(?P<val>[0-9.]+(?:e-[0-9]+)?)-(?P<seed>-?[0-9]+)",
    re.DOTALL,
)


def prepare_split(
    out: Path,
    source: Path | Input,
    *,
    share: float = SHARE,
    seed: int = 0,
    shards: ShardSettings | None = None,
    threads: int | None = None,
) -> list[Prepared]:
    """Copy images that are not divided yet into class folders in ``train`` and ``val``.

    Args:
        out: the folder to make or to go on with; not within ``source``.
        source: a folder with one folder of images per class, or what others have made: tars for
            WebDataset, a list, or Parquet files; nothing in it is changed.
        share: of each class that goes to ``val``: rounded, at least one image and not all of them.
        seed: another seed is another division.
        shards, threads: see :func:`data_pipelines.prepare.prepare_small`.

    Returns:
        What there is now; nothing if all of it was there before.

    Raises:
        UserError: the share is not within 0 and 1, a class has fewer than two images, ``source`` is
            divided already, ``out`` lies in it or holds something else, or writing fails.
    """
    source = source if isinstance(source, Input) else Input(source)
    folder = source.place
    if not 0 < share < 1:
        raise UserError(f"--val {share:g}: must be a share between 0 and 1, such as 0.1")
    if source.listing is None and out.absolute().is_relative_to(folder.absolute()):
        raise UserError(f"--output {out}: lies in {folder}, and would be one of its classes")
    if (folder / "train").is_dir():
        raise UserError(f"{folder}: is divided already: it has a folder 'train'")
    tables = open_tables(source)
    if tables is None:
        return _divide(out, _opened(source), folder.name, share, seed, shards, threads)
    with tables.unpacked(out, threads) as index:
        return _divide(out, _renamed(index), folder.name, share, seed, shards, threads)


def _divide(
    out: Path,
    index: ImageIndex,
    name: str,
    share: float,
    seed: int,
    shards: ShardSettings | None,
    threads: int | None,
) -> list[Prepared]:
    chosen = chosen_for_val(index, share, seed)
    parts = {split: _part(index, chosen == (split == "val")) for split in ("train", "val")}
    # Kept in the state file to tell this division from others; _difference takes it apart.
    whole = f"{name}-{index.fingerprint}-{share:g}-{seed}"
    sources = {
        split: [{"name": whole, "bytes": int(part.byte_sizes.sum())}]
        for split, part in parts.items()
    }
    with progress_bar() as progress, Work(out, "split", sources, shards, _difference) as work:
        missing = {split: parts[split] for split in work.missing}
        return work.place(missing, threads, progress) if missing else []


def _difference(then: str, now: str) -> str:
    """What differs between two divisions, by the names that :func:`_divide` has given them."""
    one, other = _DIVISION.fullmatch(then), _DIVISION.fullmatch(now)
    if one is None or other is None or one["images"] != other["images"] or then == now:
        return (
            "was divided from other images than those of --from are now; choose another folder for "
            "--output, or empty this one and divide these"
        )
    odd = [key for key in ("val", "seed") if one[key] != other[key]]
    if not odd:
        return (
            f"was divided from a folder called {printable(repr(one['name']))}, and --from is one "
            f"called {printable(repr(other['name']))}; choose another folder for --output"
        )
    before, asked = (" ".join(f"--{key} {found[key]}" for key in odd) for found in (one, other))
    return (
        f"was divided with {before}, and {asked} is asked for; give {before} to go on with it, or "
        "choose another folder for --output, or empty this one"
    )


def chosen_for_val(index: ImageIndex, share: float, seed: int) -> NDArray[np.bool_]:
    """Which images of an index go to ``val``, shape (n,).

    Raises:
        UserError: a class has fewer than two images.
    """
    chosen = np.zeros(len(index), np.bool_)
    for label, name in enumerate(index.classes):
        images = np.flatnonzero(index.labels == label)
        if len(images) < 2:
            raise UserError(
                f"{index.root / name}: {len(images)} image; a class needs two to be divided"
            )
        count = min(max(1, round(share * len(images))), len(images) - 1)
        ranked = sorted(images.tolist(), key=lambda image: _rank(index.files[image], seed))
        chosen[ranked[:count]] = True
    return chosen


def _rank(name: str, seed: int) -> bytes:
    return sha256(f"{seed}/".encode() + os.fsencode(name)).digest()


def _opened(source: Input) -> ImageIndex:
    """The images, called as they will be in class folders."""
    folder = source.place
    if source.listing is None and folder.is_dir() and not tars_in(folder):
        return scan_class_folders(folder)
    return _renamed(open_input(source))


def _renamed(index: ImageIndex) -> ImageIndex:
    """Images with names that their files may have in class folders."""
    names = []
    for label in range(len(index.classes)):
        files = index.files[slice(*np.searchsorted(index.labels, [label, label + 1]))]
        short = [file.rpartition("/")[2] for file in files]
        # Images of one name from several folders keep these in their names.
        if len({*short}) < len(short):
            short = [file.replace("/", "-") for file in files]
        if len({*short}) < len(short):
            raise UserError(
                f"{index.root}: two images of class {index.classes[label]!r} have "
                f"names that differ in / and - only"
            )
        names += [f"{index.classes[label]}/{name}" for name in short]
    if index.containers:
        return replace(index, files=Names.of(names), file=None)
    sizes = [byte_size(index.location(image).path) for image in range(len(index))]
    byte_sizes = np.array(sizes, np.int64)
    return replace(
        index,
        files=Names.of(names),
        byte_sizes=byte_sizes,
        containers=[*index.files],
        container=np.arange(len(index), dtype=np.int32),
        offsets=np.zeros(len(index), np.int64),
        marks=byte_sizes,
    )


def _part(index: ImageIndex, taken: NDArray[np.bool_]) -> ImageIndex:
    images = np.flatnonzero(taken)
    if index.containers:
        return index.subset(images)
    names = [index.files[image] for image in images.tolist()]
    sizes = np.array([byte_size(str(index.root / name)) for name in names], np.int64)
    return ImageIndex.of(index.root, names, index.labels[images], index.classes, byte_sizes=sizes)
