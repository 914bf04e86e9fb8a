"""What a shard is, byte by byte: members, their index, and how an image is stored."""

import tarfile
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from data_pipelines.images.header import Header, find_damage, open_with_pil, read_header
from data_pipelines.images.image_index import ImageIndex
from data_pipelines.images.order import Int64s
from data_pipelines.images.plain_file import LARGEST_MEMBER
from data_pipelines.images.source import Bytes, read_bytes
from tpp.common.errors import UserError
from tpp.common.reading import read_json

SETTINGS_FILE = ".shards.json"
SKIPPED_FILE = ".skipped.tsv"
# ImageNet's training images are 141 such shards, and a process keeps all of them open (`source`).
SHARD_BYTES = 1_000_000_000
QUALITY = 90
BLOCK = 512
# An image header lies within this, but for files with long metadata in front.
_HEAD = 1 << 16


def entry_bytes(byte_sizes: Int64s) -> Int64s:
    """What a sample takes in a tar file: two headers, the image and the label in whole blocks."""
    return (3 + -(-byte_sizes // BLOCK)) * BLOCK


def settings_of(out: Path) -> dict[str, Any] | None:
    """The settings of the shards in a folder; None if there are no shards of this command.

    Raises:
        UserError: they cannot be read.
    """
    path = out / SETTINGS_FILE
    if not path.exists():
        return None
    try:
        found = read_json(path, "the settings of the shards")
    except UserError as error:
        problem = str(error).removeprefix(f"{path}: ")
        raise UserError(f"{path}: cannot be read ({problem}); empty the folder") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds no settings of shards; empty the folder")
    return found


def header_at(file: BinaryIO, offset: int, length: int) -> Header | None:
    """The header of an image within a file, from its first bytes if possible; None: it has none."""
    length = min(length, LARGEST_MEMBER)
    for read in sorted({min(_HEAD, length), length}):
        file.seek(offset)
        with suppress(ValueError):
            return read_header(file.read(read))
    return None


def reading_error(index: ImageIndex, image: int, error: OSError) -> UserError:
    """What is said of an image whose file cannot be read."""
    return UserError(f"{index.name(image)}: cannot read this image ({error.strerror})")


def source_bytes(index: ImageIndex, image: int) -> Bytes:
    """An image's bytes.

    Raises:
        UserError: the file cannot be read, or has changed. That is no broken image, to be left out
            for good.
    """
    known = int(index.byte_sizes[image])
    try:
        data = read_bytes(index.location(image))
        if known not in (-1, len(data)):
            raise ValueError(f"{len(data):,} bytes instead of {known:,}")
    except OSError as error:
        raise reading_error(index, image, error) from None
    except ValueError as error:
        raise UserError(
            f"{index.name(image)}: is no longer as its index says ({error}); make that anew"
        ) from None
    return data


def scaled_size(header: Header, resize: int | None) -> tuple[int, int] | None:
    """Height and width to scale an image to, the longer rounded down; None: it stays."""
    shorter = min(header.height, header.width)
    if resize is None or shorter <= resize:
        return None
    return resize * header.height // shorter, resize * header.width // shorter


def converted(data: Bytes, resize: int | None, quality: int) -> tuple[bytes | memoryview, Header]:
    """An image as it is stored: its own bytes, or those of a JPEG or PNG made of it.

    Raises:
        ValueError: the image is broken.
    """
    damage = find_damage(data)
    if damage is not None:
        raise ValueError(damage)
    header = read_header(data)
    size = scaled_size(header, resize)
    if size is None and header.format != "other":
        return data.data, header
    with open_with_pil(data) as opened:
        grey = Image.getmodebase(opened.mode) == "L"
    from data_pipelines.images.batch import decode_with_pil  # with PyTorch

    image = decode_with_pil(data, 1 if grey else 3)
    # Comments and profiles would be written too, for nobody to read.
    image.info = {}
    encoded = BytesIO()
    if size is None:
        image.save(encoded, "PNG")
    else:
        # Of PIL's filters, all of which average over what they leave out, Lanczos keeps the most
        # detail: the loaders will scale the image once more.
        image = image.resize(size[::-1], Image.Resampling.LANCZOS)
        # A grey image's one channel must not be called subsampled: some decoders stumble over it.
        image.save(encoded, "JPEG", quality=quality, subsampling="4:4:4" if grey else "4:2:0")
    return encoded.getvalue(), read_header(encoded.getvalue())


def add_member(file: BinaryIO, name: str, content: bytes | memoryview) -> tuple[int, int]:
    """Append a member to a tar file; where its bytes are and how many."""
    file.write(member_header(name, len(content)))
    offset = file.tell()
    file.write(content)
    file.write(bytes(-len(content) % BLOCK))
    return offset, len(content)


def member_header(name: str, size: int) -> bytes:
    """What precedes a member: the header of POSIX.1-1988 (ustar), which every reader knows."""
    member = tarfile.TarInfo(name)
    member.size = size
    return member.tobuf(tarfile.USTAR_FORMAT)


def index_line(key: str, endings: list[str], places: list[tuple[int, int]]) -> str:
    """A sample in DALI's index file: ending, offset, length and name of each member."""
    return " ".join(
        f"{ending} {offset} {length} {key}.{ending}"
        for ending, (offset, length) in zip(endings, places, strict=True)
    )


def text_of_index(lines: list[str]) -> str:
    """DALI's index file of a shard, of the lines of its samples."""
    return "\n".join([f"v1.2 {len(lines)}", *lines]) + "\n"
