"""Images in Parquet or Arrow files, as Hugging Face's datasets writes them.

A row is an image and its label. Labels and names are read by themselves, in seconds; the images
then are written one after the other into plain files, out of which each can be read on its own.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from data_pipelines.images.folders import FURTHER_SUFFIXES, IMAGE_SUFFIXES
from data_pipelines.images.image_index import ImageIndex
from data_pipelines.images.order import Int64s
from data_pipelines.images.plain_file import LARGEST_MEMBER, open_plain
from data_pipelines.sets.claim import claimed, in_threads, progress_bar
from data_pipelines.sets.class_names import ClassNames, arrange, label_text
from data_pipelines.sets.foreign_tars import LABEL_KEYS
from tpp.common.errors import UserError, printable
from tpp.common.files import aside_of, in_bytes, sync

if TYPE_CHECKING:
    import pyarrow as pa

IMAGE_KEYS = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo", "pixel_values")
_LABEL_KEYS = (*LABEL_KEYS, "labels")
UNPACKED = ".unpacked"
"""The folder, in that of what is made, of images that are on their way there."""
# Rows that are in memory at once: their images, and the labels of many more.
_IMAGES_AT_ONCE, _LABELS_AT_ONCE = 16, 1 << 16
_BUFFER = 1 << 20
_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"
_LFS = b"version https://git-lfs"
# What a file's first bytes say, for images that have no name.
_ENDINGS = (".jpg", ".png", ".gif", ".bmp", ".tif", ".tif", ".webp")
_STARTS = (b"\xff\xd8", b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"RIFF")


class UnlabelledError(UserError):
    """Rows have no label, as in the test split of many a public set."""


class _Columns(NamedTuple):
    """Which columns hold what.

    Attributes:
        image: of the images.
        bytes_in: the field of ``image`` that holds the bytes; '' if the column does itself.
        path_in: the field with the image's path; '' if there is none.
        label: of the labels.
        classes: what Hugging Face's ClassLabel calls them; None: the labels say it.
    """

    image: str
    bytes_in: str
    path_in: str
    label: str
    classes: tuple[str, ...] | None


class _Rows(NamedTuple):
    """What is known of a file without its images: of each row the label and the path."""

    labels: list[Any]
    paths: list[str | None]


@dataclass(frozen=True)
class ImageTables:
    """A set of images in Parquet or Arrow files, of which no image has been read yet.

    Attributes:
        files: they are, in their order.
        columns: of the images, see :func:`read_tables`.
        counts: the rows of each file.
        classes: their names, in their order.
        labels: of each row of all files, int64.
        names: of each row what the image is called; those without an ending get one.
    """

    files: list[Path]
    columns: _Columns
    counts: list[int]
    classes: list[str]
    labels: Int64s
    names: list[str] = field(repr=False)

    @contextmanager
    def unpacked(self, folder: Path, threads: int | None = None) -> Iterator[ImageIndex]:
        """The index of the images, which are in plain files until the end of the context.

        It takes as much room as the images do, in a folder :data:`UNPACKED` in ``folder``. Where
        the context ends by an error, the files that are finished stay: the next call goes on from
        there. Images come by class and then by name, as those of class folders.

        Args:
            folder: of what is made of the images.
            threads: files that are read at once; by default one per processor.

        Raises:
            UserError: names the file and the row: it is damaged, or an image is missing; or there
                is no room.
        """
        place = folder / UNPACKED
        new = [path for path in (folder, folder.parent) if not path.exists()]
        try:
            with claimed(place):
                yield self._unpack(place, threads or len(os.sched_getaffinity(0)))
                for file in place.iterdir():
                    file.unlink()
        finally:
            for path in new:
                with suppress(OSError):
                    path.rmdir()

    def _unpack(self, folder: Path, threads: int) -> ImageIndex:
        targets = [folder / f"{n:05}-{_key(self, n)}" for n in range(len(self.files))]
        missing = [n for n, target in enumerate(targets) if _lengths(target) is None]
        _check_room(self, folder, missing)
        with progress_bar() as progress:
            write = partial(_write, self, targets)
            in_threads("unpacking", write, missing, threads, progress)
        found = [_lengths(target) for target in targets]
        held = np.concatenate([one for one in found if one is not None])
        sizes = held[:, 0]
        names = [
            name if name.lower().endswith(IMAGE_SUFFIXES + FURTHER_SUFFIXES) else name + _ENDINGS[e]
            for name, e in zip(self.names, held[:, 1].tolist(), strict=True)
        ]
        files = [
            f"{_folder_of(self.classes, label)}/{name}"
            for label, name in zip(self.labels.tolist(), names, strict=True)
        ]
        labels = self.labels.tolist()
        order = np.array(sorted(range(len(files)), key=lambda i: (labels[i], files[i])), np.int64)
        starts = [np.cumsum(one[:, 0]) - one[:, 0] for one in found if one is not None]
        return ImageIndex.of(
            folder,
            [files[row] for row in order.tolist()],
            self.labels[order],
            self.classes,
            byte_sizes=sizes[order],
            containers=[target.name for target in targets],
            container=np.repeat(np.arange(len(targets), dtype=np.int32), self.counts)[order],
            offsets=np.concatenate(starts)[order],
            marks=np.array([target.stat().st_size for target in targets], np.int64),
            labels_from=f"column {self.columns.label}",
            called=tuple(map(str, self.files)),
        )


def read_tables(
    files: Sequence[Path],
    *,
    names: ClassNames | None = None,
    image_key: str | None = None,
    label_key: str | None = None,
) -> ImageTables:
    """Read everything but the images: columns, classes, labels and names.

    Args:
        files: of one split.
        names: of the classes; by default those of Hugging Face's ClassLabel, or the labels'.
        image_key: the column of images; by default the one that Hugging Face calls so, or one of
            :data:`IMAGE_KEYS`. It holds bytes, or a structure of ``bytes`` and ``path``.
        label_key: the column of labels, whole numbers or text.

    Raises:
        UnlabelledError: rows have no label.
        UserError: names the file: it is damaged or of another form than the first, or a column is
            none of images or labels.
    """
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise UserError(f"{files[0]}: needs pyarrow to be read: pip install pyarrow") from None
    columns = _columns(files[0], image_key, label_key)
    with progress_bar() as progress:
        read = partial(_rows, columns=columns, image_key=image_key, label_key=label_key)
        held = in_threads("reading labels", read, files, len(os.sched_getaffinity(0)), progress)
    counts = [len(rows.labels) for rows in held]
    if not sum(counts):
        raise UserError(f"{files[0]}: no rows in it" + " nor in the others" * (len(files) > 1))
    classes, labels = _classes(files, held, columns, names)
    called = _names(files, held, labels)
    return ImageTables(list(files), columns, counts, classes, labels, called)


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Turn what goes wrong in reading a file into one line."""
    import pyarrow as pa

    try:
        yield
    except (OSError, pa.ArrowException) as error:
        said = printable(str(error).split("\n")[0], 120)
        raise UserError(
            f"{path}: cannot be read ({said}); if it is truncated or damaged, get it once more"
        ) from None


def _check_whole(path: Path) -> None:
    """Notice what pyarrow would say in a strange way, or not at all."""
    with os.fdopen(open_plain(path), "rb") as file:
        start = file.read(len(_LFS))
        size = os.fstat(file.fileno()).st_size
        file.seek(max(size - len(_STREAM_END), 0))
        end = file.read()
    if start == _LFS:
        raise UserError(f"{path}: a pointer of Git LFS and not the file; get it with: git lfs pull")
    if path.suffix.lower() == ".arrow" and not start.startswith(b"ARROW1") and end != _STREAM_END:
        raise UserError(f"{path}: no whole Arrow file: truncated; get it once more")


def _schema(path: Path) -> "pa.Schema":
    import pyarrow as pa

    with _damage_named(path):
        _check_whole(path)
        if path.suffix.lower() != ".arrow":
            return _parquet(path).schema_arrow
        with pa.memory_map(str(path)) as file:
            return _arrow(file).schema


def _parquet(path: Path) -> Any:
    import pyarrow.parquet as pq

    # Page by page: a column of a row group may be larger than the memory.
    return pq.ParquetFile(
        path, buffer_size=_BUFFER, pre_buffer=False, page_checksum_verification=True
    )


def _arrow(file: Any) -> Any:
    import pyarrow as pa

    start = file.read(6)
    file.seek(0)
    return pa.ipc.open_file(file) if start == b"ARROW1" else pa.ipc.open_stream(file)


def _batches(path: Path, leaves: Sequence[str], rows: int) -> Iterator["pa.RecordBatch"]:
    """The rows of a file, some at a time.

    Args:
        path: the file.
        leaves: columns, or ``column.field``, which alone are read where the file allows it.
        rows: how many at a time.
    """
    import pyarrow as pa

    if path.suffix.lower() != ".arrow":
        with _parquet(path) as file:
            yield from file.iter_batches(rows, columns=[*leaves], use_threads=False)
        return
    with pa.memory_map(str(path)) as mapped:
        reader = _arrow(mapped)
        several = hasattr(reader, "num_record_batches")
        batches = map(reader.get_batch, range(reader.num_record_batches)) if several else reader
        for batch in batches:
            for start in range(0, batch.num_rows, rows):
                yield batch.slice(start, rows)


def _features(path: Path, schema: "pa.Schema") -> dict[str, Any]:
    """What Hugging Face says of the columns; empty where it has not written the file."""
    text = (schema.metadata or {}).get(b"huggingface")
    if text is None:
        return {}
    try:
        found = json.loads(text)["info"]["features"]
        return {name: feature for name, feature in found.items() if isinstance(feature, dict)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(
            f"{path}: its metadata 'huggingface' is not as datasets writes it"
        ) from None


def _columns(path: Path, image_key: str | None, label_key: str | None) -> _Columns:
    schema = _schema(path)
    features = _features(path, schema)
    image = _chosen(path, schema, features, "image", image_key)
    label = _chosen(path, schema, features, "label", label_key)
    bytes_in, path_in = _image_fields(path, schema.field(image))
    _check_label(path, schema.field(label))
    feature = features.get(label, {})
    classes = feature.get("names") if feature.get("_type") == "ClassLabel" else None
    if classes is not None:
        known = isinstance(classes, list) and all(isinstance(one, str) for one in classes)
        if not known or len({*classes}) < len(classes) or not all(classes):
            raise UserError(f"{path}: column {label!r} has no proper names of classes")
    return _Columns(image, bytes_in, path_in, label, tuple(classes) if classes else None)


def _chosen(
    path: Path, schema: "pa.Schema", features: dict[str, Any], what: str, key: str | None
) -> str:
    """The column of images or of labels."""
    option = f"--{what}-key"
    if key is not None:
        if key in schema.names:
            return key
        raise UserError(f"{path}: no column {key!r}, which {option} says; it has {_few(schema)}")
    kind, known = ("Image", IMAGE_KEYS) if what == "image" else ("ClassLabel", _LABEL_KEYS)
    told = [name for name in schema.names if features.get(name, {}).get("_type") == kind]
    usual = [name for name in known if name in (told or schema.names)]
    found = usual[:1] or told
    if len(found) == 1:
        return found[0]
    several = f"columns {', '.join(told)} may be it" if told else f"it has {_few(schema)}"
    raise UserError(f"{path}: which column is the {what}? {several}; name one with {option}")


def _few(schema: "pa.Schema") -> str:
    return printable(", ".join(schema.names[:12]), 300) + ", ..." * (len(schema.names) > 12)


def _image_fields(path: Path, column: "pa.Field") -> tuple[str, str]:
    """Which fields of a column of images hold the bytes and the path."""
    import pyarrow.types as types

    def holds(kind: Any, *wanted: str) -> bool:
        return any(getattr(types, f"is_{one}")(kind) for one in wanted)

    binary = ("binary", "large_binary", "binary_view", "fixed_size_binary")
    text = ("string", "large_string", "string_view")
    if holds(column.type, *binary):
        return "", ""
    if holds(column.type, "struct"):
        fields = {one.name: one.type for one in column.type}
        if "bytes" in fields and holds(fields["bytes"], *binary):
            has_path = "path" in fields and holds(fields["path"], *text)
            return "bytes", "path" if has_path else ""
    what = "text" if holds(column.type, *text) else printable(str(column.type), 80)
    raise UserError(
        f"{path}: column {column.name!r} holds {what}, and no images; expected their bytes, or a "
        "structure of bytes and path; another column is named with --image-key"
    )


def _check_label(path: Path, column: "pa.Field") -> None:
    import pyarrow.types as types

    kind = column.type.value_type if types.is_dictionary(column.type) else column.type
    if types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind):
        return
    listed = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    what = "several labels for an image" if listed else printable(str(kind), 80)
    raise UserError(
        f"{path}: column {column.name!r} holds {what}; expected a whole number or the name of a "
        "class; another column is named with --label-key"
    )


def _rows(path: Path, columns: _Columns, image_key: str | None, label_key: str | None) -> _Rows:
    found = _columns(path, image_key, label_key)
    if found != columns:
        what = next(n for n, a, b in zip(found._fields, found, columns, strict=True) if a != b)
        raise UserError(f"{path}: is of another form than the set's first file: {what} differs")
    leaves = [columns.label]
    if columns.path_in:
        leaves.append(f"{columns.image}.{columns.path_in}")
    labels: list[Any] = []
    paths: list[str | None] = []
    with _damage_named(path):
        for batch in _batches(path, leaves, _LABELS_AT_ONCE):
            labels += batch.column(columns.label).to_pylist()
            if columns.path_in:
                paths += _field(batch.column(columns.image), columns.path_in).to_pylist()
    return _Rows(labels, paths or [None] * len(labels))


def _field(column: "pa.Array", name: str) -> "pa.Array":
    """A field of a structure, null where the structure is."""
    import pyarrow.compute as pc

    return pc.struct_field(column, name) if name else column


def _classes(
    files: Sequence[Path], held: Sequence[_Rows], columns: _Columns, names: ClassNames | None
) -> tuple[list[str], Int64s]:
    """The classes, and the label of each row of all files."""
    first: dict[Any, tuple[Path, int]] = {}
    for path, rows in zip(files, held, strict=True):
        absent = sum(label is None or label == -1 for label in rows.labels)
        if absent:
            raise UnlabelledError(
                f"{path}: {absent:,} of its {len(rows.labels):,} rows have no label (-1 or null in "
                f"column {columns.label!r}): the split cannot be used; give the others only"
            )
        for row, label in enumerate(rows.labels):
            if label not in first:
                first[label] = path, row
    known = columns.classes
    texts: dict[Any, str] = {}
    for label, (path, row) in first.items():
        number = label if isinstance(label, int) else None
        if known is not None and number is not None:
            if not 0 <= number < len(known):
                raise UserError(
                    f"{path}, row {row}: its label {number} is none of the {len(known):,} classes "
                    f"of column {columns.label!r}"
                )
            continue
        text = label_text(label)
        if text is None:
            raise UserError(f"{path}, row {row}: {printable(repr(label), 60)} is no label")
        texts[label] = text
    if known is not None and not texts:
        classes, places = [*known], {label: label for label in first}
        if names is not None:
            classes, order = arrange(known, names, lambda label: f"{files[0]}: class {label!r}")
            places = {label: order[label] for label in first}
    else:
        where = {text: f"{first[label][0]}, row {first[label][1]}" for label, text in texts.items()}
        classes, found = arrange([*where], names, where.__getitem__)
        by_text = dict(zip(where, found, strict=True))
        places = {label: by_text[text] for label, text in texts.items()}
    return classes, np.array([places[label] for rows in held for label in rows.labels], np.int64)


def _names(files: Sequence[Path], held: Sequence[_Rows], labels: Int64s) -> list[str]:
    """What the images are called: as their paths' ends; by their place where these are no names."""
    ends = [re.split(r"[/\\]", path or "")[-1] for rows in held for path in rows.paths]
    fit = all(end and end.isprintable() and not end.startswith(".") for end in ends)
    if fit and len({*zip(labels.tolist(), ends, strict=True)}) == len(ends):
        return ends
    stems = [file.stem for file in files]
    if len({*stems}) < len(stems):
        stems = [f"{number:05}-{stem}" for number, stem in enumerate(stems)]
    return [
        f"{stem}-{row:07}"
        for stem, rows in zip(stems, held, strict=True)
        for row in range(len(rows.labels))
    ]


def _folder_of(classes: Sequence[str], label: int) -> str:
    """The folder that an image would lie in."""
    name = classes[label].replace("/", "-").replace("\0", "")
    return str(label) if name in ("", ".", "..") else name


def _key(tables: ImageTables, number: int) -> str:
    """What changes when a file or the column that is read does."""
    path = tables.files[number]
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    parts = (path.absolute(), status.st_size, status.st_mtime_ns, tables.columns.image)
    return sha256("\0".join(map(str, parts)).encode()).hexdigest()[:12]


def _lengths(target: Path) -> Int64s | None:
    """Of each image in a plain file its length and ending, shape (n, 2); None: it is not whole."""
    try:
        found = np.load(target.with_name(f"{target.name}.npy"), allow_pickle=False)
        whole = found.dtype == np.int64 and found.ndim == 2 and found.shape[1] == 2
        return found if whole and found[:, 0].sum() == target.stat().st_size else None
    except (OSError, ValueError, EOFError):
        return None


def _check_room(tables: ImageTables, folder: Path, missing: Sequence[int]) -> None:
    """Check that the images fit in twice: unpacked, and as what is made of them."""
    needed = sum(tables.files[number].stat().st_size for number in missing)
    free = shutil.disk_usage(folder).free
    if 2 * needed > free:
        raise UserError(
            f"{folder.parent}: Parquet files are unpacked on the way: {in_bytes(2 * needed)} are "
            f"needed, {in_bytes(free)} are free"
        )


def _write(tables: ImageTables, targets: Sequence[Path], number: int) -> None:
    """Write the images of a file one after the other, and beside it how long they are."""
    path, target, columns = tables.files[number], targets[number], tables.columns
    leaf = f"{columns.image}.{columns.bytes_in}" if columns.bytes_in else columns.image
    aside = aside_of(target)
    lengths: list[tuple[int, int]] = []
    try:
        with aside.open("wb") as file:
            for content in _contents(path, leaf, columns):
                if content is None or not len(content):
                    raise _absent(path, len(lengths), columns)
                if len(content) > LARGEST_MEMBER:
                    raise UserError(
                        f"{path}, row {len(lengths)}: {len(content):,} bytes; no image has more "
                        f"than {LARGEST_MEMBER:,}"
                    )
                file.write(content)
                lengths.append((len(content), _ending(content[:12])))
        if len(lengths) != tables.counts[number]:
            raise UserError(f"{path}: has other rows than a moment ago; let nobody write to it")
        sync(aside)
        aside.replace(target)
        np.save(target.with_name(f"{target.name}.npy"), np.array(lengths, np.int64))
    except OSError as error:
        raise UserError(f"{target}: cannot write what is unpacked ({error.strerror})") from None
    finally:
        aside.unlink(missing_ok=True)


def _contents(path: Path, leaf: str, columns: _Columns) -> Iterator[memoryview | None]:
    batches = _batches(path, [leaf], _IMAGES_AT_ONCE)
    while True:
        with _damage_named(path):
            batch = next(batches, None)
            if batch is None:
                return
            images = _field(batch.column(columns.image), columns.bytes_in)
        for image in images:
            yield memoryview(image.as_buffer()) if image.is_valid else None


def _absent(path: Path, row: int, columns: _Columns) -> UserError:
    said = f"{path}, row {row}: column {columns.image!r} holds no image"
    if not columns.path_in:
        return UserError(said)
    return UserError(
        f"{said}, at most the path of one: Dataset.to_parquet keeps paths only; write the set with "
        "push_to_hub or save_to_disk, which put the images into it"
    )


def _ending(start: memoryview) -> int:
    """Which of :data:`_ENDINGS` an image's first bytes ask for."""
    known = bytes(start)
    return next((n for n, sign in enumerate(_STARTS) if known.startswith(sign)), 0)
