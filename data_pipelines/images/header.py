"""What an encoded image says about itself, and whether its file is whole; without decoding it.

A loader reads the header of every image, and the index command of every file of a data set: so
JPEG and PNG, which nearly all are, take a few microseconds of plain Python and no library.
What this reading does not understand is left to PIL to judge.
"""

from contextlib import AbstractContextManager, nullcontext
from io import BytesIO
from struct import error as StructError
from struct import unpack_from
from threading import Lock
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

Encoded = bytes | bytearray | memoryview | NDArray[np.uint8]
"""An image file's bytes."""

MOST_PIXELS = 178_956_970
"""Twice what PIL warns of: beyond it PIL decodes nothing, since it may be a bomb."""

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "TIFF", "WEBP", "JPEG2000", "AVIF")
"""What PIL may read. It knows forty more, among them PostScript, which Ghostscript would run."""

TAIL = 1024
"""How many of a file's last bytes tell whether it is whole."""

_JPEG = b"\xff\xd8\xff"
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
# Marker codes of ITU-T T.81, table B.1: the frame headers SOF0 to SOF15, without DHT, JPG and DAC
# that lie among them; and other segments that may stand before one: tables, APPn, comments.
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_SKIPPED = frozenset({0xC4, 0xCC, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)})
# Channels by PNG's colour types: grey, RGB, palette (of RGB), grey with alpha, RGB with alpha.
_PNG_CHANNELS = {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}
# Segments and fill bytes before a JPEG's frame header; photos have some dozens at most, and reading
# millions of them would take minutes. And the bytes that PIL may look for it in.
_MOST_SEGMENTS, _PIL_HEAD = 10_000, 2**20
# Of a JPEG, at least one bit is there for every 8 x 8 pixels. This many pixels it may have all the
# same: PIL makes an image of any number of them from a few bytes.
_PIXELS_A_BYTE, _FEW_PIXELS = 512, 2**24
# Every scan of a JPEG goes over all of its pixels, and takes but a few bytes; cameras and editors
# write a dozen.
_MOST_SCANS = 100
_SCAN, _END = b"\xff\xda", b"\xff\xd9"
# Frames whose pixels may come in several scans: all but baseline and extended sequential.
_SEQUENTIAL = frozenset({0xC0, 0xC1})
# Frames that every decoder knows: these, and progressive ones; no arithmetic coding, not lossless.
_COMMON_FRAMES = _SEQUENTIAL | {0xC2}
# Of Adobe's marker, T.872 6.5.3: the place of the byte that says what three channels are; YCbCr.
_ADOBE, _ADOBE_TRANSFORM, _ADOBE_YCC = 0xEE, 15, 1
# What follows 0xFF among a JPEG's pixels: an escaped 0xFF, restarts, and, between scans, tables,
# comments and the next scan.
_AMONG_PIXELS = np.isin(
    np.arange(256), [0, 0xFF, *range(0xD0, 0xD8), 0xC4, _SCAN[1], 0xDB, 0xDD, 0xFE]
)
# Larger images are decoded one at a time: they would fill the memory otherwise.
_LARGE_PIXELS = 2**24
_one_large_image = Lock()


class Header(NamedTuple):
    """What an image file's header says.

    Attributes:
        format: 'jpeg', 'png', or 'other' for what PIL reads besides.
        height, width: in pixels, as stored (EXIF rotation is ignored); at least 1.
        channels: as in the file: 1 grey, 3 RGB or YCbCr or a palette, 4 of a JPEG is CMYK, else 4
            is RGB and 2 is grey with alpha.
    """

    format: str
    height: int
    width: int
    channels: int


def read_header(data: Encoded) -> Header:
    """Read an image's header.

    Args:
        data: the file's bytes, or its first ones. Where the header goes beyond them (an EXIF
            thumbnail or a colour profile can be large), they are "truncated"; and of a format
            other than JPEG and PNG, the first bytes may not do.

    Raises:
        ValueError: there is no such header; says why in a few words, as 'empty file'.
    """
    return _parse(_view(data))[0]


def find_damage(data: Encoded, *, decode: bool = False) -> str | None:
    """Say in a few words why an image cannot be decoded; None if nothing speaks against it.

    What has a header and the right end is taken to be whole; anything else is decoded with PIL.
    So no image that PIL decodes is found to be damaged, nor is damage in the midst of the pixels;
    but for a JPEG that would take memory or time out of all proportion to its bytes.

    Args:
        data: the whole file's bytes.
        decode: decode it in any case, to be sure.
    """
    view = _view(data)
    try:
        header, end = _parse(view)
    except ValueError as error:
        return str(error)
    bomb = _bomb(header, end, view)
    if bomb:
        return bomb
    # What precedes the frame header may be a thumbnail, which has an end of its own.
    if not decode and looks_whole(header, view[max(end, len(view) - TAIL) :]):
        return None
    try:
        with alone_if_large(header.height, header.width), open_with_pil(view) as image:
            image.load()
    # PIL's readers raise whatever comes, depending on the format and the damage.
    except Exception as error:
        return what_pil_says(error)
    return None


def alone_if_large(height: int, width: int) -> AbstractContextManager[Any]:
    """In this context an image of that size is decoded with PIL; large ones one after the other."""
    return _one_large_image if height * width > _LARGE_PIXELS else nullcontext()


def what_pil_says(error: Exception) -> str:
    """Why PIL cannot decode an image, in a few words, from what it raised."""
    # What it says names the object in memory.
    if isinstance(error, UnidentifiedImageError):
        return "cannot be decoded"
    said = str(error)
    return "truncated" if "truncated" in said else f"cannot be decoded: {said}"


def is_common(data: Encoded) -> bool:
    """Whether every decoder makes the same pixels of an image's file, so far as its header tells.

    That are JPEGs, baseline or progressive, grey or YCbCr, and PNGs of up to 8 bits that do not
    move and whose chunks are whole: nearly all that there are. Of the rest some decoders make
    something else, or nothing.

    Args:
        data: the whole file's bytes.
    """
    view = _view(data)
    try:
        if view[:3] == _JPEG:
            return _is_common_jpeg(view)
        return view[:8] == _PNG and _is_common_png(view)
    except (IndexError, StructError):
        return False


def _is_common_jpeg(view: memoryview) -> bool:
    place, adobe, alike = 2, _ADOBE_YCC, False
    for _ in range(_MOST_SEGMENTS):
        marker = view[place + 1]
        if view[place] != 0xFF:
            return False
        if marker == _SCAN[1]:
            break
        if marker == _ADOBE and view[place + 4 : place + 9] == b"Adobe":
            adobe = view[place + _ADOBE_TRANSFORM]
        elif marker in _COMMON_FRAMES:
            channels, names = view[place + 9], view[place + 10 : place + 19 : 3]
            alike = channels == 1 or (channels == 3 and adobe == _ADOBE_YCC and names != b"RGB")
        elif marker not in _SKIPPED:
            return False
        place += 2 + (view[place + 2] << 8 | view[place + 3])
    else:
        return False
    # Of markers that do not belong between pixels, some decoders take no notice and others give up.
    data = np.frombuffer(view, np.uint8)[place:]
    markers = data[1:][np.flatnonzero(data[:-1] == 0xFF)]
    odd = markers[~_AMONG_PIXELS[markers]]
    return alike and len(odd) > 0 and odd[0] == _END[1]


def _is_common_png(view: memoryview) -> bool:
    if view[24] > 8:
        return False
    place = 8
    while True:
        length, kind = unpack_from(">I4s", view, place)
        end = place + 8 + length
        if kind == b"acTL" or unpack_from(">I", view, end) != (crc32(view[place + 4 : end]),):
            return False
        if kind == b"IEND":
            return True
        place = end + 4


def is_modest(head: Encoded, byte_size: int) -> bool:
    """Whether a file's first bytes show that its decoding is in proportion to its size.

    Else :func:`find_damage` has to see all of it.

    Args:
        head: the file's first bytes.
        byte_size: how many it has.

    Raises:
        ValueError: there is no header.
    """
    view = _view(head)
    header, end = _parse(view)
    if header.format != "jpeg":
        return True
    return not _has_too_many_pixels(header, byte_size) and _has_one_scan(header, end, view)


def open_with_pil(data: Encoded) -> Image.Image:
    """Open an image file's bytes with PIL, whatever of :data:`FORMATS` they are.

    Raises:
        Exception: PIL's readers raise whatever comes, depending on the format and the damage.
    """
    return Image.open(BytesIO(_view(data)), formats=FORMATS)


def _bomb(header: Header, end: int, view: memoryview) -> str | None:
    """Why decoding a JPEG would take memory or time that its bytes do not justify."""
    if header.format != "jpeg":
        return None
    if _has_too_many_pixels(header, len(view)):
        pixels = header.height * header.width
        return f"{pixels:,} pixels cannot be in {len(view):,} bytes"
    if _has_one_scan(header, end, view):
        return None
    data = bytes(view)
    # After a JPEG's end may come a video, where any bytes may be found.
    scans = data.count(_SCAN, end, data.find(_END, end)) if end < len(data) else data.count(_SCAN)
    return f"{scans:,} scans, more than {_MOST_SCANS}" if scans > _MOST_SCANS else None


def _has_too_many_pixels(header: Header, byte_size: int) -> bool:
    return header.height * header.width > max(_PIXELS_A_BYTE * byte_size, _FEW_PIXELS)


def _has_one_scan(header: Header, end: int, view: memoryview) -> bool:
    """Whether a JPEG's first scan holds all there is, as nearly always; without a library."""
    try:
        place = end - 10
        if view[place + 1] not in _SEQUENTIAL:
            return False
        while view[place + 1] != _SCAN[1]:
            place += 2 + (view[place + 2] << 8 | view[place + 3])
            if view[place] != 0xFF:
                return False
        return view[place + 4] == header.channels
    except IndexError:
        return False


def looks_whole(header: Header, tail: Encoded) -> bool:
    """Whether a JPEG's or PNG's last bytes are the right ones; False for other formats.

    Args:
        header: the file's header.
        tail: the file's last :data:`TAIL` bytes, or fewer: none of the header.
    """
    end = bytes(tail)
    # Cameras and editors put data of their own, or zeros, after a JPEG's end.
    if header.format == "jpeg":
        return _END in end
    return header.format == "png" and end.endswith(_PNG_END)


def is_turned(data: bytes) -> bool:
    """Whether a JPEG's EXIF data ask for a rotation or mirroring before it is shown.

    Args:
        data: the file's bytes, or its first ones.
    """
    start = data.find(b"Exif\0\0") + 6
    if start < 6:
        return False
    order = ">" if data[start : start + 2] == b"MM" else "<"
    try:
        # TIFF 6.0, section 2: the offset of the first directory; its length; its entries.
        directory = start + unpack_from(order + "I", data, start + 4)[0]
        for entry in range(unpack_from(order + "H", data, directory)[0]):
            tag, _, _, value = unpack_from(order + "HHIH", data, directory + 2 + 12 * entry)
            if tag == 0x0112:
                return 2 <= value <= 8
    except StructError:
        pass
    return False


class _TooLongError(Exception):
    """A JPEG's header has no end; PIL would not find it any sooner."""


def _view(data: Encoded) -> memoryview:
    return data.data if isinstance(data, np.ndarray) else memoryview(data)


def _parse(view: memoryview) -> tuple[Header, int]:
    """The header, and the place after it."""
    if not len(view):
        raise ValueError("empty file")
    reason = "not an image"
    try:
        if view[:3] == _JPEG:
            return _jpeg_header(view)
        if view[:8] == _PNG:
            return _png_header(view)
    except _TooLongError:
        raise ValueError("damaged JPEG header") from None
    except ValueError as error:
        reason = str(error)
    # PIL forgives more, such as garbage between the segments of a JPEG; which it reads slowly.
    try:
        with open_with_pil(view[:_PIL_HEAD] if view[:3] == _JPEG else view) as image:
            return _pil_header(image), len(view)
    except Exception:
        raise ValueError(reason) from None


def _jpeg_header(view: memoryview) -> tuple[Header, int]:
    place = 2
    try:
        for _ in range(_MOST_SEGMENTS):
            if view[place] != 0xFF:
                raise ValueError("damaged JPEG header")
            marker = view[place + 1]
            if marker in _SKIPPED:
                place += 2 + (view[place + 2] << 8 | view[place + 3])
            elif marker in _FRAMES:
                break
            elif marker == 0xFF:
                place += 1
            else:
                raise ValueError("damaged JPEG header")
        else:
            raise _TooLongError
        bits, height, width, channels = unpack_from(">BHHB", view, place + 4)
    except (IndexError, StructError):
        raise ValueError("truncated") from None
    if bits != 8 or channels not in (1, 3, 4):
        raise ValueError(f"JPEG with {channels} channels of {bits} bits")
    return _checked(Header("jpeg", height, width, channels)), place + 10


def _png_header(view: memoryview) -> tuple[Header, int]:
    try:
        length, kind, width, height, _, colour, check = unpack_from(">I4sIIBB3xI", view, 8)
    except StructError:
        raise ValueError("truncated") from None
    sound = (length, kind) == (13, b"IHDR") and crc32(view[12:29]) == check
    if not sound or colour not in _PNG_CHANNELS:
        raise ValueError("damaged PNG header")
    return _checked(Header("png", height, width, _PNG_CHANNELS[colour])), 33


def _pil_header(image: Image.Image) -> Header:
    known = {"JPEG": "jpeg", "MPO": "jpeg", "PNG": "png"}
    channels = 3 if image.mode == "P" else len(image.getbands())
    name = known.get(image.format or "", "other")
    return _checked(Header(name, image.height, image.width, channels))


def _checked(header: Header) -> Header:
    pixels = header.height * header.width
    if not pixels:
        raise ValueError("an image without pixels")
    if pixels > MOST_PIXELS:
        raise ValueError(f"{pixels:,} pixels, more than {MOST_PIXELS:,}")
    return header
