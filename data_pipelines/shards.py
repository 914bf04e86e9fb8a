"""``python -m data_pipelines.shards DIR --out DIR`` packs a data set into tar shards.

A parallel file system then sees a few large files instead of millions of small ones. The shards
are WebDataset's (https://github.com/webdataset/webdataset): plain tar files in which a sample is
two members that follow each other, ``KEY.jpg`` or ``KEY.png`` and ``KEY.cls``, the label. Beside
each one lies the index file that DALI's readers.webdataset takes, and beside all of them an index
of images (:mod:`data_pipelines.images.image_index`) by which this package reads each image on its
own.
"""

import argparse
import re
from pathlib import Path

from data_pipelines.images.image_index import open_images, parts_of, said_of_flat_parts
from data_pipelines.sets.shard_check import Verified, verify_shards
from data_pipelines.sets.shard_format import QUALITY, SKIPPED_FILE
from data_pipelines.sets.shard_writer import Written, write_shards
from tpp.common.errors import UserError, printable, run_command
from tpp.common.files import in_bytes
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


def _parts(folder: Path) -> dict[str, Path]:
    """The folders to read, by the names of those to write; '' is the one given itself."""
    parts = {part.name: part for part in parts_of(folder) if part != folder}
    if "test" in parts and "val" not in parts:
        parts["val"] = parts.pop("test")
    return parts or {"": folder}


def main() -> None:
    """Write or verify the shards of a folder, or of the train and val folders in it."""
    parser = argparse.ArgumentParser(
        prog="python -m data_pipelines.shards",
        description="Pack a folder of images into tar shards for a parallel file system.",
    )
    add = parser.add_argument
    add(
        "folder",
        metavar="DIR",
        type=user_path,
        help="folder with one folder of images per class, or with such folders train and val",
    )
    add("--out", metavar="DIR", type=user_path, required=True, help="folder to write")
    add("--shard-size", default="1GB", help="of a tar file (default 1GB)")
    add("--seed", type=int, default=0, help="of the samples' order in the shards (default 0)")
    add("--resize", metavar="N", type=int, help="scale larger images to a shorter side of N pixels")
    add("--quality", type=int, default=QUALITY, help=f"of scaled JPEGs (default {QUALITY})")
    add("--threads", type=int, help="shards at once (default: one per processor)")
    add("--skip-broken", action="store_true", help="leave broken images out and list them")
    add("--verify", action="store_true", help="compare shards written before with DIR")
    options = parser.parse_args()
    if options.threads is not None and options.threads < 1:
        raise UserError(f"--threads must be at least 1, not {options.threads}")
    shard_bytes = byte_count(options.shard_size)
    sources = {name: open_images(path) for name, path in _parts(options.folder).items()}
    for line in said_of_flat_parts(options.folder):
        print(f"{printable(line)}\n")
    for number, (name, index) in enumerate(sources.items()):
        if number:
            print()
        rest = index.said_of_the_rest()
        if rest:
            print(printable(rest))
        if options.verify:
            _print_verified(verify_shards(index, options.out / name, threads=options.threads))
            continue
        print_written(
            write_shards(
                index,
                options.out / name,
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
