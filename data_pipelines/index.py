"""``tpp index DIR`` writes the index of a folder of images.

Every file's header and its last bytes are read, so that a run knows each image's size beforehand,
and a damaged file is found now and not in a run's third night.
"""

import errno
import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from rich.markup import escape

from data_pipelines.images.folders import (
    IMAGE_SUFFIXES,
    SCAN_THREADS,
    Wanted,
    folder_mark,
    how_to_take,
    told,
    visible,
)
from data_pipelines.images.header import (
    TAIL,
    Header,
    find_damage,
    is_modest,
    is_turned,
    looks_whole,
    read_header,
)
from data_pipelines.images.image_index import (
    INDEX_FILE,
    ImageIndex,
    Location,
    check_replaceable,
    load_index,
    report_beside,
    save_index,
    scan_class_folders,
)
from data_pipelines.images.order import Int64s
from data_pipelines.images.plain_file import NOT_PLAIN, open_plain
from data_pipelines.images.source import read_bytes
from data_pipelines.sets.claim import progress_bar
from data_pipelines.sets.foreign_tars import is_pattern, scan_tars, tars_in
from data_pipelines.sets.image_lists import is_list
from data_pipelines.sets.inputs import input_parts, said_of_flat_parts
from data_pipelines.sets.table_files import find_tables, refusal
from tpp.common.command_line import Parser
from tpp.common.errors import UserError, run_command
from tpp.common.files import in_bytes, write_whole
from tpp.common.options import share
from tpp.common.paths import user_path

# Holds the header of 99.5% of ImageNet's photos; the others are read whole.
_HEAD = 32 * 1024
# Enough that handing work over costs nothing, few enough that Ctrl-C is obeyed at once.
_FILES_A_TASK, _DECODED_A_TASK = 128, 16
# A folder's time of change is this coarse at worst (NFS, ext3); nanoseconds.
_CLOCK = 2 * 10**9
# These say nothing about the file.
_SHORTAGES = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}
_ADVICE = {
    "CMYK": "none needed: decoded as RGB",
    "PNG named as a JPEG": "none needed: told by its content",
    "JPEG named as a PNG": "none needed: told by its content",
    "neither JPEG nor PNG": "none needed: decoded by Pillow; as JPEG or PNG it would be faster",
}
_UNREADABLE = "unreadable: "
_T = TypeVar("_T")


class _Look(NamedTuple):
    """What a look at one file has shown; ``notes`` are worth counting, but no damage."""

    byte_size: int
    height: int
    width: int
    damage: str | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Survey:
    """An index, and what was found while it was made: damages and notes by image number."""

    index: ImageIndex
    damages: dict[int, str]
    notes: dict[int, tuple[str, ...]]


def make_parser(prog: str = "python -m data_pipelines.index") -> Parser:
    """What the command takes."""
    parser = Parser(
        prog,
        "Index a folder of images: their sizes, and which files are broken.",
        examples=["/data/imagenet", "/data/imagenet --output ~/indices --decode"],
    )
    parser.add_argument(
        "folder",
        metavar="DIR",
        type=user_path,
        help="folder with one folder of images per class, or with tars made for WebDataset; or "
        "with such folders train, val and test",
    )
    share(
        parser,
        "--output",
        " train.safetensors and so on, for a run with data.index=DIR (default: "
        f"{INDEX_FILE} beside the class folders)",
        metavar="DIR",
    )
    share(
        parser,
        "--threads",
        f": files that are read (default: {SCAN_THREADS}) or decoded (default: one a core) at once",
    )
    parser.add_argument(
        "--also",
        metavar="ENDINGS",
        default="",
        help="files with these endings too, as webp,bmp, or all (default: "
        f"{', '.join(IMAGE_SUFFIXES)})",
    )
    parser.add_argument(
        "--nested", action="store_true", help="images in sub-folders of the class folders too"
    )
    parser.add_argument(
        "--label-key", metavar="KEY", help="of the label in .json, in tars made for WebDataset"
    )
    parser.add_argument("--decode", action="store_true", help="decode every image, to be sure")
    parser.add_argument("--strict", action="store_true", help="end with 1 if a file is broken")
    parser.renamed("--out", "--output")
    return parser


def main(words: Sequence[str] | None = None, prog: str = "python -m data_pipelines.index") -> None:
    """Index a folder of images, or the train, val and test folders in it; print what they hold."""
    options = make_parser(prog).parse_args(words)
    wanted = Wanted.also(options.also, nested=options.nested)
    _silence_pil()
    _check_kind(options.folder)
    parts = input_parts(options.folder)
    for part in parts:
        _check(part, options.output)
    broken = 0
    for number, part in enumerate(parts):
        start = time.perf_counter()
        listing = _Listing(wanted, options.label_key)
        survey = _survey(part, listing, options.threads, decode=options.decode)
        index_file, report_file = _targets(part, options.output)
        _write_report(survey, report_file)
        save_index(survey.index, index_file)
        if number:
            print()
        _print(survey, index_file, report_file, time.perf_counter() - start)
        broken += len(survey.damages)
    for line in said_of_flat_parts(options.folder, parts):
        print(f"\n{_shown(line)}")
    if broken and options.strict:
        sys.exit(1)


def _check_kind(folder: Path) -> None:
    """Say what makes an index of what is no folder of images."""
    if (folder.exists() and not folder.is_dir()) or is_list(folder) or is_pattern(folder.name):
        raise UserError(
            f"{folder}: an index is of a folder, of class folders or of tars; images of a list or "
            f"of single files get one as shards: tpp shards {folder} --output DIR"
        )
    if folder.is_dir() and input_parts(folder) == [folder] and find_tables(folder) is not None:
        raise refusal(folder)


def _check(folder: Path, out: Path | None) -> None:
    """Find out before an hour's work what would make it useless."""
    if _holds_shards(folder):
        raise UserError(
            f"{folder}: these are tar shards, which carry their index ({INDEX_FILE}); "
            "expected class folders, or tars that others made"
        )
    target = out or folder
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{target}: cannot make the folder of --output ({error.strerror})"
        ) from None
    if not os.access(target, os.W_OK | os.X_OK):
        raise UserError(
            f"{target}: cannot write the index there; choose another place with --output"
        )
    check_replaceable(_targets(folder, out)[0])


def _holds_shards(folder: Path) -> bool:
    try:
        index = load_index(folder / INDEX_FILE, folder)
    except UserError:
        return False
    return bool(index.containers) and not index.labels_from


def _targets(folder: Path, out: Path | None) -> tuple[Path, Path]:
    """Where a folder's index and its report go."""
    name = folder.name if folder.name not in ("", "..") else folder.resolve().name
    index_file = folder / INDEX_FILE if out is None else out / f"{name}.safetensors"
    return index_file, report_beside(index_file)


class _Listing(NamedTuple):
    """Which files are images, and where tars have the labels."""

    wanted: Wanted
    label_key: str | None


def _survey(folder: Path, listing: _Listing, threads: int | None, *, decode: bool) -> _Survey:
    """List a folder's images and look at each of them."""
    tars = tars_in(folder)
    index = scan_tars(tars, folder, listing.label_key) if tars else _listed(folder, listing.wanted)
    survey = _Survey(index, {}, {})

    def look(places: range) -> None:
        for place in places:
            found = _look(*index.location(place), index.files[place])
            index.byte_sizes[place] = found.byte_size
            index.sizes[place] = found.height, found.width
            if found.damage:
                survey.damages[place] = found.damage
            if found.notes:
                survey.notes[place] = found.notes

    places = range(len(index))
    pool = ThreadPoolExecutor(threads or SCAN_THREADS)
    _in_pool(pool, look, _stretches(places, _FILES_A_TASK), f"{folder.name}: reading")
    if decode:
        whole = [place for place in places if place not in survey.damages]
        survey.damages.update(_decode(index, whole, threads or len(os.sched_getaffinity(0))))
    broken = list(survey.damages)
    index.broken[broken] = True
    index.sizes[broken] = 0
    return survey


def _listed(folder: Path, wanted: Wanted) -> ImageIndex:
    """The images in class folders, with the folders' times of change."""
    # Before the listing, so that what comes or goes in the meantime is noticed by check_fits.
    now = time.time_ns()
    marks = {name: folder_mark(folder / name) for name in visible(folder, folders=True)}
    # Another change within the same tick of the clock would not show.
    marks = {name: mark if mark < now - _CLOCK else -1 for name, mark in marks.items()}
    if wanted.nested:
        # A change within its folders does not show in a class folder's own time.
        marks = {
            name: -1 if visible(folder / name, folders=True) else marks[name] for name in marks
        }
    index = scan_class_folders(folder, wanted)
    return replace(index, marks=np.array([marks.get(name, -1) for name in index.classes]))


def _look(path: str, offset: int = 0, length: int = -1, name: str = "") -> _Look:
    """Read an image's header and its end; all of it only where these leave a doubt."""
    byte_size = length
    try:
        descriptor = open_plain(path)
        try:
            if length < 0:
                byte_size = os.fstat(descriptor).st_size
            head = os.pread(descriptor, min(_HEAD, byte_size), offset)
            header = _header_of_whole(descriptor, head, offset, byte_size)
        finally:
            os.close(descriptor)
        damage = None
        if header is None:
            data = head if byte_size <= len(head) else read_bytes(Location(path, offset, length))
            damage = find_damage(data)
            header = None if damage else read_header(data)
    except ValueError as error:
        return _Look(byte_size, 0, 0, str(error), ())
    except OSError as error:
        if error.errno in _SHORTAGES:
            raise UserError(f"{path}: {error.strerror}; give fewer --threads") from None
        return _Look(length, 0, 0, f"{_UNREADABLE}{error.strerror}", ())
    if header is None:
        return _Look(byte_size, 0, 0, damage, ())
    return _Look(byte_size, header.height, header.width, None, _notes(name or path, header, head))


def _header_of_whole(descriptor: int, head: bytes, offset: int, byte_size: int) -> Header | None:
    """The header of a large image that looks whole; None where all of it must be seen."""
    if byte_size <= len(head):
        return None
    try:
        header = read_header(head)
        if not is_modest(head, byte_size):
            return None
    except ValueError:
        return None
    start = max(byte_size - TAIL, len(head))
    tail = os.pread(descriptor, byte_size - start, offset + start)
    return header if looks_whole(header, tail) else None


def _notes(name: str, header: Header, head: bytes) -> tuple[str, ...]:
    named_png = name.lower().endswith(".png")
    noted = {
        "grey": header.channels < 3,
        "CMYK": header.format == "jpeg" and header.channels == 4,
        "PNG named as a JPEG": header.format == "png" and not named_png,
        "JPEG named as a PNG": header.format == "jpeg" and named_png,
        "neither JPEG nor PNG": header.format == "other",
        "turned": header.format == "jpeg" and is_turned(head),
    }
    return tuple(note for note, holds in noted.items() if holds)


def _decode(index: ImageIndex, places: list[int], processes: int) -> dict[int, str]:
    """Decode images in processes of their own; what is wrong with those that fail."""
    stretches = _stretches(places, _DECODED_A_TASK)
    locations = [[index.location(place) for place in stretch] for stretch in stretches]
    # Each process would import PyTorch for itself otherwise.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data_pipelines.images.image_index"])
    _start_server_without_ctrl_c()
    pool = ProcessPoolExecutor(processes, context, initializer=_silence_pil)
    try:
        found = _in_pool(pool, _decode_files, locations, f"{index.root.name}: decoding")
    except BrokenProcessPool:
        raise UserError(
            f"{index.root}: a process that decodes images was killed, perhaps for want of memory; "
            "give fewer --threads"
        ) from None
    damages = (damage for stretch in found for damage in stretch)
    return {place: damage for place, damage in zip(places, damages, strict=True) if damage}


def _start_server_without_ctrl_c() -> None:
    """Ctrl-C reaches all processes; the first one ends the others.

    They have it blocked from their beginning: one that it ended while it was starting would break
    the pool under the first one's hands.
    """
    resource_tracker.ensure_running()  # the server would, and that unblocks the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _silence_pil() -> None:
    # It warns of odd metadata and large images, without saying which file it means.
    warnings.filterwarnings("ignore", module=r"PIL\.")


def _decode_files(locations: list[Location]) -> list[str | None]:
    found: list[str | None] = []
    for location in locations:
        try:
            found.append(find_damage(read_bytes(location), decode=True))
        except OSError as error:
            found.append(f"{_UNREADABLE}{error.strerror}")
        except ValueError as error:
            found.append(str(error))
    return found


def _stretches(items: Any, length: int) -> list[Any]:
    return [items[start : start + length] for start in range(0, len(items), length)]


def _in_pool(
    pool: Executor, work: Callable[[Any], _T], stretches: Sequence[Sequence[Any]], title: str
) -> list[_T]:
    """Call ``work`` with each stretch of a list, with a progress bar over the list's items."""
    progress = progress_bar()
    results = []
    with pool, progress:
        task = progress.add_task(escape(title), total=sum(map(len, stretches)))
        # An interruption of this loop ends the map, which then drops what has not been begun.
        for stretch, result in zip(stretches, pool.map(work, stretches), strict=True):
            results.append(result)
            progress.advance(task, len(stretch))
    return results


def _write_report(survey: _Survey, path: Path) -> None:
    """Write a line for each finding, the broken files first; no file where there is none."""
    odd = [
        (place, note)
        for place, notes in survey.notes.items()
        for note in notes
        if note in _ADVICE and place not in survey.damages
    ]
    lines = ["path\tfinding\twhat to do"]
    for place, what in sorted(survey.damages.items()) + sorted(odd):
        file = _shown(survey.index.name(place))
        lines.append(f"{file}\t{_shown(what)}\t{_advice(what)}")
    try:
        if len(lines) > 1:
            write_whole(path, "\n".join(lines) + "\n")
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"{path}: cannot write the report ({error.strerror}); choose another place with "
            "--output"
        ) from None


def _advice(what: str) -> str:
    if what in _ADVICE:
        return _ADVICE[what]
    if what == _UNREADABLE + os.strerror(errno.EACCES):
        return "make it readable (chmod), then index again"
    if what == _UNREADABLE + os.strerror(errno.ENOENT):
        return "it went away, or is a link to nothing: put it back or delete it, then index again"
    if what == _UNREADABLE + NOT_PLAIN:
        return "delete it, then index again"
    if what.startswith(_UNREADABLE):
        return "look after the file system, then index again"
    return "extract it anew from the archive, delete it, or run with data.on_error=skip"


def _print(survey: _Survey, index_file: Path, report_file: Path, seconds: float) -> None:
    index = survey.index
    counts = np.bincount(index.labels)
    lines = {
        "folder": _shown(str(index.root)),
        "classes": f"{len(index.classes):,}",
        "images": f"{len(index):,}",
        "smallest": _class(index, counts, int(counts.argmin())),
        "largest": _class(index, counts, int(counts.argmax())),
        "bytes": in_bytes(int(index.byte_sizes[index.byte_sizes > 0].sum())),
        "pixels": _pixels(index),
    }
    first = sorted(survey.damages)[:3]
    names = ", ".join(_shown(index.files[place]) for place in first)
    some = f" ({names}{', ...' * (len(survey.damages) > 3)})" if first else ""
    lines["broken"] = f"{len(survey.damages):,}{some}"
    found = Counter(note for notes in survey.notes.values() for note in notes)
    lines |= {note: f"{found[note]:,}" for note in (*_ADVICE, "grey") if found[note]}
    if found["turned"]:
        lines["turned"] = f"{found['turned']:,} by their EXIF data, which no run follows"
    if index.passed_over:
        lines["passed over"] = _shown(told(index.passed_over))
        options = how_to_take(index.passed_over)
        if options:
            lines["to take them"] = f"index again with {options}"
    lines |= {"fingerprint": index.fingerprint, "index": _shown(str(index_file))}
    if report_file.exists():
        lines["report"] = _shown(str(report_file))
    lines["time"] = f"{seconds:.1f} s ({len(index) / seconds:,.0f} files/s)"
    width = max(map(len, lines))
    for name, value in lines.items():
        print(f"{name:<{width}}  {value}")


def _class(index: ImageIndex, counts: Int64s, label: int) -> str:
    return f"{_shown(index.classes[label])} ({counts[label]:,} images)"


def _pixels(index: ImageIndex) -> str:
    """Height and width of the median, the smallest and the largest image by area."""
    sizes = index.sizes[~index.broken].astype(np.int64)
    if not len(sizes):
        return "none: every image is broken"
    order = np.argsort(sizes.prod(1), kind="stable")
    median, least, most = sizes[order[[(len(order) - 1) // 2, 0, -1]]].tolist()
    return (
        f"height x width: median {median[0]} x {median[1]}, "
        f"smallest {least[0]} x {least[1]}, largest {most[0]} x {most[1]}"
    )


def _shown(text: str) -> str:
    """A name in one line and in characters that can be printed, whatever bytes it is made of."""
    known = os.fsencode(text).decode(errors="backslashreplace")
    return "".join(
        sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in known
    )


if __name__ == "__main__":
    run_command(main)
