"""What a file is by its first bytes, and what to do with one that holds no weights."""

import os
import zipfile
from pathlib import Path

from tpp.common.errors import UserError, printable
from tpp.common.files import in_bytes

_HEAD = 512  # bytes that are looked at; a tar archive says what it is at 257
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
_CONVERT = "; where it was made, save its weights alone: "
_OTHERS = (
    (0, b"\x1f\x8b", "compressed with gzip; unpack it first"),
    (0, b"\xfd7zXZ", "compressed with xz; unpack it first"),
    (0, b"BZh", "compressed with bzip2; unpack it first"),
    (0, b"7z\xbc\xaf", "a 7z archive; unpack it first"),
    (0, b"\x89HDF", f"an HDF5 file, as Keras writes it{_CONVERT}as safetensors"),
    (0, b"\x93NUMPY", "a NumPy array, and no set of named tensors"),
    (257, b"ustar", "a tar archive, whatever its name says; unpack it, and name the file in it"),
)
_STATE_DICT = "torch.save(model.state_dict(), PATH)"


def check_file(path: Path) -> None:
    """Raise UserError if there is no such file, it is a folder, or it cannot be read."""
    if path.is_dir():
        raise UserError(f"{path}: a folder, where a file is needed")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if not os.access(path, os.R_OK):
        raise UserError(f"{path}: no permission to read it")


def is_safetensors(path: Path) -> bool:
    """Whether a file looks like safetensors, by its first bytes; by its name where they do not say.

    Raises:
        UserError: it is missing, or of a kind that holds no weights, which is named.
    """
    check_file(path)
    head = _head_of(path)
    if head[8:9] == b"{":
        return True
    if not head.startswith((_ZIP, _PICKLE)):
        _refuse_other(path, head)
    return path.suffix == ".safetensors" and not head.startswith((_ZIP, _PICKLE))


def begins_as_torch(path: Path) -> bool:
    """Whether a file that is not safetensors is in the zip format of torch.save (since 1.6).

    Raises:
        UserError: it cannot be a file of torch.save, or is truncated; the message says what it is.
    """
    head = _head_of(path)
    if head.startswith(_ZIP):
        _refuse_archive(path)
        return True
    if not head.startswith(_PICKLE):
        raise UserError(f"{path}: neither a safetensors file nor one of torch.save")
    return False


def _refuse_archive(path: Path) -> None:
    """Raise UserError for a zip archive that torch.save did not write, saying what it is.

    Args:
        path: a file that begins as torch.save's files do since torch 1.6.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [Path(entry.filename) for entry in archive.infolist()]
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        size = in_bytes(path.stat().st_size)
        raise UserError(
            f"{path}: not a whole PyTorch file: it begins as one, and its end is missing ({size} "
            "are there); copy it again"
        ) from None
    parts = {part for name in names for part in name.parts[1:]} | {name.name for name in names}
    if "constants.pkl" in parts or "code" in parts:
        load = "torch.jit.load(PATH).state_dict()"
        raise UserError(
            f"{path}: a TorchScript file, which holds a program{_CONVERT}torch.save({load}, NEW)"
        )
    if "archive_format" in parts or "serialized_exported_program.json" in parts:
        raise UserError(
            f"{path}: an exported program (torch.export), made for serving; name the checkpoint "
            "that it was made from"
        )
    if "data.pkl" not in parts:
        raise UserError(f"{path}: a zip archive that torch.save did not write; unpack it first")


def _head_of(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_HEAD)


def _refuse_other(path: Path, head: bytes) -> None:
    """Raise UserError for what is known to be something else."""
    if not head:
        raise UserError(f"{path}: an empty file; copy it again")
    for start, mark, what in _OTHERS:
        if head[start:].startswith(mark):
            raise UserError(f"{path}: {what}")
    if path.suffix == ".onnx":
        raise UserError(f"{path}: an ONNX file; name the checkpoint that it was made from")
    text = _text_of(head)
    if text is None:
        return
    if text.startswith("version https://git-lfs"):
        raise UserError(f"{path}: a pointer of Git LFS, not the file; fetch it with: git lfs pull")
    if text.lstrip().lower().startswith(("<!doctype", "<html", "<?xml")):
        raise UserError(f"{path}: a web page, so it was not downloaded; download it again")
    begins = printable(" ".join(text[:40].split()))
    raise UserError(f"{path}: a text file ({begins} ...), no checkpoint")


def _text_of(head: bytes) -> str | None:
    """The first bytes as text; None if they are none."""
    try:
        text = head[: _HEAD - 4].decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 8:  # and not only a character that is cut off
            return None
        text = head[: error.start].decode("utf-8")
    plain = text.replace("\n", "").replace("\r", "").replace("\t", "")
    return text if plain and plain.isprintable() else None
