import fcntl
import functools
import gzip
import http.server
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from hashlib import md5
from pathlib import Path

import numpy as np
import pytest
from archives_for_tests import (
    Files,
    cifar_records,
    idx_bytes,
    member,
    tar_bytes,
    write_devkit,
    write_tar,
    write_train,
    write_zip,
)
from fork_server import BARE, Forks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.datasets import ImageFolder

from data_pipelines.images.image_index import open_images, scan_class_folders
from data_pipelines.images.plain_file import LARGEST_MEMBER
from data_pipelines.prepare import prepare_imagenet, prepare_small
from data_pipelines.sets import imagenet
from data_pipelines.sets.archives import archive_files, safe_parts, tar_members
from data_pipelines.sets.preparation import STATE_FILE, WORK_FOLDER
from data_pipelines.sets.small_sets import SETS, Download
from tpp.common.errors import UserError

# ImageNet's devkit is read in a process of its own.
pytestmark = pytest.mark.processes

ROOT = Path(__file__).resolve().parents[2]
CLASSES, PER_CLASS, VAL = 4, 6, 8
Photos = dict[str, dict[str, bytes]]
Run = Callable[..., str]


def _few(archive: Path, most: int, keep: str = "") -> list[tuple[str, bytes]]:
    """The first files of a real archive, those whose name has ``keep`` in it."""
    found = []
    with tarfile.open(archive) as opened:
        for one in opened:
            if keep in one.name:
                found.append((one.name, opened.extractfile(one).read()))  # type: ignore[union-attr]
                if len(found) == most:
                    break
    return found


@pytest.fixture(scope="module")
def photos(shared_data: Callable[[str], Path]) -> Photos:
    """Real photos, named as in ImageNet's training archive."""
    real = _few(shared_data("imagenet-sample-500.tar"), CLASSES * PER_CLASS)
    contents = [content for _, content in real]
    wnids = [name.split("/")[1] for name, _ in real[:CLASSES]]
    # The archive is in no order, neither that of classes nor that of names.
    return {
        wnid: {f"{wnid}_{7 * n % 11}.JPEG": contents[PER_CLASS * place + n] for n in range(6)}
        for place, wnid in reversed(list(enumerate(wnids)))
    }


@pytest.fixture(scope="module")
def truth(photos: Photos) -> list[str]:
    """Class of each validation image."""
    return [sorted(photos)[3 * number % CLASSES] for number in range(VAL)]


@pytest.fixture(scope="module")
def val_files(photos: Photos) -> dict[str, bytes]:
    contents = [content for some in photos.values() for content in some.values()]
    return {f"ILSVRC2012_val_{n + 1:08d}.JPEG": contents[n] for n in range(VAL)}


@pytest.fixture(scope="module")
def official(
    photos: Photos,
    truth: list[str],
    val_files: Mapping[str, bytes],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """The three archives of ImageNet, small."""
    folder = tmp_path_factory.mktemp("official")
    counts = {wnid: len(some) for wnid, some in photos.items()}
    return {
        "train": write_train(folder / "ILSVRC2012_img_train.tar", photos),
        "val": write_tar(folder / "ILSVRC2012_img_val.tar", reversed(list(val_files.items()))),
        "devkit": write_devkit(folder / "ILSVRC2012_devkit_t12.tar.gz", counts, truth),
    }


@pytest.fixture(scope="module")
def cifar_jpegs(shared_data: Callable[[str], Path]) -> list[tuple[str, bytes]]:
    """1,600 real photos of CIFAR-10."""
    return _few(shared_data("cifar10-jpeg.tar.gz"), 1600)


@pytest.fixture(scope="module", autouse=True)
def _each_devkit_is_read_once() -> Iterator[None]:
    """Its reader is a new interpreter with SciPy, and nearly all tests have the same devkit."""
    read, known = imagenet._leaves, {}

    def leaves(content: bytes, where: str) -> list[tuple[int, str, int]]:
        if content not in known:
            known[content] = read(content, where)
        return known[content]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(imagenet, "_leaves", leaves)
        yield


def _contents(root: Path) -> dict[str, bytes]:
    """All files, hidden ones too."""
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def _images(root: Path) -> dict[str, bytes]:
    found = _contents(root)
    found.pop(STATE_FILE)
    return found


def _expected(photos: Photos, truth: list[str], val: Mapping[str, bytes]) -> dict[str, bytes]:
    train = {f"train/{wnid}/{k}": v for wnid, some in photos.items() for k, v in some.items()}
    return train | {
        f"val/{truth[int(name[-13:-5]) - 1]}/{name}": content for name, content in val.items()
    }


def _options(official: Mapping[str, Path], **changed: Path) -> list[object]:
    files = {**official, **changed}
    return ["imagenet", *(part for name, path in files.items() for part in (f"--{name}", path))]


def test_imagenet_becomes_class_folders_byte_by_byte(
    run: Run,
    official: Mapping[str, Path],
    photos: Photos,
    truth: list[str],
    val_files: Mapping[str, bytes],
    tmp_path: Path,
) -> None:
    out = tmp_path / "deep" / "imagenet"
    said = run(*_options(official), "--output", out)
    assert _images(out) == _expected(photos, truth, val_files)
    for split, count in (("train", CLASSES * PER_CLASS), ("val", VAL)):
        index = scan_class_folders(out / split)
        folder = ImageFolder(str(out / split))
        assert index.classes == folder.classes == sorted(photos)
        assert len(folder) == len(index) == count
        assert folder[0][0].size == Image.open(index.location(0).path).size
    lines = [line.split() for line in said.splitlines()]
    assert lines[0][:5] == ["train", "4", "classes,", "24", "images,"]
    assert lines[1][:5] == ["val", "4", "classes,", "8", "images,"]
    assert lines[-2] == ["next", "tpp", "index", str(out)]
    assert said.endswith(f"data.root={out}\n")


def test_a_further_run_changes_nothing_and_says_so(
    run: Run, official: Mapping[str, Path], tmp_path: Path
) -> None:
    run(*_options(official), "--output", tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert f"{tmp_path / 'out'}: already prepared\n" in run(
        *_options(official), "--output", tmp_path / "out"
    )
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_train_alone_without_devkit_and_val_later(
    run: Run,
    official: Mapping[str, Path],
    photos: Photos,
    truth: list[str],
    val_files: Mapping[str, bytes],
    tmp_path: Path,
) -> None:
    said = run("imagenet", "--train", official["train"], "--output", tmp_path / "out")
    assert "not checked  number of images of each class, for want of --devkit\n" in said
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [STATE_FILE, "train"]
    rest = ["--val", official["val"], "--devkit", official["devkit"]]
    assert "not checked" not in run("imagenet", *rest, "--output", tmp_path / "out")
    assert _images(tmp_path / "out") == _expected(photos, truth, val_files)
    assert "already prepared" in run(*_options(official), "--output", tmp_path / "out")


def test_imagenet_straight_to_shards(
    run: Run,
    official: Mapping[str, Path],
    photos: Photos,
    truth: list[str],
    val_files: Mapping[str, bytes],
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    said = run(*_options(official), "--output", out, "--shards", "--shard-size", "1MB")
    found = {}
    for split in ("train", "val"):
        index = open_images(out / split)
        assert index.classes == sorted(photos)
        assert len(index.containers) > 1 or split == "val"
        for image, name in enumerate(index.files):
            path, offset, length = index.location(image)
            found[f"{split}/{name}"] = Path(path).read_bytes()[offset : offset + length]
            assert name.split("/")[0] == index.classes[index.labels[image]]
    assert found == _expected(photos, truth, val_files)
    assert said.splitlines()[-1].split() == ["next", "train", "with", f"data.root={out}"]
    assert not (out / WORK_FOLDER).exists()
    folders = run(*_options(official), "--output", tmp_path / "folders")
    assert folders.splitlines()[0] == said.splitlines()[0]
    for split in ("train", "val"):
        same = scan_class_folders(tmp_path / "folders" / split).fingerprint
        assert open_images(out / split).fingerprint == same


def test_the_table_of_an_archive_is_read_once(
    refused: Run, photos: Photos, official: Mapping[str, Path], tmp_path: Path
) -> None:
    train = tmp_path / "train.tar"
    train.write_bytes(official["train"].read_bytes())
    arguments = ["imagenet", "--train", train, "--output", tmp_path / "out"]
    with _file_sizes_below(10_000):
        assert "cannot write this class (File too large)" in refused(*arguments)
    time_before = train.stat().st_mtime_ns
    with train.open("r+b") as file:
        file.write(b"damaged")
    assert "truncated or damaged (bad checksum)" in refused(*arguments)
    os.utime(train, ns=(time_before, time_before))
    made = prepare_imagenet(tmp_path / "out", train=train)
    assert made[0].images == CLASSES * PER_CLASS


@contextmanager
def _file_sizes_below(limit: int) -> Iterator[None]:
    """Let this process write no file of more bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="module")
def many(cifar_jpegs: list[tuple[str, bytes]]) -> Photos:
    """80 classes of 20 small photos."""
    found: Photos = {}
    for number, (_, content) in enumerate(cifar_jpegs):
        wnid = f"n{number // 20:08d}"
        found.setdefault(wnid, {})[f"{wnid}_{number % 20}.JPEG"] = content
    return found


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_was_ended_is_gone_on_with(
    run: Run, many: Photos, tmp_path: Path, sent: signal.Signals, forks: Forks
) -> None:
    train = write_train(tmp_path / "train.tar", many)
    out, expected = tmp_path / "out", _expected(many, [], {})
    arguments = ["imagenet", "--train", str(train), "--output", str(out), "--threads", "1"]
    process = forks.start("data_pipelines.prepare", arguments, ROOT, {**os.environ, **BARE})
    while len(list((out / "train").glob("n*"))) < 10:
        assert process.poll() is None, process.output()
        time.sleep(0.0005)
    os.kill(process.pid, sent)
    code, said = process.wait(60), process.output()[1]
    classes = [path.name for path in (out / "train").glob("n*")]
    assert 10 <= len(classes) < len(many)
    found = {k: v for k, v in _contents(out / "train").items() if k[0] != "."}
    assert found == {f"{wnid}/{k}": v for wnid in classes for k, v in many[wnid].items()}
    if sent == signal.SIGINT:
        assert (code, said) == (130, "interrupted\n")
        assert list((out / "train").glob(".*")) == []
    else:
        assert code == -signal.SIGKILL
        # What a run may leave that is killed between two lines.
        (out / "train" / ".n00000079.77.tmp").mkdir()
        (out / "train" / ".n00000079.77.tmp" / "half").write_bytes(b"half")
        (out / f".{STATE_FILE}.77.tmp").write_bytes(b"half")
    assert f"; {len(classes)} class folders were there\n" in run(*arguments)
    assert _images(out) == expected


def test_a_failing_run_leaves_whole_classes_only(
    refused: Run, run: Run, photos: Photos, official: Mapping[str, Path], tmp_path: Path
) -> None:
    sizes = {wnid: max(map(len, some.values())) for wnid, some in photos.items()}
    # The class with the largest photo cannot be written.
    with _file_sizes_below(max(sizes.values()) - 1):
        said = refused(*_options(official), "--output", tmp_path / "out", "--threads", 1)
    worst = max(sizes, key=sizes.__getitem__)
    assert f"{tmp_path}/out/train/{worst}: cannot write this class (File too large); the" in said
    train = tmp_path / "out" / "train"
    assert list(train.glob(".*")) == []
    for folder in train.iterdir():
        assert _contents(folder) == photos[folder.name]
    run(*_options(official), "--output", tmp_path / "out")
    assert {p.name for p in train.iterdir()} == set(photos)


def test_no_space_is_said_beforehand(refused: Run, tmp_path: Path) -> None:
    # A file with holes: its images have more bytes than there are, and take no space.
    each = 240 * 2**20
    count = 2 * shutil.disk_usage(tmp_path).free // each
    with (tmp_path / "train.tar").open("wb") as file:
        file.write(member("n01440764.tar", count * (each + 512) + 1024))
        for number in range(count):
            file.write(member(f"n01440764_{number}.JPEG", each))
            file.seek(each, os.SEEK_CUR)
        file.truncate(file.tell() + 2048)
    line = refused("imagenet", "--train", tmp_path / "train.tar", "--output", tmp_path / "out")
    assert f"out: {count * each / 1e9:,.1f} GB are needed for the images, " in line
    assert line.endswith("are free; make room or choose another folder\n")
    assert _nothing_written(tmp_path / "out")


def test_a_full_disk_is_one_line_and_the_run_goes_on(
    photos: Photos, official: Mapping[str, Path], tmp_path: Path
) -> None:
    # A file system with room for the bytes, and too few entries for the files.
    place = tmp_path / "small"
    place.mkdir()
    script = (
        "import os, sys; from data_pipelines.prepare import main; "
        "from tpp.common.errors import run_command; from contextlib import suppress\n"
        f"sys.argv = ['prepare', 'imagenet', '--train', '{official['train']}', "
        f"'--output', '{place}/out', '--threads', '1']\n"
        "with suppress(SystemExit): run_command(main)\n"
        f"print(len(os.listdir('{place}/out/train')))\n"
        f"os.system('mount -o remount,nr_inodes=1000 {place}')\n"
        "run_command(main)"
    )
    mount = f"mount -t tmpfs -o size=1g,nr_inodes=20 none {place} || exit 77"
    unshare = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
    found = subprocess.run(
        [*unshare, f'{mount}; "$@"', "sh", sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if found.returncode == 77 or "unshare:" in found.stderr:
        pytest.skip(f"needs a file system of its own ({found.stderr.strip()})")
    assert found.returncode == 0, found.stderr
    assert found.stderr.startswith(f"error: {place}/out/train/n")
    assert "(No space left on device); the same command goes on from here" in found.stderr
    assert found.stderr.count("\n") == 1
    classes, said = found.stdout.split("\n", 1)
    assert 1 <= int(classes) < CLASSES
    assert f"; {classes} class folders were there" in said


def test_two_at_once_are_refused(
    refused: Run, official: Mapping[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    lock = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    said = refused(*_options(official), "--output", tmp_path / "out")
    os.close(lock)
    assert "out: another process is making this folder at the moment" in said


# --- mistakes -------------------------------------------------------------------------------------


def _nothing_written(out: Path) -> bool:
    return not out.exists()


def test_swapped_archives_are_recognised(
    refused: Run, official: Mapping[str, Path], tmp_path: Path
) -> None:
    train, val, devkit = (official[name] for name in ("train", "val", "devkit"))
    plain = tmp_path / "devkit.tar"
    plain.write_bytes(gzip.decompress(devkit.read_bytes()))
    single = write_tar(tmp_path / "n01440764.tar", [("n01440764_1.JPEG", b"1")])
    for changed, said in (
        ({"train": val}, f"{val}: member 'ILSVRC2012_val_00000008.JPEG', expected names such as "),
        ({"train": val}, "looks like the archive of validation images; give it as --val"),
        ({"val": train}, "looks like the archive of training images; give it as --train"),
        ({"devkit": val}, "looks like the archive of validation images"),
        ({"train": single}, "looks like the archive of a single class; the one of all is needed"),
        ({"train": devkit}, f"{devkit}: compressed (gzip); expected the plain .tar"),
        ({"train": tmp_path}, f"{tmp_path}: a folder; give the archive itself"),
        ({"train": tmp_path / "no"}, f"{tmp_path}/no: cannot read this archive (No such file"),
    ):
        assert said in refused(*_options(official, **changed), "--output", tmp_path / "out")
        assert _nothing_written(tmp_path / "out")


def test_options_that_miss_something(
    refused: Run, official: Mapping[str, Path], tmp_path: Path
) -> None:
    out = ["--output", tmp_path / "out"]
    assert "--val needs --devkit" in refused("imagenet", "--val", official["val"], *out)
    assert "name the archives with --train and --val" in refused("imagenet", *out)
    assert "are for --shards" in refused(*_options(official), *out, "--resize", 400)
    assert "--threads: must be at least 1" in refused(*_options(official), *out, "--threads", 0)
    assert _nothing_written(tmp_path / "out")


def _without(images: Mapping[str, bytes]) -> dict[str, bytes]:
    return dict(list(images.items())[:-1])


def test_numbers_of_images_are_held_against_the_devkit(
    refused: Run,
    official: Mapping[str, Path],
    photos: Photos,
    val_files: Mapping[str, bytes],
    tmp_path: Path,
) -> None:
    first, *_, last = sorted(photos)
    cut = {**photos, last: _without(photos[last])}
    fewer = {wnid: some for wnid, some in photos.items() if wnid != first}
    more = {**photos, "n99999999": {"n99999999_1.JPEG": b"1"}}
    foreign = {**photos, last: {**photos[last], f"{first}_99.JPEG": b"1"}}
    empty = {**photos, last: {**photos[last], f"{last}_99.JPEG": b""}}
    for number, (images, said) in enumerate(
        [
            (cut, f"{last}.tar has 5 images, by the devkit it should have 6"),
            (fewer, f"misses class {first}; expected the 4 classes of the devkit"),
            (more, "has, unlike the devkit, class n99999999"),
            (foreign, f"{last}.tar: member '{first}_99.JPEG', expected names such as {last}_"),
            (empty, f"member '{last}_99.JPEG' is empty"),
        ]
    ):
        train = write_train(tmp_path / f"{number}.tar", images)
        line = refused(*_options(official, train=train), "--output", tmp_path / "out")
        assert f"error: {train}: " in line
        assert said in line
        assert _nothing_written(tmp_path / "out")
    val = write_tar(tmp_path / "val.tar", _without(val_files).items())
    line = refused(*_options(official, val=val), "--output", tmp_path / "out")
    assert "7 images, the devkit has the classes of 8" in line
    assert "the first missing is ILSVRC2012_val_00000008.JPEG" in line
    assert _nothing_written(tmp_path / "out")


def test_all_of_imagenet_has_its_published_numbers(
    refused: Run, photos: Photos, tmp_path: Path
) -> None:
    image = next(iter(photos.values()))
    content = min(image.values(), key=len)
    wnids = [f"n{number:08d}" for number in range(1000)]
    train = write_train(tmp_path / "t.tar", {w: {f"{w}_1.JPEG": content[:9]} for w in wnids})
    devkit = write_devkit(tmp_path / "d.tar.gz", dict.fromkeys(wnids, 1), wnids)
    files = ((f"ILSVRC2012_val_{n:08d}.JPEG", b"1") for n in range(1, 1001))
    val = write_tar(tmp_path / "v.tar", files)
    given_ = ["--devkit", devkit, "--output", tmp_path / "out"]
    line = refused("imagenet", "--train", train, *given_)
    assert "1,000 images; ImageNet's archive has 1,281,167" in line
    line = refused("imagenet", "--val", val, *given_)
    assert "1,000 images; ImageNet's archive has 50,000" in line


def test_members_that_are_there_twice(
    refused: Run, official: Mapping[str, Path], photos: Photos, tmp_path: Path
) -> None:
    wnid, images = next(iter(photos.items()))
    name, content = next(iter(images.items()))
    inner = tar_bytes([(name, content), (name, content)])
    twice = write_tar(tmp_path / "inner.tar", [(f"{wnid}.tar", inner)])
    outer = write_tar(tmp_path / "outer.tar", 2 * [(f"{wnid}.tar", tar_bytes(images.items()))])
    for train, named in ((twice, name), (outer, f"{wnid}.tar")):
        line = refused("imagenet", "--train", train, "--output", tmp_path / "out")
        assert f"member '{named}' is there twice" in line
        assert _nothing_written(tmp_path / "out")


def test_a_cut_archive_is_found_wherever_it_is_cut(
    refused: Run, photos: Photos, tmp_path: Path
) -> None:
    small = {wnid: {f"{wnid}_1.JPEG": b"x" * 700, f"{wnid}_2.JPEG": b"y" * 512} for wnid in photos}
    whole = write_train(tmp_path / "whole.tar", small).read_bytes()
    cut = tmp_path / "cut.tar"
    # Of the zeros at the end, the first block is what says that it is the end.
    content = len(whole.rstrip(b"\0"))
    for length in range(0, content, 512):
        for more in (0, 100):
            cut.write_bytes(whole[: length + more])
            with pytest.raises(UserError, match=rf"^{cut}: .*(truncated|empty)"):
                prepare_imagenet(tmp_path / "out", train=cut)
    assert _nothing_written(tmp_path / "out")
    line = refused("imagenet", "--train", cut, "--output", tmp_path / "out")
    assert "get the archive once more" in line


def test_a_hole_in_an_archive_is_not_its_end(refused: Run, photos: Photos, tmp_path: Path) -> None:
    train = write_train(tmp_path / "train.tar", photos)
    size = train.stat().st_size
    with train.open("r+b") as file:
        first = tarfile.TarInfo.frombuf(file.read(512), "utf-8", "strict")
        place = file.seek(512 + -(-first.size // 512) * 512)
        file.write(bytes(size - place))
    line = refused("imagenet", "--train", train, "--output", tmp_path / "out")
    assert f"{train}: damaged: it ends at byte {512 + first.size:,} of {size:,}" in line
    assert _nothing_written(tmp_path / "out")


def test_another_archive_set_or_form_for_the_same_folder(
    refused: Run, run: Run, official: Mapping[str, Path], photos: Photos, tmp_path: Path
) -> None:
    out = ["--output", tmp_path / "out"]
    run(*_options(official), *out)
    before = _contents(tmp_path / "out")
    other = write_train(tmp_path / "other.tar", photos)
    assert "train is made from ILSVRC2012_img_train.tar (" in refused(
        *_options(official, train=other), *out
    )
    assert "holds imagenet as class folders" in refused(*_options(official), *out, "--shards")
    assert "holds imagenet as class folders" in refused("mnist", "--archive", other, *out)
    assert _contents(tmp_path / "out") == before
    mine = tmp_path / "mine" / "train"
    mine.mkdir(parents=True)
    (mine / "thesis.txt").touch()
    line = refused(*_options(official), "--output", tmp_path / "mine")
    assert "mine/train: is there and not from this command" in line
    assert _contents(tmp_path / "mine") == {"train/thesis.txt": b""}


def test_a_class_folder_that_was_changed_is_named(
    refused: Run, photos: Photos, official: Mapping[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    prepare_imagenet(out, train=official["train"])
    wnid = sorted(photos)[1]
    next((out / "train" / wnid).iterdir()).unlink()
    state = json.loads((out / STATE_FILE).read_text())
    state["splits"]["train"]["finished"] = False
    (out / STATE_FILE).write_text(json.dumps(state))
    line = refused("imagenet", "--train", official["train"], "--output", out)
    assert f"{out}/train/{wnid}: holds 5 files, 6 images belong there; delete this folder" in line


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b'{"version": 7}', b'{"version": 1, "splits": {"val": {}}}']
)
def test_a_damaged_state_file_is_named(
    refused: Run, official: Mapping[str, Path], tmp_path: Path, content: bytes
) -> None:
    (tmp_path / STATE_FILE).write_bytes(content)
    line = refused(*_options(official), "--output", tmp_path)
    assert f"{tmp_path / STATE_FILE}: cannot be read" in line


@pytest.mark.parametrize("damage", ["meta", "truth", "unknown", "wnid", "missing"])
def test_a_damaged_devkit_is_named(
    refused: Run, official: Mapping[str, Path], tmp_path: Path, damage: str
) -> None:
    files = {n.split("/", 1)[1]: c for n, c in archive_files(official["devkit"], 10**6)}
    meta, lines = imagenet.META_FILE, imagenet.TRUTH_FILE
    if damage == "meta":
        files[meta] = files[meta][: len(files[meta]) // 2]
    elif damage == "truth":
        files[lines] = b"1\nn01440764\n"
    elif damage == "unknown":
        files[lines] = b"1\n99\n"
    elif damage == "wnid":
        files[meta] = files[meta].replace(b"n014", b"../4")
    else:
        del files[lines]
    devkit = write_tar(tmp_path / "devkit.tar.gz", files.items())
    said = {
        "meta": f"{meta}: cannot read its synsets",
        "truth": f"{lines}: expected one class number a line",
        "unknown": f"{lines}: 99 is not the number of a class in {meta}",
        "wnid": "is no WordNet id; expected such as n01440764",
        "missing": f"no {lines} in this devkit",
    }[damage]
    line = refused(*_options(official, devkit=devkit), "--output", tmp_path / "out")
    assert f"error: {devkit}: {said}" in line or (damage == "wnid" and said in line)
    assert _nothing_written(tmp_path / "out")


# --- members that try to leave the folder ---------------------------------------------------------

ESCAPES = [
    member("../evil.JPEG", 4) + b"evil".ljust(512, b"\0"),
    member("/evil.JPEG", 4) + b"evil".ljust(512, b"\0"),
    member("n01440764/../../evil.JPEG", 4) + b"evil".ljust(512, b"\0"),
    member("n01440764_1.JPEG", kind=tarfile.SYMTYPE, to="/etc/passwd"),
    member("n01440764_1.JPEG", kind=tarfile.LNKTYPE, to="../../etc/passwd"),
    member("n01440764_1.JPEG", kind=tarfile.CHRTYPE),
    member("n01440764_1.JPEG", kind=tarfile.FIFOTYPE),
    member("../evil/", kind=tarfile.DIRTYPE),
    member("n01440764_1.JPEG", 4, tarfile.GNUTYPE_SPARSE) + b"evil".ljust(512, b"\0"),
    member("train/a\nb/evil.jpg", 4) + b"evil".ljust(512, b"\0"),
]


@pytest.mark.parametrize("escape", ESCAPES)
@pytest.mark.parametrize("where", ["outer", "class", "val", "devkit", "small"])
def test_members_that_leave_the_folder_are_refused_by_name(
    refused: Run, official: Mapping[str, Path], tmp_path: Path, escape: bytes, where: str
) -> None:
    bad = escape + bytes(1024)
    out = tmp_path / "in" / "out"
    path = tmp_path / "bad.tar"
    path.write_bytes(tar_bytes([("n01440764.tar", bad)]) if where == "class" else bad)
    if where == "small":
        arguments: list[object] = ["imagenette", "--archive", path]
    else:
        arguments = _options(official, **{"train" if where in ("outer", "class") else where: path})
    line = refused(*arguments, "--output", out)
    assert f"error: {path}: " in line
    name = tarfile.TarInfo.frombuf(escape[:512], "utf-8", "strict").name
    assert f"member {name!r}" in line
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["bad.tar"]
    assert not out.exists()


HOSTILE = st.one_of(
    st.text(st.sampled_from("./\\ab\0\n"), max_size=12),
    st.lists(st.sampled_from(["..", ".", "", "a", "C:", "..\\"]), max_size=6).map("/".join),
    st.text(max_size=20),
)


@given(HOSTILE)
def test_what_is_let_through_stays_inside(name: str) -> None:
    try:
        parts = safe_parts("archive", name)
    except UserError as error:
        assert "\n" not in str(error)
        return
    root = "/some/root"
    inside = os.path.normpath(os.path.join(root, name))  # noqa: PTH118
    assert inside == "/".join([root, *parts])
    assert inside.startswith(root + "/")


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=40))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_no_name_makes_a_file_outside(tmp_path: Path, name: str) -> None:
    base = tmp_path / "case"
    base.mkdir(exist_ok=True)
    before = set(tmp_path.rglob("*"))
    for write, suffix in ((write_tar, "tar"), (write_zip, "zip")):
        archive = write(tmp_path / f"a.{suffix}", [(f"train/{name}.png", b"1")])
        before.add(archive)
        try:
            made = prepare_small("mnist", base / "out", archives=[archive])
        except UserError:
            assert set(tmp_path.rglob("*")) == before
            continue
        assert made[0].images == 1
        new = set(tmp_path.rglob("*")) - before
        assert all((base / "out") in (path, *path.parents) for path in new)
        subprocess.run(["rm", "-r", base / "out"], check=True)


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_damaged_tar_is_read_right_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    files = [(f"n01440764_{number}.JPEG", bytes([number]) * size) for number, size in SIZES]
    content = bytearray(tar_bytes(files))
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=3)):
        content[place] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.tar"
    path.write_bytes(content)
    try:
        with path.open("rb") as file:
            members = list(tar_members(file.fileno(), 0, len(content), "it"))
        read = list(archive_files(path, 10**6))
    except UserError as error:
        assert "\n" not in str(error)
        return
    assert [(one.name, bytes(content[one.offset :][: one.size])) for one in members] == read
    assert all(safe_parts("it", one.name) for one in members)


SIZES = [(1, 10), (2, 512), (3, 0), (4, 1500)]


def test_offsets_are_those_of_tarfile(official: Mapping[str, Path]) -> None:
    path = official["val"]
    with tarfile.open(path) as archive, path.open("rb") as file:
        theirs = [(one.name, one.offset_data, one.size) for one in archive]
        assert list(tar_members(file.fileno(), 0, path.stat().st_size, "it")) == theirs


def test_blown_up_sizes_are_refused_before_they_are_read(refused: Run, tmp_path: Path) -> None:
    huge = member("train/a/1.png", LARGEST_MEMBER + 1)
    long_name = member("././@LongLink", 2**33, tarfile.GNUTYPE_LONGNAME)
    for number, (content, said) in enumerate(
        [(huge, "is said to have 268,435,457 bytes"), (long_name, "a header of 8,589,934,592")]
    ):
        path = tmp_path / f"{number}.tar.gz"
        path.write_bytes(gzip.compress(content + bytes(10**6)))
        assert said in refused("imagenette", "--archive", path, "--output", tmp_path / "out")
    bomb = write_zip(tmp_path / "bomb.zip", [(f"train/a/{n}.png", bytes(10**6)) for n in range(9)])
    with pytest.raises(UserError, match=r"bomb\.zip: its files have more than 5,000,000 bytes"):
        list(archive_files(bomb, 5 * 10**6))
    assert len(list(archive_files(bomb, 9 * 10**6))) == 9
    assert _nothing_written(tmp_path / "out")


# --- the smaller data sets ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(shared_data: Callable[[str], Path]) -> list[tuple[str, bytes]]:
    """The real archive's photos of three classes, some of them grey."""
    path = shared_data("tiny-imagenet-50.tar.gz")
    with tarfile.open(path) as archive:
        members = archive.getmembers()
        classes = sorted({one.name.split("/")[2] for one in members})[:3]
        return [
            (one.name, archive.extractfile(one).read())  # type: ignore[union-attr]
            for one in members
            if one.name.split("/")[2] in classes and int(one.name[-6].replace("_", "0")) < 1
        ]


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zip"])
@pytest.mark.parametrize("second", ["val", "test"])
def test_archives_of_class_folders(
    run: Run, tiny: list[tuple[str, bytes]], tmp_path: Path, kind: str, second: str
) -> None:
    files = [(name.replace("/val/", f"/{second}/"), content) for name, content in tiny]
    noise = [("tiny-imagenet-50/readme.txt", b"x"), ("__MACOSX/train/n1/._1.jpg", b"x")]
    write: Callable[[Path, Files], Path] = write_zip if kind == "zip" else write_tar
    archive = write(tmp_path / f"tiny.{kind}", [*noise, *files])
    if kind == "tar":
        archive.write_bytes(member("./", kind=tarfile.DIRTYPE) + archive.read_bytes())
    said = run("tiny-imagenet", "--archive", archive, "--output", tmp_path / "out")
    expected = {name.split("/", 1)[1]: content for name, content in tiny}
    assert {name.split("/")[0] for name in expected} == {"train", "val"}
    assert _images(tmp_path / "out") == expected
    assert f"{sum(name.startswith('val') for name in expected)} images" in said
    assert "already prepared" in run("tiny-imagenet", "--output", tmp_path / "out")


def test_a_whole_real_archive(run: Run, shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    archive = shared_data("tiny-imagenet-50.tar.gz")
    out = tmp_path / "out"
    said = run("tiny-imagenet", "--archive", archive, "--output", out, "--shards")
    assert "train        50 classes, 25,000 images" in said
    assert "val          50 classes, 2,500 images" in said
    images = {split: open_images(out / split) for split in ("train", "val")}
    places = {split: {name: k for k, name in enumerate(i.files)} for split, i in images.items()}
    with tarfile.open(archive) as opened:
        for number, one in enumerate(opened):
            if number % 100 == 0:
                split, name = one.name.split("/", 2)[1:]
                path, offset, length = images[split].location(places[split][name])
                with Path(path).open("rb") as file:
                    content = os.pread(file.fileno(), length, offset)
                assert content == opened.extractfile(one).read()  # type: ignore[union-attr]


def test_tiny_imagenet_as_it_is_offered(
    run: Run,
    refused: Run,
    tiny: list[tuple[str, bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    top, files, lines, expected = "tiny-imagenet-200", [], [], {}
    for number, (name, content) in enumerate(tiny):
        _, split, wnid, base = name.split("/")
        if split == "train":
            files.append((f"{top}/train/{wnid}/images/{base}", content))
            expected[f"train/{wnid}/{base}"] = content
        else:
            files.append((f"{top}/val/images/val_{number}.JPEG", content))
            lines.append(f"val_{number}.JPEG\t{wnid}\t0\t0\t62\t62\n")
            expected[f"val/{wnid}/val_{number}.JPEG"] = content
    files.append((f"{top}/train/n01443537/n01443537_boxes.txt", b"boxes"))
    files.append((f"{top}/test/images/test_0.JPEG", tiny[0][1]))
    truth = (f"{top}/val/val_annotations.txt", "".join(lines).encode())
    out = ["--output", tmp_path / "out"]
    whole = write_zip(tmp_path / "tiny-imagenet-200.zip", [*files, truth])
    line = refused("tiny-imagenet", "--archive", whole, *out)
    train = sum(name.startswith("train") for name in expected)
    assert f"{train} train images; the official archive of tiny-imagenet has 100,000" in line
    counts = {"train": train, "val": len(expected) - train}
    monkeypatch.setitem(SETS, "tiny-imagenet", replace(SETS["tiny-imagenet"], images=counts))
    none = write_zip(tmp_path / "none.zip", files)
    assert "no val/val_annotations.txt" in refused("tiny-imagenet", "--archive", none, *out)
    odd = write_zip(tmp_path / "odd.zip", [*files, (truth[0], truth[1].replace(b"n0", b"../0"))])
    assert "would lie outside" in refused("tiny-imagenet", "--archive", odd, *out)
    assert _nothing_written(tmp_path / "out")
    run("tiny-imagenet", "--archive", whole, *out)
    assert _images(tmp_path / "out") == expected


@pytest.fixture(scope="module")
def pixels(cifar_jpegs: list[tuple[str, bytes]]) -> np.ndarray:
    """Real pixels of CIFAR-10, uint8 (60, 32, 32, 3)."""
    return np.stack([np.asarray(Image.open(io.BytesIO(c))) for _, c in cifar_jpegs[:60]])


def _cifar(name: str, labels: np.ndarray, pixels: np.ndarray) -> list[tuple[str, bytes]]:
    """The files of a binary archive: 50 training images, 10 for validation."""
    if name == "cifar10":
        parts = [(f"data_batch_{n + 1}.bin", slice(10 * n, 10 * n + 10)) for n in range(5)]
        parts.append(("test_batch.bin", slice(50, 60)))
        names = ("batches.meta.txt", b"airplane\nautomobile\nbird\ncat\n\n")
    else:
        parts = [("train.bin", slice(50)), ("test.bin", slice(50, 60))]
        names = ("fine_label_names.txt", b"apple\naquarium_fish\nbaby\nbear\n")
        labels = np.stack([9 - labels, labels], axis=1)
    columns = labels.reshape(60, -1)
    return [(f"top/{p}", cifar_records(columns[s], pixels[s])) for p, s in parts] + [
        (f"top/{names[0]}", names[1])
    ]


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_binary_becomes_png(
    run: Run,
    refused: Run,
    pixels: np.ndarray,
    tmp_path: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    labels = (np.arange(60) * 7 % 4).astype(np.uint8)
    files = _cifar(name, labels, pixels)
    archive = write_tar(tmp_path / f"{name}-binary.tar.gz", files)
    given_ = [name, "--archive", archive, "--output", tmp_path / "out"]
    assert "50 train images; the official archive of" in refused(*given_)
    monkeypatch.setitem(SETS, name, replace(SETS[name], images={"train": 50, "val": 10}))
    short = write_tar(tmp_path / "short.tar.gz", [(n, c[:-1]) for n, c in files])
    line = refused(name, "--archive", short, "--output", tmp_path / "out")
    assert "no whole number of records" in line
    fewer = write_tar(tmp_path / "fewer.tar.gz", files[1:])
    assert f"no {files[0][0][4:]} in this archive" in refused(
        name, "--archive", fewer, "--output", tmp_path / "out"
    )
    over = _cifar(name, labels + 1, pixels)
    beyond = write_tar(tmp_path / "beyond.tar.gz", over)
    assert "a label of 4; there are 4 classes" in refused(
        name, "--archive", beyond, "--output", tmp_path / "out"
    )
    assert _nothing_written(tmp_path / "out")
    run(*given_)
    names = {"cifar10": ["airplane", "automobile", "bird", "cat"]}.get(
        name, ["apple", "aquarium_fish", "baby", "bear"]
    )
    seen = 0
    for split, first in (("train", 0), ("val", 50)):
        folder = ImageFolder(str(tmp_path / "out" / split))
        assert folder.classes == names
        for path, label in folder.samples:
            number = first + int(Path(path).stem)
            assert np.array_equal(np.asarray(Image.open(path)), pixels[number])
            assert Image.open(path).format == "PNG"
            assert label == labels[number]
            seen += 1
    assert seen == 60


def test_cifar_for_python_is_refused(refused: Run, tmp_path: Path) -> None:
    for name, pickled in (("cifar10", "cifar-10-batches-py/data_batch_1"), ("cifar100", "p/meta")):
        archive = write_tar(tmp_path / "python.tar.gz", [(pickled, b"cos\nsystem\n.")])
        line = refused(name, "--archive", archive, "--output", tmp_path / "out")
        assert "take the binary version, https://www.cs.toronto.edu/~kriz/cifar-10" in line


@pytest.fixture
def mnist_files(
    shared_data: Callable[[str], Path], tmp_path: Path
) -> tuple[list[Path], dict[str, np.ndarray], list[int]]:
    """MNIST's four files with 40 and 20 real digits; the pixels by PNG name; the labels."""
    real = _few(shared_data("mnist-png.tar.gz"), 60, "7.png")
    values = np.stack([np.asarray(Image.open(io.BytesIO(content))) for _, content in real])
    labels = [(3 * number) % 10 for number in range(60)]
    folder = tmp_path / "mnist"
    folder.mkdir()
    paths = []
    for part, some in (("train", slice(40)), ("t10k", slice(40, 60))):
        paths += [folder / f"{part}-images-idx3-ubyte.gz", folder / f"{part}-labels-idx1-ubyte.gz"]
        paths[-2].write_bytes(idx_bytes(values[some]))
        paths[-1].write_bytes(idx_bytes(np.array(labels[some], np.uint8)))
    expected = {
        f"{'train' if n < 40 else 'val'}/{labels[n]}/{n - (0 if n < 40 else 40):05d}.png": values[n]
        for n in range(60)
    }
    return paths, expected, labels


def test_mnist_becomes_png(
    run: Run,
    refused: Run,
    mnist_files: tuple[list[Path], dict[str, np.ndarray], list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    paths, expected, _ = mnist_files
    out = ["--output", tmp_path / "out"]
    line = refused("mnist", "--archive", *paths, *out)
    assert "train-images-idx3-ubyte.gz: not MNIST's idx file of 60000 x 28 x 28 bytes" in line
    monkeypatch.setitem(SETS, "mnist", replace(SETS["mnist"], images={"train": 40, "val": 20}))
    line = refused("mnist", "--archive", *paths[:3], *out)
    assert "t10k-labels-idx1-ubyte.gz is not among the files given" in line
    whole = paths[2].read_bytes()
    paths[2].write_bytes(whole[:-20])
    assert "truncated or damaged" in refused("mnist", "--archive", *paths, *out)
    content = gzip.decompress(whole)
    for other in (content[:-1], content + b"1"):
        paths[2].write_bytes(gzip.compress(other))
        line = refused("mnist", "--archive", *paths, *out)
        assert "t10k-images-idx3-ubyte.gz: not MNIST's idx file of 20 x 28 x 28 bytes" in line
    paths[2].write_bytes(whole)
    assert _nothing_written(tmp_path / "out")
    run("mnist", "--archive", *paths, *out)
    found = _images(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, content in found.items():
        image = Image.open(io.BytesIO(content))
        assert image.mode == "L"
        assert np.array_equal(np.asarray(image), expected[name])


@pytest.fixture
def home(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and the address it is served at."""
    folder = tmp_path / "served"
    folder.mkdir()
    quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": _say_nothing})
    handler = functools.partial(quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        # torchvision asks once for the address alone and hangs up, which would be told on stderr.
        server.handle_error = _say_nothing
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


def _say_nothing(*_: object) -> None:
    pass


def test_downloads_are_checked_and_tried_elsewhere(
    run: Run,
    refused: Run,
    tiny: list[tuple[str, bytes]],
    home: tuple[Path, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, url = home
    archive = write_tar(folder / "imagenette2-160.tgz", tiny)
    digest = md5(archive.read_bytes()).hexdigest()

    def offered(urls: tuple[str, ...], digest: str) -> None:
        changed = replace(SETS["imagenette-160"], downloads=(Download(urls, digest),))
        monkeypatch.setitem(SETS, "imagenette-160", changed)

    arguments = ["imagenette", "--size", "160", "--output", tmp_path / "out"]
    offered((f"{url}imagenette2-160.tgz",), "0" * 32)
    line = refused(*arguments)
    assert f"imagenette-160: cannot download {url}imagenette2-160.tgz (File not found or" in line
    assert "get imagenette2-160.tgz (MD5 " in line
    assert "name it with --archive" in line
    assert _nothing_written(tmp_path / "out")
    offered((f"{url}absent/imagenette2-160.tgz", f"{url}imagenette2-160.tgz"), digest)
    run(*arguments)
    assert _images(tmp_path / "out") == {name.split("/", 1)[1]: c for name, c in tiny}
    archive.unlink()
    assert "already prepared" in run(*arguments)


def test_imagenette_is_counted_where_it_is_the_official_one(
    refused: Run, tiny: list[tuple[str, bytes]], tmp_path: Path
) -> None:
    files = [("imagenette2-320/" + name.split("/", 1)[1], content) for name, content in tiny]
    archive = write_tar(tmp_path / "imagenette2-320.tgz", files)
    arguments = ["imagenette", "--size", "320", "--archive", archive, "--output", tmp_path / "out"]
    assert "the official archive of imagenette-320 has 9,469" in refused(*arguments)


def test_archives_of_something_else(
    refused: Run, tiny: list[tuple[str, bytes]], tmp_path: Path
) -> None:
    text = write_zip(tmp_path / "thesis.zip", [("thesis/chapter.txt", b"In the beginning")])
    twice = write_tar(tmp_path / "twice.tar", [tiny[0], tiny[0]])
    noise = tmp_path / "noise.tar"
    noise.write_bytes(np.random.default_rng(0).bytes(2000))
    other = tmp_path / "other.tar.xz"
    other.write_bytes(b"\xfd7zXZ\0" + bytes(100))
    cut = tmp_path / "cut.tgz"
    cut.write_bytes(write_tar(tmp_path / "whole.tgz", tiny).read_bytes()[:5000])
    stored = bytearray(gzip.compress(tar_bytes(tiny), 0))
    stored[stored.index(tiny[0][1][:40]) + 60] ^= 1
    flipped = tmp_path / "flipped.tgz"
    flipped.write_bytes(stored)
    link = tmp_path / "link.zip"
    with zipfile.ZipFile(link, "w") as archive:
        info = zipfile.ZipInfo("train/a/1.png")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/passwd")
    for path, said in (
        (text, "no images of mnist; expected train-images-idx3-ubyte.gz and "),
        (twice, f"{twice}: {tiny[0][0].split('/', 1)[1]} is in it twice"),
        (noise, f"{noise}: no such archive as expected here, truncated or damaged"),
        (other, f"{other}: compressed with xz; expected a .tar, .tar.gz or .zip"),
        (cut, f"{cut}: no such archive as expected here, truncated or damaged"),
        (flipped, f"{flipped}: no such archive as expected here, truncated or damaged (CRC"),
        (link, f"{link}: member 'train/a/1.png' is a link, a device or the like"),
    ):
        assert said in refused("mnist", "--archive", path, "--output", tmp_path / "out")
        assert _nothing_written(tmp_path / "out")
