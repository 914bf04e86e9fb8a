"""``python -m data_pipelines.prepare SET --out DIR`` makes a data set ready for training.

The images of ImageNet's official archives, or of a smaller data set's, become class folders in
DIR/train and DIR/val, or tar shards. They appear class by class, or shard by shard, and whole or
not at all: a run that was stopped, in whatever way, is gone on with by the same command.
"""

import argparse
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_pipelines.images.image_index import ImageIndex
from data_pipelines.sets.claim import progress_bar
from data_pipelines.sets.imagenet import (
    TRAIN_IMAGES,
    check_train_counts,
    read_devkit,
    train_index,
    val_index,
)
from data_pipelines.sets.preparation import (
    IMAGES_FILE,
    THREADS,
    Prepared,
    ShardSettings,
    Sources,
    Work,
    go_through,
)
from data_pipelines.sets.shard_format import QUALITY
from data_pipelines.shards import byte_count
from tpp.common.errors import UserError, run_command
from tpp.common.files import aside_of, in_bytes, sync
from tpp.common.paths import user_path

if TYPE_CHECKING:
    from data_pipelines.sets.small_sets import FoundImage


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
    with progress_bar() as progress, Work(out, "imagenet", _sources(archives), shards) as work:
        if not work.missing:
            return []
        known = read_devkit(devkit) if devkit else None
        indexes = {}
        if train and "train" in work.missing:
            index = work.saved_index("train", train.parent)
            if index is None or index.containers != [train.name] or _newer(train, index):
                task = progress.add_task("reading train", total=TRAIN_IMAGES)
                advance = go_through(progress, task)
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
    """Make a data set of :data:`data_pipelines.sets.small_sets.SETS` ready.

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
    # With torchvision, which knows where the archives are.
    from data_pipelines.sets.small_sets import SETS, download, images_in

    sources = _sources({"train": list(archives), "val": list(archives)})
    with progress_bar() as progress, Work(out, name, sources, shards) as work:
        if not work.missing:
            return []
        saved = {split: work.saved_index(split, work.folder) for split in work.missing}
        indexes = {split: index for split, index in saved.items() if index is not None}
        if len(indexes) < len(saved):
            files = list(archives) or download(name, work.folder)
            task = progress.add_task("unpacking", total=sum(SETS[name].images.values()))
            found = images_in(name, files, shutil.disk_usage(work.folder).free // 2)
            unpacked = unpack(found, str(files[0]), work.folder, go_through(progress, task))
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
    found: "Iterator[FoundImage]", where: str, folder: Path, advance: Callable[[int], None]
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
    path = folder / IMAGES_FILE
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


def _newer(archive: Path, index: ImageIndex) -> bool:
    """Whether an archive was changed after its index had been made."""
    return index.file is not None and archive.stat().st_mtime > index.file.stat().st_mtime


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
        imagenet.add_argument(option, type=user_path, metavar="FILE", help=f"{file}: {use}")
    chosen = [imagenet]
    for name in ("imagenette", "cifar10", "cifar100", "mnist", "tiny-imagenet"):
        small = sets.add_parser(name, help="downloaded, or from local files")
        small.add_argument(
            "--archive",
            type=user_path,
            nargs="+",
            default=[],
            metavar="FILE",
            help="the official files, or an archive with class folders in train/ and val/",
        )
        if name == "imagenette":
            small.add_argument(
                "--size",
                choices=("full", "320", "160"),
                default="full",
                help="shorter side in pixels",
            )
        chosen.append(small)
    for one in chosen:
        _add_common(one)
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", metavar="DIR", type=user_path, required=True, help="folder to make")
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
