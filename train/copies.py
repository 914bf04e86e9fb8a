"""A second copy of a run folder in an object store: made beside training, and gone on from.

``copy_to/NAME/copy.json`` is the copy: it lists every file of the run folder with its size and
sha256. It is written last, after each file was uploaded and read back, and replaced as a whole, so
that there is a complete copy at any time or none. A file lies beside it under its path and its
hash (``dense/0f3c.../model.safetensors``), so that none that a copy needs is ever overwritten;
those that it no longer needs are deleted after.

``copy.json`` in the run folder says which copies this folder has made, or was made of: so a folder
that another machine has gone on from is not mixed up with what that machine did.
"""

import hashlib
import json
import os
import re
import secrets
import threading
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field, ValidationError

from tpp.common.errors import UserError, reason_of
from tpp.common.files import aside_of, in_bytes, is_aside, move, sync, write_whole
from tpp.common.object_storage import NotThereError, StorageError, Store
from tpp.common.reading import LARGEST, parse_json, read_json

COPY_FILE = "copy.json"
# Of this machine alone: the lock, this module's own, and what was compiled for its processor.
_NOT_COPIED = ("run.lock", COPY_FILE, "compiled")
# Never written to once they are there, so that they need not be held in memory.
_FINAL_SUFFIXES = (".safetensors", ".gz", ".png")
_CHECKPOINT = re.compile(r"(.+/checkpoints/step-[0-9]+)/[^/]+")
_DIGITS = 16  # of a hash, in a name
_OURS = re.compile(r"(.+/)?[0-9a-f]{16}/[^/]+")
# Copies whose ids the run folder remembers: the last one, and one that was about to be made.
_REMEMBERED = 4
_CHUNK = 4 * 2**20


class _File(BaseModel, extra="forbid", strict=True):
    """What a copy says of a file."""

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class _Manifest(BaseModel, extra="forbid", strict=True):
    """``copy.json`` of a copy; ``run`` is a run's random name, and ``copy_id`` this one copy's."""

    format: Literal["tpp-run-copy"] = "tpp-run-copy"
    version: Literal[1] = 1
    run: str = Field(pattern=r"^[0-9a-f]{16}$")
    copy_id: str = Field(pattern=r"^[0-9a-f]{16}$")
    files: dict[str, _File]


class _Record(BaseModel, extra="forbid", strict=True):
    """``copy.json`` of a run folder: which copies are of this folder as it was."""

    run: str
    copies: list[str]
    fetching: bool = False


@dataclass(eq=False)
class _Source:
    """A file as it was when a copy was asked for: its bytes, or an open file that stays as it is.

    Without either it is as in the copy before.
    """

    size: int
    data: bytes | None = None
    descriptor: int | None = None
    known: str | None = None

    def sha256(self) -> str:
        if self.known is None:
            if self.data is not None:
                self.known = hashlib.sha256(self.data).hexdigest()
            else:
                assert self.descriptor is not None
                self.known = _hash_of(_chunks(self.descriptor))
        return self.known

    def close(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


@dataclass(eq=False)
class _Snapshot:
    """A run folder as it was when a copy was asked for."""

    what: str
    is_checkpoint: bool
    files: dict[str, _Source] = field(default_factory=dict)
    stamps: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def close(self) -> None:
        for source in self.files.values():
            source.close()


class _TakenError(Exception):
    """Another process has made a copy at the same place."""


class RunCopies:
    """The copies of one run folder, for the process that writes into it.

    At most one copy is under way and one waits; a newer one takes the place of that which waits.
    Nothing but :meth:`take_up` and :meth:`close` waits for the store.

    Args:
        folder: the run folder, locked.
        copy_to: URL below which the copy lies, under the folder's name.
    """

    def __init__(self, folder: Path, copy_to: str) -> None:
        self._folder = folder
        self._store = Store(f"{copy_to}/{folder.resolve().name}")
        self._record = _Record(run=secrets.token_hex(8), copies=[])
        self._published: dict[str, _File] | None = None  # None: not known
        # Of files that a copy has: what told them apart from a later state of theirs.
        self._stamps: dict[str, tuple[int, ...]] = {}
        self._pending: _Snapshot | None = None
        self._current: _Snapshot | None = None  # under way
        self._missed: str | None = None  # what the copy before could not be made for
        self._closing = self._ended = self._tidy = self._has_said = False
        self._lines: deque[str] = deque()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="copies", daemon=True)

    # ---- in the thread that trains -----------------------------------------------------------

    def take_up(self) -> list[str]:
        """Fetch the copy where the run folder is empty, and claim the place of a new one.

        Returns:
            Lines to say.

        Raises:
            UserError: the store cannot be reached or written to, the package for it is missing,
                or what is there is not of this folder; one line.
        """
        try:
            return self._take_up()
        except OSError as error:
            place = error.filename or self._folder
            raise UserError(f"{place}: {error.strerror}") from None
        finally:
            self._thread.start()

    def offer(
        self, what: str, *, is_checkpoint: bool = False, passing: Collection[Path] = ()
    ) -> None:
        """Have the run folder as it is now copied.

        Args:
            what: is new, to be named where it is not copied.
            is_checkpoint: whether that is one, whose copy is missed if a newer one overtakes it.
            passing: folders of checkpoints that are about to go: they stay in a copy that has them,
                and are not copied for the first time.
        """
        if self._ended:
            return
        snapshot = self._snapshot(what, is_checkpoint, {self._name(path) for path in passing})
        with self._changed:
            overtaken, self._pending = self._pending, snapshot
            self._changed.notify_all()
        if overtaken is not None:
            overtaken.close()
            if overtaken.is_checkpoint and is_checkpoint:
                self._lines.append(
                    f"{overtaken.what}: not copied, as the copy before it is still under way; "
                    "the newer one is next"
                )

    def take_lines(self) -> list[str]:
        """What there is to say since the last call."""
        lines = []
        while self._lines:
            lines.append(self._lines.popleft())
        return lines

    def close(self, patience: float | None) -> list[str]:
        """Finish what is under way and what waits; what failed last is tried once more.

        Args:
            patience: seconds to wait for it; None for as long as it takes.

        Returns:
            Lines to say.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(patience)
        if self._thread.is_alive():
            self._lines.append(
                f"{self._store.url}: not up to date: the copy took longer than the {patience:.0f} "
                "s that are waited for at a stop; the one before it is whole"
            )
        return self.take_lines()

    # ---- taking up ---------------------------------------------------------------------------

    def _take_up(self) -> list[str]:
        record = self._read_record()
        if record is not None and not record.fetching and not self._contents():
            # Of a start that failed before there was anything of a run: nothing to go on from.
            record = None
        self._record = record or self._record
        try:
            manifest = self._read_manifest()
        except StorageError as error:
            if record is None or record.fetching:
                raise
            return [f"{error}; the run goes on from its own folder"]
        if manifest is None:
            if record is not None and record.fetching:
                raise UserError(
                    f"{self._folder}: was being fetched from {self._store.url}, which is gone; "
                    "delete the folder to begin anew"
                )
            self._publish({}, {})
            return []
        if record is None and (there := self._contents()):
            raise UserError(
                f"checkpoints.copy_to: {self._store.url} is the copy of another run than the one "
                f"in {self._folder} (which has {there}); choose another place, or empty one of them"
            )
        if record is None or record.fetching:
            return self._fetch(manifest)
        if record.run != manifest.run:
            raise UserError(
                f"checkpoints.copy_to: {self._store.url} is the copy of another run than the one "
                f"in {self._folder}; choose another place, or empty one of them"
            )
        if manifest.copy_id not in record.copies:
            raise UserError(
                f"{self._folder}: the run has gone on elsewhere, and its copy {self._store.url} is "
                "of there; delete the folder to go on from the copy"
            )
        self._published = manifest.files
        return []

    def _fetch(self, manifest: _Manifest) -> list[str]:
        """Make the run folder what the copy is. Killed on the way, it is begun again."""
        self._record = _Record(run=manifest.run, copies=[manifest.copy_id], fetching=True)
        self._write_record()
        lines, damaged = [], set()
        for name, file in manifest.files.items():
            checkpoint = _CHECKPOINT.fullmatch(name)
            if checkpoint is not None and checkpoint[1] in damaged:
                continue
            try:
                self._fetch_file(name, file)
            except StorageError as error:
                if checkpoint is None:
                    raise
                lines.append(f"{error}; this checkpoint is left out")
                damaged.add(checkpoint[1])
        files = {
            name: file
            for name, file in manifest.files.items()
            if not any(name.startswith(f"{folder}/") for folder in damaged)
        }
        for folder in damaged:
            for name in manifest.files:
                if name.startswith(f"{folder}/"):
                    (self._folder / name).unlink(missing_ok=True)
            with suppress(OSError):
                (self._folder / folder).rmdir()
        self._record = self._record.model_copy(update={"fetching": False})
        self._write_record()
        self._published = files
        self._stamps = {name: _stamp(self._folder / name) for name in files}
        total = in_bytes(sum(file.bytes for file in files.values()))
        return [
            *lines,
            f"{self._folder}: taken up from {self._store.url}: {len(files):,} files, {total}",
        ]

    def _fetch_file(self, name: str, file: _File) -> None:
        path, aside = self._folder / name, aside_of(self._folder / name)
        if path.is_file() and path.stat().st_size == file.bytes and _hash_at(path) == file.sha256:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        key = _key(name, file.sha256)
        try:
            for _ in range(2):
                hashed = hashlib.sha256()
                with aside.open("wb") as out:
                    for chunk in self._store.stream(key, file.bytes):
                        hashed.update(chunk)
                        out.write(chunk)
                if hashed.hexdigest() == file.sha256:
                    break
            else:
                raise StorageError(
                    f"{self._store.url_of(key)}: damaged: not the {file.bytes:,} bytes with the "
                    "sha256 that the copy says"
                )
            sync(aside)
            move(aside, path, lambda: path.stat().st_size == file.bytes)
        finally:
            aside.unlink(missing_ok=True)

    def _contents(self) -> str:
        """A file or folder of a run in the run folder; "" where there is none."""
        found = sorted(path.name for path in self._folder.iterdir() if not is_aside(path))
        return next((name for name in found if name not in _NOT_COPIED), "")

    def _read_record(self) -> _Record | None:
        path = self._folder / COPY_FILE
        if not path.exists():
            return None
        text = json.dumps(read_json(path, "which copies the run has"))
        try:
            return _Record.model_validate_json(text)
        except ValidationError:
            raise UserError(
                f"{path}: does not say which copies the run has; delete it to go on without "
                "checkpoints.copy_to, or the folder to go on from its copy"
            ) from None

    def _write_record(self) -> None:
        write_whole(self._folder / COPY_FILE, self._record.model_dump_json(indent=1) + "\n")

    def _read_manifest(self) -> _Manifest | None:
        url = self._store.url_of(COPY_FILE)
        try:
            raw = self._store.read(COPY_FILE, largest=LARGEST)
        except NotThereError:
            return None
        try:
            text = json.dumps(parse_json(raw.decode(), url))
            manifest = _Manifest.model_validate_json(text)
        except (UnicodeDecodeError, ValidationError):
            raise UserError(f"{url}: is not the copy of a run, as this version writes it") from None
        for name in manifest.files:
            parts = name.split("/")
            if (
                not name.isprintable()
                or any(not part or part.startswith(".") for part in parts)
                or parts[0] in _NOT_COPIED
            ):
                raise UserError(f"{url}: {name[:200]!r} is no name of a file of a run")
        return manifest

    # ---- what there is to copy ---------------------------------------------------------------

    def _snapshot(self, what: str, is_checkpoint: bool, passing: set[str]) -> _Snapshot:
        snapshot = _Snapshot(what, is_checkpoint)
        with self._changed:
            stamps, coming = self._stamps, [s for s in (self._current, self._pending) if s]
            # What a copy that comes before this one leaves out is gone from the store by then.
            published = {
                name: file
                for name, file in (self._published or {}).items()
                if all(name in before.files for before in coming)
            }
        for path in self._walk():
            name = self._name(path)
            checkpoint = _CHECKPOINT.fullmatch(name)
            if checkpoint is not None and checkpoint[1] in passing and name not in published:
                continue
            # A file that goes while it is looked at is one that the run has no more use for.
            with suppress(FileNotFoundError):
                snapshot.stamps[name] = stamp = _stamp(path)
                if name in published and stamps.get(name) == stamp:
                    known = published[name]
                    snapshot.files[name] = _Source(known.bytes, known=known.sha256)
                elif path.suffix in _FINAL_SUFFIXES:
                    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                    size = os.fstat(descriptor).st_size
                    snapshot.files[name] = _Source(size, descriptor=descriptor)
                else:
                    data = path.read_bytes()
                    snapshot.files[name] = _Source(len(data), data=data)
        return snapshot

    def _walk(self) -> Iterator[Path]:
        for root, folders, files in os.walk(self._folder):
            here = Path(root)
            top = here == self._folder
            skipped = _NOT_COPIED if top else ()
            folders[:] = sorted(
                name for name in folders if name not in skipped and not name.startswith(".")
            )
            for name in sorted(files):
                path = here / name
                hidden = name.startswith(".") or path.is_symlink()
                if name not in skipped and not hidden and name.isprintable():
                    yield path

    def _name(self, path: Path) -> str:
        return path.relative_to(self._folder).as_posix()

    # ---- in the thread that copies -----------------------------------------------------------

    def _work(self) -> None:
        last = False
        while not last:
            with self._changed:
                self._changed.wait_for(lambda: self._pending is not None or self._closing)
                snapshot, self._pending = self._pending, None
                self._current = snapshot
            if snapshot is None:  # and none will come
                if self._missed is None or self._ended:
                    return
                last = True
            what = snapshot.what if snapshot is not None else self._missed or ""
            try:
                if snapshot is None:
                    snapshot = self._snapshot(what, False, set())
                self._copy(snapshot)
                self._missed = None
                if not self._has_said:
                    self._lines.append(f"checkpoints are copied to {self._store.url}")
                self._has_said = True
            except _TakenError:
                self._ended = True
                self._lines.append(
                    f"{self._store.url}: another process has made a copy there; this one makes "
                    "no more"
                )
            except Exception as error:
                why = str(error) if isinstance(error, UserError) else _in_words(error)
                self._missed, self._tidy = what, False
                with self._changed:
                    next_one = self._pending is not None or not self._closing
                if last:
                    then = "tried again at the end; the copy before it stays as it was"
                else:
                    then = "training goes on, and the next checkpoint's copy has it too"
                if next_one or last:  # or else it is tried again at once
                    self._lines.append(f"{what}: not copied: {why}; {then}")
            finally:
                if snapshot is not None:
                    snapshot.close()
                with self._changed:
                    self._current = None

    def _copy(self, snapshot: _Snapshot) -> None:
        if self._published is None:  # the store was away when the run began
            manifest = self._read_manifest()
            self._published = manifest.files if manifest is not None else {}
        there = {_key(name, file.sha256) for name, file in self._published.items()}
        files = {}
        for name, source in snapshot.files.items():
            sha256 = source.sha256()
            files[name] = _File(bytes=source.size, sha256=sha256)
            if _key(name, sha256) not in there:
                self._upload(_key(name, sha256), source, sha256)
        if files != self._published:
            self._publish(files, snapshot.stamps)
        with self._changed:
            self._stamps = snapshot.stamps

    def _upload(self, key: str, source: _Source, sha256: str) -> None:
        """Upload a file, and read it back."""
        for _ in range(2):
            if source.data is not None:
                self._store.write(key, source.data)
            elif source.descriptor is not None:
                self._store.upload(key, source.descriptor)
            else:
                raise StorageError(f"{self._store.url_of(key)}: is gone from the copy before")
            if _hash_of(self._store.stream(key, source.size)) == sha256:
                return
        raise StorageError(
            f"{self._store.url_of(key)}: reads back as other bytes than were uploaded"
        )

    def _publish(self, files: Mapping[str, _File], stamps: Mapping[str, tuple[int, ...]]) -> None:
        """Make these files the copy, and delete what only the one before needed."""
        before = self._read_manifest()
        if before is not None and before.copy_id not in self._record.copies:
            raise _TakenError
        copy_id = secrets.token_hex(8)
        manifest = _Manifest(run=self._record.run, copy_id=copy_id, files=dict(files))
        content = (manifest.model_dump_json(indent=1) + "\n").encode()
        # First here: a copy that this folder does not know of would be another machine's.
        known = [*self._record.copies, copy_id][-_REMEMBERED:]
        if before is not None and before.copy_id not in known:
            known = [before.copy_id, *known]
        self._record = self._record.model_copy(update={"copies": known})
        self._write_record()
        self._store.write(COPY_FILE, content)
        if self._store.read(COPY_FILE) != content:
            raise StorageError(
                f"{self._store.url_of(COPY_FILE)}: reads back as other bytes than were written"
            )
        old = self._published or {}
        with self._changed:  # at once: a hash of one copy with a stamp of another is no file's
            self._published, self._stamps = dict(files), dict(stamps)
        needed = {_key(name, file.sha256) for name, file in files.items()}
        if self._tidy:
            gone = {_key(name, file.sha256) for name, file in old.items()} - needed
        else:  # what a copy that was broken off has left, too
            gone = {name for name in self._store.sizes() if _OURS.fullmatch(name)} - needed
        self._store.delete(sorted(gone))
        self._tidy = True


def _key(name: str, sha256: str) -> str:
    """Where a file with these bytes lies in a copy."""
    folder, _, base = name.rpartition("/")
    return "/".join(part for part in (folder, sha256[:_DIGITS], base) if part)


def _stamp(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino


def _chunks(descriptor: int) -> Iterator[bytes]:
    offset = 0
    while chunk := os.pread(descriptor, _CHUNK, offset):
        offset += len(chunk)
        yield chunk


def _hash_of(chunks: Iterator[bytes]) -> str:
    hashed = hashlib.sha256()
    for chunk in chunks:
        hashed.update(chunk)
    return hashed.hexdigest()


def _hash_at(path: Path) -> str:
    with path.open("rb") as file:
        return _hash_of(_chunks(file.fileno()))


def _in_words(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return f"{type(error).__name__}: {reason_of(error)}"
