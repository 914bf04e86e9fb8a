"""Archives of others, read without trusting them: tar, tar.gz and zip.

Nothing here writes a file. A member that points out of its folder, a link or a device ends the
reading with its name; so do sizes that no image has, and an archive that is cut off.
"""

import gzip
import io
import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

from data_pipelines.images.plain_file import LARGEST_MEMBER, open_plain
from tpp.common.errors import UserError

# Long names and their like are read into memory by tarfile itself, as long as they claim to be.
_LARGEST_HEADER = 2**20
# Tiny ImageNet's archive, the one with most, has 120,000 files; ImageNet's are in 1000 archives.
_MOST_FILES = 1_000_000
# Images hardly compress, nor do their pixels; this much may come of an archive besides.
_EXPANSION, _ALWAYS = 20, 64 * 2**20
# What file systems take for a name, and for a path.
_LONGEST_NAME, _LONGEST_PATH = 255, 4096
_BLOCK = tarfile.BLOCKSIZE
# Tars are filled up with zeros, mostly to 10 KiB.
_LONGEST_PADDING = 2**20
_AGAIN = "get the archive once more"
_ZIP_START = b"PK\x03\x04"
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_PLAIN_FILE = (tarfile.REGTYPE, tarfile.AREGTYPE)
_ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
# What the libraries raise for damage, depending on where it is.
DAMAGE = (
    gzip.BadGzipFile,
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    ValueError,
    OverflowError,
    NotImplementedError,
    RuntimeError,
    KeyError,
    IndexError,
)


class Member(NamedTuple):
    """A file within an uncompressed tar: ``size`` bytes of the tar from ``offset`` on."""

    name: str
    offset: int
    size: int


class _File(Protocol):
    """What is needed of an open file."""

    def read(self, size: int, /) -> bytes: ...
    def seek(self, place: int, whence: int = 0, /) -> int: ...
    def tell(self) -> int: ...


class Window(io.RawIOBase):
    """``size`` bytes of an open file from ``start`` on, as a file; any thread may have its own."""

    def __init__(self, descriptor: int, start: int, size: int) -> None:
        self.descriptor, self.start, self.size = descriptor, start, size
        self._place = 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def seek(self, place: int, whence: int = os.SEEK_SET) -> int:
        """Go to a place."""
        self._place = (
            place + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self.size}[whence]
        )
        return self._place

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
        """Fill a buffer as far as the window goes."""
        length = min(len(buffer), max(self.size - self._place, 0))
        data = os.pread(self.descriptor, length, self.start + self._place)
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)


class _Wary:
    """Passes reads on to a file, but none that a header of a hostile archive blew up.

    Attributes:
        last: what was read last.
        left: how many bytes may be read for this file's header, which can be one of many parts.
    """

    def __init__(self, file: _File) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell
        self.last, self.left = b"", _LARGEST_HEADER

    def read(self, size: int) -> bytes:
        self.left -= size
        if size < 0 or self.left < 0:
            raise ValueError(f"a header of {size:,} bytes or more")
        self.last = self._file.read(size)
        return self.last


@contextmanager
def damage_named(where: str) -> Iterator[None]:
    """Turn whatever the libraries raise for a damaged archive into one line.

    Raises:
        UserError: instead.
    """
    try:
        yield
    except DAMAGE as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{where}: no such archive as expected here, truncated or damaged ({said}); {_AGAIN}"
        ) from None
    except OSError as error:
        raise UserError(f"{where}: cannot read this archive ({error.strerror or error})") from None


def compression_of(path: Path) -> str | None:
    """How an archive is compressed: 'gzip', 'bzip2', 'xz', 'zstd', 'zip', or None.

    Raises:
        UserError: the file cannot be read, or is none.
    """
    if path.is_dir():
        raise UserError(f"{path}: a folder; give the archive itself")
    with damage_named(str(path)), os.fdopen(open_plain(path), "rb") as file:
        start = file.read(8)
    if start.startswith(_ZIP_START):
        return "zip"
    return next((name for magic, name in _COMPRESSED.items() if start.startswith(magic)), None)


def safe_parts(archive: str, name: str) -> list[str]:
    """The folders and the file of a member's name.

    Args:
        archive: what to call the archive in a message.
        name: as the archive spells it.

    Raises:
        UserError: the name points, or might point, out of the folder that it is unpacked into.
    """
    parts = [part for part in name.split("/") if part not in ("", ".")]
    odd = not name.isprintable() or "\\" in name
    odd = odd or max(map(len, map(os.fsencode, parts)), default=0) > _LONGEST_NAME
    odd = odd or len(os.fsencode(name)) > _LONGEST_PATH
    if not parts or ".." in parts or name.startswith("/") or odd:
        raise UserError(
            f"{archive}: member {name!r} would lie outside of the folder that it is unpacked "
            "into, or is no file name; expected names such as folder/file"
        )
    return parts


def tar_members(
    descriptor: int, start: int, size: int, where: str, *, largest: int = LARGEST_MEMBER
) -> Iterator[Member]:
    """The files of an uncompressed tar, by their headers alone.

    Args:
        descriptor: the open file that the tar is in; read with pread, never moved.
        start, size: where in the file the tar lies, in bytes.
        where: what to call the tar in messages.
        largest: how many bytes a file may have.

    Yields:
        Names as in the tar, offsets as in the file.

    Raises:
        UserError: the tar is damaged, cut off, or holds what :func:`safe_parts` refuses, links or
            devices.
    """
    # tarfile reads the byte before each header and then the header: together one read.
    file = io.BufferedReader(Window(descriptor, start, size), 2 * _BLOCK)
    end = 0
    for header in _tar_headers(file, where):
        end = header.offset_data + header.size
        if end > size:
            raise UserError(
                f"{where}: truncated within {header.name!r}, which goes on to byte {end:,} "
                f"of {size:,}; {_AGAIN}"
            )
        _check_size(where, header.name, header.size, largest)
        yield Member(header.name, start + header.offset_data, header.size)
    # Where a download left a hole there are zeros too.
    if size - end > _LONGEST_PADDING:
        raise UserError(
            f"{where}: damaged: it ends at byte {end:,} of {size:,}, as if the rest were missing; "
            f"{_AGAIN}"
        )


def _tar_headers(file: _File, where: str) -> Iterator[tarfile.TarInfo]:
    """The headers of a tar's files, whose names and kinds are checked, and of nothing else."""
    wary, count = _Wary(file), 0
    with damage_named(where):
        archive = tarfile.TarFile(fileobj=wary)  # type: ignore[arg-type]
        while header := archive.next():
            # tarfile keeps all that it has seen.
            archive.members.clear()  # type: ignore[attr-defined]
            wary.left, count = _LARGEST_HEADER, count + 1
            _check_count(where, count)
            if header.isdir() and header.name in ("", "."):
                continue
            safe_parts(where, header.name)
            if header.isdir():
                continue
            if header.type not in _PLAIN_FILE or header.issparse():
                raise _no_plain_file(where, header.name)
            yield header
    # tarfile takes a damaged header for the end; a tar ends with a block of zeros.
    if wary.last != bytes(_BLOCK):
        raise UserError(
            f"{where}: truncated or damaged at byte {archive.offset:,}, where there is neither a "
            f"file nor the archive's end; {_AGAIN}"
        )


def _no_plain_file(where: str, name: str) -> UserError:
    return UserError(
        f"{where}: member {name!r} is a link, a device or the like; expected files and folders"
    )


def _check_count(where: str, count: int) -> None:
    if count > _MOST_FILES:
        raise UserError(f"{where}: more than {_MOST_FILES:,} files; no such archive has as many")


def _check_size(where: str, name: str, size: int, largest: int) -> None:
    if not 0 <= size <= largest:
        raise UserError(
            f"{where}: member {name!r} is said to have {size:,} bytes; no file of a data set "
            f"has more than {largest:,}"
        )


def archive_files(path: Path, most: int) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the files of a tar, tar.gz or zip, in the archive's order.

    Args:
        path: the archive; its kind is told by its first bytes.
        most: how many bytes its files may have together; at the most it is 20 times as many as the
            archive has, and a little.

    Raises:
        UserError: the archive is damaged, cut off, of another kind, holds what
            :func:`safe_parts` refuses, links or devices, or more than ``most`` bytes.
    """
    kind = compression_of(path)
    if kind not in (None, "gzip", "zip"):
        raise UserError(f"{path}: compressed with {kind}; expected a .tar, .tar.gz or .zip")
    total, expected = 0, _ALWAYS + _EXPANSION * path.stat().st_size
    for name, size, content in _zip_files(path) if kind == "zip" else _tar_files(path, kind):
        total += size
        if total > most:
            raise UserError(
                f"{path}: its files have more than {most:,} bytes together, which is all the "
                "space there is for them"
            )
        if total > expected:
            raise UserError(
                f"{path}: more than {expected:,} bytes come out of its {path.stat().st_size:,}; no "
                "images compress so well"
            )
        yield name, content


def _tar_files(path: Path, kind: str | None) -> Iterator[tuple[str, int, bytes]]:
    where = str(path)
    with damage_named(where), path.open("rb") as raw:
        file = gzip.GzipFile(fileobj=raw) if kind else raw
        for header in _tar_headers(file, where):
            _check_size(where, header.name, header.size, LARGEST_MEMBER)
            file.seek(header.offset_data)
            content = file.read(header.size)
            if len(content) != header.size:
                raise EOFError(f"within {header.name!r}")
            yield header.name, header.size, content
        # gzip's checksum comes last.
        if len(file.read(_LONGEST_PADDING + 1)) > _LONGEST_PADDING:
            raise ValueError("it goes on after its end")


def _zip_files(path: Path) -> Iterator[tuple[str, int, bytes]]:
    where = str(path)
    with damage_named(where), zipfile.ZipFile(path) as archive:
        _check_count(where, len(archive.infolist()))
        for info in archive.infolist():
            safe_parts(where, info.orig_filename)
            kind = stat.S_IFMT(info.external_attr >> 16)
            if info.is_dir():
                continue
            if kind not in (0, stat.S_IFREG):
                raise _no_plain_file(where, info.filename)
            # Others make gigabytes of a few bytes at once, whatever size the member claims.
            if info.compress_type not in _ZIP_METHODS:
                raise ValueError(f"{info.filename!r} is compressed in an unusual way")
            _check_size(where, info.filename, info.file_size, LARGEST_MEMBER)
            content = archive.read(info)
            if len(content) != info.file_size:
                raise EOFError(f"within {info.filename!r}")
            yield info.filename, info.file_size, content
