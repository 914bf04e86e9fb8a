"""Images in an object store: their index, their bytes, and the shards that are kept here.

An index says which bytes of which object an image is, so that each is read by itself, in whatever
order the run has. Shards that are kept on a disk of the node are fetched whole, each once, in the
background; until one is here, its images are asked for one by one. What has no room is always
read so: nothing is thrown out for something else, since an order that is shuffled as a whole comes
back to every shard all the time.
"""

import fcntl
import hashlib
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipelines.images.image_index import INDEX_FILE, ImageIndex, Location, load_index
from tpp.common.errors import UserError, printable
from tpp.common.files import aside_of, is_aside, write_whole
from tpp.common.object_storage import NotThereError, StorageError, Store

Bytes = NDArray[np.uint8]
_INDEX_HERE = "index.safetensors"
_LARGEST_INDEX = 2**31  # bytes; ImageNet's has a tenth of a gigabyte
_OF_FREE = 0.9
# Seconds until a process looks again whether that which fetches is still there, or the store.
_LOOK_EVERY = 5.0


def open_remote(url: str, cache: Path | None = None, index_file: Path | None = None) -> ImageIndex:
    """The index of images in an object store.

    Args:
        url: of the folder of shards, or of class folders, with their index in it.
        cache: folder for what is kept here; None for ``tpp/sets`` in the user's cache folder.
        index_file: the index, where it is in a file here.

    Raises:
        UserError: there is no index, the shards are not those that it says, or the store cannot
            be reached.
    """
    store = Store(url)
    try:
        raw = index_file.read_bytes() if index_file is not None else _index_of(store)
    except OSError as error:
        raise UserError(f"{index_file}: cannot read the index ({error.strerror})") from None
    # What lies here is of this one index: other shards at the same URL have another one.
    named = f"{_digest(url.encode())}-{_digest(raw)}"
    here = (cache if cache is not None else _users_cache()) / named / _INDEX_HERE
    _keep(here, raw)
    index = load_index(here, here.parent, url)
    if index.containers:
        _check_sizes(index, store)
    elif (index.byte_sizes < 0).any():
        raise UserError(f"{url}: its index does not say how many bytes images have; make it anew")
    return index


def fetch_index(url: str, here: Path) -> None:
    """Fetch an index to where another node has it.

    Raises:
        UserError: it is not there, or is another one.
    """
    raw = _index_of(Store(url))
    if here.parent.name != f"{_digest(url.encode())}-{_digest(raw)}":
        raise UserError(f"{url}/{INDEX_FILE}: was replaced while the run began; begin anew")
    _keep(here, raw)


def read_objects(locations: Sequence[Location]) -> list[Bytes | None]:
    """The bytes of images in an object store, all asked for at once; None where one ends early.

    Raises:
        UserError: the store cannot be reached, or an object is not there.
    """
    found: list[Bytes | None] = []
    for store, places in _by_bucket(locations):
        ranges = [(name, location.offset, location.length) for name, location in places]
        for data, (_, location) in zip(store.read_ranges(ranges), places, strict=True):
            whole = len(data) == location.length
            found.append(np.frombuffer(bytearray(data), np.uint8) if whole else None)
    return found


def _by_bucket(locations: Sequence[Location]) -> Iterator[tuple[Store, list[tuple[str, Location]]]]:
    """Runs of locations of one bucket, with the objects' names in it."""
    run: list[tuple[str, Location]] = []
    of = ""
    for location in locations:
        scheme, _, rest = location.path.partition("://")
        bucket, _, name = rest.partition("/")
        if run and of != f"{scheme}://{bucket}":
            yield Store(of), run
            run = []
        of = f"{scheme}://{bucket}"
        run.append((name, location))
    if run:
        yield Store(of), run


def _index_of(store: Store) -> bytes:
    try:
        return store.read(INDEX_FILE, largest=_LARGEST_INDEX)
    except NotThereError:
        raise UserError(
            f"{store.url_of(INDEX_FILE)}: no such object or bucket; make the index before copying "
            "the set there: tpp shards writes one, and for others' tars and for class folders tpp "
            "index does (docs/object_storage.md)"
        ) from None


def _keep(here: Path, raw: bytes) -> None:
    if here.exists():
        return
    try:
        here.parent.mkdir(parents=True, exist_ok=True)
        write_whole(here, raw)
    except OSError as error:
        raise UserError(
            f"{here}: cannot keep the index here ({error.strerror}); choose another folder with "
            "data.cache"
        ) from None


def _check_sizes(index: ImageIndex, store: Store) -> None:
    there = store.sizes()
    sizes = index.marks.tolist() or [None] * len(index.containers)
    for name, size in zip(index.containers, sizes, strict=True):
        found = there.get(name)
        if found is None or size not in (None, found):
            what = "is not there" if found is None else f"has {found:,} bytes instead of {size:,}"
            raise UserError(
                f"{store.url_of(INDEX_FILE)}: this index does not fit: {store.url_of(name)} "
                f"{what}; copy the shards and their index there anew"
            )


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _users_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tpp" / "sets"


# ---- shards that are kept ----------------------------------------------------------------------


def keep_shards(indices: Sequence[ImageIndex], gigabytes: float | None) -> None:
    """Have shards fetched to this node in the background, the first of ``indices`` first.

    Of all processes of a node that ask for it, one does. What goes wrong is printed, and tried
    again: images that are not here are read from the store.

    Args:
        indices: of images in an object store.
        gigabytes: what their folder above may hold, other sets in it included; None for nine
            tenths of what is free on its disk, and what it holds already.
    """
    wanted = [index for index in indices if index.url and index.containers]
    if wanted:
        keeper = _Keeper(wanted, gigabytes)
        threading.Thread(target=keeper.run, name="shards", daemon=True).start()


class _Keeper:
    def __init__(self, indices: Sequence[ImageIndex], gigabytes: float | None) -> None:
        self._indices, self._gigabytes = indices, gigabytes
        self._folder = indices[0].root.parent
        self._said: set[str] = set()

    def run(self) -> None:
        """Fetch until all is here that has room."""
        while not self._all_here():
            try:
                with _alone(self._folder / ".lock") as alone:
                    if alone and self._fetch_all():
                        return
            except StorageError as error:
                self._say(f"{error}; its images are read one by one")
            except OSError as error:
                self._say(f"{error.filename or self._folder}: {error.strerror}; no more is kept")
                return
            time.sleep(_LOOK_EVERY)

    def _all_here(self) -> bool:
        return all(path.exists() for _, path, _ in self._shards())

    def _shards(self) -> Iterator[tuple[str, Path, int]]:
        for index in self._indices:
            sizes = index.marks.tolist()
            if len(sizes) != len(index.containers):
                return  # an index that does not say how large they are
            for name, size in zip(index.containers, sizes, strict=True):
                yield f"{index.url}/{name}", index.root / name, size

    def _fetch_all(self) -> bool:
        """Fetch what has room, one shard after the other."""
        used = _remove_leftovers(self._folder)
        free = shutil.disk_usage(self._folder).free
        room = _OF_FREE * (used + free) if self._gigabytes is None else self._gigabytes * 1e9
        left_out = kept = 0
        for url, path, size in self._shards():
            if path.exists():
                kept += size
            elif used + size > room:
                left_out += size
            else:
                _fetch(url, path, size)
                used, kept = used + size, kept + size
        if left_out:
            self._say(
                f"{self._folder}: keeps {kept / 1e9:,.1f} GB of the shards; there is no room for "
                f"the other {left_out / 1e9:,.1f} GB, whose images are read one by one"
            )
        return True

    def _say(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            print(printable(line), flush=True)


def _fetch(url: str, path: Path, size: int) -> None:
    """Fetch an object whole; it appears whole or not at all."""
    folder, _, name = url.rpartition("/")
    aside = aside_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with aside.open("wb") as file:
            for chunk in Store(folder).stream(name, size):
                file.write(chunk)
            got = file.tell()
        if got != size:
            raise StorageError(f"{url}: ends after {got:,} bytes of {size:,}")
        aside.rename(path)
    finally:
        aside.unlink(missing_ok=True)


def _remove_leftovers(folder: Path) -> int:
    """Remove what a killed process left unfinished; the bytes that are left in the folder."""
    used = 0
    for root, _, files in os.walk(folder):
        for name in files:
            path = Path(root) / name
            with suppress(FileNotFoundError):
                # An index may be under way, of another process.
                if is_aside(path) and not name.startswith(f".{_INDEX_HERE}"):
                    path.unlink()
                else:
                    used += path.stat().st_size
    return used


@contextmanager
def _alone(lock: Path) -> Iterator[bool]:
    """Whether no other process of this node has the lock; it goes when the process ends."""
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(descriptor)
