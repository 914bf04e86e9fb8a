"""From a request to its images' bytes: reading, and what becomes of images that cannot be read."""

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Generic, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from data_pipelines.images.image_index import ImageIndex, Location, report_beside
from data_pipelines.images.order import Int64s, Order
from data_pipelines.images.plain_file import LARGEST_MEMBER, open_plain
from data_pipelines.images.remote import read_objects
from data_pipelines.settings import OnError
from tpp.common.errors import UserError
from tpp.common.object_storage import is_url

if TYPE_CHECKING:
    from data_pipelines.images.batch import Request

Bytes = NDArray[np.uint8]
T = TypeVar("T")

ON_ERROR = get_args(OnError)
# What a network file system says while it is coming back; everything else is said for good.
_PASSING = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ENOTCONN}
# Shards of which a process keeps the files open.
SHARDS_OPEN = 256
_PAUSES = (0.1, 1.0, 5.0)


def said_of_known(index: ImageIndex) -> str:
    """What an index file says of broken images: how many, the first, and where all are listed."""
    known = np.flatnonzero(index.broken)
    report = report_beside(index.file) if index.file is not None else None
    listed = f"; all of them: {report}" if report is not None and report.is_file() else ""
    return (
        f"{index.file}: says that {len(known):,} of {len(index):,} images are broken (first: "
        f"{index.name(int(known[0]))}{listed})"
    )


class BadImages:
    """The images of an index that cannot be read, and what is done about them.

    Args:
        index: the images.
        on_error: 'fail': the first one ends the run. 'skip': it is left out, see
            :class:`ImageSource`.
        limit: the share of the images that may be skipped. Each rank judges by what it has read
            itself, at the start as if it had read its share of one epoch.
        world_size: number of ranks that share the images.

    Raises:
        UserError: the index itself knows of bad images, with 'fail', or of more than ``limit``.
    """

    def __init__(
        self, index: ImageIndex, *, on_error: str = "fail", limit: float = 0.0, world_size: int = 1
    ) -> None:
        if on_error not in ON_ERROR:
            raise UserError(f"data.on_error must be one of {', '.join(ON_ERROR)}, not {on_error!r}")
        self._index, self._limit, self._world_size = index, limit, world_size
        self._skips = on_error == "skip"
        self._asked = 0
        self._new: list[tuple[str, str]] = []
        self._lock = threading.Lock()
        known = np.flatnonzero(index.broken).tolist()
        self._indexed = len(known) / max(len(index), 1)
        self._known = dict.fromkeys(known, "broken, says the index")
        self._found = 0
        if known and not (self._skips and self._indexed <= limit):
            advice = (
                f"data.max_skipped allows {limit:.4g} of them"
                if self._skips
                else "mend or delete them and make the index anew, or set data.on_error=skip"
            )
            raise UserError(f"{said_of_known(index)}; {advice}")
        self._new = [(index.name(image), self._known[image]) for image in known]

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key != "_lock"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__ |= state
        self._lock = threading.Lock()

    def __contains__(self, image: int) -> bool:
        return image in self._known

    def ask(self, count: int) -> int:
        """Take note that so many images are to be read; how many that makes."""
        with self._lock:
            self._asked += count
            return self._asked

    def hear(self, asked: int) -> None:
        """Take note of how many it is, in a worker process, which has a copy of its own."""
        with self._lock:
            self._asked = max(self._asked, asked)

    def add(self, image: int, reason: str) -> None:
        """Take note of an image that cannot be read.

        Raises:
            UserError: names the file, if nothing may be skipped or this is one too many.
        """
        path = self._index.name(image)
        if not self._skips:
            raise UserError(f"{path}: cannot read this image ({reason})")
        with self._lock:
            if image in self._known:
                return
            self._known[image] = reason
            self._new.append((path, reason))
            self._found += 1
        images = len(self._index)
        share = min(images, max(self._asked, -(-images // self._world_size)))
        if self._found / share + self._indexed > self._limit:
            raise UserError(
                f"{path}: cannot read this image ({reason}), nor {self._found - 1:,} others of the "
                f"{share:,} that this rank reads; data.max_skipped allows a share of "
                f"{self._limit:.4g}, which would now be {self._found / share + self._indexed:.4g}"
            )

    def take_new(self) -> list[tuple[str, str]]:
        """Path and reason of each image found since the last call; each one is handed out once."""
        with self._lock:
            new, self._new = self._new, []
        return new


@dataclass(frozen=True, eq=False)
class Fetched(Generic[T]):
    """What became of a request, or of some rows of it.

    Attributes:
        rows: the rows of the request that could be met, ascending.
        images: the image that each of these rows got.
        items: what ``take`` made of each one's bytes.
        bad: images that could not be read, and why.
    """

    rows: list[int]
    images: list[int]
    items: list[T]
    bad: list[tuple[int, str]]


@dataclass(frozen=True, eq=False)
class ImageSource:
    """Reads the images of requests. Several threads may use one; worker processes get a copy.

    Attributes:
        index: the images.
        order: of training, in which a bad image is replaced by the next one that can be read: a
            function of the sample's number and of which images are bad, on any number of ranks.
            None for evaluation, where it is left out.
        bad: what is known of bad images.
    """

    index: ImageIndex
    order: Order | None
    bad: BadImages

    def fetch(self, request: "Request", rows: range, take: Callable[[int, Bytes], T]) -> Fetched[T]:
        """Read the images of some rows of a request.

        Args:
            request: the batch.
            rows: which of it.
            take: makes something of an image's number and bytes; raises ValueError where it
                cannot.

        Raises:
            UserError: an image cannot be read, and may not be skipped; or the object store that it
            is in gives no answer.
        """
        fetched: Fetched[T] = Fetched([], [], [], [])
        self.bad.hear(request.asked)
        ahead = self._read_together(request, rows) if self.index.url else {}
        for row in rows:
            sample, first = int(request.samples[row]), int(request.images[row])
            for image in self._candidates(sample, first):
                if image in self.bad:
                    continue
                try:
                    data = ahead.get(image)
                    if data is None:
                        data = read_bytes(self.index.location(image))
                    item = take(image, data)
                except (OSError, ValueError) as error:
                    reason = error.strerror if isinstance(error, OSError) else str(error)
                    fetched.bad.append((image, reason or str(error)))
                    self.bad.add(image, reason or str(error))
                    continue
                fetched.rows.append(row)
                fetched.images.append(image)
                fetched.items.append(item)
                break
        return fetched

    def _read_together(self, request: "Request", rows: range) -> dict[int, Bytes]:
        """The bytes of those images that an object store has to be asked for: all at once."""
        images = {int(request.images[row]) for row in rows}
        asked = {image: self.index.location(image) for image in images if image not in self.bad}
        asked = {
            image: place
            for image, place in asked.items()
            if is_url(place.path) and place.length <= LARGEST_MEMBER
        }
        found = read_objects([*asked.values()])
        return {image: data for image, data in zip(asked, found, strict=True) if data is not None}

    def _candidates(self, sample: int, first: int) -> Iterator[int]:
        yield first
        if self.order is not None:
            for later in range(1, len(self.index)):
                yield self.order.image_after(sample, later)


def read_bytes(location: Location) -> Bytes:
    """An image's bytes, as an array of its own.

    A network file system that is away for a moment is asked again for some seconds.

    Raises:
        OSError: the file cannot be read, or is a pipe, a device or the like.
        ValueError: it ends too early, or has more bytes than any image.
    """
    for pause in _PAUSES:
        try:
            return _read(location)
        except OSError as error:
            if error.errno not in _PASSING:
                raise
            time.sleep(pause)
    return _read(location)


def _read(location: Location) -> Bytes:
    path, offset, length = location
    if is_url(path) and length <= LARGEST_MEMBER:
        (found,) = read_objects([location])
        if found is None:
            raise ValueError(f"the object ends before these {length:,} bytes do")
        return found
    if length < 0:
        opened = _OpenFile(path)
        length = os.fstat(opened.descriptor).st_size
    else:
        opened = _container(path)
    if length > LARGEST_MEMBER:
        raise ValueError(f"{length:,} bytes; no image has more than {LARGEST_MEMBER:,}")
    data = np.empty(length, np.uint8)
    got = 0
    while got < length:
        count = os.preadv(opened.descriptor, [data[got:].data], offset + got)
        if count == 0:
            raise ValueError(f"the file ends {length - got} bytes too early")
        got += count
    return data


class _OpenFile:
    """A file that is open as long as somebody holds this object."""

    def __init__(self, path: str) -> None:
        self.descriptor = open_plain(path)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


@lru_cache(maxsize=SHARDS_OPEN)
def _container(path: str) -> _OpenFile:
    """A shard, kept open: opening files is what a parallel file system is slow at.

    One that falls out of the cache is closed when the last thread has read from it.
    """
    return _OpenFile(path)


def rows_of(images: Int64s, parts: int) -> list[range]:
    """Split a batch's rows among readers."""
    return [range(part, len(images), parts) for part in range(min(parts, len(images)))]
