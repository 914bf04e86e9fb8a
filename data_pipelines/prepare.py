"""``tpp prepare SET --output DIR`` makes a data set ready for training.

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
from data_pipelines.sets.division import SHARE, prepare_split
from data_pipelines.sets.imagenet import (
    TRAIN_IMAGES,
    check_train_counts,
    read_devkit,
    train_index,
    val_index,
)
from data_pipelines.sets.inputs import Input
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
from tpp.common.command_line import Parser
from tpp.common.errors import UserError, run_command
from tpp.common.files import aside_of, in_bytes, sync
from tpp.common.options import add_reading, reading_of, share
from tpp.common.paths import user_path

if TYPE_CHECKING:
    from data_pipelines.sets.small_sets import FoundImage

_PROGRAM = "python -m data_pipelines.prepare"
_PHOTOGRAPHS = ("photos", "div2k", "set5", "set14", "b100", "urban100")


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


def main(words: Sequence[str] | None = None, prog: str = _PROGRAM) -> None:
    """Make a data set ready and say what there is and what comes next."""
    options = make_parser(prog).parse_args(words)
    if options.set in _PHOTOGRAPHS:
        _say_folders(options)
        return
    shards = _shard_settings(options)
    started = time.monotonic()
    name, common = options.set, {"shards": shards, "threads": options.threads}
    if name == "imagenet":
        files = {key: getattr(options, key) for key in ("train", "val", "devkit")}
        made = prepare_imagenet(options.output, **files, **common)
    elif name == "split":
        source = Input(options.source, **reading_of(options))
        division = {"share": options.val, "seed": options.seed}
        made = prepare_split(options.output, source, **division, **common)
    else:
        if name == "imagenette" and options.size != "full":
            name += f"-{options.size}"
        made = prepare_small(name, options.output, archives=options.archive, **common)
    if not made:
        print(f"{options.output}: already prepared")
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
        print(f"next         tpp index {options.output}")
        print(f"             and then train with data.root={options.output}")
    else:
        print(f"next         train with data.root={options.output}")


def _say_folders(options: argparse.Namespace) -> None:
    """Make photographs for super-resolution ready and say what there is."""
    # With PyTorch.
    from data_pipelines.sets.photographs import prepare_div2k, prepare_photos, prepare_test_set

    started = time.monotonic()
    name, out = options.set, options.output
    if name == "div2k":
        made = prepare_div2k(out, train=options.train, val=options.val)
    elif name == "photos":
        made = prepare_photos(out, options.archive, halve=options.halve, only=options.only)
    else:
        made = prepare_test_set(name, out, options.archive, scale=options.scale)
    for part in made:
        kept = "; was there" if part.kept else ""
        name = str(part.folder.relative_to(options.output))
        print(f"{name:<13}{part.images:,} images, {in_bytes(part.bytes)}{kept}")
    print(f"seconds      {time.monotonic() - started:,.1f}")
    print(f"next         train with data.root={options.output}")


def make_parser(prog: str = _PROGRAM) -> Parser:
    """What the command takes, with a parser for each set."""
    parser = Parser(
        prog,
        "Make a data set ready for training, from its archives or from class folders.",
        more="What was stopped goes on by the same command.",
        examples=[
            "cifar10 --output /data/cifar10",
            "split --from /data/classes --output /data/images --val 0.1",
            "imagenet --train ILSVRC2012_img_train.tar --val ILSVRC2012_img_val.tar "
            "--devkit ILSVRC2012_devkit_t12.tar.gz --output /data/imagenet",
        ],
    )
    sets = parser.add_subparsers(
        dest="set", metavar="SET", required=True, help="the data set; SET --help says more of each"
    )

    def one_of(name: str, what: str, summary: str, example: str) -> Parser:
        return sets.add_parser(name, help=what, summary=summary, examples=[example])

    imagenet = one_of(
        "imagenet",
        "ImageNet (ILSVRC 2012), from its archives",
        "Make ImageNet (ILSVRC 2012) ready from its official archives.",
        "--train ILSVRC2012_img_train.tar --output /data/imagenet",
    )
    for option, file, use in (
        ("--train", "ILSVRC2012_img_train.tar", "training images"),
        ("--val", "ILSVRC2012_img_val.tar", "validation images; needs --devkit"),
        ("--devkit", "ILSVRC2012_devkit_t12.tar.gz", "the classes, and how many images they have"),
    ):
        imagenet.add_argument(option, type=user_path, metavar="FILE", help=f"{file}: {use}")
    chosen = [imagenet]
    for name in ("imagenette", "cifar10", "cifar100", "mnist", "tiny-imagenet"):
        small = one_of(
            name,
            "downloaded, or from local files",
            f"Make {name} ready, downloaded or from local files.",
            f"--output /data/{name}",
        )
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
                help="shorter side in pixels (default: full)",
            )
        chosen.append(small)
    split = one_of(
        "split",
        "class folders, tars, Parquet files or a list, into train and val",
        "Divide class folders, tars, Parquet files or a list of images into train and val, by "
        "their names.",
        "--from /data/classes --output /data/images --val 0.1",
    )
    split.add_argument(
        "--from",
        dest="source",
        type=user_path,
        metavar="DIR",
        required=True,
        help="with one folder of images per class, or tars made for WebDataset, or Parquet files; "
        "or a list of images (.csv, .txt), a tar, a Parquet file, a pattern of these; nothing in "
        "it is changed",
    )
    add_reading(split, tables=True)
    split.add_argument(
        "--val",
        type=float,
        default=SHARE,
        metavar="SHARE",
        help=f"of each class, for validation (default: {SHARE})",
    )
    share(split, "--seed", ": another one is another division", default=0)
    chosen.append(split)
    for one in chosen:
        _add_common(one)
    for name in _PHOTOGRAPHS:
        what = "for super-resolution, from local archives"
        _add_photographs(
            name,
            one_of(
                name,
                what,
                f"Make {name} ready {what}.",
                ("--train DIV2K_train_HR.zip" if name == "div2k" else f"--archive {name}.tar")
                + " --output /data/sr",
            ),
        )
    return parser


def _add_photographs(name: str, one: Parser) -> None:
    """The options of a set for super-resolution."""
    add = one.add_argument
    if name == "div2k":
        for option, file in (("--train", "train"), ("--val", "valid")):
            add(option, type=user_path, metavar="FILE", help=f"DIV2K_{file}_HR.zip")
    else:
        add("--archive", type=user_path, metavar="FILE", required=True, help="tar or zip")
    if name == "photos":
        add("--halve", action="store_true", help="half as large, with weaker JPEG artefacts")
        add(
            "--only",
            choices=("train", "val"),
            help="of each ten photographs, by path, the first nine (train) or the last (val)",
        )
    elif name != "div2k":
        add(
            "--scale",
            type=int,
            choices=(2, 3, 4),
            default=2,
            help="whose image_SRF_ folder, where the archive has such (default: 2)",
        )
    _add_output(one)


def _add_common(parser: Parser) -> None:
    _add_output(parser)
    share(parser, "--threads", ": classes, or shards, that are written at once")
    parser.add_argument(
        "--shards", action="store_true", help="write tar shards instead of class folders"
    )
    share(parser, "--shard-size", " (default: 1GB)")
    share(parser, "--resize", ", if they are larger")
    share(parser, "--quality", f" (default: {QUALITY})")


def _add_output(parser: Parser) -> None:
    share(parser, "--output", " the data set", metavar="DIR", required=True)
    parser.renamed("--out", "--output")


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
