"""``python -m data_pipelines.prepare SET --out DIR`` makes a data set ready for training.

The images of ImageNet's official archives, or of a smaller data set's, become class folders in
DIR/train and DIR/val, or tar shards. They appear class by class, or shard by shard, and whole or
not at all: a run that was stopped, in whatever way, is gone on with by the same command.
"""

import argparse
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, Field, ValidationError
from rich.progress import Progress, TaskID

from data_pipelines.image_index import ImageIndex, check_fits, load_index, save_index, visible
from data_pipelines.imagenet import (
    TRAIN_IMAGES,
    check_train_counts,
    read_devkit,
    train_index,
    val_index,
)
from data_pipelines.making import claimed, progress_bar
from data_pipelines.shards import QUALITY, SHARD_BYTES, byte_count, write_shards
from data_pipelines.small_sets import IMAGENETTE_SIZES, SETS, FoundImage, download, images_in
from data_pipelines.source import read_bytes
from tpp.errors import UserError, printable, run_command
from tpp.files import aside_of, in_bytes, sync, write_whole
from tpp.reading import read_json

STATE_FILE = ".prepared.json"
# What is needed on the way only: downloads, unpacked images and indexes of archives.
WORK_FOLDER = ".preparing"
_IMAGES_FILE = "images.bin"
_VERSION = 1
# File systems hand out space in blocks; most of them in blocks of this many bytes.
_BLOCK = 4096
# Reading and writing is mostly waiting.
THREADS = 16
_AGAIN = "the same command goes on from here"

Sources = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class ShardSettings:
    """How images are laid into shards; see :func:`data_pipelines.shards.write_shards`."""

    shard_bytes: int = SHARD_BYTES
    resize: int | None = None
    quality: int = QUALITY


class _Archive(BaseModel, strict=True):
    name: str
    bytes: int


class _Split(BaseModel, strict=True):
    archives: list[_Archive]
    classes: int
    images: int
    bytes: int
    finished: bool


class _State(BaseModel, strict=True):
    """What the state file says."""

    version: Literal[1]
    set: str = Field(pattern=r"^[a-z0-9-]+$")
    form: Literal["class folders"] | dict[Literal["shard_bytes", "resize", "quality"], int | None]
    splits: dict[Literal["train", "val"], _Split]


@dataclass(frozen=True)
class Prepared:
    """What is in one of the two folders now.

    Attributes:
        split: 'train' or 'val'.
        classes, images, bytes: how many; bytes are those of the images as the archive has them.
        kept: how many classes, or shards, an earlier run had finished.
    """

    split: str
    classes: int
    images: int
    bytes: int
    kept: int


def prepare_imagenet(
    out: Path,
    *,
    train: Path | None = None,
    val: Path | None = None,
    devkit: Path | None = None,
    shards: ShardSettings | None = None,
    threads: int | None = None,
) -> list[Prepared]:
    """Make ImageNet ready from its official archives (ILSVRC 2012), or one of its two parts.

    Args:
        out: the folder to make or to go on with.
        train, val: ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, plain as they are offered.
        devkit: ILSVRC2012_devkit_t12.tar.gz; needed for ``val``. Without it the numbers of
            training images are not checked.
        shards: write shards; None: class folders.
        threads: classes, or shards, that are worked on at the same time; by default
            :data:`THREADS`, or one shard per processor.

    Returns:
        What there is now; nothing if all of it was there before.

    Raises:
        UserError: an archive is another one, damaged, unsafe, or incomplete; ``out`` holds
            something else; there is no room, or writing fails.
    """
    if val and not devkit:
        raise UserError("imagenet: --val needs --devkit, which knows the validation images' class")
    archives = {split: [path] for split, path in (("train", train), ("val", val)) if path}
    if not archives:
        raise UserError("imagenet: name the archives with --train and --val, or one of them")
    with progress_bar() as progress, _Work(out, "imagenet", _sources(archives), shards) as work:
        if not work.missing:
            return []
        known = read_devkit(devkit) if devkit else None
        indexes = {}
        if train and "train" in work.missing:
            index = work.saved_index("train", train.parent)
            if index is None or index.containers != [train.name] or _newer(train, index):
                task = progress.add_task("reading train", total=TRAIN_IMAGES)
                advance = _advance(progress, task)
                index = train_index(train, threads or THREADS, advance)
            if known:
                check_train_counts(train, index, known)
            indexes["train"] = index
        # That of val is made in a second.
        if val and known and "val" in work.missing:
            indexes["val"] = val_index(val, known)
        return work.place(indexes, threads, progress)


def prepare_small(
    name: str,
    out: Path,
    *,
    archives: Sequence[Path] = (),
    shards: ShardSettings | None = None,
    threads: int | None = None,
) -> list[Prepared]:
    """Make a data set of :data:`data_pipelines.small_sets.SETS` ready.

    Args:
        name: of the data set.
        out: the folder to make or to go on with.
        archives: its official archives, or one with class folders {train,val}/<class>/<image>
            (or test for val); by default the official ones are downloaded.
        shards: write shards; None: class folders.
        threads: classes, or shards, that are worked on at the same time; by default
            :data:`THREADS`, or one shard per processor.

    Returns:
        What there is now; nothing if all of it was there before.

    Raises:
        UserError: an archive cannot be had, is another one, damaged, unsafe, or incomplete;
            ``out`` holds something else; there is no room, or writing fails.
    """
    sources = _sources({"train": list(archives), "val": list(archives)})
    with progress_bar() as progress, _Work(out, name, sources, shards) as work:
        if not work.missing:
            return []
        saved = {split: work.saved_index(split, work.folder) for split in work.missing}
        indexes = {split: index for split, index in saved.items() if index is not None}
        if len(indexes) < len(saved):
            files = list(archives) or download(name, work.folder)
            task = progress.add_task("unpacking", total=sum(SETS[name].images.values()))
            found = images_in(name, files, shutil.disk_usage(work.folder).free // 2)
            unpacked = unpack(found, str(files[0]), work.folder, _advance(progress, task))
            indexes = {split: unpacked[split] for split in work.missing if split in unpacked}
        return work.place(indexes, threads, progress)


def _sources(archives: Mapping[str, Sequence[Path]]) -> Sources:
    """Name and size in bytes of each split's archives."""
    return {
        split: [{"name": path.name, "bytes": _archive_bytes(path)} for path in paths]
        for split, paths in archives.items()
    }


def _archive_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: cannot read this archive ({error.strerror})") from None


def unpack(
    found: Iterator[FoundImage], where: str, folder: Path, advance: Callable[[int], None]
) -> dict[str, ImageIndex]:
    """Gather images into one plain file in ``folder``, and index it: by split, train and val.

    What is 'test' becomes 'val', unless there is a 'val'.

    Args:
        found: the images.
        where: what to call the archive that they come from.
        folder: where the file goes.
        advance: called for every image.

    Raises:
        UserError: an image is there twice, or the file cannot be written.
    """
    path = folder / _IMAGES_FILE
    aside = aside_of(path)
    places: dict[str, dict[tuple[str, str], tuple[int, int]]] = {}
    try:
        with aside.open("wb") as file:
            for split, label, name, content in found:
                images = places.setdefault(split, {})
                if (label, name) in images:
                    raise UserError(f"{where}: {split}/{label}/{name} is in it twice")
                images[label, name] = file.tell(), len(content)
                file.write(content)
                advance(1)
        sync(aside)
        aside.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot write what is unpacked ({error.strerror})") from None
    finally:
        aside.unlink(missing_ok=True)
    places.setdefault("val", places.pop("test", {}))
    return {split: _unpacked_index(path, images) for split, images in places.items() if images}


def _unpacked_index(path: Path, images: dict[tuple[str, str], tuple[int, int]]) -> ImageIndex:
    names = sorted(images)
    classes = sorted({label for label, _ in names})
    labels = {label: number for number, label in enumerate(classes)}
    offsets, lengths = np.array([images[name] for name in names], np.int64).T
    return ImageIndex.of(
        path.parent,
        (f"{label}/{name}" for label, name in names),
        [labels[label] for label, _ in names],
        classes,
        byte_sizes=lengths,
        containers=[path.name],
        container=np.zeros(len(names), np.int32),
        offsets=offsets,
        marks=np.array([path.stat().st_size], np.int64),
    )


class _Work:
    """The folder that is made ready: what was done before, and what is missing.

    As a context it keeps others out, and if nothing came of it, leaves no empty folders.

    Args:
        out: the folder.
        name: of the data set.
        sources: the archives of each split that is asked for.
        shards: write shards; None: class folders.

    Attributes:
        folder: for what is needed on the way only.
        missing: the splits that are asked for and are not finished.
    """

    def __init__(
        self, out: Path, name: str, sources: Sources, shards: ShardSettings | None
    ) -> None:
        self.out, self.name, self.sources, self.shards = out, name, sources, shards
        self.folder = out / WORK_FOLDER
        self.missing: list[str] = []
        self._state: dict[str, Any] = {}

    def __enter__(self) -> "_Work":
        with ExitStack() as stack:
            stack.enter_context(claimed(self.out))
            stack.callback(self._leave_no_empty_folder)
            try:
                self.folder.mkdir(exist_ok=True)
                self._look()
            except OSError as error:
                raise UserError(f"{self.out}: cannot write here ({error.strerror})") from None
            self._leave = stack.pop_all().close
        return self

    def __exit__(self, *error: object) -> None:
        self._leave()

    def _leave_no_empty_folder(self) -> None:
        with suppress(OSError):
            self.folder.rmdir()

    def _look(self) -> None:
        """Find out what there is, and whether it is of the same kind and from the same archives."""
        for leftover in (*self.out.glob(f".{STATE_FILE}.*.tmp"), *self.folder.glob(".*.tmp")):
            leftover.unlink()
        self._state = _read_state(self.out / STATE_FILE)
        for key, value in (("set", self.name), ("form", self._form())):
            if self._state.get(key, value) != value:
                raise UserError(
                    f"{self.out}: holds {self._state['set']} as {_form_in_words(self._state)}; "
                    "choose another folder"
                )
        for split, archives in self.sources.items():
            known = self._state.get("splits", {}).get(split)
            if known is None and (self.out / split).exists():
                raise UserError(
                    f"{self.out / split}: is there and not from this command; choose another folder"
                )
            finished = known is not None and known["finished"]
            # Once it is finished, nobody has to name the archives again.
            if known and known["archives"] != archives and not (finished and not archives):
                raise UserError(
                    f"{self.out}: {split} is made from {_names(known['archives'])}, not from "
                    f"{_names(archives)}; choose another folder"
                )
            if not finished:
                self.missing.append(split)
        if not self.missing:
            self._clean_up()

    def _clean_up(self) -> None:
        """Remove what was needed on the way, if all is done."""
        splits = self._state.get("splits", {}).values()
        if splits and all(split["finished"] for split in splits):
            shutil.rmtree(self.folder)

    def _form(self) -> Any:
        return "class folders" if self.shards is None else vars(self.shards)

    def saved_index(self, split: str, root: Path) -> ImageIndex | None:
        """The index of images in an archive that an earlier run made, if it fits the archive."""
        try:
            index = load_index(self.folder / f"{split}.safetensors", root)
            check_fits(index)
        except UserError:
            return None
        return index

    def place(
        self, indexes: Mapping[str, ImageIndex], threads: int | None, progress: Progress
    ) -> list[Prepared]:
        """Write the images of each split where they belong, and that it is done."""
        if self.shards is None:
            _check_room(self.out, indexes)
        self._state = {
            "version": _VERSION,
            "set": self.name,
            "form": self._form(),
            "splits": {
                **self._state.get("splits", {}),
                **{
                    split: {
                        "archives": self.sources[split],
                        **_counts(indexes.get(split)),
                        "finished": split not in indexes,
                    }
                    for split in self.missing
                },
            },
        }
        made = []
        try:
            self._save_state()
            for split, index in indexes.items():
                if index.file is None:
                    save_index(index, self.folder / f"{split}.safetensors")
            for split, index in indexes.items():
                made.append(self._place(split, index, threads, progress))
                self._state["splits"][split]["finished"] = True
                self._save_state()
            self._clean_up()
        except OSError as error:
            raise UserError(f"{self.out}: cannot write ({error.strerror}); {_AGAIN}") from None
        return made

    def _save_state(self) -> None:
        write_whole(self.out / STATE_FILE, json.dumps(self._state, indent=1) + "\n")

    def _place(
        self, split: str, index: ImageIndex, threads: int | None, progress: Progress
    ) -> Prepared:
        if self.shards is None:
            task = progress.add_task(f"writing {split}", total=len(index))
            advance = _advance(progress, task)
            kept = write_class_folders(index, self.out / split, threads or THREADS, advance)
        else:
            # It draws bars of its own.
            progress.stop()
            written = write_shards(index, self.out / split, **vars(self.shards), threads=threads)
            kept = written.reused
        return Prepared(split, kept=kept, **_counts(index))


def _counts(index: ImageIndex | None) -> dict[str, int]:
    if index is None:
        return {"classes": 0, "images": 0, "bytes": 0}
    return {
        "classes": len(index.classes),
        "images": len(index),
        "bytes": int(index.byte_sizes.sum()),
    }


def _read_state(path: Path) -> dict[str, Any]:
    """What a state file says; nothing if there is none."""
    if not path.exists():
        return {}
    try:
        state = read_json(path, "the state of this folder")
        return _State.model_validate(state).model_dump(exclude={"version"})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "content"
        problem = f"{where}: {first['msg']}"
    except UserError as error:
        problem = str(error).removeprefix(f"{path}: ")
    raise UserError(f"{path}: cannot be read ({problem}); empty the folder")


def _form_in_words(state: Mapping[str, Any]) -> str:
    form = state["form"]
    if not isinstance(form, dict):
        return str(form)
    return "shards, " + ", ".join(f"{key} {value}" for key, value in form.items())


def _names(archives: Sequence[Mapping[str, Any]]) -> str:
    return (
        ", ".join(
            f"{printable(archive['name'])} ({archive['bytes']:,} bytes)" for archive in archives
        )
        or "downloads"
    )


def _newer(archive: Path, index: ImageIndex) -> bool:
    """Whether an archive was changed after its index had been made."""
    return index.file is not None and archive.stat().st_mtime > index.file.stat().st_mtime


def _check_room(out: Path, indexes: Mapping[str, ImageIndex]) -> None:
    """Check that there is space for the class folders that are missing."""
    needed = 0
    for split, index in indexes.items():
        there = np.array([(out / split / name).exists() for name in index.classes])
        blocks = -(-index.byte_sizes // _BLOCK) * _BLOCK
        needed += int(blocks[~there[index.labels]].sum())
    free = shutil.disk_usage(out).free
    if needed > free:
        raise UserError(
            f"{out}: {in_bytes(needed)} are needed for the images, {in_bytes(free)} are free; "
            "make room or choose another folder"
        )


def write_class_folders(
    index: ImageIndex, out: Path, threads: int, advance: Callable[[int], None]
) -> int:
    """Copy the images of an index into class folders, each of which appears whole or not at all.

    Args:
        index: images in larger files, of known sizes, sorted by class.
        out: the folder to make; class folders that an earlier call has finished are kept.
        threads: how many classes are written at the same time.
        advance: called with the number of images done.

    Returns:
        How many class folders were kept.

    Raises:
        UserError: a folder in ``out`` holds something else, an image cannot be read, or writing
            fails.
    """
    out.mkdir(parents=True, exist_ok=True)
    for leftover in out.glob(".*.tmp"):
        shutil.rmtree(leftover)
    bounds = np.searchsorted(index.labels, np.arange(len(index.classes) + 1))
    images = {
        name: range(bounds[label], bounds[label + 1]) for label, name in enumerate(index.classes)
    }
    kept = visible(out, folders=True)
    for name in kept:
        expected = [index.files[image].rsplit("/", 1)[1] for image in images.get(name, [])]
        found = visible(out / name, folders=False)
        if not expected or found != sorted(expected):
            raise UserError(
                f"{out / name}: holds {len(found):,} files, {len(expected):,} images belong there; "
                "delete this folder and do the same again"
            )
        advance(len(expected))
    stop = Event()
    with ThreadPoolExecutor(threads) as pool:
        futures = [
            pool.submit(_write_class, index, images[name], out / name, advance, stop)
            for name in index.classes
            if name not in set(kept)
        ]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    sync(out)
    return len(kept)


def _write_class(
    index: ImageIndex, images: range, folder: Path, advance: Callable[[int], None], stop: Event
) -> None:
    """Write one class folder aside, have it on the disk, and rename it."""
    aside = aside_of(folder)
    try:
        aside.mkdir()
        for image in images:
            if stop.is_set():
                return
            _copy(index, image, aside / index.files[image].rsplit("/", 1)[1])
            advance(1)
        # After all are written: the disk has had time for most of them by now.
        for file in aside.iterdir():
            sync(file)
        sync(aside)
        aside.rename(folder)
        sync(folder.parent)
    except OSError as error:
        raise UserError(f"{folder}: cannot write this class ({error.strerror}); {_AGAIN}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _copy(index: ImageIndex, image: int, path: Path) -> None:
    location = index.location(image)
    try:
        content = read_bytes(location)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{location.path}: cannot read {index.files[image]} at byte {location.offset:,} "
            f"({getattr(error, 'strerror', None) or error}); {_AGAIN}"
        ) from None
    path.write_bytes(content.data)
    written = path.stat().st_size
    if written != location.length:
        raise UserError(
            f"{path}: {written:,} bytes written instead of {location.length:,}; {_AGAIN}"
        )


def _advance(progress: Progress, task: TaskID) -> Callable[[int], None]:
    return lambda images: progress.advance(task, images)


def main() -> None:
    """Make a data set ready and say what there is and what comes next."""
    options = _parser().parse_args()
    if options.threads is not None and options.threads < 1:
        raise UserError(f"--threads must be at least 1, not {options.threads}")
    shards = _shard_settings(options)
    started = time.monotonic()
    name, common = options.set, {"shards": shards, "threads": options.threads}
    if name == "imagenet":
        files = {key: getattr(options, key) for key in ("train", "val", "devkit")}
        made = prepare_imagenet(options.out, **files, **common)
    else:
        if name == "imagenette" and options.size != "full":
            name += f"-{options.size}"
        made = prepare_small(name, options.out, archives=options.archive, **common)
    if not made:
        print(f"{options.out}: already prepared")
    for part in made:
        what = "class folders" if shards is None else "shards"
        kept = f"; {part.kept:,} {what} were there" if part.kept else ""
        print(
            f"{part.split:<13}{part.classes:,} classes, {part.images:,} images, "
            f"{in_bytes(part.bytes)}{kept}"
        )
        if name == "imagenet" and part.split == "train" and not options.devkit:
            print("not checked  number of images of each class, for want of --devkit")
    print(f"seconds      {time.monotonic() - started:,.1f}")
    if shards is None:
        print(f"next         python -m data_pipelines.index {options.out}")
        print(f"             and then train with data.root={options.out}")
    else:
        print(f"next         train with data.root={options.out}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_pipelines.prepare",
        description="Make a data set ready for training, from its official archives.",
    )
    sets = parser.add_subparsers(dest="set", metavar="SET", required=True)
    imagenet = sets.add_parser("imagenet", help="ImageNet (ILSVRC 2012) from its archives")
    for option, file, use in (
        ("--train", "ILSVRC2012_img_train.tar", "training images"),
        ("--val", "ILSVRC2012_img_val.tar", "validation images; needs --devkit"),
        ("--devkit", "ILSVRC2012_devkit_t12.tar.gz", "the classes, and how many images they have"),
    ):
        imagenet.add_argument(option, type=Path, metavar="FILE", help=f"{file}: {use}")
    chosen = [imagenet]
    for name in ("imagenette", "cifar10", "cifar100", "mnist", "tiny-imagenet"):
        small = sets.add_parser(name, help="downloaded, or from local files")
        small.add_argument(
            "--archive",
            type=Path,
            nargs="+",
            default=[],
            metavar="FILE",
            help="the official files, or an archive with class folders in train/ and val/",
        )
        if name == "imagenette":
            small.add_argument(
                "--size", choices=IMAGENETTE_SIZES, default="full", help="shorter side in pixels"
            )
        chosen.append(small)
    for one in chosen:
        _add_common(one)
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", metavar="DIR", type=Path, required=True, help="folder to make")
    add("--threads", type=int, help="classes, or shards, that are written at once")
    add("--shards", action="store_true", help="write tar shards instead of class folders")
    add("--shard-size", help="of a tar file (default 1GB)")
    add("--resize", metavar="N", type=int, help="scale larger images to a shorter side of N pixels")
    add("--quality", type=int, help=f"of scaled JPEGs (default {QUALITY})")


def _shard_settings(options: argparse.Namespace) -> ShardSettings | None:
    given = {
        "shard_bytes": byte_count(options.shard_size) if options.shard_size else None,
        "resize": options.resize,
        "quality": options.quality,
    }
    settings = {key: value for key, value in given.items() if value is not None}
    if settings and not options.shards:
        raise UserError("--shard-size, --resize and --quality are for --shards")
    return ShardSettings(**settings) if options.shards else None


if __name__ == "__main__":
    run_command(main)
