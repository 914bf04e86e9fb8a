"""``tpp shards DIR --output DIR`` packs a data set into tar shards.

A parallel file system then sees a few large files instead of millions of small ones. The shards
are WebDataset's (https://github.com/webdataset/webdataset): plain tar files in which a sample is
two members that follow each other, ``KEY.jpg`` or ``KEY.png`` and ``KEY.cls``, the label. Beside
each one lies the index file that DALI's readers.webdataset takes, and beside all of them an index
of images (:mod:`data_pipelines.images.image_index`) by which this package reads each image on its
own.
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from data_pipelines.images.image_index import INDEX_FILE, ImageIndex
from data_pipelines.sets.inputs import (
    Input,
    input_parts,
    open_input,
    open_tables,
    said_of_flat_parts,
)
from data_pipelines.sets.shard_check import Verified, verify_shards
from data_pipelines.sets.shard_format import QUALITY, SKIPPED_FILE
from data_pipelines.sets.shard_writer import Written, write_shards
from data_pipelines.sets.table_files import find_tables
from data_pipelines.sets.table_images import ImageTables, UnlabelledError
from tpp.common.command_line import Parser
from tpp.common.errors import UserError, printable, run_command
from tpp.common.files import in_bytes
from tpp.common.options import add_reading, reading_of, share
from tpp.common.paths import user_path

_UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def byte_count(text: str) -> int:
    """A number of bytes, as '256MB' or '1 GiB'.

    Raises:
        UserError: it is no such number; a unit is needed.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?b)", text.strip(), re.IGNORECASE)
    count = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if count < 1:
        raise UserError(f"--shard-size must be such as 256MB or 1GB, not {text!r}")
    return count


def print_written(written: Written) -> None:
    """Say what :func:`write_shards` did, in aligned lines."""
    size = in_bytes(written.bytes_after)
    reused = f" ({written.reused:,} of them there before)" if written.reused else ""
    speed = written.images / max(written.seconds, 1e-9)
    print(f"images       {written.images:,}")
    if written.resize is not None:
        print(f"scaled       {written.scaled:,} to a shorter side of {written.resize} pixels")
        before = f"{written.side_before:,.0f} before"
        print(f"shorter side {written.side_after:,.0f} pixels on average, {before}")
    if written.skipped:
        print(f"skipped      {written.skipped:,} broken, see {written.out / SKIPPED_FILE}")
    print(f"shards       {written.shards:,}{reused}")
    print(f"image bytes  {size}, {in_bytes(written.bytes_before)} before")
    print(f"seconds      {written.seconds:,.1f} ({speed:,.0f} images/s)")
    print(f"written to   {written.out}")


def _parts(folder: Path) -> tuple[dict[str, Input], list[str]]:
    """What to read, by the names of the folders to write; '' is the one given itself.

    And lines on what is left out.
    """
    if not folder.is_dir():
        return {"": Input(folder)}, []
    found = input_parts(folder)
    alone = found == [folder] and not (folder / INDEX_FILE).exists()
    tables = find_tables(folder) if alone else None
    if tables is not None:
        parts = {name: Input(folder, tables=tuple(files)) for name, files in tables.parts.items()}
        said = tables.left_out
    else:
        parts = {part.name: Input(part) for part in found if part != folder}
        said = said_of_flat_parts(folder, found) if parts else []
    if "test" in parts and "val" not in parts:
        parts["val"] = parts.pop("test")
    return parts or {"": Input(folder)}, said


def _opened(parts: dict[str, Input], said: list[str]) -> dict[str, ImageIndex | ImageTables]:
    """The images of each part; a test split without labels is left out, and that is said."""
    found: dict[str, ImageIndex | ImageTables] = {}
    for name, source in parts.items():
        try:
            found[name] = open_tables(source) or open_input(source)
        except UnlabelledError as error:
            if name != "test":
                raise
            said.append(f"left out: {error}")
    return found


def make_parser(prog: str = "python -m data_pipelines.shards") -> Parser:
    """What the command takes."""
    parser = Parser(
        prog,
        "Pack a folder of images into tar shards for a parallel file system.",
        more="The shards are WebDataset's, with the index of DALI's reader beside each of them.",
        examples=[
            "/data/imagenet --output /data/shards",
            "/data/imagenet --output /data/small --resize 256 --shard-size 256MB",
            "/data/cifar100-of-the-hub --output /data/shards --label-key fine_label",
        ],
    )
    parser.add_argument(
        "folder",
        metavar="DIR",
        type=user_path,
        help="folder with one folder of images per class, or with tars made for WebDataset, or "
        "Parquet files of Hugging Face; or with such folders train and val; or a tar, a Parquet "
        "file, a pattern of these, a list of images (.csv, .txt)",
    )
    share(parser, "--output", " the shards", metavar="DIR", required=True)
    share(parser, "--shard-size", default="1GB")
    share(parser, "--seed", ", the samples' order in the shards", default=0)
    share(parser, "--resize", ", if they are larger")
    share(parser, "--quality", default=QUALITY)
    share(parser, "--threads", ": shards that are written at once (default: one per processor)")
    add_reading(parser, tables=True)
    add = parser.add_argument
    add("--skip-broken", action="store_true", help="leave broken images out and list them")
    add("--verify", action="store_true", help="compare shards written before with DIR")
    parser.renamed("--out", "--output")
    return parser


def main(words: Sequence[str] | None = None, prog: str = "python -m data_pipelines.shards") -> None:
    """Write or verify the shards of a folder, or of the train and val folders in it."""
    options = make_parser(prog).parse_args(words)
    shard_bytes = byte_count(options.shard_size)
    whole = options.listing is not None
    parts, left_out = ({"": Input(options.folder)}, []) if whole else _parts(options.folder)
    given = reading_of(options)
    parts = {name: replace(source, **given) for name, source in parts.items()}
    sources = _opened(parts, left_out)
    for line in left_out:
        print(f"{printable(line)}\n")
    for number, (name, source) in enumerate(sources.items()):
        if number:
            print()
        if isinstance(source, ImageIndex):
            _pack(source, name, options, shard_bytes)
            continue
        with source.unpacked(options.output / name, options.threads) as index:
            _pack(index, name, options, shard_bytes)


def _pack(index: ImageIndex, name: str, options: argparse.Namespace, shard_bytes: int) -> None:
    """Write or verify the shards of one part."""
    for said in (index.said_of_form(), index.said_of_the_rest()):
        if said:
            print(printable(said))
    if options.verify:
        _print_verified(verify_shards(index, options.output / name, threads=options.threads))
        return
    print_written(
        write_shards(
            index,
            options.output / name,
            shard_bytes=shard_bytes,
            seed=options.seed,
            resize=options.resize,
            quality=options.quality,
            threads=options.threads,
            skip_broken=options.skip_broken,
        )
    )


def _print_verified(verified: Verified) -> None:
    print(f"images       {verified.images:,}, all as they should be")
    print(f"same bytes   {verified.kept:,}")
    print(f"converted    {verified.converted:,}, whole and of the right size")
    print(f"seconds      {verified.seconds:,.1f}")


if __name__ == "__main__":
    run_command(main)
