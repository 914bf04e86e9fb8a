"""The list of images: listed, kept in a file, and compared with the folder again."""

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from torchvision.datasets import ImageFolder

from data_pipelines.images.folders import folder_mark
from data_pipelines.images.image_index import (
    INDEX_FILE,
    ImageIndex,
    Location,
    check_fits,
    load_index,
    open_images,
    save_index,
    scan_class_folders,
)
from data_pipelines.images.names import Names
from tpp.common.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
ARRAYS = ("labels", "byte_sizes", "sizes", "broken", "container", "offsets", "marks")
IMAGENET = 1_281_167

# What Linux lets a file be named, as Python spells it; "." and ".." are folders everywhere.
file_names = (
    st.binary(min_size=1, max_size=12)
    .map(lambda name: name.replace(b"\0", b"0").replace(b"/", b"_"))
    .map(os.fsdecode)
    .filter(lambda name: name not in (".", ".."))
)


def _touch(root: Path, *names: str, content: bytes = b"") -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def _indexed(root: Path) -> ImageIndex:
    """A folder's index as the command makes it, loaded from its file."""
    index = scan_class_folders(root)
    byte_sizes = [(root / name).stat().st_size for name in index.files]
    marks = [folder_mark(root / name) for name in index.classes]
    index = replace(index, byte_sizes=np.array(byte_sizes), marks=np.array(marks))
    save_index(index, root / INDEX_FILE)
    return load_index(root / INDEX_FILE, root)


def _in_shards(root: Path) -> ImageIndex:
    """Six images of 10 bytes in two containers."""
    _touch(root, "one.tar", content=bytes(range(30)))
    _touch(root, "two.tar", content=bytes(range(100, 140)))
    index = ImageIndex.of(
        root,
        [f"{label}/{name}.jpg" for label in "ab" for name in range(3)],
        [0, 0, 0, 1, 1, 1],
        ["a", "b"],
        byte_sizes=np.full(6, 10),
        containers=["one.tar", "two.tar"],
        container=np.array([1, 0, 1, 0, 1, 0], np.int32),
        offsets=np.array([0, 20, 30, 10, 20, 0]),
        marks=np.array([30, 40]),
    )
    save_index(index, root / INDEX_FILE)
    return load_index(root / INDEX_FILE, root)


def _assert_same(one: ImageIndex, other: ImageIndex) -> None:
    assert list(one.files) == list(other.files)
    assert one.classes == other.classes
    assert one.containers == other.containers
    assert one.fingerprint == other.fingerprint
    for name in ARRAYS:
        mine, theirs = getattr(one, name), getattr(other, name)
        assert mine.dtype == theirs.dtype
        assert np.array_equal(mine, theirs)


# Listing


def test_same_files_classes_and_labels_as_image_folder(tmp_path: Path) -> None:
    _touch(tmp_path, "b/2.JPEG", "b/10.jpg", "a/x.PNG", "a/é.jpeg", "a/notes.txt", "Z/1.jpg")
    index = scan_class_folders(tmp_path)
    folder = ImageFolder(str(tmp_path))
    assert index.classes == folder.classes
    theirs = [(str(Path(path).relative_to(tmp_path)), label) for path, label in folder.samples]
    assert list(zip(index.files, index.labels.tolist(), strict=True)) == theirs
    assert index.labels.dtype == np.int64
    assert len(index) == 5


def test_hidden_entries_and_loose_files_are_left_out(tmp_path: Path) -> None:
    _touch(tmp_path, "a/1.jpg", "a/._1.jpg", ".cache/2.jpg", "loose.jpg", "a/sub.jpg/3.jpg")
    assert list(scan_class_folders(tmp_path).files) == ["a/1.jpg"]


def test_links_count_as_what_they_point_to(tmp_path: Path) -> None:
    real = _touch(tmp_path / "real", "1.jpg")
    root = _touch(tmp_path / "root", "a/1.jpg")
    (root / "b").symlink_to(real)
    assert list(scan_class_folders(root).files) == ["a/1.jpg", "b/1.jpg"]


def test_fingerprint_follows_names_and_labels_only(tmp_path: Path) -> None:
    one = scan_class_folders(_touch(tmp_path / "one", "a/1.jpg", "b/2.jpg"))
    same = scan_class_folders(_touch(tmp_path / "same", "b/2.jpg", "a/1.jpg"))
    assert one.fingerprint == same.fingerprint
    renamed = scan_class_folders(_touch(tmp_path / "renamed", "a/1.jpg", "b/3.jpg"))
    more = scan_class_folders(_touch(tmp_path / "more", "a/1.jpg", "b/2.jpg", "b/3.jpg"))
    assert len({one.fingerprint, renamed.fingerprint, more.fingerprint}) == 3


@pytest.mark.parametrize(
    ("names", "named", "said"),
    [
        ([], "", "no class folders; expected class folders such as"),
        (["1.jpg"], "", "no class folders"),
        (["a/readme.txt", "b/readme.txt"], "", "no images in its 2 folders"),
        (["a/1.jpg", "b/readme.txt"], "/b", "class folder without images"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, names: list[str], named: str, said: str) -> None:
    _touch(tmp_path, *names)
    with pytest.raises(UserError) as caught:
        scan_class_folders(tmp_path)
    assert f"{tmp_path}{named}: " in str(caught.value)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_root_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent: cannot list .*No such file"):
        scan_class_folders(tmp_path / "absent")


# In memory


@given(names=st.lists(file_names), data=st.data())
def test_names_are_a_list(names: list[str], data: st.DataObject) -> None:
    packed = Names.of(names)
    assert list(packed) == names
    assert len(packed) == len(names)
    places = st.none() | st.integers(-20, 20)
    part = slice(data.draw(places), data.draw(places), data.draw(st.sampled_from([None, -2, 3])))
    assert packed[part] == names[part]
    for place in range(-len(names), len(names)):
        assert packed[place] == names[place]
    for place in (len(names), -len(names) - 1):
        with pytest.raises(IndexError):
            packed[place]


def test_location_in_files_and_in_shards(tmp_path: Path) -> None:
    root = _touch(tmp_path / "files", "a/1.jpg", "b/2.jpg", content=b"image")
    path, offset, length = scan_class_folders(root).location(1)
    assert (path, offset) == (f"{root}/b/2.jpg", 0)
    assert length in (-1, 5)
    shards = _in_shards(tmp_path / "shards")
    assert shards.location(2) == Location(f"{tmp_path}/shards/two.tar", 30, 10)


def test_subset_keeps_what_belongs_to_its_images(tmp_path: Path) -> None:
    shards = _in_shards(tmp_path)
    chosen = [4, 1, 1]
    part = shards.subset(np.array(chosen))
    assert [part.location(place) for place in range(3)] == [shards.location(i) for i in chosen]
    assert list(part.files) == ["b/1.jpg", "a/1.jpg", "a/1.jpg"]
    assert part.labels.tolist() == [1, 0, 0]
    assert part.classes == ["a", "b"]
    assert part.fingerprint != shards.fingerprint


# In a file


@given(data=st.data())
def test_saved_and_loaded_is_the_same(tmp_path_factory: Any, data: st.DataObject) -> None:
    classes = sorted(data.draw(st.sets(file_names, min_size=1, max_size=4)))
    images = data.draw(
        st.lists(st.tuples(st.integers(0, len(classes) - 1), file_names), min_size=1, max_size=9)
    )
    n, rng = len(images), np.random.default_rng(data.draw(st.integers(0, 9)))
    more: dict[str, Any] = {
        "byte_sizes": rng.integers(0, 1000, n),
        "sizes": rng.integers(0, 2**31, (n, 2), dtype=np.int32),
        "broken": rng.random(n) < 0.5,
    }
    if data.draw(st.booleans()):
        more |= {
            "containers": ["shard.tar", "更.tar"],
            "container": rng.integers(0, 2, n, dtype=np.int32),
            "offsets": rng.integers(0, 2**40, n),
            "marks": np.array([2**41, 2**41]),
        }
    labels = [label for label, _ in sorted(images)]
    files = [f"{classes[label]}/{name}" for label, name in sorted(images)]
    folder = tmp_path_factory.mktemp("saved")
    index = ImageIndex.of(folder, files, labels, classes, **more)
    save_index(index, folder / INDEX_FILE)
    loaded = load_index(folder / INDEX_FILE, folder)
    _assert_same(loaded, index)
    assert loaded.root == folder
    assert list(folder.iterdir()) == [folder / INDEX_FILE]


def test_kept_fingerprint_is_that_of_the_names(tmp_path: Path) -> None:
    loaded = _indexed(_touch(tmp_path, "a/1.jpg", "b/2.jpg"))
    assert loaded.fingerprint == scan_class_folders(tmp_path).fingerprint


def test_worker_is_sent_the_file_and_not_the_arrays(tmp_path: Path) -> None:
    root = _touch(tmp_path, *(f"a/{number:06}.jpg" for number in range(500)))
    listed, loaded = scan_class_folders(root), _indexed(root)
    assert len(pickle.dumps(loaded)) < 500 < len(pickle.dumps(listed))
    for index in (listed, loaded):
        back = pickle.loads(pickle.dumps(index))
        _assert_same(back, index)
        assert (back.root, back.file) == (index.root, index.file)
        assert not np.shares_memory(back.labels, index.labels)


def test_worker_does_not_take_another_index_for_this_one(tmp_path: Path) -> None:
    sent = pickle.dumps(_indexed(_touch(tmp_path, "a/1.jpg")))
    _indexed(_touch(tmp_path, "a/2.jpg"))
    with pytest.raises(UserError, match=r"\.index\.safetensors: another index took this one's"):
        pickle.loads(sent)


LOADING = """
import sys
from pathlib import Path
import torch  # every process that trains has it; what is measured is the index
from data_pipelines.images.image_index import INDEX_FILE, load_index

def memory():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}

before = memory()
index = load_index(f"{sys.argv[1]}/{INDEX_FILE}", sys.argv[1])
assert index.location(len(index) - 1).path.endswith("/n00000999_1281166.JPEG")
print("loaded", flush=True)
sys.stdin.readline()
after = memory()
print(*(after[name] - before[name] for name in ("Private_Dirty", "Rss", "Pss")), flush=True)
sys.stdin.readline()
"""


def test_imagenets_index_is_shared_by_the_processes_of_a_node(tmp_path: Path) -> None:
    classes = [f"n{number:08}" for number in range(1000)]
    labels = np.arange(IMAGENET) * 1000 // IMAGENET
    files = (f"{classes[label]}/{classes[label]}_{i}.JPEG" for i, label in enumerate(labels))
    index = ImageIndex.of(tmp_path, files, labels, classes, byte_sizes=np.full(IMAGENET, 110_000))
    save_index(index, tmp_path / INDEX_FILE)
    file_size = (tmp_path / INDEX_FILE).stat().st_size
    command = [sys.executable, "-c", LOADING, str(tmp_path)]
    pipe = subprocess.PIPE
    with (
        subprocess.Popen(command, stdin=pipe, stdout=pipe, cwd=ROOT) as one,
        subprocess.Popen(command, stdin=pipe, stdout=pipe, cwd=ROOT) as other,
    ):
        # Both hold their index while each one is measured.
        said = [_answer(process) for process in (one, other)]
        grown = [_answer(process, b"\n") for process in (one, other)]
        for process in (one, other):
            process.communicate(b"\n")
    assert said == ["loaded", "loaded"]
    for private_dirty, resident, share in (map(int, line.split()) for line in grown):
        assert private_dirty < 30e6
        # The file's pages are there once for both.
        assert resident > 0.8 * file_size
        assert share < 0.5 * resident + 20e6


def _answer(process: subprocess.Popen[bytes], sent: bytes = b"") -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(sent)
    process.stdin.flush()
    return process.stdout.readline().decode().strip()


# Damage


@pytest.fixture(scope="module", params=["files", "shards"])
def saved(request: Any, tmp_path_factory: pytest.TempPathFactory) -> ImageIndex:
    root = tmp_path_factory.mktemp("saved")
    if request.param == "shards":
        return _in_shards(root)
    return _indexed(_touch(root, "a/1.jpg", "a/2.jpg", "b/1.png", content=b"image"))


def test_damaged_file_is_refused(saved: ImageIndex) -> None:
    assert saved.file is not None
    content = saved.file.read_bytes()
    flips = np.random.default_rng(0).integers(1, 256, len(content)).tolist()
    for place, bits in enumerate(flips):
        flipped = bytearray(content)
        flipped[place] ^= bits
        _assert_refused_or_same(bytes(flipped), saved)
        _assert_refused_or_same(content[:place], saved)


def _assert_refused_or_same(content: bytes, saved: ImageIndex) -> None:
    damaged = saved.root / "damaged.safetensors"
    # Anew each time: what was mapped before must not change.
    damaged.unlink(missing_ok=True)
    damaged.write_bytes(content)
    try:
        index = load_index(damaged, saved.root)
    except UserError as error:
        assert str(error).startswith(f"{damaged}: ")
        assert "\n" not in str(error)
    else:
        _assert_same(index, saved)


def _rewritten(saved: ImageIndex, change: Callable[[dict[str, Any], dict[str, str]], None]) -> Path:
    """An index file of which arrays or metadata were changed, with a checksum that fits."""
    assert saved.file is not None
    content = saved.file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    metadata = json.loads(content[8 : 8 + length])["__metadata__"]
    arrays = load_file(saved.file)
    change(arrays, metadata)
    held = b"".join(arrays[name].tobytes() for name in ("names", "name_ends", *ARRAYS))
    held += "".join(metadata[name] for name in ("classes", "containers", "fingerprint")).encode()
    metadata["crc32"] = f"{crc32(held):08x}"
    path = saved.root / "changed.safetensors"
    save_file(arrays, path, metadata)
    return path


def _set(name: str, place: Any, value: Any) -> Callable[[dict[str, Any], dict[str, str]], None]:
    def change(arrays: dict[str, Any], metadata: dict[str, str]) -> None:
        arrays[name][place] = value

    return change


def _put(name: str, value: Any) -> Callable[[dict[str, Any], dict[str, str]], None]:
    def change(arrays: dict[str, Any], metadata: dict[str, str]) -> None:
        if name in arrays:
            arrays[name] = value
        else:
            metadata[name] = value

    return change


HOSTILE: dict[str, tuple[Callable[[dict[str, Any], dict[str, str]], None], str]] = {
    "label": (_set("labels", 0, 2), "labels out of range"),
    "negative label": (_set("labels", 0, -1), "labels out of range"),
    "order": (_set("labels", 0, 1), "not in the order of the classes"),
    "name's end": (_set("name_ends", 0, 2**62), "the names' ends"),
    "negative end": (_set("name_ends", 0, -(2**62)), "the names' ends"),
    "last end": (_set("name_ends", -1, 2**62), "the names' ends"),
    "zero in a name": (_set("names", 0, 0), "a zero byte in the names"),
    "size": (_set("sizes", 0, -5), "sizes out of range"),
    "byte size": (_set("byte_sizes", 0, -2), "sizes out of range"),
    "marks": (_put("marks", np.zeros(3, np.int64)), "3 marks"),
    "shape": (_put("broken", np.zeros(1, np.bool_)), "broken is torch.bool of shape (1,)"),
    "type": (_put("labels", np.zeros(3, np.int32)), "labels is torch.int32"),
    "classes": (_put("classes", '{"a": 1}'), "its classes are not a list of names"),
    "class": (_put("classes", '["a", 1]'), "its classes are not a list of names"),
    "zero in a class": (_put("classes", '["a", "b\\u0000"]'), "a zero byte"),
    "no JSON": (_put("classes", "["), "a damaged index"),
    "deep JSON": (_put("classes", "[" * 100_000), "a damaged index"),
    "format": (_put("format", "else"), "not an index of images"),
    "version": (_put("version", "99"), "an index of version 99, this program reads"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file_is_refused(tmp_path: Path, case: str) -> None:
    saved = _indexed(_touch(tmp_path, "a/1.jpg", "a/2.jpg", "b/1.png"))
    change, said = HOSTILE[case]
    path = _rewritten(saved, change)
    with pytest.raises(UserError) as caught:
        load_index(path, tmp_path)
    assert str(caught.value).startswith(f"{path}: ")
    assert said in str(caught.value)
    assert f"tpp index {tmp_path}" in str(caught.value)


HOSTILE_SHARDS: dict[str, tuple[Callable[[dict[str, Any], dict[str, str]], None], str]] = {
    "container": (_set("container", 0, 2), "container out of range"),
    "negative container": (_set("container", 0, -1), "container out of range"),
    "offset": (_set("offsets", 0, 31), "offsets beyond the end of a container"),
    "negative offset": (_set("offsets", 0, -1), "offsets out of range"),
    "overflow": (_set("offsets", 0, 2**63 - 1), "offsets beyond the end of a container"),
    "unknown length": (_set("byte_sizes", 0, -1), "sizes out of range"),
    "length": (_set("byte_sizes", 0, 2**63 - 1), "offsets beyond the end of a container"),
    "mark": (_set("marks", 0, -(2**63)), "offsets beyond the end of a container"),
    "absolute": (_put("containers", '["/etc/passwd", "two.tar"]'), "outside of the folder"),
    "above": (_put("containers", '["../x", "two.tar"]'), "outside of the folder"),
}


@pytest.mark.parametrize("case", HOSTILE_SHARDS)
def test_hostile_index_of_shards_is_refused(tmp_path: Path, case: str) -> None:
    change, said = HOSTILE_SHARDS[case]
    path = _rewritten(_in_shards(tmp_path), change)
    with pytest.raises(UserError) as caught:
        load_index(path, tmp_path)
    assert said in str(caught.value)


def test_what_is_no_index_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent: cannot read the index \(No such file"):
        load_index(tmp_path / "absent", tmp_path)
    with pytest.raises(UserError, match=r"cannot read the index|damaged index"):
        load_index(tmp_path, tmp_path)
    for content in (b"", b"x", b"no index at all"):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(UserError, match=r"file: a damaged index"):
            load_index(tmp_path / "file", tmp_path)
    save_file({"weight": np.zeros(3)}, tmp_path / "file")
    with pytest.raises(UserError, match=r"file: not an index of images; make it anew with"):
        load_index(tmp_path / "file", tmp_path)


def test_index_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    index = scan_class_folders(_touch(tmp_path, "a/1.jpg"))
    with pytest.raises(UserError, match=r"absent/index: cannot write .*No such file.*--out"):
        save_index(index, tmp_path / "absent" / "index")


# Compared with the folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    names = [f"{label}/{number}.jpg" for label in "abc" for number in range(4)]
    return _touch(tmp_path / "images", *names, content=b"an image")


def _difference(index: ImageIndex) -> str:
    with pytest.raises(UserError) as caught:
        check_fits(index)
    message = str(caught.value)
    beginning = f"{index.file}: this index no longer fits {index.root}: "
    ending = (
        "; write the shards anew with: tpp shards"
        if index.containers
        else f"; make it anew with: tpp index {index.root}"
    )
    assert message.startswith(beginning)
    assert message.endswith(ending)
    return message.removeprefix(beginning).removesuffix(ending)


def test_unchanged_folder_passes(folder: Path) -> None:
    index = _indexed(folder)
    check_fits(index)
    # Nor does what no index counts.
    _touch(folder, "b/notes.txt", "b/.hidden.jpg", "loose.jpg", ".tmp/1.jpg")
    check_fits(index)
    # Nor does an index without marks or sizes need to be complete.
    check_fits(replace(index, marks=index.marks[:0], byte_sizes=np.full(len(index), -1)))


def test_copied_folder_passes(folder: Path, tmp_path: Path) -> None:
    index = _indexed(folder)
    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    for name in "abc":
        os.utime(tmp_path / "copy" / name, (1e9, 1e9))
    copy = load_index(tmp_path / "copy" / INDEX_FILE, tmp_path / "copy")
    assert folder_mark(tmp_path / "copy" / "a") != index.marks[0]
    check_fits(copy)
    (tmp_path / "copy" / "c" / "3.jpg").unlink()
    assert _difference(copy) == "c/3.jpg is gone"


CHANGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "file added": (lambda root: _touch(root, "b/1a.jpg"), "b/1a.jpg is new"),
    "files added": (
        lambda root: _touch(root, "b/8.jpg", "b/9.jpg"),
        "b/8.jpg is new (and 1 more there)",
    ),
    "file removed": (lambda root: (root / "b/2.jpg").unlink(), "b/2.jpg is gone"),
    "file renamed": (lambda root: (root / "b/2.jpg").rename(root / "b/x.jpg"), "b/2.jpg is gone"),
    "file moved": (lambda root: (root / "b/2.jpg").rename(root / "a/4.jpg"), "a/4.jpg is new"),
    "class added": (lambda root: _touch(root, "bb/1.jpg"), "it has another class folder, 'bb'"),
    "class removed": (lambda root: shutil.rmtree(root / "b"), "it has no class folder 'b'"),
    "classes removed": (
        lambda root: [(root / name).rename(root / f".{name}") for name in "bc"],
        "it has no class folder 'b' and 1 more",
    ),
    "file truncated": (
        lambda root: (root / "b/2.jpg").write_bytes(b"an"),
        "b/2.jpg has 2 bytes instead of 8",
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_change_is_named(folder: Path, case: str) -> None:
    index = _indexed(folder)
    change, said = CHANGES[case]
    change(folder)
    # Whatever the clock's resolution: a class folder that changed has another time of change.
    for name in index.classes:
        images = [path.name for path in (folder / name).glob("*")]
        if images and sorted(images) != ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]:
            os.utime(folder / name, (2e9, 2e9))
    assert _difference(index) == said
    with pytest.raises(UserError, match="no longer fits"):
        open_images(folder)


def test_shards_are_compared_by_their_size(tmp_path: Path) -> None:
    index = _in_shards(tmp_path)
    check_fits(index)
    check_fits(replace(index, marks=index.marks[:0]))
    with (tmp_path / "two.tar").open("ab") as file:
        file.write(b"more")
    assert _difference(index) == "two.tar has 44 bytes instead of 40"
    (tmp_path / "one.tar").unlink()
    assert _difference(index) == "one.tar cannot be read (No such file or directory)"
    assert _difference(replace(index, marks=index.marks[:0])).startswith("one.tar cannot be read")


def test_opened_by_its_index_or_by_listing(folder: Path, tmp_path: Path) -> None:
    listed = open_images(folder)
    assert listed.file is None
    indexed = _indexed(folder)
    assert open_images(folder).file == folder / INDEX_FILE
    elsewhere = tmp_path / "elsewhere.safetensors"
    (folder / INDEX_FILE).rename(elsewhere)
    opened = open_images(folder, elsewhere)
    assert opened.file == elsewhere
    assert list(opened.files) == list(listed.files) == list(indexed.files)
    with pytest.raises(UserError, match=r"absent: cannot read the index"):
        open_images(folder, tmp_path / "absent")
