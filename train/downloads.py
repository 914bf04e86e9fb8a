"""Files that are downloaded once, and known by where they come from."""

import hashlib
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urlparse
from urllib.request import Request, urlopen

import torch

from tpp.common.errors import UserError, reason_of
from tpp.common.files import aside_of

# The first digits of a file's sha256 in its name, as torch.hub has it: resnet50-0676ba61.pth.
_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.[^.]+$")
_SECONDS = 60
_LONGEST_NAME = 100


def place_of(url: str) -> Path:
    """Where the file of a URL is kept: where torch.hub keeps such files.

    A file whose name holds its hash is kept by that name, as torch.hub does; it is checked. Any
    other by its whole address: names such as ``model.safetensors`` stand for thousands of files.
    """
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    name = Path(urlparse(url).path).name
    if _HASH_IN_NAME.search(name):
        return folder / name
    address = hashlib.sha256(url.encode()).hexdigest()[:32]
    return folder / address / (name[-_LONGEST_NAME:] or "file")


def fetch(url: str, *, key: str, sha256: str | None = None) -> Path:
    """The file of a URL, downloaded if need be: whole and of the right hash, or not at all.

    Args:
        url: http or https.
        key: that names it in the configuration.
        sha256: the file's, or its first digits; what the file's name says of it counts too.

    Raises:
        UserError: it cannot be fetched, or its hash is another. Nothing is kept then.
    """
    target = place_of(url)
    said = _HASH_IN_NAME.search(target.name)
    wanted = [hash for hash in (sha256, said and said[1]) if hash]
    if target.is_file():
        if all(map(_digest(target).startswith, wanted)):
            return target
        if sha256 is not None and (said is None or _digest(target).startswith(said[1])):
            raise UserError(_another_hash(key, f"{url}, kept at {target},", sha256, target))
    with _aside(target) as aside:
        try:
            with urlopen(
                Request(url, headers={"User-Agent": "torch.hub"}), timeout=_SECONDS
            ) as source:
                with aside.open("wb") as file:
                    shutil.copyfileobj(source, file, 1 << 20)
                length = source.headers.get("Content-Length")
            # torch.hub takes what there is (findings/torch_hub_keeps_half_a_download.sh).
            if length is not None and aside.stat().st_size != int(length):
                raise OSError(
                    f"it broke off after {aside.stat().st_size:,} of {int(length):,} bytes"
                )
        except (OSError, URLError, ValueError) as error:
            raise UserError(
                f"{key}: cannot download {url} ({reason_of(error)}); on a machine without access "
                f"put the file at {target}, or name a local file"
            ) from None
        for hash in wanted:
            if not _digest(aside).startswith(hash):
                raise UserError(_another_hash(key, url, hash, aside))
        aside.replace(target)
    return target


def check_hash(path: Path, sha256: str, key: str) -> None:
    """Check a local file.

    Raises:
        UserError: its hash does not begin so.
    """
    if not _digest(path).startswith(sha256):
        raise UserError(_another_hash(key, str(path), sha256, path))


@contextmanager
def _aside(target: Path) -> Iterator[Path]:
    """Where to write what is to become a file; nothing is left there, nor an empty folder."""
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = aside_of(target)
    try:
        yield aside
    finally:
        aside.unlink(missing_ok=True)
        if not any(target.parent.iterdir()):
            target.parent.rmdir()


def _another_hash(key: str, what: str, wanted: str, path: Path) -> str:
    found = _digest(path)[: max(len(wanted), 8)]
    return f"{key}: {what} has sha256 {found}..., not {wanted}..."


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
