"""Headers and damage against what PIL says, on real photos and on images of every kind."""

import tarfile
from collections.abc import Callable, Iterator
from io import BytesIO
from itertools import islice
from pathlib import Path
from struct import pack
from typing import Any
from zlib import crc32

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_pipelines.images.header import MOST_PIXELS, Header, find_damage, is_turned, read_header

RNG = np.random.default_rng(0)


def _image(mode: str, width: int = 21, height: int = 13) -> Image.Image:
    pixels = RNG.integers(0, 256, (height, width, 4), dtype=np.uint8)
    if mode == "I;16":
        return Image.fromarray(pixels[..., :2].copy().view(np.uint16)[..., 0])
    return Image.fromarray(pixels, "RGBA").convert(mode)


def _encoded(mode: str, format: str, **options: Any) -> bytes:
    file = BytesIO()
    _image(mode).save(file, format, **options)
    return file.getvalue()


def _exif(orientation: int = 1, endian: str = "<", size: int = 0) -> Image.Exif:
    exif = Image.Exif()
    exif.endian = endian
    exif[0x010E] = "x" * size
    exif[0x0112] = orientation
    return exif


def _with_thumbnail() -> bytes:
    """A JPEG whose EXIF data hold a whole JPEG, as cameras write it."""
    exif = _exif().tobytes() + _encoded("RGB", "JPEG")
    return _encoded("RGB", "JPEG", exif=exif)


def _decodes(data: bytes | bytearray) -> bool:
    try:
        with Image.open(BytesIO(data)) as image:
            image.load()
    except Exception:
        return False
    return True


def _members(archive: Path) -> Iterator[bytes]:
    with tarfile.open(archive) as members:
        for member in members:
            if member.isfile() and not Path(member.name).name.startswith("."):
                file = members.extractfile(member)
                assert file is not None
                yield file.read()


@pytest.mark.parametrize(
    ("archive", "format"),
    [
        ("imagenet-sample-500.tar", "jpeg"),
        ("cifar10-jpeg.tar.gz", "jpeg"),
        ("mnist-png.tar.gz", "png"),
        ("tiny-imagenet-50.tar.gz", "jpeg"),
    ],
)
def test_real_images(shared_data: Callable[[str], Path], archive: str, format: str) -> None:
    channels = set()
    for data in islice(_members(shared_data(archive)), 500):
        header = read_header(data)
        with Image.open(BytesIO(data)) as image:
            found = Header(format, image.height, image.width, len(image.getbands()))
        assert header == found
        assert find_damage(data) is None
        channels.add(header.channels)
    assert channels == ({1} if format == "png" else channels | {3})


KINDS: list[tuple[str, str, dict[str, Any], str, int]] = [
    ("L", "JPEG", {}, "jpeg", 1),
    ("RGB", "JPEG", {"subsampling": 0}, "jpeg", 3),
    ("RGB", "JPEG", {"progressive": True, "comment": "of a photo"}, "jpeg", 3),
    ("RGB", "JPEG", {"restart_marker_rows": 1, "optimize": True}, "jpeg", 3),
    ("CMYK", "JPEG", {}, "jpeg", 4),
    ("RGB", "JPEG", {"exif": _exif(6, size=60_000), "icc_profile": bytes(200_000)}, "jpeg", 3),
    ("RGB", "MPO", {"save_all": True, "append_images": [_image("RGB")]}, "jpeg", 3),
    ("1", "PNG", {}, "png", 1),
    ("L", "PNG", {}, "png", 1),
    ("I;16", "PNG", {}, "png", 1),
    ("LA", "PNG", {}, "png", 2),
    ("P", "PNG", {"bits": 4}, "png", 3),
    ("RGB", "PNG", {"icc_profile": bytes(200_000), "exif": _exif(6)}, "png", 3),
    ("RGBA", "PNG", {}, "png", 4),
    ("RGB", "WEBP", {}, "other", 3),
    ("P", "GIF", {}, "other", 3),
    ("RGB", "BMP", {}, "other", 3),
    ("L", "TIFF", {}, "other", 1),
    ("L", "PPM", {}, "other", 1),
]


@pytest.mark.parametrize(("mode", "format", "options", "name", "channels"), KINDS)
def test_every_kind(
    mode: str, format: str, options: dict[str, Any], name: str, channels: int
) -> None:
    data = _encoded(mode, format, **options)
    expected = Header(name, 13, 21, channels)
    for given_as in (data, memoryview(data), np.frombuffer(data, np.uint8)):
        assert read_header(given_as) == expected
        assert find_damage(given_as) is None
        assert find_damage(given_as, decode=True) is None


def _frame(data: bytes | bytearray) -> int:
    """Where the frame header of a JPEG that PIL wrote begins."""
    return data.index(b"\xff\xc0\0\x11\x08")


FRAMES = sorted({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})


def _of_every_frame() -> Iterator[bytes]:
    """Headers of arithmetic coding and such, which PIL cannot write."""
    for kind in FRAMES:
        data = bytearray(_encoded("RGB", "JPEG"))
        data[_frame(data) + 1] = kind
        yield bytes(data)


def _with_fill_bytes(data: bytes) -> bytes:
    place = _frame(data)
    return data[:place] + b"\xff\xff\xff" + data[place:]


def test_jpeg_and_png_take_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = [_encoded(mode, form, **more) for mode, form, more, name, _ in KINDS if name != "other"]
    usual += [*_of_every_frame(), _with_fill_bytes(_encoded("RGB", "JPEG"))]

    def fail(*_: Any) -> None:
        raise AssertionError("left to PIL")

    monkeypatch.setattr(Image, "open", fail)
    for data in usual:
        header = read_header(data)
        assert (header.height, header.width) == (13, 21)
        assert find_damage(data) is None


@pytest.mark.parametrize("format", ["JPEG", "MPO"])
@pytest.mark.parametrize("added", [b"\xff\xff\xff", b"\xff\xd0", b"abc"], ids=["fill", "RST", "?"])
def test_what_may_lie_between_segments_is_passed_over(format: str, added: bytes) -> None:
    more = {"save_all": True, "append_images": [_image("RGB")]} if format == "MPO" else {}
    data = _encoded("RGB", format, **more)
    place = _frame(data)
    data = data[:place] + added + data[place:]
    assert _decodes(data)
    assert read_header(data) == Header("jpeg", 13, 21, 3)
    assert find_damage(data) is None


def test_first_bytes_do_if_the_header_lies_within() -> None:
    data = _encoded("RGB", "JPEG", icc_profile=bytes(200_000))
    place = _frame(data)
    assert place > 200_000
    assert read_header(data[: place + 10]) == Header("jpeg", 13, 21, 3)
    with pytest.raises(ValueError, match=r"^truncated$"):
        read_header(data[: place + 9])


@pytest.mark.parametrize(
    "data",
    [
        _with_thumbnail(),
        _encoded("RGB", "JPEG", progressive=True),
        _encoded("L", "JPEG"),
        _encoded("RGB", "PNG"),
        _encoded("P", "PNG"),
        _encoded("RGB", "BMP"),
    ],
    ids=["thumbnail", "progressive", "grey", "png", "palette", "bmp"],
)
def test_damage_is_found_in_each_beginning_that_pil_cannot_decode(data: bytes) -> None:
    with Image.open(BytesIO(data)) as image:
        size = image.height, image.width
    damages = []
    for length in range(len(data)):
        start = data[:length]
        damage = find_damage(start)
        assert (damage is None) == _decodes(start)
        damages.append(damage)
        try:
            header = read_header(start)
        except ValueError as error:
            assert damage == str(error)
        else:
            assert (header.height, header.width) == size
    assert damages[0] == "empty file"
    assert "truncated" in damages
    assert damages[len(data) // 2] is not None


def test_what_follows_the_end_is_no_damage() -> None:
    for format in ("JPEG", "PNG"):
        data = _encoded("RGB", format)
        for added in (b"\0", b"\n" * 5000):
            assert find_damage(data + added) is None


def _png(width: int, height: int) -> bytes:
    header = b"IHDR" + pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n\0\0\0\x0d" + header + pack(">I", crc32(header))


def _jpeg(width: int, height: int, bits: int = 8, channels: int = 3) -> bytes:
    data = bytearray(_encoded("RGB", "JPEG"))
    place = _frame(data) + 4
    data[place : place + 6] = pack(">BHHB", bits, height, width, channels)
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "empty file"),
        (b"<html>404 Not Found</html>", "not an image"),
        (bytes(5000), "not an image"),
        (b"\xff\xd8\xff", "truncated"),
        (_png(0, 5), "an image without pixels"),
        (_jpeg(5, 0), "an image without pixels"),
        (_png(20_000, 20_000), "400,000,000 pixels, more than 178,956,970"),
        (_jpeg(65_500, 65_500), "4,290,250,000 pixels, more than 178,956,970"),
        (_png(5, 5)[:-1] + b"?", "damaged PNG header"),
        (_jpeg(5, 5, bits=12), "JPEG with 3 channels of 12 bits"),
        (_jpeg(5, 5, channels=2), "JPEG with 2 channels of 8 bits"),
        (b"\xff\xd8\xff\xda" + bytes(100), "damaged JPEG header"),
        (b"\xff\xd8\xff\xe0\0\1" + bytes(100), "damaged JPEG header"),
    ],
)
def test_reasons(data: bytes, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        read_header(data)
    assert str(caught.value) == find_damage(data) == said


def test_largest_image_is_pils() -> None:
    assert Image.MAX_IMAGE_PIXELS is not None
    assert MOST_PIXELS == 2 * Image.MAX_IMAGE_PIXELS
    assert read_header(_png(MOST_PIXELS, 1)).width == MOST_PIXELS
    with pytest.raises(ValueError, match="pixels"):
        read_header(_png(MOST_PIXELS + 1, 1))


def test_damage_within_is_found_by_decoding() -> None:
    data = bytearray(_encoded("RGB", "PNG"))
    data[len(data) // 2] ^= 255
    assert find_damage(data) is None
    damage = find_damage(data, decode=True)
    assert damage is not None
    assert damage.startswith("cannot be decoded: ")
    # PIL's readers of other formats raise other errors: this one ValueError.
    damage = find_damage(b"P3 2 2 255 " + b"x " * 12)
    assert damage is not None
    assert damage.startswith("cannot be decoded: ")


@pytest.mark.parametrize("endian", ["<", ">"])
@pytest.mark.parametrize("orientation", range(10))
def test_turned_by_exif(endian: str, orientation: int) -> None:
    data = _encoded("RGB", "JPEG", exif=_exif(orientation, endian, size=50))
    assert is_turned(data) == (orientation in range(2, 9))
    assert not is_turned(_encoded("RGB", "JPEG"))
    place = data.index(b"Exif\0\0")
    for length in range(place, place + 60):
        assert is_turned(data[:length]) in (False, is_turned(data))


@given(
    start=st.sampled_from([b"", b"\xff\xd8\xff", b"\xff\xd8\xff\xe0\0\2\xff", _png(5, 5), b"BM"]),
    rest=st.binary(max_size=300),
)
def test_any_bytes_are_an_image_or_a_reason(start: bytes, rest: bytes) -> None:
    data = start + rest
    assert isinstance(is_turned(b"Exif\0\0MM\0*" + rest), bool)
    damage = find_damage(data)
    try:
        read_header(data)
    except ValueError as error:
        assert damage == str(error)
    assert (find_damage(data, decode=True) is None) == _decodes(data)


WHOLE = [_with_thumbnail(), _encoded("CMYK", "JPEG", progressive=True), _encoded("LA", "PNG")]


@given(
    data=st.sampled_from(WHOLE),
    flips=st.lists(st.tuples(st.integers(0, 700), st.integers(1, 255)), min_size=1, max_size=3),
)
def test_what_pil_decodes_is_never_called_damaged(
    data: bytes, flips: list[tuple[int, int]]
) -> None:
    flipped = bytearray(data)
    for place, bits in flips:
        flipped[place % len(flipped)] ^= bits
    damage = find_damage(flipped)
    if not _decodes(flipped):
        return
    assert damage is None
    header = read_header(flipped)
    with Image.open(BytesIO(flipped)) as image:
        assert (header.height, header.width) == (image.height, image.width)
