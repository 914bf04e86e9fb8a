"""One picture in every image format that turns up in class folders, for tests and docs/formats.md.

Pillow writes most of them. What it cannot write is put together here, byte by byte, or made of what
it wrote by changing a few bytes; each of these says what.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from struct import pack
from typing import Any
from zlib import compress, crc32

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
HEIGHT, WIDTH = 36, 47


def picture() -> Pixels:
    """The picture: smooth, in saturated colours that a JPEG's YCbCr has to clip; (h, w, 3)."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    waves = [np.sin(x / 7), np.cos(y / 6), np.sin((x + y) / 9 + 1)]
    return np.clip(128 + 160 * np.stack(waves, -1), 0, 255).astype(np.uint8)


COLOUR = picture()
GREY = np.asarray(Image.fromarray(COLOUR).convert("L"))


@dataclass(frozen=True)
class Kind:
    """A format: how a file of it is made, and what it shows.

    Attributes:
        make: the file's bytes.
        shows: what a reader should see, (h, w, 3) or (h, w) of levels 0..255; None: whatever Pillow
            sees.
        within: how far from that it may be in the mean, for what the format itself loses.
        broken: whether no loader reads it, and the index names it.
    """

    make: Callable[[], bytes]
    shows: Pixels | None = None
    within: float = 0.6
    broken: bool = False


def saved(pixels: Pixels | Image.Image, format: str, mode: str = "", **options: Any) -> bytes:
    """What Pillow writes."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = BytesIO()
    (image.convert(mode) if mode else image).save(file, format, **options)
    return file.getvalue()


def exif(orientation: int) -> Image.Exif:
    """EXIF data that ask for a rotation."""
    data = Image.Exif()
    data[0x0112] = orientation
    return data


def segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, start and end of each segment of a JPEG before its pixels."""
    place = 2
    while data[place + 1] != 0xDA:
        end = place + 2 + (data[place + 2] << 8 | data[place + 3])
        yield data[place + 1], place, end
        place = end


def without_segment(data: bytes, marker: int) -> bytes:
    """A JPEG without its segments of one kind."""
    for found, start, end in reversed(list(segments(data))):
        if found == marker:
            data = data[:start] + data[end:]
    return data


def as_ycck(data: bytes) -> bytes:
    """A CMYK JPEG whose Adobe marker says YCCK: the same numbers, other colours."""
    (start,) = [start for marker, start, _ in segments(data) if marker == 0xEE]
    return data[: start + 15] + b"\2" + data[start + 16 :]


def lossless_jpeg(pixels: Pixels) -> bytes:
    """A lossless JPEG (ITU-T T.81, annex H): predictor 1, one table of nine codes of 4 bits."""
    planes = pixels.reshape(*pixels.shape[:2], -1)
    height, width, channels = planes.shape
    codes = b"\xff\xc4" + pack(">HB16B9B", 28, 0, 0, 0, 0, 9, *[0] * 12, *range(9))
    ids = range(1, channels + 1)
    frame = pack(">HBHHB", 8 + 3 * channels, 8, height, width, channels)
    frame = b"\xff\xc3" + frame + b"".join(bytes([one, 0x11, 0]) for one in ids)
    scan = pack(">HB", 6 + 2 * channels, channels) + b"".join(bytes([one, 0]) for one in ids)
    bits = []
    for y in range(height):
        for x in range(width):
            for c in range(channels):
                left = planes[y, x - 1, c] if x else planes[y - 1, x, c] if y else 128
                difference = int(planes[y, x, c]) - int(left)
                size = abs(difference).bit_length()
                value = difference if difference > 0 else difference + (1 << size) - 1
                bits.append(f"{size:04b}" + (f"{value:0{size}b}" if size else ""))
    text = "".join(bits)
    text += "1" * (-len(text) % 8)
    body = bytes(int(text[k : k + 8], 2) for k in range(0, len(text), 8))
    body = body.replace(b"\xff", b"\xff\0")
    return b"\xff\xd8" + codes + frame + b"\xff\xda" + scan + b"\1\0\0" + body + b"\xff\xd9"


def png_chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG."""
    return pack(">I", len(content)) + kind + content + pack(">I", crc32(kind + content))


# First row and column, and steps between them, of Adam7's passes.
_ADAM7 = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2)]
_ADAM7 += [(1, 0, 2, 1)]


def png(pixels: NDArray[Any], colour: int, bits: int, *, interlaced: bool = False) -> bytes:
    """A PNG of samples (h, w) or (h, w, c) of so many bits, of one of PNG's colour types."""
    samples = pixels.reshape(*pixels.shape[:2], -1)
    passes = _ADAM7 if interlaced else [(0, 0, 1, 1)]
    rows = []
    for top, left, down, across in passes:
        for row in samples[top::down, left::across]:
            if bits == 16:
                packed = row.astype(">u2").tobytes()
            else:
                planes = np.unpackbits(row.astype(np.uint8).reshape(-1, 1), axis=1)
                packed = np.packbits(planes[:, 8 - bits :]).tobytes()
            rows.append(b"\0" + packed)
    height, width = samples.shape[:2]
    header = pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlaced)
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", compress(b"".join(rows)))
    return b"\x89PNG\r\n\x1a\n" + chunks + png_chunk(b"IEND", b"")


def bmp16(pixels: Pixels) -> bytes:
    """A BMP of 5-5-5 bits, from the bottom up."""
    height, width = pixels.shape[:2]
    red, green, blue = (pixels.astype(np.uint16) >> 3).transpose(2, 0, 1)
    rows = np.pad(red << 10 | green << 5 | blue, ((0, 0), (0, width % 2)))[::-1].astype("<u2")
    header = pack("<IiiHHIIiiII", 40, width, height, 1, 16, 0, rows.nbytes, 0, 0, 0, 0)
    return b"BM" + pack("<IHHI", 54 + rows.nbytes, 0, 0, 54) + header + rows.tobytes()


def top_down(data: bytes) -> bytes:
    """A 24-bit BMP of Pillow's with its rows the other way round."""
    _, height = np.frombuffer(data[18:26], "<i4").tolist()
    rows = np.frombuffer(data[54:], np.uint8).reshape(height, -1)[::-1]
    return data[:22] + pack("<i", -height) + data[26:54] + rows.tobytes()


def jpeg2000_12() -> bytes:
    """A grey JPEG 2000 of 12 bits: of 16 bits, with the difference of the two zero levels."""
    levels = (GREY.astype(np.uint16) << 4 | GREY >> 4) + (1 << 15) - (1 << 11)
    data = bytearray(saved(Image.fromarray(levels), "JPEG2000", no_jp2=True))
    data[data.index(b"\xff\x51") + 40] = 11
    return bytes(data)


def odd_webp() -> bytes:
    """A lossless WebP with EXIF data whose chunk of pixels has an odd length."""
    for cut in range(20):
        data = saved(COLOUR[: HEIGHT - cut], "WEBP", lossless=True, exif=exif(1))
        place = data.index(b"VP8L")
        if int.from_bytes(data[place + 4 : place + 8], "little") % 2:
            return data
    raise AssertionError("no odd one")


def tiff_extra(data: bytes, kind: int) -> bytes:
    """A TIFF with alpha, which is now said to be of another kind (1: premultiplied)."""
    start = int.from_bytes(data[4:8], "little")
    for place in range(start + 2, start + 2 + 12 * data[start], 12):
        if int.from_bytes(data[place : place + 2], "little") == 338:
            return data[: place + 8] + pack("<H", kind) + data[place + 10 :]
    raise AssertionError("no alpha")


def netpbm(magic: str, pixels: NDArray[Any], maxval: int, *, ascii: bool = False) -> bytes:
    """A PGM or PPM whose samples go up to ``maxval``."""
    samples = np.round(pixels.astype(np.float64) / 255 * maxval).astype(np.uint16)
    head = f"{magic}\n{WIDTH} {HEIGHT}\n{maxval}\n".encode()
    if ascii:
        return head + " ".join(map(str, samples.ravel().tolist())).encode() + b"\n"
    return head + samples.astype(">u2" if maxval > 255 else np.uint8).tobytes()


ALPHA = np.dstack([COLOUR, np.linspace(64, 255, HEIGHT * WIDTH).reshape(GREY.shape).astype("u1")])
_OTHER = Image.fromarray(255 - COLOUR)
_CMYK = saved(COLOUR, "JPEG", "CMYK", quality=95)
_DEEP = COLOUR.astype(np.uint16) * 257
_GREY16 = GREY.astype(np.uint16) * 257


def _bits(count: int) -> Pixels:
    """The grey picture in so many bits."""
    return GREY >> (8 - count)


def _from_bits(count: int) -> Pixels:
    return (_bits(count).astype(np.int64) * 255 // (2**count - 1)).astype(np.uint8)


def _palette() -> Image.Image:
    return Image.fromarray(COLOUR).quantize(200)


def _bilevel() -> Pixels:
    return np.where(GREY > 127, 255, 0).astype(np.uint8)


def _bilevel_image() -> Image.Image:
    return Image.fromarray(_bilevel()).convert("1", dither=Image.Dither.NONE)


_TURNED = np.rot90(COLOUR, -1)

KINDS: dict[str, Kind] = {
    "JPEG, colour": Kind(lambda: saved(COLOUR, "JPEG", quality=95), COLOUR, 6),
    "JPEG, colour without subsampling": Kind(
        lambda: saved(COLOUR, "JPEG", quality=95, subsampling=0), COLOUR, 4
    ),
    "JPEG, colour 4:2:2": Kind(lambda: saved(COLOUR, "JPEG", quality=95, subsampling=1), COLOUR, 6),
    "JPEG, grey": Kind(lambda: saved(GREY, "JPEG", quality=95), GREY, 3),
    "JPEG, progressive": Kind(
        lambda: saved(COLOUR, "JPEG", quality=95, progressive=True), COLOUR, 6
    ),
    "JPEG, grey and progressive": Kind(
        lambda: saved(GREY, "JPEG", quality=95, progressive=True), GREY, 3
    ),
    "JPEG with restart markers": Kind(
        lambda: saved(COLOUR, "JPEG", quality=95, restart_marker_blocks=2), COLOUR, 6
    ),
    "JPEG with EXIF orientation": Kind(
        lambda: saved(COLOUR, "JPEG", quality=95, exif=exif(6)), COLOUR, 6
    ),
    "JPEG stored as RGB": Kind(lambda: saved(COLOUR, "JPEG", quality=95, keep_rgb=True), COLOUR, 4),
    "JPEG, CMYK with Adobe marker": Kind(lambda: _CMYK, COLOUR, 4),
    "JPEG, CMYK without Adobe marker": Kind(lambda: without_segment(_CMYK, 0xEE), COLOUR, 4),
    "JPEG, YCCK": Kind(lambda: as_ycck(_CMYK)),
    "JPEG, lossless grey": Kind(lambda: lossless_jpeg(GREY), GREY, 0.01),
    "JPEG, lossless colour": Kind(lambda: lossless_jpeg(COLOUR)),
    "JPEG, 12 bits": Kind(
        lambda: saved(COLOUR, "JPEG").replace(b"\xff\xc0\0\x11\x08", b"\xff\xc1\0\x11\x0c"),
        broken=True,
    ),
    "JPEG, several pictures (MPO)": Kind(
        lambda: saved(COLOUR, "MPO", quality=95, save_all=True, append_images=[_OTHER.copy()]),
        COLOUR,
        6,
    ),
    "PNG, colour": Kind(lambda: saved(COLOUR, "PNG"), COLOUR, 0.01),
    "PNG, grey": Kind(lambda: saved(GREY, "PNG"), GREY, 0.01),
    "PNG, grey of 1 bit": Kind(lambda: png(_bits(1), 0, 1), _from_bits(1), 0.01),
    "PNG, grey of 2 bits": Kind(lambda: png(_bits(2), 0, 2), _from_bits(2), 0.01),
    "PNG, grey of 4 bits": Kind(lambda: png(_bits(4), 0, 4), _from_bits(4), 0.01),
    "PNG, grey of 16 bits": Kind(lambda: png(_GREY16, 0, 16), GREY, 0.01),
    "PNG, colour of 16 bits": Kind(lambda: png(_DEEP, 2, 16), COLOUR, 0.01),
    "PNG, palette": Kind(lambda: saved(_palette(), "PNG"), COLOUR, 10),
    "PNG, palette of 4 bits": Kind(lambda: saved(_palette().quantize(16), "PNG", bits=4)),
    "PNG, palette with transparency": Kind(
        lambda: saved(_palette(), "PNG", transparency=3), COLOUR, 8
    ),
    "PNG, colour with a transparent colour": Kind(
        lambda: saved(COLOUR, "PNG", transparency=(0, 0, 0)), COLOUR, 0.01
    ),
    "PNG, colour with alpha": Kind(lambda: saved(ALPHA, "PNG"), COLOUR, 0.01),
    "PNG, grey with alpha": Kind(lambda: png(np.dstack([GREY, ALPHA[..., 3]]), 4, 8), GREY, 0.01),
    "PNG, colour of 16 bits with alpha": Kind(
        lambda: png(ALPHA.astype(np.uint16) * 257, 6, 16), COLOUR, 0.01
    ),
    "PNG, grey of 16 bits with alpha": Kind(
        lambda: png(np.dstack([GREY, ALPHA[..., 3]]).astype(np.uint16) * 257, 4, 16), GREY, 0.01
    ),
    "PNG, interlaced": Kind(lambda: png(COLOUR, 2, 8, interlaced=True), COLOUR, 0.01),
    "PNG, interlaced grey of 2 bits": Kind(
        lambda: png(_bits(2), 0, 2, interlaced=True), _from_bits(2), 0.01
    ),
    "PNG with gamma and colour profile": Kind(
        lambda: saved(COLOUR, "PNG", icc_profile=bytes(500)), COLOUR, 0.01
    ),
    "PNG with EXIF orientation": Kind(lambda: saved(COLOUR, "PNG", exif=exif(6)), COLOUR, 0.01),
    "PNG, animated": Kind(
        lambda: saved(COLOUR, "PNG", save_all=True, append_images=[_OTHER.copy()]), COLOUR, 0.01
    ),
    "PNG, animated, with a still image apart": Kind(
        lambda: saved(
            COLOUR,
            "PNG",
            save_all=True,
            append_images=[_OTHER.copy(), _OTHER.copy()],
            default_image=True,
        ),
        COLOUR,
        0.01,
    ),
    "GIF": Kind(lambda: saved(_palette(), "GIF"), COLOUR, 10),
    "GIF, grey": Kind(lambda: saved(GREY, "GIF"), GREY, 0.01),
    "GIF with transparency": Kind(lambda: saved(_palette(), "GIF", transparency=3), COLOUR, 10),
    "GIF, animated": Kind(
        lambda: saved(_palette(), "GIF", save_all=True, append_images=[_OTHER.quantize(200)]),
        COLOUR,
        10,
    ),
    "BMP of 24 bits": Kind(lambda: saved(COLOUR, "BMP"), COLOUR, 0.01),
    "BMP of 32 bits": Kind(lambda: saved(ALPHA, "BMP"), COLOUR, 0.01),
    "BMP of 5-5-5 bits": Kind(lambda: bmp16(COLOUR), COLOUR, 5),
    "BMP, grey": Kind(lambda: saved(GREY, "BMP"), GREY, 0.01),
    "BMP, palette": Kind(lambda: saved(_palette(), "BMP"), COLOUR, 10),
    "BMP, bilevel": Kind(lambda: saved(_bilevel_image(), "BMP"), _bilevel(), 0.01),
    "BMP, top row first": Kind(lambda: top_down(saved(COLOUR, "BMP")), COLOUR, 0.01),
    "WebP": Kind(lambda: saved(COLOUR, "WEBP", quality=95), COLOUR, 10),
    "WebP, lossless": Kind(lambda: saved(COLOUR, "WEBP", lossless=True), COLOUR, 0.01),
    "WebP, lossless with EXIF data and an odd chunk": Kind(odd_webp),
    "WebP with EXIF orientation": Kind(
        lambda: saved(COLOUR, "WEBP", lossless=True, exif=exif(6)), COLOUR, 0.01
    ),
    "WebP with alpha": Kind(lambda: saved(ALPHA, "WEBP", lossless=True), COLOUR, 0.01),
    "WebP, animated": Kind(
        lambda: saved(COLOUR, "WEBP", lossless=True, save_all=True, append_images=[_OTHER.copy()]),
        COLOUR,
        0.01,
    ),
    "AVIF": Kind(lambda: saved(COLOUR, "AVIF", quality=95), COLOUR, 10),
    "TIFF": Kind(lambda: saved(COLOUR, "TIFF"), COLOUR, 0.01),
    "TIFF, LZW": Kind(lambda: saved(COLOUR, "TIFF", compression="tiff_lzw"), COLOUR, 0.01),
    "TIFF, deflate": Kind(
        lambda: saved(COLOUR, "TIFF", compression="tiff_adobe_deflate"), COLOUR, 0.01
    ),
    "TIFF, JPEG": Kind(lambda: saved(COLOUR, "TIFF", compression="jpeg"), COLOUR, 25),
    "TIFF, grey": Kind(lambda: saved(GREY, "TIFF"), GREY, 0.01),
    "TIFF, grey of 16 bits": Kind(lambda: saved(Image.fromarray(_GREY16), "TIFF"), GREY, 0.01),
    "TIFF, grey of floating point": Kind(
        lambda: saved(Image.fromarray(GREY.astype(np.float32)), "TIFF"), GREY, 0.01
    ),
    "TIFF, bilevel": Kind(lambda: saved(_bilevel_image(), "TIFF"), _bilevel(), 0.01),
    "TIFF, fax": Kind(
        lambda: saved(_bilevel_image(), "TIFF", compression="group4"), _bilevel(), 0.01
    ),
    "TIFF, CMYK": Kind(lambda: saved(COLOUR, "TIFF", "CMYK"), COLOUR, 0.6),
    "TIFF, palette": Kind(lambda: saved(_palette(), "TIFF"), COLOUR, 10),
    "TIFF with alpha": Kind(lambda: saved(ALPHA, "TIFF"), COLOUR, 0.01),
    "TIFF with premultiplied alpha": Kind(
        lambda: tiff_extra(
            saved(
                np.dstack([(COLOUR * (ALPHA[..., 3:] / 255)).round().astype("u1"), ALPHA[..., 3]]),
                "TIFF",
            ),
            1,
        ),
        COLOUR,
        2,
    ),
    "TIFF with an orientation": Kind(
        lambda: saved(COLOUR, "TIFF", tiffinfo={274: 6}), _TURNED, 0.01
    ),
    "TIFF of several pages": Kind(
        lambda: saved(COLOUR, "TIFF", save_all=True, append_images=[_OTHER.copy()]), COLOUR, 0.01
    ),
    "JPEG 2000": Kind(lambda: saved(COLOUR, "JPEG2000"), COLOUR, 0.01),
    "JPEG 2000, grey": Kind(lambda: saved(GREY, "JPEG2000"), GREY, 0.01),
    "JPEG 2000, grey codestream": Kind(lambda: saved(GREY, "JPEG2000", no_jp2=True), GREY, 0.01),
    "JPEG 2000, grey of 12 bits": Kind(jpeg2000_12, GREY, 1),
    "JPEG 2000, grey of 16 bits": Kind(
        lambda: saved(Image.fromarray(_GREY16), "JPEG2000"), GREY, 0.01
    ),
    "JPEG 2000 with alpha": Kind(lambda: saved(ALPHA, "JPEG2000"), COLOUR, 0.01),
    "PGM": Kind(lambda: netpbm("P5", GREY, 255), GREY, 0.01),
    "PGM up to 100": Kind(lambda: netpbm("P5", GREY, 100), GREY, 1),
    "PGM up to 1023": Kind(lambda: netpbm("P5", GREY, 1023), GREY, 0.6),
    "PGM up to 65535": Kind(lambda: netpbm("P5", GREY, 65535), GREY, 0.6),
    "PGM, as text": Kind(lambda: netpbm("P2", GREY, 255, ascii=True), GREY, 0.01),
    "PPM": Kind(lambda: netpbm("P6", COLOUR, 255), COLOUR, 0.01),
    "PPM up to 100": Kind(lambda: netpbm("P6", COLOUR, 100), COLOUR, 1.5),
    "PPM up to 1023": Kind(lambda: netpbm("P6", COLOUR, 1023), COLOUR, 0.6),
    "PPM, as text": Kind(lambda: netpbm("P3", COLOUR, 255, ascii=True), COLOUR, 0.01),
    "PBM": Kind(lambda: saved(_bilevel_image(), "PPM"), _bilevel(), 0.01),
    "ICO, TGA, PCX, PSD and others": Kind(lambda: saved(COLOUR, "TGA"), broken=True),
    "SVG": Kind(lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>', broken=True),
}
