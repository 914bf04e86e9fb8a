"""Photographs for super-resolution: DIV2K, the usual test sets, and anyone's own.

Each set becomes one folder of ``train`` or ``val``, beside those of others, as ``val/Set5`` and
``val/Set14``. Such a folder appears whole or not at all.
"""

import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image

from data_pipelines.images.batch import check_image, decode_with_pil
from data_pipelines.images.bicubic import shrink
from data_pipelines.images.folders import FURTHER_SUFFIXES, IMAGE_SUFFIXES, visible
from data_pipelines.sets.archives import archive_files, safe_parts
from data_pipelines.sets.claim import claimed, progress_bar
from data_pipelines.sets.class_folders import RUN_AGAIN
from data_pipelines.sets.preparation import STATE_FILE, go_through
from data_pipelines.sets.shard_format import QUALITY, converted
from tpp.common.errors import UserError
from tpp.common.files import aside_of, sync

Split = Literal["train", "val"]
_SUFFIXES = IMAGE_SUFFIXES + FURTHER_SUFFIXES
# Of so many photographs, in the order of their paths, the last is none of the training set.
_OF = 10
# Numbers of DIV2K's images.
_DIV2K: dict[Split, range] = {"train": range(1, 801), "val": range(801, 901)}
# What folders of large images are called, the best first: those before anything was cut off.
_LARGE = ("original", "hr", "gt", "gtmod12", "test")
# As SelfExSR has it, beside small images: image_SRF_2/img_001_SRF_2_HR.png.
_SELF_EX = re.compile(r"(?P<name>.+)_SRF_(?P<scale>\d)_(?P<kind>.+)", re.IGNORECASE)
_SELF_FOLDER = re.compile(r"image_SRF_\d", re.IGNORECASE)
# A message has the names of so many images.
_FEW = 14


class TestSet(NamedTuple):
    """A test set: its name in papers, how its folder may be called besides, how many images."""

    name: str
    also: tuple[str, ...]
    images: int


TEST_SETS = {
    "set5": TestSet("Set5", (), 5),
    "set14": TestSet("Set14", ("cset14",), 14),
    # The images for testing of BSDS300.
    "b100": TestSet("B100", ("bsd100", "bsds100", "bsds300"), 100),
    "urban100": TestSet("Urban100", ("curban100",), 100),
}


class Written(NamedTuple):
    """A folder that is there now: how many images and bytes; ``kept``: it was there before."""

    folder: Path
    images: int
    bytes: int
    kept: bool


def prepare_photos(
    out: Path, archive: Path, *, halve: bool = False, only: Split | None = None
) -> list[Written]:
    """Divide the photographs of an archive between train/photos and val/photos.

    In the order of their paths, of each ten nine are for training and the last is for evaluation.

    Args:
        out: the folder to make or to go on with.
        archive: .tar, .tar.gz or .zip of JPEGs, PNGs or what else the loaders read.
        halve: make them half as large, as MATLAB's bicubic does it, which weakens JPEG's artefacts;
            they are stored as PNG.
        only: one of the two parts alone.

    Raises:
        UserError: the archive is damaged, unsafe, or holds no images; ``out`` holds something
            else; writing fails.
    """
    paths = sorted(images_of(archive, out))
    if not paths:
        raise UserError(f"{archive}: no images in this archive")
    names = _names(paths, archive)
    plan = {}
    for place, path in enumerate(paths):
        split = "val" if place % _OF == _OF - 1 else "train"
        if only in (None, split):
            plan[path] = (f"{split}/photos", names[path])
    if not plan:
        raise UserError(
            f"{archive}: of its {len(paths)} images none is for {only}: the last of each {_OF} is"
        )
    return write_folders(out, archive, plan, _halved if halve else _as_they_are)


def prepare_div2k(
    out: Path, *, train: Path | None = None, val: Path | None = None
) -> list[Written]:
    """Make DIV2K ready, or one of its two parts: train/DIV2K, 800 images, and val/DIV2K, 100.

    Args:
        out: the folder to make or to go on with.
        train, val: DIV2K_train_HR.zip and DIV2K_valid_HR.zip, as they are offered.

    Raises:
        UserError: an archive is damaged, unsafe, another one, or incomplete; ``out`` holds
            something else; writing fails.
    """
    archives: dict[Split, Path | None] = {"train": train, "val": val}
    if train is None and val is None:
        raise UserError("div2k: name the archives with --train and --val, or one of them")
    made = []
    for split, archive in archives.items():
        if archive is not None:
            folder = "DIV2K_train_HR" if split == "train" else "DIV2K_valid_HR"
            numbers = [f"{number:04}" for number in _DIV2K[split]]
            plan = {f"{folder}/{name}.png": (f"{split}/DIV2K", name) for name in numbers}
            made += write_folders(out, archive, plan, _as_they_are)
    return made


def prepare_test_set(name: str, out: Path, archive: Path, *, scale: int = 2) -> list[Written]:
    """Make a test set ready: its large images become val/Set5 and so on.

    They may lie right in the set's folder, in a folder ``original``, ``HR``, ``GT`` or ``GTmod12``
    in it, or be called as SelfExSR has them (``image_SRF_2/img_001_SRF_2_HR.png``); small ones, and
    other sets in the same archive, are passed over.

    Args:
        name: a key of :data:`TEST_SETS`.
        out: the folder to make or to go on with.
        archive: .tar, .tar.gz or .zip.
        scale: which of SelfExSR's folders; its images are cut to a multiple of it.

    Raises:
        UserError: the archive is damaged, unsafe, or holds another number of images; ``out``
            holds something else; writing fails.
    """
    wanted = TEST_SETS[name]
    where, names = _large_images(wanted, archive, sorted(images_of(archive, out)), scale)
    if not len(names) == len({*names.values()}) == wanted.images:
        there = f" ({', '.join(sorted(names.values()))})" if len(names) <= _FEW else ""
        raise UserError(
            f"{archive}: {len(names)} images in {where}{there}{_gaps(names, wanted)}; "
            f"{wanted.name} has {wanted.images}"
        )
    plan = {path: (f"val/{wanted.name}", short) for path, short in names.items()}
    return write_folders(out, archive, plan, _as_they_are)


def _large_images(
    wanted: TestSet, archive: Path, paths: list[str], scale: int
) -> tuple[str, dict[str, str]]:
    """The folder of a set's large images in an archive, and their names by their paths."""
    known = (wanted.name.lower(), *wanted.also)
    folders: dict[str, dict[str, str]] = {}
    for path in paths:
        folder, _, file = path.rpartition("/")
        name = Path(file).stem
        found = _SELF_EX.fullmatch(name)
        if found is not None:
            if found["kind"].upper() != "HR" or int(found["scale"]) != scale:
                continue
            name = found["name"]
        folders.setdefault(folder, {})[path] = name
    # Of an archive of several sets, this one's.
    own = {f: n for f, n in folders.items() if {*known} & {*f.lower().split("/")}} or folders
    ranks = {folder: _rank(folder.rpartition("/")[2].lower(), known) for folder in own}
    large = {folder: rank for folder, rank in ranks.items() if rank is not None}
    if not large:
        raise UserError(
            f"{archive}: no large images of {wanted.name}; expected {wanted.name}/, or in it HR/, "
            f"GTmod12/ or original/, or image_SRF_{scale}/NAME_SRF_{scale}_HR.png"
        )
    best = min(large, key=lambda folder: (large[folder], folder))
    return best or "its top folder", own[best]


def _rank(folder: str, known: Collection[str]) -> int | None:
    """How good a folder of large images this is, by its name; None for one of others."""
    if folder in _LARGE:
        return _LARGE.index(folder)
    if re.sub(r"[-_ ]?(hr|main|master)$", "", folder) in (*known, ""):
        return len(_LARGE)
    return len(_LARGE) + 1 if _SELF_FOLDER.fullmatch(folder) else None


def _gaps(names: Mapping[str, str], wanted: TestSet) -> str:
    """Which of images that are numbered from 1 on are missing, for a message; '' for others."""
    found = [re.search(r"(\d+)$", name) for name in names.values()]
    numbers = {int(match[1]) for match in found if match}
    missing = sorted({*range(1, wanted.images + 1)} - numbers)
    if len(numbers) < len(names) or not numbers <= {*range(1, wanted.images + 1)} or not missing:
        return ""
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    return f", without number {missing[0]}{more}"


def images_of(archive: Path, out: Path) -> Iterator[str]:
    """Paths of the images in an archive that are not hidden; they fit where ``out`` is to be."""
    place = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    for path, _ in archive_files(archive, shutil.disk_usage(place).free):
        parts = safe_parts(str(archive), path)
        # A Mac puts files of its own beside the images, whose names begin with a dot.
        if path.lower().endswith(_SUFFIXES) and not any(part.startswith(".") for part in parts):
            yield path


def write_folders(
    out: Path,
    archive: Path,
    plan: Mapping[str, tuple[str, str]],
    change: Callable[[bytes], tuple[bytes, str]],
) -> list[Written]:
    """Write images of an archive into folders, each of which appears whole or not at all.

    Args:
        out: the folder that they are in.
        archive: the archive.
        plan: of each path in the archive the folder in ``out``, and the name without its ending.
        change: makes of an image's bytes those that are written, and the ending of their name.

    Returns:
        The folders, in their order; those that were there are not written again.

    Raises:
        UserError: an image is missing from the archive, or cannot be decoded; a folder is there
            and holds others; writing fails.
    """
    wanted: dict[str, list[str]] = {}
    for folder, name in plan.values():
        wanted.setdefault(folder, []).append(name)
    with claimed(out), ExitStack() as stack:
        if (out / STATE_FILE).exists():
            raise UserError(f"{out}: holds a data set with class folders; choose another folder")
        kept = {folder for folder, names in wanted.items() if _is_there(out / folder, names)}
        new = {path: place for path, place in plan.items() if place[0] not in kept}
        try:
            asides = {
                folder: stack.enter_context(_written_aside(out / folder))
                for folder in wanted
                if folder not in kept
            }
            if new:
                _write(archive, out, new, asides, change)
            for folder, aside in asides.items():
                for file in aside.iterdir():
                    sync(file)
                sync(aside)
                aside.rename(out / folder)
                sync((out / folder).parent)
            return [_written(out / folder, folder in kept) for folder in wanted]
        except OSError as error:
            raise UserError(f"{out}: cannot write ({error.strerror}); {RUN_AGAIN}") from None


def _write(
    archive: Path,
    out: Path,
    plan: Mapping[str, tuple[str, str]],
    asides: Mapping[str, Path],
    change: Callable[[bytes], tuple[bytes, str]],
) -> None:
    done = set()
    with progress_bar() as progress:
        advance = go_through(progress, progress.add_task("writing", total=len(plan)))
        for path, content in archive_files(archive, shutil.disk_usage(out).free):
            if path not in plan:
                continue
            if path in done:
                raise UserError(f"{archive}: {path} is in it twice")
            folder, name = plan[path]
            try:
                made, ending = change(content)
            except ValueError as error:
                raise UserError(f"{archive}: {path}: {error}") from None
            (asides[folder] / f"{name}{ending}").write_bytes(made)
            done.add(path)
            advance(1)
    missing = sorted(set(plan) - done)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{archive}: no {missing[0]}{more} in it; {len(plan)} images are expected")


@contextmanager
def _written_aside(folder: Path) -> Iterator[Path]:
    """An empty folder beside ``folder``, to be renamed; else it is gone afterwards."""
    folder.parent.mkdir(exist_ok=True)
    for leftover in folder.parent.glob(f".{folder.name}.*.tmp"):
        shutil.rmtree(leftover)
    aside = aside_of(folder)
    aside.mkdir()
    try:
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        with suppress(OSError):  # it holds something
            folder.parent.rmdir()


def _is_there(folder: Path, names: list[str]) -> bool:
    """Whether an earlier run has made this folder."""
    if not folder.exists():
        return False
    found = [Path(file).stem for file in visible(folder, folders=False)]
    if sorted(found) != sorted(names):
        raise UserError(
            f"{folder}: holds {len(found):,} files, {len(names):,} images belong there; delete "
            "this folder and do the same again"
        )
    return True


def _written(folder: Path, kept: bool) -> Written:
    sizes = [file.stat().st_size for file in folder.iterdir()]
    return Written(folder, len(sizes), sum(sizes), kept)


def _names(paths: list[str], archive: Path) -> dict[str, str]:
    """A file name for each path, without an ending: its own, or where two are alike the path."""
    parts = {path: safe_parts(str(archive), str(Path(path).with_suffix(""))) for path in paths}
    names = {path: some[-1] for path, some in parts.items()}
    if len(set(names.values())) < len(paths):
        names = {path: "-".join(some) for path, some in parts.items()}
    twice = {name: path for path, name in names.items()}
    for path, name in names.items():
        if twice[name] != path:
            raise UserError(f"{archive}: {path} and {twice[name]} would both be called {name}")
    return names


def _as_they_are(content: bytes) -> tuple[bytes, str]:
    """JPEG and PNG byte by byte; other formats as PNG."""
    made, header = converted(np.frombuffer(content, np.uint8), None, QUALITY)
    return bytes(made), ".jpg" if header.format == "jpeg" else ".png"


def _halved(content: bytes) -> tuple[bytes, str]:
    """Half as large; odd sides are rounded up, as MATLAB's imresize(image, 0.5) does it."""
    data = np.frombuffer(content, np.uint8)
    grey = check_image(data).channels == 1
    pixels = np.array(decode_with_pil(data, 1 if grey else 3)).astype(np.float32)
    levels = torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)
    small = (shrink(levels / 255, 2) * 255).round().byte().permute(1, 2, 0).numpy()
    encoded = BytesIO()
    Image.fromarray(small[:, :, 0] if grey else small).save(encoded, "PNG")
    return encoded.getvalue(), ".png"
