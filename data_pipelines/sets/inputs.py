"""Opening a set of images, in whatever form its owner has it."""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from data_pipelines.images.folders import loose_images
from data_pipelines.images.image_index import (
    INDEX_FILE,
    ImageIndex,
    named_parts,
    open_images,
    parts_of,
)
from data_pipelines.images.remote import open_remote
from data_pipelines.sets.class_names import arrange, read_class_names
from data_pipelines.sets.foreign_tars import expand, is_pattern, scan_tars, tars_in
from data_pipelines.sets.image_lists import is_list, line_of_label, read_list
from data_pipelines.sets.shard_format import SETTINGS_FILE
from data_pipelines.sets.table_files import find_tables, holds_tables, is_table, refusal
from data_pipelines.sets.table_images import ImageTables, read_tables
from tpp.common.errors import UserError


@dataclass(frozen=True)
class Input:
    """Where images are, and how to read what others wrote.

    Attributes:
        place: a folder of class folders, of shards or of tars; a tar; a pattern of tars such as
            ``shard-{000..019}.tar``; or a list of images. For :func:`open_tables` also Parquet
            files: one, a pattern, or a folder.
        listing: a list of the images; ``place`` is then the folder that they are in, if its paths
            are not relative to its own.
        index_file: the index of a folder; by default the one in it.
        class_names: a file with the names of the classes in their order.
        path_key: the column of paths in a list.
        label_key: the column of labels in a list or in Parquet files, or the key in a sample's
            ``json``.
        image_key: the column of images in Parquet files.
        tables: the Parquet or Arrow files, where ``place`` holds several splits of them.
        url: where the images are, with their index, if in an object store; ``place`` then has no
            meaning.
        cache: folder for what is kept here of an object store; None for the user's own.
    """

    place: Path
    listing: Path | None = None
    index_file: Path | None = None
    class_names: Path | None = None
    path_key: str | None = None
    label_key: str | None = None
    image_key: str | None = None
    tables: tuple[Path, ...] = ()
    url: str | None = None
    cache: Path | None = None

    def is_there(self) -> bool:
        """Whether there is something to open."""
        if self.url is not None:
            return True  # or opening says so
        if self.listing is not None:
            return self.listing.exists()
        return self.place.exists() or is_pattern(self.place.name)


def open_input(source: Input) -> ImageIndex:
    """The index of a set of images; no image is looked at.

    Raises:
        UserError: there are no images, an index does not fit them, or something of what others
            wrote cannot be read: names the file, with the line or the member. Or they are in
            Parquet files, which :func:`open_tables` reads.
    """
    try:
        return _opened(source)
    except UserError:
        if source.url is None:
            refuse_tables(source)
        raise


def _opened(source: Input) -> ImageIndex:
    names = read_class_names(source.class_names) if source.class_names is not None else None
    place, listing = source.place, source.listing
    if listing is None and source.url is None and is_list(place):
        listing, place = place, place.with_suffix("")
    if listing is not None:
        return read_list(
            listing,
            _folders_of(listing, place),
            names=names,
            path_key=source.path_key,
            label_key=source.label_key,
        )
    if source.url is not None:
        index = open_remote(source.url, source.cache, source.index_file)
    else:
        index = _open_folder_or_tars(place, source)
    if names is None and not index.labels_from:
        return index
    classes, places = arrange(index.classes, names, lambda label: where_class_is(index, label))
    return index.with_classes(classes, places)


def where_class_is(index: ImageIndex, name: str, source: Input | None = None) -> str:
    """Where the class is found, for messages: a folder, a tar's member, or a list and its line.

    Args:
        index: the images.
        name: of one of its classes.
        source: what the index was opened from, where that may be a list.
    """
    if index.containers:
        has = index.labels == index.classes.index(name)
        return index.name(int(has.argmax())) if has.any() else index.place
    if not index.labels_from:
        return f"{index.place}/{name}"
    listing, line = Path(index.labels_from), 0
    if source is not None:
        # The list may have gone since, or be out of this rank's reach.
        with suppress(UserError):
            line = line_of_label(listing, name, source.path_key, source.label_key)
    return f"{listing}, line {line}" if line else str(listing)


def open_tables(source: Input) -> ImageTables | None:
    """The images in Parquet or Arrow files, of which none has been read; None: it is another form.

    Raises:
        UserError: the files cannot be read, or are of several splits.
    """
    files = [*source.tables] or _tables_of(source)
    if not files:
        return None
    names = read_class_names(source.class_names) if source.class_names is not None else None
    return read_tables(files, names=names, image_key=source.image_key, label_key=source.label_key)


def _tables_of(source: Input) -> list[Path]:
    place = source.place
    if source.listing is not None or source.url is not None:
        return []
    if place.is_dir():
        splits = None if (place / INDEX_FILE).exists() else find_tables(place)
        if splits is not None and len(splits.parts) > 1:
            raise UserError(
                f"{place}: is divided already, into {', '.join(splits.parts)}; give the files of "
                f"one, as '{next(iter(splits.parts.values()))[0].parent}/train-*.parquet'"
            )
        return next(iter(splits.parts.values())) if splits is not None else []
    if not is_table(place):
        return []
    if place.exists():
        return [place]
    if not is_pattern(os.fspath(place)):
        raise UserError(f"{place}: there is no such file")
    return expand(os.fspath(place))


def refuse_tables(source: Input) -> None:
    """Raise UserError where there are Parquet files, and no images that can be read as they are."""
    if source.listing is not None:
        return
    folder = source.place if source.place.is_dir() else source.place.parent
    if is_table(source.place) and not source.place.is_dir():
        raise refusal(source.place)
    if folder.is_dir() and not (folder / INDEX_FILE).exists() and holds_tables(folder):
        raise refusal(folder)


def _folders_of(listing: Path, place: Path) -> Sequence[Path]:
    """What a list's paths may be relative to."""
    own = listing.parent
    candidates = [place, own] if place.is_dir() else [own]
    return [*dict.fromkeys(candidates)]


def _open_folder_or_tars(place: Path, source: Input) -> ImageIndex:
    text = os.fspath(place)
    if place.is_dir():
        index = _open_folder(place, source)
    elif place.exists():
        index = scan_tars([place], place.parent, source.label_key)
    elif is_pattern(text):
        tars = expand(text)
        absent = next((tar for tar in tars if not tar.is_file()), None)
        if absent is not None:
            raise UserError(f"{absent}: there is no such file, which {place} stands for")
        index = scan_tars(tars, _common_folder(tars), source.label_key)
    else:
        return open_images(place, source.index_file)
    return index


def _open_folder(folder: Path, source: Input) -> ImageIndex:
    label_key = source.label_key
    if source.index_file is not None or (folder / INDEX_FILE).exists():
        index = open_images(folder, source.index_file)
        if index.labels_from and index.containers:
            found = {tar.name for tar in tars_in(folder)}
            odd = sorted(found.symmetric_difference(index.containers))
            if odd:
                raise UserError(
                    f"{index.file}: this index no longer fits {folder}: {odd[0]} "
                    f"{'is new' if odd[0] in found else 'is gone'}; make it anew with: python -m "
                    f"data_pipelines.index {folder}"
                )
        wanted = f".json: {label_key}"
        if index.labels_from and label_key is not None and index.labels_from != wanted:
            raise UserError(
                f"{index.file}: labels of this index are from {index.labels_from}, not from "
                f"{wanted}; make it anew with: tpp index {folder} "
                f"--label-key {label_key}"
            )
        return index
    if (folder / SETTINGS_FILE).exists():
        raise UserError(
            f"{folder}: unfinished shards, which have no index; the command that began them goes "
            "on: tpp shards"
        )
    tars = tars_in(folder)
    return scan_tars(tars, folder, label_key) if tars else open_images(folder)


def _common_folder(files: Sequence[Path]) -> Path:
    return Path(os.path.commonpath([file.absolute().parent for file in files]))


def input_parts(folder: Path) -> list[Path]:
    """The parts of a data set, as :func:`parts_of` has them; folders of tars are parts too."""
    parts = parts_of(folder)
    held = [part for part in named_parts(folder) if part in parts or tars_in(part)]
    return held or parts


def said_of_flat_parts(folder: Path, parts: Sequence[Path]) -> list[str]:
    """A line for each folder beside true parts that is named as one and is none.

    It is left out: whose images they are, nothing says.

    Args:
        folder: of the data set.
        parts: as :func:`input_parts` has them.
    """
    lines = []
    for part in named_parts(folder) if [*parts] != [folder] else []:
        count = sum(kind.number for kind in loose_images(part)) if part not in parts else 0
        if count:
            lines.append(
                f"{part}: left out: it holds {count:,} images but no class folders; sort them "
                "into the folders of their classes, or give a list of these"
            )
    return lines
