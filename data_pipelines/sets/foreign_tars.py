"""Tars that others made for WebDataset, as an index of images.

A sample is the members of a tar that have a key in common: the path up to the first dot in the
file's name; what follows is the field (https://github.com/webdataset/webdataset). Here a sample is
an image and its label. They are found by the members' headers alone, in any order, so that each
image can be read on its own: no index of DALI's is needed.
"""

import itertools
import os
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipelines.images.folders import SCAN_THREADS, visible
from data_pipelines.images.image_index import ImageIndex
from data_pipelines.images.plain_file import open_plain
from data_pipelines.sets.archives import Member, compression_of, damage_named, tar_members
from data_pipelines.sets.claim import in_threads, progress_bar
from data_pipelines.sets.class_names import in_order, label_text
from tpp.common.errors import UserError, printable
from tpp.common.reading import parse_json

IMAGE_FIELDS = ("jpg", "jpeg", "png", "webp")
LABEL_KEYS = ("label", "cls", "class", "class_id", "class_name", "target", "category")
# Of a sample's .cls or .json: what is longer is something else.
_LONGEST_LABEL = 2**20
_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4")
_RANGE = re.compile(r"([0-9]+)\.\.([0-9]+)")
_MOST_TARS = 1_000_000
_SHOWN_FIELDS = 5


class _Held(NamedTuple):
    """What one tar holds: of each sample the image's place and name, and the label's text.

    Attributes:
        images: the image members.
        labels: of each of these.
        labels_from: where they are, see :class:`ImageIndex`.
        size: of the tar, in bytes.
    """

    images: list[Member]
    labels: list[str]
    labels_from: str
    size: int


def is_pattern(text: str) -> bool:
    """Whether a name stands for several files: ``shard-{000..019}.tar``, ``*.tar``."""
    return any(sign in text for sign in "{*?[")


def expand(pattern: str) -> list[Path]:
    """The files that a pattern of braces and wildcards stands for, in its order.

    ``{00..19}`` counts, with as many digits as the first number has; ``{a,b}`` takes each in turn.

    Raises:
        UserError: the braces do not pair, or a wildcard finds nothing.
    """
    found: list[Path] = []
    for text in _braces(pattern):
        if len(found) > _MOST_TARS:
            raise UserError(f"{pattern}: more than {_MOST_TARS:,} files")
        if any(sign in text for sign in "*?["):
            matches = _matching(Path(text))
            if not matches:
                raise UserError(f"{text}: there is no such file")
            found += matches
        else:
            found.append(Path(text))
    return found


def _matching(path: Path) -> list[Path]:
    """The files that a path with wildcards stands for, sorted."""
    wild = next(n for n, part in enumerate(path.parts) if any(sign in part for sign in "*?["))
    return sorted(Path(*path.parts[:wild]).glob(str(Path(*path.parts[wild:]))))


def _braces(pattern: str) -> Iterator[str]:
    parts = re.split(r"\{([^{}]*)\}", pattern)
    if any(sign in part for part in parts for sign in "{}"):
        raise UserError(f"{pattern}: its braces do not pair; expected such as {{0000..0019}}")
    choices: list[Sequence[str]] = []
    for place, part in enumerate(parts):
        counted = _RANGE.fullmatch(part)
        if place % 2 == 0:
            choices.append([part])
        elif counted is not None:
            first, last = int(counted[1]), int(counted[2])
            width = len(counted[1]) if counted[1].startswith("0") else 0
            if not first <= last < first + _MOST_TARS:
                raise UserError(f"{pattern}: {{{part}}} does not count up to at most a million")
            choices.append([f"{number:0{width}}" for number in range(first, last + 1)])
        else:
            choices.append(part.split(","))
    return map("".join, itertools.product(*choices))


def tars_in(folder: Path) -> list[Path]:
    """The tars of others right in a folder without class folders, sorted by name; often none.

    Raises:
        UserError: they are compressed, or the folder cannot be listed.
    """
    names = visible(folder, folders=False)
    tars = [folder / name for name in names if name.lower().endswith(".tar")]
    packed = [name for name in names if name.lower().endswith(_PACKED)]
    if (not tars and not packed) or visible(folder, folders=True):
        return []
    if packed:
        raise _compressed(folder / packed[0])
    return tars


def scan_tars(tars: Sequence[Path], root: Path, label_key: str | None = None) -> ImageIndex:
    """The index of the images in tars of others. No image is looked at.

    The labels' different texts are the classes here; what they stand for is for
    :func:`data_pipelines.sets.class_names.arrange`. Images come by class and then by the names of
    their members; where two tars have a name in common, the tar's name comes before it.

    Args:
        tars: the files.
        root: a folder that all of them are in, at any depth.
        label_key: the key of a sample's ``json`` that is its label; by default the labels are in
            ``cls``, or in ``json`` under one of :data:`LABEL_KEYS`.

    Raises:
        UserError: names the tar and the member: a tar is compressed, damaged or unsafe, a sample
            has no image, two of them or no label, or is there twice.
    """
    with progress_bar() as progress:
        scan = partial(_scan, label_key=label_key)
        held = in_threads("reading tars", scan, tars, min(SCAN_THREADS, len(tars)), progress)
    names = [os.path.relpath(tar, root) for tar in tars]
    kept = [(name, one) for name, one in zip(names, held, strict=True) if one.images]
    if not kept:
        raise UserError(f"{root}: no samples in its {len(tars):,} tars")
    first_name, first = kept[0]
    for name, one in kept:
        if one.labels_from != first.labels_from:
            raise UserError(
                f"{root}: labels of {name} are in {one.labels_from}, those of {first_name} in "
                f"{first.labels_from}; expected one place for all"
            )
    files = [image.name for _, one in kept for image in one.images]
    if len({*files}) < len(files):
        files = [f"{name}/{image.name}" for name, one in kept for image in one.images]
    texts = [label for _, one in kept for label in one.labels]
    classes = in_order({*texts})
    numbers = {text: number for number, text in enumerate(classes)}
    labels = [numbers[text] for text in texts]
    order = np.array(sorted(range(len(files)), key=lambda i: (labels[i], files[i])), np.int64)
    counts = [len(one.images) for _, one in kept]
    places = np.array([image[1:] for _, one in kept for image in one.images], np.int64)
    return ImageIndex.of(
        root,
        [files[image] for image in order.tolist()],
        np.array(labels, np.int64)[order],
        classes,
        byte_sizes=places[order, 1],
        containers=[name for name, _ in kept],
        container=np.repeat(np.arange(len(kept), dtype=np.int32), counts)[order],
        offsets=places[order, 0],
        marks=np.array([one.size for _, one in kept], np.int64),
        labels_from=first.labels_from,
    )


def _compressed(path: Path, kind: str = "") -> UserError:
    how = f"compressed with {kind}" if kind else "compressed"
    return UserError(
        f"{path}: {how}: no image in it can be read by itself; unpack it to a plain .tar"
    )


def _scan(tar: Path, label_key: str | None) -> _Held:
    kind = compression_of(tar)
    if kind is not None:
        raise _compressed(tar, kind)
    with damage_named(str(tar)):
        descriptor = open_plain(tar)
    try:
        size = os.fstat(descriptor).st_size
        samples = _samples(tar, tar_members(descriptor, 0, size, str(tar)))
        if not samples:
            return _Held([], [], "", size)
        labels_from = _where_labels_are(tar, descriptor, samples, label_key)
        images, labels = [], []
        for key, fields in samples.items():
            images.append(_image_of(tar, key, fields))
            labels.append(_label_of(tar, descriptor, key, fields, labels_from))
    finally:
        os.close(descriptor)
    return _Held(images, labels, labels_from, size)


def _samples(tar: Path, members: Iterator[Member]) -> dict[str, dict[str, Member]]:
    """The members of each key, by field."""
    samples: dict[str, dict[str, Member]] = {}
    for member in members:
        # "./cat/1.jpg", as `tar .` has it, is cat/1.jpg.
        path = "/".join(part for part in member.name.split("/") if part not in ("", "."))
        folder, _, file = path.rpartition("/")
        stem, dot, field = file.partition(".")
        # As webdataset does: hidden files, those without an ending, and its own.
        if not stem or not dot or (path.startswith("__") and path.endswith("__")):
            continue
        fields = samples.setdefault(f"{folder}/{stem}" if folder else stem, {})
        field = field.lower()
        if field in fields:
            raise UserError(f"{tar}: {member.name} is in it twice")
        fields[field] = member._replace(name=path)
    return samples


def _image_of(tar: Path, key: str, fields: dict[str, Member]) -> Member:
    found = [member for field, member in fields.items() if field in IMAGE_FIELDS]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(
            f"{tar}: sample {key!r} has {len(found)} images, {found[0].name} and {found[1].name}; "
            "expected one"
        )
    raise UserError(
        f"{tar}: sample {key!r} has no image, only {_shown(fields)}; expected {key}.jpg, .jpeg, "
        f".png or .webp{_of_dots(key, fields, IMAGE_FIELDS)}"
    )


def _where_labels_are(
    tar: Path, descriptor: int, samples: dict[str, dict[str, Member]], label_key: str | None
) -> str:
    """What the first sample with a label says: '.cls', or '.json' and the key."""
    if label_key is not None:
        return f".json: {label_key}"
    for key, fields in samples.items():
        if "cls" in fields:
            return ".cls"
        if "json" in fields:
            said = _json_of(tar, descriptor, fields["json"])
            found = next((name for name in LABEL_KEYS if name in said), None)
            if found is not None:
                return f".json: {found}"
            raise UserError(
                f"{tar}: {fields['json'].name} has no label under {', '.join(LABEL_KEYS)}; its "
                f"keys are {_few(said)}: name one with data.label_key"
            )
        raise _no_label(tar, key, fields, "cls or .json")
    raise AssertionError  # there is a sample


def _label_of(
    tar: Path, descriptor: int, key: str, fields: dict[str, Member], labels_from: str
) -> str:
    field, _, name = labels_from.removeprefix(".").partition(": ")
    if field not in fields:
        raise _no_label(tar, key, fields, field)
    member = fields[field]
    if name:
        said = _json_of(tar, descriptor, member)
        if name not in said:
            raise UserError(f"{tar}: {member.name} has no key {name!r}; its keys are {_few(said)}")
        label = label_text(said[name])
        shown = said[name]
    else:
        shown = _text_of(tar, descriptor, member)
        label = label_text(shown)
    if label is None:
        raise UserError(
            f"{tar}: {member.name}: {printable(repr(shown), 60)} is no label; expected a whole "
            "number or the name of a class"
        )
    return label


def _no_label(tar: Path, key: str, fields: dict[str, Member], wanted: str) -> UserError:
    dots = _of_dots(key, fields, ("cls", "json"))
    return UserError(
        f"{tar}: sample {key!r} has no label, only {_shown(fields)}; expected {key}.{wanted}{dots}"
    )


def _of_dots(key: str, fields: dict[str, Member], wanted: Sequence[str]) -> str:
    """What to say where the field's name would be right after its last dot."""
    dotted = [field for field in fields if field.rpartition(".")[2] in wanted and "." in field]
    if not dotted:
        return ""
    return (
        f": a key ends at the first dot of a file's name, so {fields[dotted[0]].name} is field "
        f"{dotted[0]!r} of {key!r}; use keys without dots"
    )


def _json_of(tar: Path, descriptor: int, member: Member) -> dict[str, object]:
    said = parse_json(_text_of(tar, descriptor, member), f"{tar}: {member.name}")
    if not isinstance(said, dict):
        raise UserError(f"{tar}: {member.name}: expected a JSON object with a label")
    return said


def _text_of(tar: Path, descriptor: int, member: Member) -> str:
    if member.size > _LONGEST_LABEL:
        raise UserError(f"{tar}: {member.name}: {member.size:,} bytes are no label")
    with damage_named(str(tar)):
        content = os.pread(descriptor, member.size, member.offset)
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise UserError(f"{tar}: {member.name}: is no text, and so no label") from None


def _shown(fields: dict[str, Member]) -> str:
    return _few([member.name for member in fields.values()])


def _few(names: Sequence[str] | dict[str, object]) -> str:
    shown = [printable(str(name), 60) for name in itertools.islice(names, _SHOWN_FIELDS)]
    return ", ".join(shown) + ", ..." * (len(names) > _SHOWN_FIELDS) or "none"
