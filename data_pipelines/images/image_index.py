"""The list of a data set's images, compact enough for ImageNet on every rank of a node.

An index is a handful of flat arrays. Kept in a file (``tpp index DIR``), it is
mapped into memory: loading it reads next to nothing, and the ranks of a node share its pages.
Images are files of their own in class folders, or stretches of larger files (tar shards).
"""

import contextlib
import json
import operator
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from zlib import crc32

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from data_pipelines.images.folders import (
    SCAN_THREADS,
    USUAL,
    PassedOver,
    Wanted,
    byte_size,
    folder_mark,
    how_to_take,
    image_names,
    list_images,
    loose_images,
    together,
    told,
    visible,
)
from data_pipelines.images.names import Names
from data_pipelines.images.order import Int64s
from data_pipelines.images.plain_file import open_plain
from tpp.common.errors import UserError
from tpp.common.files import write_whole

if TYPE_CHECKING:
    from torch import Tensor

INDEX_FILE = ".index.safetensors"
PARTS = ("train", "val", "test")
"""Names of the folders of class folders that a data set's folder may hold."""
_FORMAT = "tpp-image-index"
_VERSION = "1"
_FINGERPRINT = re.compile("[0-9a-f]{12}")
# How many images' sizes a run looks at to see whether its index is still that of the folder.
_SAMPLED = 256


def report_beside(index_file: Path) -> Path:
    """Where ``tpp index`` puts its report: beside the index that it writes."""
    return index_file.with_name(f"{index_file.name.removesuffix('.safetensors')}-report.tsv")


class Location(NamedTuple):
    """Where an image's bytes are: ``length`` bytes of ``path`` from ``offset`` on.

    A length of -1 means the whole file, as long as it is when it is read. In an object store the
    path is a URL.
    """

    path: str
    offset: int
    length: int


@dataclass(frozen=True, eq=False)
class ImageIndex:
    """Every image of a data set, in an order that depends on the names alone.

    Attributes:
        root: the folder that holds the class folders or the shards.
        files: names, by class and then by name: paths relative to ``root`` where the images are
            files, and in shards the paths that they had before.
        labels: class number of each image, int64, shape (n,).
        classes: names of the classes; the label is the position in this list. Of class folders
            they are sorted, unless they are told in another order.
        byte_sizes: length of each image's file, int64, shape (n,); -1 where not looked up.
        sizes: height and width of each image in pixels, int32, shape (n, 2); 0, 0 where not
            looked up, or where the image cannot be read.
        broken: whether the image was found to be unreadable, bool, shape (n,).
        containers: the larger files that hold the images, relative to ``root``; empty where each
            image is a file.
        container, offsets: which of ``containers`` holds each image, int32, and where its bytes
            begin in it, int64; shape (n,), or (0,) without containers.
        marks: what changes when the folder does, int64: per class the folder's time of change in
            nanoseconds, or per container its size in bytes; shape (0,) where not looked up.
        file: where this index was loaded from.
        wanted: which files in the class folders are images.
        passed_over: what else lies in the folder.
        labels_from: where tars of others, or a list, have the labels; empty for class folders and
            for shards of this package.
        called: of each of ``containers``, where those are plain copies for a while, the file that
            it is a copy from, for messages.
        url: where the images are in an object store; ``root`` then is the folder that holds the
            index, and those of ``containers`` that are kept here. Empty for a folder.
    """

    root: Path
    files: Names
    labels: Int64s
    classes: list[str]
    byte_sizes: Int64s
    sizes: NDArray[np.int32]
    broken: NDArray[np.bool_]
    containers: list[str] = field(default_factory=list)
    container: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    offsets: Int64s = field(default_factory=lambda: np.zeros(0, np.int64))
    marks: Int64s = field(default_factory=lambda: np.zeros(0, np.int64))
    file: Path | None = None
    wanted: Wanted = USUAL
    passed_over: tuple[PassedOver, ...] = ()
    labels_from: str = ""
    called: tuple[str, ...] = ()
    url: str = ""

    @classmethod
    def of(
        cls,
        root: str | os.PathLike[str],
        files: Iterable[str],
        labels: Any,
        classes: Sequence[str],
        **more: Any,
    ) -> "ImageIndex":
        """An index of files of which nothing but name and label is known, unless ``more`` says."""
        names = files if isinstance(files, Names) else Names.of(files)
        unknown: dict[str, Any] = {
            "byte_sizes": np.full(len(names), -1, np.int64),
            "sizes": np.zeros((len(names), 2), np.int32),
            "broken": np.zeros(len(names), np.bool_),
        }
        labels = np.asarray(labels, dtype=np.int64)
        return cls(Path(root), names, labels, list(classes), **{**unknown, **more})

    def __len__(self) -> int:
        return len(self.labels)

    def __reduce__(self) -> Any:
        # A worker process maps the same file instead of being sent a copy of everything.
        if self.file is not None:
            return _load_again, (self.file, self.root, self.url, self.fingerprint)
        return super().__reduce__()

    @cached_property
    def fingerprint(self) -> str:
        """12 hex digits that change when a name or a label does; the same for files and shards."""
        digest = sha256()
        for name in self.files:
            digest.update(os.fsencode(name) + b"\0")
        digest.update(self.labels.astype("<i8").tobytes())
        return digest.hexdigest()[:12]

    @property
    def place(self) -> str:
        """The folder or the URL of the images, to be said."""
        return self.url or str(self.root)

    def location(self, image: int) -> Location:
        """Where an image's bytes are now: of one in an object store, here if they are kept here."""
        length = int(self.byte_sizes[image])
        if not self.containers:
            return Location(f"{self.place}/{self.files[image]}", 0, length if self.url else -1)
        container = self.containers[self.container[image]]
        path = f"{self.root}/{container}"
        if self.url and not Path(path).exists():
            path = f"{self.url}/{container}"
        return Location(path, int(self.offsets[image]), length)

    def name(self, image: int) -> str:
        """What to call an image in a message: its path, in shards with the member's name."""
        if not self.containers:
            return f"{self.place}/{self.files[image]}"
        container = self.container[image]
        path = (
            self.called[container] if self.called else f"{self.place}/{self.containers[container]}"
        )
        return f"{path}: {self.files[image]}"

    def said_of_the_rest(self) -> str | None:
        """What lies in the folder and is no part of the index, in a line; None: nothing does."""
        if not self.passed_over:
            return None
        if self.containers or self.labels_from:
            return f"{self.place}: passed over when it was made: {told(self.passed_over)}"
        options = how_to_take(self.passed_over)
        command = f"tpp index {self.place} {options}"
        taken = f"; take the images with: {command}" if options else ""
        return f"{self.place}: passed over: {told(self.passed_over)}{taken}"

    def said_of_form(self) -> str | None:
        """How others have laid out these images, in a line; None: as class folders or shards."""
        if not self.labels_from:
            return None
        with_images = len(np.unique(self.labels))
        some = f", of {with_images:,} of the classes" * (with_images < len(self.classes))
        if self.containers:
            root = Path(self.called[0]).parent if self.called else self.place
            kind = "Parquet or Arrow file" if self.called else "tar"
            tars = f"{len(self.containers):,} {kind}" + "s" * (len(self.containers) > 1)
            return f"{root}: {len(self):,} images in {tars}, labels from {self.labels_from}{some}"
        return f"{self.root}: {len(self):,} images of the list {self.labels_from}{some}"

    def with_classes(self, classes: Sequence[str], places: Sequence[int]) -> "ImageIndex":
        """The same images, of classes in another order or with other names.

        Args:
            classes: their names.
            places: of each class of this index, its position in ``classes``; no two alike.
        """
        labels = np.asarray(places, np.int64)[self.labels]
        if (labels == self.labels).all():
            renamed = replace(self, classes=list(classes))
            if "fingerprint" in self.__dict__:  # it is of names and labels alone
                renamed.__dict__["fingerprint"] = self.fingerprint
            return renamed
        order = np.argsort(labels, kind="stable")
        return replace(
            self.subset(order),
            labels=labels[order],
            classes=list(classes),
            marks=self.marks if self.containers else np.zeros(0, np.int64),
            wanted=self.wanted,
            passed_over=self.passed_over,
            labels_from=self.labels_from,
        )

    def subset(self, images: Int64s) -> "ImageIndex":
        """The index of these images only, in this order; all classes stay."""
        return ImageIndex.of(
            self.root,
            [self.files[image] for image in images.tolist()],
            self.labels[images],
            self.classes,
            byte_sizes=self.byte_sizes[images],
            sizes=self.sizes[images],
            broken=self.broken[images],
            containers=self.containers,
            container=self.container[images] if self.containers else self.container,
            offsets=self.offsets[images] if self.containers else self.offsets,
            called=self.called,
            url=self.url,
        )


# As PyTorch writes its types: an index is made without it.
_ARRAYS = {
    "names": "torch.uint8",
    "name_ends": "torch.int64",
    "labels": "torch.int64",
    "byte_sizes": "torch.int64",
    "sizes": "torch.int32",
    "broken": "torch.bool",
    "container": "torch.int32",
    "offsets": "torch.int64",
    "marks": "torch.int64",
}


def save_index(index: ImageIndex, path: Path) -> None:
    """Write an index: a safetensors file that appears whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    arrays: dict[str, Any] = {name: getattr(index, name, None) for name in _ARRAYS}
    arrays |= {"names": index.files.text, "name_ends": index.files.ends}
    metadata = {
        "format": _FORMAT,
        "version": _VERSION,
        "classes": json.dumps(index.classes),
        "containers": json.dumps(index.containers),
        "fingerprint": index.fingerprint,
    }
    # Only where there is something to say: other indices stay as they always were.
    if index.wanted != USUAL:
        metadata["wanted"] = json.dumps(index.wanted)
    if index.passed_over:
        metadata["passed_over"] = json.dumps(index.passed_over)
    if index.labels_from:
        metadata["labels_from"] = index.labels_from
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    metadata["crc32"] = _checksum(arrays, metadata)
    content = save(arrays, metadata)
    try:
        write_whole(path, content)
    except OSError as error:
        raise UserError(
            f"{path}: cannot write the index ({error.strerror}); choose another place with --output"
        ) from None


def check_replaceable(path: Path) -> None:
    """Check that no other file lies where an index is to be written; a damaged index may.

    Raises:
        UserError: a whole safetensors file is there, and it is none of this package's indices.
    """
    with contextlib.suppress(OSError, SafetensorError), safe_open(path, framework="np") as file:
        if (file.metadata() or {}).get("format") != _FORMAT:
            raise UserError(
                f"{path}: holds something else than an index of images, and would be replaced; "
                "choose another place with --output"
            )


def load_index(
    path: str | os.PathLike[str], root: str | os.PathLike[str], url: str = ""
) -> ImageIndex:
    """Map an index into memory; whether it still fits the folder is for :func:`check_fits`.

    Args:
        path: the file.
        root: the folder of class folders or shards that it is the index of.
        url: where these are, if in an object store.

    Raises:
        UserError: the file cannot be read or is no index.
    """
    path = Path(path)
    again = f"make it anew with: tpp index {'DIR' if url else root}"
    try:
        os.close(open_plain(path))
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise UserError(f"{path}: not an index of images; {again}")
            if metadata["version"] != _VERSION:
                raise UserError(
                    f"{path}: an index of version {metadata['version']}, this program reads "
                    f"version {_VERSION}; {again}"
                )
            tensors = {name: file.get_tensor(name) for name in _ARRAYS}
        classes, containers = (json.loads(metadata[key]) for key in ("classes", "containers"))
        wanted, passed_over = _listing_of(metadata)
        fingerprint = metadata["fingerprint"]
        if not _FINGERPRINT.fullmatch(fingerprint):
            raise ValueError(f"a fingerprint {fingerprint!r}")
    except OSError as error:
        raise UserError(f"{path}: cannot read the index ({error.strerror or error})") from None
    except (SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: a damaged index ({error}); {again}") from None
    problem = _inconsistency(tensors, classes, containers)
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
    if not problem and metadata.get("crc32") != _checksum(arrays, metadata):
        problem = "its checksum is another one"
    if problem:
        raise UserError(f"{path}: a damaged index ({problem}); {again}")
    names = Names(arrays.pop("names"), arrays.pop("name_ends"))
    index = ImageIndex(
        Path(root),
        names,
        classes=classes,
        containers=containers,
        file=path,
        wanted=wanted,
        passed_over=passed_over,
        labels_from=metadata.get("labels_from", ""),
        url=url,
        **arrays,
    )
    # Hashing 1.3 million names takes a second; the file says what came out.
    index.__dict__["fingerprint"] = fingerprint
    return index


def _listing_of(metadata: Mapping[str, str]) -> tuple[Wanted, tuple[PassedOver, ...]]:
    """What an index says of how its folder was listed; ValueError where it makes no sense."""
    wanted, passed = USUAL, []
    try:
        if "wanted" in metadata:
            suffixes, nested = json.loads(metadata["wanted"])
            wanted = Wanted(tuple(map(str, suffixes)), bool(nested))
        for what, count, example in json.loads(metadata.get("passed_over", "[]")):
            passed.append(PassedOver(str(what), int(count), str(example)))
    except TypeError as error:
        raise ValueError(str(error)) from None
    return wanted, tuple(passed)


def _load_again(path: Path, root: Path, url: str, fingerprint: str) -> ImageIndex:
    """Load an index in another process, unless the file has changed in the meantime."""
    index = load_index(path, root, url)
    if index.fingerprint != fingerprint:
        raise UserError(f"{path}: another index took this one's place during the run; begin anew")
    return index


def _checksum(arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> str:
    """CRC-32 of all that an index holds, as 8 hex digits; 7 GB/s, so loading may check it."""
    check = 0
    for name in _ARRAYS:
        check = crc32(arrays[name].data, check)
    for name in (
        *("classes", "containers", "fingerprint", "wanted", "passed_over", "labels_from"),
    ):
        check = crc32(metadata.get(name, "").encode(), check)
    return f"{check:08x}"


def _inconsistency(tensors: "dict[str, Tensor]", classes: Any, containers: Any) -> str | None:
    """What is wrong with an index's arrays, so that nothing later reads out of bounds."""
    for what, names in (("classes", classes), ("containers", containers)):
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            return f"its {what} are not a list of names"
        if any("\0" in name for name in names):
            return f"a zero byte in the names of its {what}"
        if what == "containers" and any(name.startswith("/") or ".." in name for name in names):
            return "a container outside of the folder"
    if containers:
        # Their classes are no folders, and may come in an order of their own.
        if len({*classes}) < len(classes) or not all(classes):
            return "a class twice, or one without a name"
    elif any("/" in name or name in ("", "..") for name in classes):
        return "a class that is no folder in this one"
    elif any(map(operator.ge, classes, classes[1:])):
        return "classes that are not sorted, or one twice"
    n = len(tensors["labels"])
    held = n if containers else 0
    shapes = {"names": None, "marks": None, "sizes": (n, 2), "container": (held,)}
    shapes |= {"offsets": (held,)}
    for name, dtype in _ARRAYS.items():
        tensor, shape = tensors[name], shapes.get(name, (n,))
        if str(tensor.dtype) != dtype or (
            tensor.dim() != 1 if shape is None else tensor.shape != shape
        ):
            return f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}"
    if not n:
        return "no images"
    ends = tensors["name_ends"]
    if ends.min() < 0 or (ends.diff() < 0).any() or ends[-1] != len(tensors["names"]):
        return "the names' ends"
    if len(tensors["names"]) and not tensors["names"].min():
        return "a zero byte in the names"
    if _leads_out(tensors["names"].numpy(), ends.numpy()):
        return "a name outside of the folder"
    if len(tensors["marks"]) not in (0, len(containers or classes)):
        return f"{len(tensors['marks'])} marks"
    for name, limit in (("labels", len(classes)), ("container", len(containers))):
        values = tensors[name]
        if len(values) and (values.min() < 0 or values.max() >= limit):
            return f"{name} out of range"
    if tensors["sizes"].min() < 0 or tensors["byte_sizes"].min() < (0 if held else -1):
        return "sizes out of range"
    if held and tensors["offsets"].min() < 0:
        return "offsets out of range"
    if held and len(tensors["marks"]):
        room = tensors["marks"][tensors["container"].long()] - tensors["offsets"]
        if tensors["marks"].min() < 0 or (tensors["byte_sizes"] > room).any():
            return "offsets beyond the end of a container"
    if not held and (tensors["labels"].diff() < 0).any():
        return "not in the order of the classes"
    return None


def _leads_out(text: NDArray[np.uint8], ends: Int64s) -> bool:
    """Whether '..' is a part of any name; one by one only where two dots are to be found."""
    if b".." not in text.tobytes():
        return False
    return any(".." in name.split("/") for name in Names(text, ends))


def open_images(folder: Path, index_file: Path | None = None) -> ImageIndex:
    """The index of a folder: from its index file, where there is one, else by listing it.

    Args:
        folder: class folders, or shards with their index.
        index_file: where the index is; by default :data:`INDEX_FILE` in the folder, if it exists.

    Raises:
        UserError: there are no images, or the index does not fit the folder.
    """
    path = index_file or folder / INDEX_FILE
    if index_file is None and not path.exists():
        return scan_class_folders(folder)
    index = load_index(path, folder)
    check_fits(index)
    return index


def check_fits(index: ImageIndex) -> None:
    """Check that the folder still is as its index says, without listing what has not changed.

    The names of the class folders are compared; folders whose time of change differs are listed
    and compared name by name (a copied folder's differ all); of some images, evenly drawn, the
    size in bytes. Of shards, every one's size.

    Raises:
        UserError: says what differs, and what to do.
    """
    again = f"make it anew with: tpp index {index.root}"
    if index.containers:
        problem = _container_difference(index)
        if not index.labels_from:
            again = "write the shards anew with: tpp shards"
    else:
        problem = _folder_difference(index)
    if problem:
        raise UserError(f"{index.file}: this index no longer fits {index.root}: {problem}; {again}")


def _container_difference(index: ImageIndex) -> str | None:
    sizes = index.marks.tolist() or [None] * len(index.containers)
    for name, size in zip(index.containers, sizes, strict=True):
        try:
            found = (index.root / name).stat().st_size
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if size not in (None, found):
            return f"{name} has {found:,} bytes instead of {size:,}"
    return None


def _folder_difference(index: ImageIndex) -> str | None:
    found = visible(index.root, folders=True)
    for what, odd in (
        ("has no class folder", set(index.classes) - set(found)),
        ("has another class folder,", set(found) - set(index.classes)),
    ):
        if odd:
            return f"it {what} {min(odd)!r}" + (f" and {len(odd) - 1} more" if len(odd) > 1 else "")
    changed = list(range(len(index.classes)))
    if len(index.marks) == len(index.classes):
        with ThreadPoolExecutor(SCAN_THREADS) as pool:
            marks = list(pool.map(lambda name: folder_mark(index.root / name), index.classes))
        changed = np.flatnonzero(index.marks != marks).tolist()
    bounds = np.searchsorted(index.labels, np.arange(len(index.classes) + 1))
    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        listed = pool.map(
            lambda label: image_names(index.root / index.classes[label], index.wanted), changed
        )
        for label, names in zip(changed, listed, strict=True):
            now = {f"{index.classes[label]}/{name}" for name in names}
            then = set(index.files[bounds[label] : bounds[label + 1]])
            for what, files in (("is gone", then - now), ("is new", now - then)):
                if files:
                    more = f" (and {len(files) - 1} more there)" if len(files) > 1 else ""
                    return f"{min(files)} {what}{more}"
    sampled = np.unique(np.linspace(0, len(index) - 1, _SAMPLED, dtype=np.int64)).tolist()
    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        sizes = pool.map(lambda image: byte_size(index.location(image).path), sampled)
        for image, size in zip(sampled, sizes, strict=True):
            if index.byte_sizes[image] not in (-1, size):
                return f"{index.files[image]} has {size:,} bytes instead of " + (
                    f"{index.byte_sizes[image]:,}"
                )
    return None


def scan_class_folders(root: str | os.PathLike[str], wanted: Wanted | None = None) -> ImageIndex:
    """List the images of the class folders in ``root``, and count what else lies there.

    Classes are the sorted folder names, as in torchvision's ImageFolder. Hidden files and folders
    are left out. No file is opened.

    Args:
        root: the folder.
        wanted: which files are images; by default .jpg, .jpeg, .png (in any case) right in a class
            folder.

    Raises:
        UserError: ``root`` is not a readable folder, holds no class folders or no images, or a
            class folder has no images.
    """
    root, wanted = Path(root), wanted or USUAL
    layout = f"expected class folders such as {root}/<class>/<image>.jpg"
    classes = visible(root, folders=True)
    loose = loose_images(root)
    if not classes:
        holds = f"; its {loose[0].number:,} images lie beside each other" if loose else ""
        raise UserError(f"{root}: no class folders; {layout}{holds}")
    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        images, rest = zip(
            *pool.map(lambda name: list_images(root / name, wanted), classes), strict=True
        )
    passed = together([*loose, *chain.from_iterable(rest)])
    if not any(images):
        raise UserError(f"{root}: no images in its {len(classes)} folders{_aid(passed)}; {layout}")
    for name, found, others in zip(classes, images, rest, strict=True):
        if not found:
            raise UserError(
                f"{root / name}: class folder without images{_aid(others)}; "
                f"expected {', '.join(wanted.suffixes)} files, or no such folder"
            )
    files = (
        f"{name}/{image}" for name, found in zip(classes, images, strict=True) for image in found
    )
    counts = [len(found) for found in images]
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), counts)
    return ImageIndex.of(root, files, labels, classes, wanted=wanted, passed_over=passed)


def _aid(passed: Sequence[PassedOver]) -> str:
    """What a folder without images holds, and how to take that."""
    options = how_to_take(passed)
    taken = f"; take them with: tpp index DIR {options}" if options else ""
    return f" (it holds {told(passed)}{taken})" if passed else ""


def parts_of(folder: Path) -> list[Path]:
    """The folders to index: the one given, or those in it that are a data set's parts."""
    named = named_parts(folder)
    # A class may be named 'train' as well.
    parts = [
        part
        for part in named
        if (part / INDEX_FILE).exists() or (visible(part, folders=True) and not image_names(part))
    ]
    # Beside a part, a folder of folders is one too, whatever else lies in it.
    if parts:
        return [part for part in named if part in parts or visible(part, folders=True)]
    return [folder]


def named_parts(folder: Path) -> list[Path]:
    """The folders in one that are called as a data set's parts are."""
    found = visible(folder, folders=True)
    return [folder / name for name in PARTS if name in found]
