"""Objects on S3, Google Cloud Storage and Azure, through fsspec; tried again, within bounds.

Credentials are what the providers' own libraries find in the environment or in their files. None
are taken from a URL, and none are written or said.
"""

import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

from tpp.common.errors import UserError, reason_of
from tpp.common.redaction import without_secrets

T = TypeVar("T")
# What opens a scheme, as a package and as fsspec calls it.
_PACKAGES = {
    "s3": ("s3fs", "s3"),
    "gs": ("gcsfs", "gs"),
    "gcs": ("gcsfs", "gs"),
    "az": ("adlfs", "az"),
    "abfs": ("adlfs", "az"),
}
_OPTIONS: dict[str, dict[str, Any]] = {
    # s3fs tries again by itself, and botocore below it would once more.
    "s3": {
        "config_kwargs": {"retries": {"max_attempts": 0}, "max_pool_connections": 64},
        "max_concurrency": 4,
    },
}
_URL = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_URL_SECRET = re.compile(r"(://)[^/\s]*(?=@)|(?<=\?)\S+")
_PAUSES = (0.5, 2.0, 6.0)
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, FileExistsError)
_FINAL_NAMES = ("Credential", "Authentication", "NotFound", "ParamValidation")
# Bytes that are asked for at once, and how many such ranges are under way.
_RANGE, _RANGES = 8 * 2**20, 4


class StorageError(UserError):
    """An object store gives no answer, or another one than hoped for; names the URL."""


class NotThereError(StorageError):
    """There is no such object, or no such bucket."""


class AwayError(StorageError):
    """The store gives no answer, or says that it cannot: what may be well a little later."""


def is_url(text: str) -> bool:
    """Whether this is a URL, of whatever scheme, and no path."""
    return _URL.match(text) is not None


def check_url(url: str) -> str:
    """Check that a URL is one of an object store; returns it without a slash at its end.

    Raises:
        ValueError: another scheme, no bucket, or something that may be a secret; says what would
            be right, and repeats nothing of a secret.
    """
    match = _URL.match(url)
    schemes = ", ".join(f"{scheme}://" for scheme in _PACKAGES)
    if match is None or match[1] not in _PACKAGES:
        raise ValueError(f"expected a URL that begins with one of {schemes}")
    rest = url[match.end() :]
    if "@" in rest or "?" in rest or "#" in rest:
        raise ValueError(
            "a URL with a user name, a password or a query is not taken, as it would be written "
            "into the run folder; credentials come from the environment or the provider's files"
        )
    parts = rest.rstrip("/").split("/")
    if not url.isprintable() or not all(parts) or {".", ".."}.intersection(parts):
        raise ValueError(f"expected {match[1]}://BUCKET/PATH")
    return f"{match[1]}://{'/'.join(parts)}"


def hidden(text: str) -> str:
    """A text with URLs, without what may be a secret in them."""
    return _URL_SECRET.sub(lambda found: f"{found[1] or ''}...", text)


@dataclass(frozen=True)
class Store:
    """A place in an object store. Any thread and any process may use it; it can be pickled.

    All methods try again what may pass, for some ten seconds, beside what the provider's library
    does by itself.

    Attributes:
        url: where it is, as :func:`check_url` returns it.

    Raises:
        StorageError: from any method: names the URL and what is wrong.
        NotThereError: from any method that reads: there is no such object or bucket.
    """

    url: str

    def url_of(self, name: str) -> str:
        """The URL of an object below this place."""
        return f"{self.url}/{name}" if name else self.url

    def read(self, name: str, *, largest: int | None = None) -> bytes:
        """The bytes of an object; at most ``largest``, and an error where there are more."""
        if largest is not None and (size := self.size(name)) > largest:
            raise StorageError(f"{self.url_of(name)}: {size:,} bytes; at most {largest:,} are read")
        return bytes(self._do(name, lambda files, path: files.cat_file(path)))

    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """Parts of objects, all at once.

        Args:
            ranges: of each its name, first byte and length.

        Returns:
            The bytes of each; fewer where the object ends before.
        """
        found: list[bytes | None] = [None] * len(ranges)
        for pause in (*_PAUSES, None):
            left = [n for n, data in enumerate(found) if data is None]
            names = [ranges[n] for n in left]
            answers = self._cat_ranges(names)
            problem: tuple[str, Exception] | None = None
            for n, answer in zip(left, answers, strict=True):
                if isinstance(answer, Exception):
                    name = ranges[n][0]
                    if pause is None or _is_final(answer):
                        raise _said(self.url_of(name), answer)
                    problem = name, answer
                else:
                    found[n] = bytes(answer)
            if problem is None:
                break
            time.sleep(pause or 0.0)
        return [data for data in found if data is not None]

    def stream(self, name: str, size: int) -> Iterator[bytes]:
        """The bytes of an object of a known size, a few ranges ahead of the reader.

        One that is longer gives a byte more, so that it is not taken for the one that is meant.
        """
        if size == 0:
            yield b"" if self.size(name) == 0 else b"?"
        ends = [*range(_RANGE, size, _RANGE), size + 1]
        ranges = [(name, start, end - start) for start, end in zip([0, *ends], ends, strict=False)]
        for first in range(0, len(ranges) if size else 0, _RANGES):
            yield from self.read_ranges(ranges[first : first + _RANGES])

    def size(self, name: str) -> int:
        """How many bytes an object has."""
        return int(self._do(name, lambda files, path: files.info(path)["size"]))

    def sizes(self) -> dict[str, int]:
        """Names and sizes of all objects below this place; none where there is nothing."""
        try:
            found = self._do("", lambda files, path: files.find(path, detail=True))
        except NotThereError:
            return {}
        inside = f"{self._path('')}/"
        return {
            path.removeprefix(inside): int(info["size"] or 0)
            for path, info in found.items()
            if path.startswith(inside)
        }

    def write(self, name: str, data: bytes) -> None:
        """Make an object, or replace one: it appears whole or not at all."""
        self._do(name, lambda files, path: files.pipe_file(path, data))

    def upload(self, name: str, descriptor: int) -> None:
        """Make an object of an open file, also of one that has been deleted meanwhile."""
        # By its descriptor, as a path: what the libraries take, and what they cut into parts.
        here = f"/proc/self/fd/{descriptor}"
        self._do(name, lambda files, path: files.put_file(here, path))

    def delete(self, names: Sequence[str]) -> None:
        """Delete objects; what is gone already is none the worse."""
        if not names:
            return
        try:
            self._do("", lambda files, _: files.rm([self._path(name) for name in names]))
        except NotThereError:
            return

    def _path(self, name: str) -> str:
        return self.url_of(name).partition("://")[2]

    def _do(self, name: str, act: Callable[[Any, str], T]) -> T:
        for pause in (*_PAUSES, None):
            try:
                files = self._files()
                return act(files, self._path(name))
            except UserError:
                raise
            except Exception as error:
                if pause is None or _is_final(error):
                    raise _said(self.url_of(name), error) from None
                time.sleep(pause)
        raise AssertionError

    def _cat_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> list[Any]:
        files = self._files()
        starts = [start for _, start, _ in ranges]
        ends = [start + length for _, start, length in ranges]
        paths = [self._path(name) for name, _, _ in ranges]
        try:
            return list(files.cat_ranges(paths, starts, ends, on_error="return"))
        except Exception as error:
            return [error] * len(ranges)

    def _files(self) -> Any:
        scheme = self.url.partition("://")[0]
        package, protocol = _PACKAGES[scheme]
        try:
            return _filesystem(protocol, os.getpid())
        except ImportError:
            raise StorageError(
                f"{self.url}: needs the package {package}, which is not installed: pip install "
                f"{package}"
            ) from None
        except Exception as error:
            raise _said(self.url, error) from None


@lru_cache(maxsize=16)
def _filesystem(protocol: str, process: int) -> Any:
    """One for all threads of a process; a fork needs its own."""
    import fsspec

    # What goes wrong on the way is said here, in a line; gcsfs would print a traceback too.
    logging.getLogger("gcsfs").addHandler(logging.NullHandler())
    # Other processes write there too, so that nothing that was listed is sure to be so still.
    files = fsspec.filesystem(protocol, use_listings_cache=False, **_OPTIONS.get(protocol, {}))
    if protocol == "s3":
        files.retries = 2  # of 5, and of 5 times 5 where it reads: half a minute with what is above
    return files


def _is_final(error: Exception) -> bool:
    """Whether trying again would give the same."""
    name = type(error).__name__
    return isinstance(error, (*_FINAL, ValueError, TypeError, ImportError)) or any(
        part in name for part in _FINAL_NAMES
    )


def _said(url: str, error: Exception) -> StorageError:
    reason = without_secrets(reason_of(error))
    if isinstance(error, FileNotFoundError) or type(error).__name__ == "ResourceNotFoundError":
        return NotThereError(f"{url}: no such object or bucket")
    if isinstance(error, PermissionError):
        return StorageError(f"{url}: the credentials do not allow it ({reason})")
    if any(part in type(error).__name__ for part in ("Credential", "Authentication")):
        return StorageError(
            f"{url}: no credentials found ({reason}); set them in the environment or in the "
            "provider's files (docs/object_storage.md)"
        )
    kind = StorageError if _is_final(error) else AwayError
    return kind(f"{url}: cannot be reached ({type(error).__name__}: {reason})")
