"""The index command: what it writes, reports and prints, on real images and on broken ones."""

import os
import resource
import signal
import tarfile
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from fork_server import BARE, Fork, Forks
from PIL import Image
from rich.progress import Progress
from safetensors.numpy import save_file

from data_pipelines import index as command
from data_pipelines.images.image_index import (
    INDEX_FILE,
    ImageIndex,
    check_fits,
    load_index,
    open_images,
    save_index,
    scan_class_folders,
)
from data_pipelines.index import main
from tpp.common.errors import UserError, run_command

ROOT = Path(__file__).resolve().parents[2]
REPORT_FILE = ".index-report.tsv"
FACTS = 13
"""Length of the longest name of a fact that is always printed, and of the gap after it."""


def _encoded(mode: str = "RGB", format: str = "JPEG", size: int = 40, **options: Any) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (size, size + 8, 4), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(pixels, "RGBA").convert(mode).save(file, format, **options)
    return file.getvalue()


def _write(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, dict[str, str], str]]:
    """Run the command: exit code, the facts that it printed, and standard error."""

    def run_it(*arguments: str | Path) -> tuple[int, dict[str, str], str]:
        monkeypatch.setattr("sys.argv", ["index", *map(str, arguments)])
        code = 0
        try:
            run_command(main)
        except SystemExit as ended:
            code = int(ended.code or 0)
        out, err = capsys.readouterr()
        return code, dict(line.split("  ", 1) for line in out.splitlines() if line), err

    return run_it


def _report(path: Path) -> list[list[str]]:
    head, *lines = path.read_text().splitlines()
    assert head == "path\tfinding\twhat to do"
    return [line.split("\t") for line in lines]


@pytest.fixture(scope="module")
def photos(shared_data: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    with tarfile.open(shared_data("imagenet-sample-500.tar")) as archive:
        archive.extractall(root, filter="data")
    return root / "imagenet-sample"


def test_real_photos(photos: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    code, facts, err = run(photos, "--output", tmp_path / "new" / "folder")
    assert (code, err) == (0, "")
    file = tmp_path / "new" / "folder" / "imagenet-sample.safetensors"
    index = open_images(photos, file)
    assert _names(file.parent) == [file.name]
    assert not (photos / INDEX_FILE).exists()
    assert not index.broken.any()
    grey = 0
    for place, name in enumerate(index.files):
        with Image.open(photos / name) as image:
            assert index.sizes[place].tolist() == [image.height, image.width]
            grey += image.mode == "L"
        assert index.byte_sizes[place] == (photos / name).stat().st_size
    assert facts["grey"].split() == [str(grey)]
    areas = sorted(index.sizes.tolist(), key=lambda size: size[0] * size[1])
    for height, width in (areas[0], areas[-1]):
        assert f" {height} x {width}" in facts["pixels"]
    assert facts["bytes"].split() == [f"{index.byte_sizes.sum() / 1e6:,.1f}", "MB"]


def test_facts_are_aligned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _write(tmp_path, dict.fromkeys(["cat/1.jpg", "dog/1.jpg", "dog/2.jpg"], _encoded()))
    monkeypatch.setattr("sys.argv", ["index", str(tmp_path)])
    run_command(main)
    lines = capsys.readouterr().out.splitlines()
    assert {line[:FACTS].strip(): line[FACTS:] for line in lines if line[:4] != "time"} == {
        "folder": str(tmp_path),
        "classes": "2",
        "images": "3",
        "smallest": "cat (1 images)",
        "largest": "dog (2 images)",
        "bytes": f"{3 * len(_encoded()) / 1000:,.1f} kB",
        "pixels": "height x width: median 40 x 48, smallest 40 x 48, largest 40 x 48",
        "broken": "0",
        "fingerprint": scan_class_folders(tmp_path).fingerprint,
        "index": str(tmp_path / INDEX_FILE),
    }
    check_fits(load_index(tmp_path / INDEX_FILE, tmp_path))


LARGE = _encoded(size=300)
EXTRACT = "extract it anew from the archive, delete it, or run with data.on_error=skip"
SLOW = "none needed: decoded by Pillow; as JPEG or PNG it would be faster"
BROKEN = {
    "a/empty.jpg": (b"", "empty file"),
    "a/text.JPEG": (b"404 Not Found", "not an image"),
    "a/cut.jpg": (_encoded()[:-500], "truncated"),
    "a/large_cut.jpg": (LARGE[:-500], "truncated"),
    "a/header_cut.jpg": (_encoded()[:100], "truncated"),
    "b/cut.png": (_encoded(format="PNG")[:-500], "truncated"),
    "b/large_cut.png": (_encoded(format="PNG", size=300)[:-500], "truncated"),
    "b/tab\tand\nline.jpg": (b"", "empty file"),
    os.fsdecode(b"b/\xff.jpg"): (b"", "empty file"),
}
FINE = {
    "a/whole.jpg": _encoded(),
    "a/large.JPEG": LARGE,
    "a/long_header.jpg": _encoded(icc_profile=bytes(200_000)),
    "a/zeros_after.jpg": LARGE + bytes(5000),
    "b/whole.png": _encoded(format="PNG", size=300),
    "b/grey.png": _encoded("L", "PNG"),
    "b/grey_alpha.png": _encoded("LA", "PNG"),
}
ODD = {
    "a/ink.jpg": (_encoded("CMYK"), "CMYK", "none needed: decoded as RGB"),
    "a/p.JPEG": (_encoded(format="PNG"), "PNG named as a JPEG", "none needed: told by its content"),
    "b/j.PNG": (_encoded(), "JPEG named as a PNG", "none needed: told by its content"),
    "b/web.jpg": (_encoded(format="WEBP"), "neither JPEG nor PNG", SLOW),
}


@pytest.mark.processes
@pytest.mark.parametrize("options", [(), ("--decode", "--threads", "1")], ids=["", "decode"])
def test_broken_and_odd_files(
    tmp_path: Path, run: Callable[..., Any], options: tuple[str, ...]
) -> None:
    root = _write(tmp_path / "images", {name: content for name, (content, _) in BROKEN.items()})
    _write(root, {**FINE, **{name: content for name, (content, *_) in ODD.items()}})
    code, facts, err = run(root, *options)
    assert (code, err) == (0, "")
    index = open_images(root)
    assert {n for n, broken in zip(index.files, index.broken, strict=True) if broken} == set(BROKEN)
    for place, name in enumerate(index.files):
        assert index.byte_sizes[place] == (root / name).stat().st_size
        size = [0, 0]
        if name not in BROKEN:
            with Image.open(root / name) as image:
                size = [image.height, image.width]
        assert index.sizes[place].tolist() == size

    lines = _report(root / REPORT_FILE)
    named = {"b/tab\tand\nline.jpg": r"b/tab\tand\nline.jpg", "b/\udcff.jpg": r"b/\xff.jpg"}
    expected = [
        [f"{root}/{named.get(name, name)}", BROKEN[name][1], EXTRACT] for name in sorted(BROKEN)
    ]
    assert lines[: len(BROKEN)] == expected
    assert [path for path, *_ in lines[len(BROKEN) :]] == [f"{root}/{name}" for name in sorted(ODD)]
    for path, what, advice in lines[len(BROKEN) :]:
        _, finding, expected_advice = ODD[path.removeprefix(f"{root}/")]
        assert what == finding
        assert advice == expected_advice

    assert facts["broken"].strip() == "9 (a/cut.jpg, a/empty.jpg, a/header_cut.jpg, ...)"
    for note in ("CMYK", "PNG named as a JPEG", "JPEG named as a PNG", "neither JPEG nor PNG"):
        assert facts[note].strip() == "1"
    assert facts["grey"].strip() == "2"
    assert facts["report"].strip() == str(root / REPORT_FILE)


def test_report_goes_when_all_is_well(tmp_path: Path, run: Callable[..., Any]) -> None:
    root = _write(tmp_path, {"a/1.jpg": b"", "a/2.jpg": _encoded()})
    code, facts, _ = run(root, "--strict")
    assert code == 1
    assert facts["broken"].strip() == "1 (a/1.jpg)"
    assert (root / REPORT_FILE).exists()
    _write(root, {"a/1.jpg": _encoded()})
    code, facts, _ = run(root, "--strict")
    assert code == 0
    assert facts["broken"].strip() == "0" and "report" not in facts
    assert not (root / REPORT_FILE).exists()
    assert not open_images(root).broken.any()


def test_nothing_but_broken_images(tmp_path: Path, run: Callable[..., Any]) -> None:
    code, facts, _ = run(_write(tmp_path, {"a/1.jpg": b"", "a/2.jpg": b""}))
    assert code == 0
    assert facts["pixels"].strip() == "none: every image is broken"


@pytest.mark.processes
def test_damage_within_is_found_by_decoding(tmp_path: Path, run: Callable[..., Any]) -> None:
    damaged = bytearray(_encoded(format="PNG", size=300))
    damaged[len(damaged) // 2] ^= 255
    root = _write(tmp_path, {"a/1.jpg": bytes(damaged), "a/2.jpg": _encoded()})
    run(root)
    assert open_images(root).broken.tolist() == [False, False]
    run(root, "--decode", "--threads", "1")
    assert open_images(root).broken.tolist() == [True, False]
    assert open_images(root).sizes.tolist() == [[0, 0], [40, 48]]
    # That it is a PNG by another name does not matter any more.
    ((path, finding, advice),) = _report(root / REPORT_FILE)
    assert (path, advice) == (f"{root}/a/1.jpg", EXTRACT)
    assert finding.startswith("cannot be decoded: ")


def test_files_that_cannot_be_opened(tmp_path: Path, run: Callable[..., Any]) -> None:
    root = _write(tmp_path / "images", {"a/1.jpg": _encoded()})
    (root / "a" / "gone.jpg").symlink_to(root / "a" / "nowhere.jpg")
    os.mkfifo(root / "a" / "pipe.jpg")
    (root / "b").symlink_to(_write(tmp_path / "elsewhere", {"1.jpg": _encoded()}))
    code, _, _ = run(root)
    index = open_images(root)
    found = {path.removeprefix(f"{root}/"): said for path, *said in _report(root / REPORT_FILE)}
    assert code == 0
    assert found["a/gone.jpg"][0] == "unreadable: No such file or directory"
    assert "link to nothing" in found["a/gone.jpg"][1]
    assert found["a/pipe.jpg"] == [
        "unreadable: a pipe, a device or a socket, not a file",
        "delete it, then index again",
    ]
    assert len(found) == 2
    sizes = dict(zip(index.files, index.byte_sizes.tolist(), strict=True))
    assert sizes["a/gone.jpg"] == sizes["a/pipe.jpg"] == -1
    assert sizes["b/1.jpg"] == len(_encoded())


def test_turned_photos_are_counted(tmp_path: Path, run: Callable[..., Any]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    _, facts, _ = run(_write(tmp_path, {"a/1.jpg": _encoded(exif=exif), "a/2.jpg": _encoded()}))
    assert facts["turned"].split()[0] == "1"
    assert not (tmp_path / REPORT_FILE).exists()


# Which folders


def test_train_and_val_are_indexed_each(tmp_path: Path, run: Callable[..., Any]) -> None:
    names = ["val/a/1.jpg", "train/a/1.jpg", "train/a/2.jpg", "devkit/readme.txt"]
    root = _write(tmp_path / "images", {**dict.fromkeys(names, _encoded()), "val/a/bad.jpg": b""})
    code, _, _ = run(root)
    assert code == 0
    assert len(open_images(root / "train")) == 2
    assert open_images(root / "val").broken.tolist() == [False, True]
    assert not (root / INDEX_FILE).exists()
    assert (root / "val" / REPORT_FILE).exists()

    out = tmp_path / "out"
    run(root, "--output", out)
    assert _names(out) == ["train.safetensors", "val-report.tsv", "val.safetensors"]
    assert len(open_images(root / "val", out / "val.safetensors")) == 2


def test_class_may_be_named_train(tmp_path: Path, run: Callable[..., Any]) -> None:
    names = ["train/1.jpg", "train/thumbnails/1.jpg", "ship/1.jpg", "test/1.jpg"]
    run(_write(tmp_path, dict.fromkeys(names, _encoded())))
    assert list(open_images(tmp_path).files) == ["ship/1.jpg", "test/1.jpg", "train/1.jpg"]


@pytest.mark.parametrize("given", [".", "../images", "{root}/"])
def test_folder_has_its_name_however_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Any], given: str
) -> None:
    root = _write(tmp_path / "images", {"a/1.jpg": _encoded()})
    monkeypatch.chdir(root)
    run(given.format(root=root), "--output", tmp_path / "out")
    assert _names(tmp_path / "out") == ["images.safetensors"]


def test_shards_carry_their_index(tmp_path: Path, run: Callable[..., Any]) -> None:
    _write(tmp_path, {"val/shard.tar": bytes(100), "train/a/1.jpg": _encoded()})
    index = ImageIndex.of(
        tmp_path / "val",
        ["a/1.jpg"],
        [0],
        ["a"],
        byte_sizes=np.array([10]),
        containers=["shard.tar"],
        container=np.zeros(1, np.int32),
        offsets=np.zeros(1, np.int64),
        marks=np.array([100]),
    )
    save_index(index, tmp_path / "val" / INDEX_FILE)
    before = (tmp_path / "val" / INDEX_FILE).read_bytes()
    for folder in (tmp_path, tmp_path / "val"):
        code, facts, err = run(folder)
        assert (code, facts) == (2, {})
        assert err == (
            f"error: {tmp_path}/val: these are tar shards, which carry their index "
            f"({INDEX_FILE}); expected class folders, or tars that others made\n"
        )
    assert (tmp_path / "val" / INDEX_FILE).read_bytes() == before
    assert not (tmp_path / "train" / INDEX_FILE).exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{root}/absent"], "{root}/absent: cannot list the data folder (No such file"),
        (
            ["{root}/val"],
            "{root}/val: cannot list the data folder (No such file or directory); "
            "tpp prepare split divides a folder of classes",
        ),
        (
            ["{root}", "--threads", "0"],
            "python -m data_pipelines.index: --threads: must be at least 1, not 0",
        ),
        (
            ["{root}", "--output", "{root}/a/1.jpg"],
            "{root}/a/1.jpg: cannot make the folder of ",
        ),
        (["{root}", "--output", "/proc/x"], "/proc/x: cannot make the folder of "),
        (["{root}/a"], "{root}/a: no class folders; expected"),
    ],
)
def test_mistake_is_one_line(
    tmp_path: Path, run: Callable[..., Any], arguments: list[str], said: str
) -> None:
    _write(tmp_path, {"a/1.jpg": _encoded()})
    code, facts, err = run(*(argument.format(root=tmp_path) for argument in arguments))
    assert (code, facts) == (2, {})
    assert err.startswith(f"error: {said.format(root=tmp_path)}")
    assert err.count("\n") == 1


@pytest.fixture
def as_nobody() -> Iterator[Path]:
    """A folder that all may read, and the rights of a user that is not root."""
    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        if os.geteuid():
            yield Path(folder)
            return
        nobody = 65534
        os.chown(folder, nobody, nobody)
        os.setresuid(nobody, nobody, 0)
        try:
            yield Path(folder)
        finally:
            os.setresuid(0, 0, 0)


def test_files_without_leave_to_read(as_nobody: Path, run: Callable[..., Any]) -> None:
    _write(as_nobody, {"a/1.jpg": _encoded(), "a/2.jpg": _encoded()})
    (as_nobody / "a" / "1.jpg").chmod(0)
    assert run(as_nobody)[0] == 0
    assert open_images(as_nobody).broken.tolist() == [True, False]
    advice = "make it readable (chmod), then index again"
    expected = [f"{as_nobody}/a/1.jpg", "unreadable: Permission denied", advice]
    assert _report(as_nobody / REPORT_FILE) == [expected]


def test_folder_without_leave_to_write(as_nobody: Path, run: Callable[..., Any]) -> None:
    _write(as_nobody, {"a/1.jpg": b""})
    as_nobody.chmod(0o555)
    code, facts, err = run(as_nobody)
    assert (code, facts) == (2, {})
    assert err == (
        f"error: {as_nobody}: cannot write the index there; choose another place with --output\n"
    )
    assert not list(as_nobody.glob(".*"))
    as_nobody.chmod(0o755)


def test_an_index_takes_no_other_file_s_place(tmp_path: Path, run: Callable[..., Any]) -> None:
    root = _write(tmp_path / "train", {"a/1.jpg": _encoded()})
    other = tmp_path / "out" / "train.safetensors"
    other.parent.mkdir()
    save_file({"weight": np.zeros(3)}, other)
    before = other.read_bytes()
    code, facts, err = run(root, "--output", other.parent)
    assert (code, facts) == (2, {})
    assert err.startswith(f"error: {other}: holds something else than an index of images")
    assert other.read_bytes() == before and _names(other.parent) == [other.name]
    other.write_bytes(b"cut")  # a damaged one is made anew, and an older one too
    assert run(root, "--output", other.parent)[0] == run(root, "--output", other.parent)[0] == 0
    assert len(load_index(other, root)) == 1


def test_too_few_descriptors_are_no_damage(tmp_path: Path) -> None:
    root = _write(tmp_path, {"a/1.jpg": _encoded()})
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(UserError, match=r"a/1\.jpg: Too many open files; give fewer --threads"):
            command._look(f"{root}/a/1.jpg")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# Changes and interruptions


def test_change_during_the_pass_is_found_later(
    tmp_path: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = _write(tmp_path, {f"{label}/1.jpg": _encoded() for label in "ab"})
    for label in "ab":
        os.utime(root / label, (1e9, 1e9))
    look = command._look

    def look_and_add(*where: Any) -> Any:
        _write(root, {"b/2.jpg": _encoded()})
        return look(*where)

    monkeypatch.setattr(command, "_look", look_and_add)
    run(root)
    with pytest.raises(Exception, match=r"no longer fits .*b/2\.jpg is new"):
        open_images(root)


def test_change_within_a_tick_of_the_clock_is_found(
    tmp_path: Path, run: Callable[..., Any]
) -> None:
    root = _write(tmp_path, {"a/1.jpg": _encoded(), "b/1.jpg": _encoded()})
    os.utime(root / "b", (1e9, 1e9))
    changed = (root / "a").stat()
    run(root)
    check_fits(load_index(root / INDEX_FILE, root))
    _write(root, {"a/2.jpg": _encoded()})
    os.utime(root / "a", ns=(changed.st_atime_ns, changed.st_mtime_ns))
    with pytest.raises(Exception, match=r"a/2\.jpg is new"):
        open_images(root)
    assert load_index(root / INDEX_FILE, root).marks.tolist() == [-1, 10**18]


def _start(forks: Forks, *arguments: object) -> Fork:
    """Start the command in a process, and a session, of its own."""
    environment = {**os.environ, **BARE}
    return forks.start("data_pipelines.index", [*map(str, arguments)], ROOT, environment)


def test_interruption_leaves_what_was_there(tmp_path: Path, forks: Forks) -> None:
    png = _encoded("RGBA", "PNG", size=1200)
    root = _write(tmp_path / "images", {f"a/{number:03}.png": png for number in range(1)})
    for number in range(1, 400):
        os.link(root / "a" / "000.png", root / "a" / f"{number:03}.png")
    save_index(scan_class_folders(root), root / INDEX_FILE)
    before = (root / INDEX_FILE).read_bytes()
    process = _start(forks, root, "--decode", "--threads", "2")
    while not _decoding(process.pid):
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of the processes
    assert process.wait(60) == 130
    assert process.output() == ("", "interrupted\n")
    assert (root / INDEX_FILE).read_bytes() == before
    assert _names(root) == [INDEX_FILE, "a"]


def test_interruption_leaves_the_remaining_files(
    tmp_path: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(tmp_path, {f"a/{number}.jpg": _encoded() for number in range(200)})
    looked = []
    look = command._look

    def look_slowly(*where: Any) -> Any:
        looked.append(where)
        time.sleep(0.01)
        return look(*where)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_look", look_slowly)
    monkeypatch.setattr(command, "_FILES_A_TASK", 1)
    monkeypatch.setattr(Progress, "advance", interrupt)
    code, facts, err = run(tmp_path, "--threads", "1")
    assert (code, facts, err) == (130, {}, "interrupted\n")
    assert len(looked) < 200
    assert _names(tmp_path) == ["a"]


def _decoding(command: int) -> bool:
    """Whether a worker process of the command is at work: it has used 0.2 s of a processor."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parent, session, ticks = int(fields[1]), int(fields[3]), int(fields[11])
        # What the command itself has started only starts others.
        if session == command and command not in (int(folder.name), parent) and ticks > 20:
            return True
    return False


def test_two_at_once_do_not_disturb_each_other(tmp_path: Path, forks: Forks) -> None:
    root = _write(tmp_path, {f"a/{number}.jpg": _encoded() for number in range(300)})
    for process in [_start(forks, root) for _ in range(2)]:
        assert process.wait(120) == 0
        assert process.output()[1] == ""
    assert len(open_images(root)) == 300
    assert _names(root) == [INDEX_FILE, "a"]


def test_what_gets_no_index_says_what_it_gets(
    tmp_path: Path, run: Callable[..., tuple[int, dict[str, str], str]]
) -> None:
    (tmp_path / "data").mkdir()
    for name in ("train.csv", "a.tar", "data/train.parquet"):
        (tmp_path / name).touch()
    for place in (tmp_path / "train.csv", tmp_path / "a.tar", tmp_path / "*.tar"):
        code, _, err = run(place)
        assert code == 2 and err.count("\n") == 1
        assert err.endswith(f"get one as shards: tpp shards {place} --output DIR\n")
    code, _, err = run(tmp_path)
    assert (code, err.count("\n")) == (2, 1)
    assert f"make shards of them: tpp shards {tmp_path} --output DIR" in err
