"""What the preparation of any data set is made of: archives, splits, and how far it has come."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, Field, ValidationError
from rich.progress import Progress, TaskID

from data_pipelines.images.image_index import ImageIndex, check_fits, load_index, save_index
from data_pipelines.sets.claim import claimed
from data_pipelines.sets.class_folders import RUN_AGAIN, write_class_folders
from data_pipelines.sets.shard_format import QUALITY, SHARD_BYTES
from data_pipelines.sets.shard_writer import write_shards
from tpp.common.errors import UserError, printable
from tpp.common.files import in_bytes, write_whole
from tpp.common.reading import read_json

STATE_FILE = ".prepared.json"
# What is needed on the way only: downloads, unpacked images and indexes of archives.
WORK_FOLDER = ".preparing"
IMAGES_FILE = "images.bin"
_VERSION = 1
# File systems hand out space in blocks; most of them in blocks of this many bytes.
_BLOCK = 4096
# Reading and writing is mostly waiting.
THREADS = 16
Sources = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class ShardSettings:
    """How images are laid into shards: :func:`data_pipelines.sets.shard_writer.write_shards`."""

    shard_bytes: int = SHARD_BYTES
    resize: int | None = None
    quality: int = QUALITY


class _Archive(BaseModel, strict=True):
    name: str
    bytes: int


class _Split(BaseModel, strict=True):
    archives: list[_Archive]
    classes: int
    images: int
    bytes: int
    finished: bool


class _State(BaseModel, strict=True):
    """What the state file says."""

    version: Literal[1]
    set: str = Field(pattern=r"^[a-z0-9-]+$")
    form: Literal["class folders"] | dict[Literal["shard_bytes", "resize", "quality"], int | None]
    splits: dict[Literal["train", "val"], _Split]


@dataclass(frozen=True)
class Prepared:
    """What is in one of the two folders now.

    Attributes:
        split: 'train' or 'val'.
        classes, images, bytes: how many; bytes are those of the images as the archive has them.
        kept: how many classes, or shards, an earlier run had finished.
    """

    split: str
    classes: int
    images: int
    bytes: int
    kept: int


class Work:
    """The folder that is made ready: what was done before, and what is missing.

    As a context it keeps others out, and if nothing came of it, leaves no empty folders.

    Args:
        out: the folder.
        name: of the data set.
        sources: the archives of each split that is asked for.
        shards: write shards; None: class folders.
        difference: says of the name of an archive that a split was made from, and of the one that
            is asked for, what differs, where these names are not those of files.

    Attributes:
        folder: for what is needed on the way only.
        missing: the splits that are asked for and are not finished.
    """

    def __init__(
        self,
        out: Path,
        name: str,
        sources: Sources,
        shards: ShardSettings | None,
        difference: Callable[[str, str], str] | None = None,
    ) -> None:
        self.out, self.name, self.sources, self.shards = out, name, sources, shards
        self.folder, self._difference = out / WORK_FOLDER, difference
        self.missing: list[str] = []
        self._state: dict[str, Any] = {}

    def __enter__(self) -> "Work":
        with ExitStack() as stack:
            stack.enter_context(claimed(self.out))
            stack.callback(self._leave_no_empty_folder)
            try:
                self.folder.mkdir(exist_ok=True)
                self._look()
            except OSError as error:
                raise UserError(f"{self.out}: cannot write here ({error.strerror})") from None
            self._leave = stack.pop_all().close
        return self

    def __exit__(self, *error: object) -> None:
        self._leave()

    def _leave_no_empty_folder(self) -> None:
        with suppress(OSError):
            self.folder.rmdir()

    def _look(self) -> None:
        """Find out what there is, and whether it is of the same kind and from the same archives."""
        for leftover in (*self.out.glob(f".{STATE_FILE}.*.tmp"), *self.folder.glob(".*.tmp")):
            leftover.unlink()
        self._state = _read_state(self.out / STATE_FILE)
        for key, value in (("set", self.name), ("form", self._form())):
            if self._state.get(key, value) != value:
                raise UserError(
                    f"{self.out}: holds {self._state['set']} as {_form_in_words(self._state)}; "
                    "choose another folder"
                )
        for split, archives in self.sources.items():
            known = self._state.get("splits", {}).get(split)
            if known is None and (self.out / split).exists():
                raise UserError(
                    f"{self.out / split}: is there and not from this command; choose another folder"
                )
            finished = known is not None and known["finished"]
            # Once it is finished, nobody has to name the archives again.
            if known and known["archives"] != archives and not (finished and not archives):
                raise UserError(f"{self.out}: {self._said_of_other(split, known['archives'])}")
            if not finished:
                self.missing.append(split)
        if not self.missing:
            self._clean_up()

    def _said_of_other(self, split: str, known: Sequence[Mapping[str, Any]]) -> str:
        """What to say of a split that is made from other archives than are asked for."""
        archives = self.sources[split]
        if self._difference is not None and len(known) == len(archives) == 1:
            return self._difference(known[0]["name"], archives[0]["name"])
        return (
            f"{split} is made from {_names(known)}, not from {_names(archives)}; choose another "
            "folder"
        )

    def _clean_up(self) -> None:
        """Remove what was needed on the way, if all is done."""
        splits = self._state.get("splits", {}).values()
        if splits and all(split["finished"] for split in splits):
            shutil.rmtree(self.folder)

    def _form(self) -> Any:
        return "class folders" if self.shards is None else vars(self.shards)

    def saved_index(self, split: str, root: Path) -> ImageIndex | None:
        """The index of images in an archive that an earlier run made, if it fits the archive."""
        try:
            index = load_index(self.folder / f"{split}.safetensors", root)
            check_fits(index)
        except UserError:
            return None
        return index

    def place(
        self, indexes: Mapping[str, ImageIndex], threads: int | None, progress: Progress
    ) -> list[Prepared]:
        """Write the images of each split where they belong, and that it is done."""
        if self.shards is None:
            _check_room(self.out, indexes)
        self._state = {
            "version": _VERSION,
            "set": self.name,
            "form": self._form(),
            "splits": {
                **self._state.get("splits", {}),
                **{
                    split: {
                        "archives": self.sources[split],
                        **_counts(indexes.get(split)),
                        "finished": split not in indexes,
                    }
                    for split in self.missing
                },
            },
        }
        made = []
        try:
            self._save_state()
            for split, index in indexes.items():
                if index.file is None:
                    save_index(index, self.folder / f"{split}.safetensors")
            for split, index in indexes.items():
                made.append(self._place(split, index, threads, progress))
                self._state["splits"][split]["finished"] = True
                self._save_state()
            self._clean_up()
        except OSError as error:
            raise UserError(f"{self.out}: cannot write ({error.strerror}); {RUN_AGAIN}") from None
        return made

    def _save_state(self) -> None:
        write_whole(self.out / STATE_FILE, json.dumps(self._state, indent=1) + "\n")

    def _place(
        self, split: str, index: ImageIndex, threads: int | None, progress: Progress
    ) -> Prepared:
        if self.shards is None:
            task = progress.add_task(f"writing {split}", total=len(index))
            advance = go_through(progress, task)
            kept = write_class_folders(index, self.out / split, threads or THREADS, advance)
        else:
            # It draws bars of its own.
            progress.stop()
            written = write_shards(index, self.out / split, **vars(self.shards), threads=threads)
            kept = written.reused
        return Prepared(split, kept=kept, **_counts(index))


def _counts(index: ImageIndex | None) -> dict[str, int]:
    if index is None:
        return {"classes": 0, "images": 0, "bytes": 0}
    return {
        "classes": len(index.classes),
        "images": len(index),
        "bytes": int(index.byte_sizes.sum()),
    }


def _read_state(path: Path) -> dict[str, Any]:
    """What a state file says; nothing if there is none."""
    if not path.exists():
        return {}
    try:
        state = read_json(path, "the state of this folder")
        return _State.model_validate(state).model_dump(exclude={"version"})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "content"
        problem = f"{where}: {first['msg']}"
    except UserError as error:
        problem = str(error).removeprefix(f"{path}: ")
    raise UserError(f"{path}: cannot be read ({problem}); empty the folder")


def _form_in_words(state: Mapping[str, Any]) -> str:
    form = state["form"]
    if not isinstance(form, dict):
        return str(form)
    return "shards, " + ", ".join(f"{key} {value}" for key, value in form.items())


def _names(archives: Sequence[Mapping[str, Any]]) -> str:
    return (
        ", ".join(
            f"{printable(archive['name'])} ({archive['bytes']:,} bytes)" for archive in archives
        )
        or "downloads"
    )


def _check_room(out: Path, indexes: Mapping[str, ImageIndex]) -> None:
    """Check that there is space for the class folders that are missing."""
    needed = 0
    for split, index in indexes.items():
        there = np.array([(out / split / name).exists() for name in index.classes])
        blocks = -(-index.byte_sizes // _BLOCK) * _BLOCK
        needed += int(blocks[~there[index.labels]].sum())
    free = shutil.disk_usage(out).free
    if needed > free:
        raise UserError(
            f"{out}: {in_bytes(needed)} are needed for the images, {in_bytes(free)} are free; "
            "make room or choose another folder"
        )


def go_through(progress: Progress, task: TaskID) -> Callable[[int], None]:
    """What moves a bar on by so many images."""
    return lambda images: progress.advance(task, images)
