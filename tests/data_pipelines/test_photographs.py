"""Photographs for super-resolution, from archives to folders."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from archives_for_tests import member, write_tar, write_zip
from bicubic_reference import SET5, imresize
from PIL import Image

from data_pipelines.sets.preparation import STATE_FILE

Run = Callable[..., str]
Files = list[tuple[str, bytes]]


@pytest.fixture(scope="module")
def photos(shared_data: Callable[[str], Path]) -> Files:
    """23 real photographs, one of them grey, in no order."""
    found = {}
    with tarfile.open(shared_data("imagenet-sample-500.tar")) as opened:
        for one in opened:
            if len(found) < 22 or "beaker" in one.name:
                found[one.name] = opened.extractfile(one).read()  # type: ignore[union-attr]
    return sorted(found.items(), key=lambda item: item[0][::-1])


def contents(root: Path) -> dict[str, bytes]:
    """All files, hidden ones too."""
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def pixels(content: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(content)))


def test_of_ten_photographs_nine_are_for_training(run, photos, tmp_path):
    archive = write_tar(tmp_path / "a.tar", [("top/._n.JPEG", b"Mac"), ("top/x.txt", b""), *photos])
    said = run("photos", "--archive", archive, "--output", tmp_path / "out")
    ordered = sorted(photos)
    expected = {}
    for place, (path, content) in enumerate(ordered):
        split = "val" if place in (9, 19) else "train"
        expected[f"{split}/photos/{Path(path).stem}.jpg"] = content
    assert contents(tmp_path / "out") == expected
    assert [line.split()[:3] for line in said.splitlines()[:2]] == [
        ["train/photos", "21", "images,"],
        ["val/photos", "2", "images,"],
    ]
    assert said.endswith(f"next         train with data.root={tmp_path / 'out'}\n")


def test_halved_as_matlab_does_it(run, photos, tmp_path):
    few = sorted(photos)[:2] + [one for one in photos if "beaker" in one[0]]
    archive = write_zip(tmp_path / "a.zip", few)
    run("photos", "--archive", archive, "--halve", "--only", "train", "--output", tmp_path / "out")
    made = contents(tmp_path / "out")
    assert set(made) == {f"train/photos/{Path(path).stem}.png" for path, _ in few}
    for path, content in few:
        before = pixels(content).astype(float)
        after = pixels(made[f"train/photos/{Path(path).stem}.png"])
        size = tuple(-(-side // 2) for side in before.shape[:2])
        planes = before.reshape(*before.shape[:2], -1)
        truth = np.stack([imresize(planes[:, :, c], size, 0.5) for c in range(planes.shape[2])], 2)
        assert after.reshape(truth.shape).tolist() == truth.tolist()
    assert before.ndim == 2


def test_paths_tell_apart_what_names_do_not(run, photos, tmp_path):
    files = [(f"{top}/1.jpg", content) for top, (_, content) in zip("ab", photos, strict=False)]
    run("photos", "--archive", write_zip(tmp_path / "a.zip", files), "--output", tmp_path / "out")
    assert set(contents(tmp_path / "out")) == {"train/photos/a-1.jpg", "train/photos/b-1.jpg"}


def test_done_before_and_gone_on_with(run, refused, photos, tmp_path):
    archive, out = write_tar(tmp_path / "a.tar", photos), tmp_path / "out"
    command = ("photos", "--archive", archive, "--output", out)
    run(*command, "--only", "val")
    assert [path.name for path in out.iterdir()] == ["val"]
    val = contents(out)
    # What a run leaves that was killed.
    leftover = out / "train" / ".photos.77.tmp"
    leftover.mkdir(parents=True)
    (leftover / "half.jpg").write_bytes(b"half")
    said = run(*command)
    assert "was there" not in said.splitlines()[0]
    assert said.splitlines()[1].endswith("; was there")
    found = contents(out)
    assert len(found) == len(photos) and found.items() >= val.items()
    (out / "val" / "photos" / "more.jpg").write_bytes(b"")
    assert "val/photos: holds 3 files, 2 images belong there; delete" in refused(*command)


def test_whole_or_not_at_all(refused, photos, tmp_path):
    out = tmp_path / "out"
    path, content = sorted(photos)[10]
    files = [(name, data if name != path else content[:5000]) for name, data in photos]
    archive = write_tar(tmp_path / "a.tar", files)
    for halve in ((), ("--halve",)):
        said = refused("photos", "--archive", archive, "--output", out, *halve)
        assert said == f"error: {archive}: {path}: truncated\n"
        assert not out.exists()


@pytest.mark.parametrize(
    ("files", "options", "expected"),
    [
        ([("a.txt", b"")], (), "no images in this archive"),
        ([("a.png", b"")], ("--only", "val"), "of its 1 images none is for val"),
        ([("a.png", b""), ("a.jpg", b"")], (), "a.jpg and a.png would both be called a"),
        ([("../a.png", b"")], (), "would lie outside of the folder"),
        ([("a.png", b"")], (), "a.png: empty file"),
    ],
)
def test_mistakes(refused, tmp_path, files, options, expected):
    archive = write_tar(tmp_path / "a.tar", files)
    said = refused("photos", "--archive", archive, "--output", tmp_path / "out", *options)
    assert f"{archive}: " in said and expected in said
    assert not (tmp_path / "out").exists()


def test_links_and_other_sets_are_refused(refused, photos, tmp_path):
    out = tmp_path / "out"
    archive = tmp_path / "a.tar"
    archive.write_bytes(member("a.png", kind=tarfile.SYMTYPE, to="/etc/passwd") + bytes(1024))
    assert "is a link" in refused("photos", "--archive", archive, "--output", out)
    out.mkdir()
    (out / STATE_FILE).write_text("{}")
    archive = write_tar(tmp_path / "b.tar", photos)
    assert "holds a data set with class folders" in refused(
        "photos", "--archive", archive, "--output", out
    )


# --- sets that are known --------------------------------------------------------------------------


def png(number: int) -> bytes:
    made = io.BytesIO()
    Image.new("RGB", (2, 3), (number % 256, number // 256, 7)).save(made, "PNG")
    return made.getvalue()


PNGS = [png(number) for number in range(901)]


def numbered(folder: str, numbers: range, pattern: str) -> Files:
    return [(f"{folder}/{pattern.format(n)}", PNGS[n]) for n in numbers]


def div2k(split: str, numbers: range) -> Files:
    return numbered(f"DIV2K_{split}_HR", numbers, "{:04}.png")


def test_div2k_from_its_two_archives_and_set5_beside_it(run, refused, shared_data, tmp_path):
    out = tmp_path / "out"
    train = write_zip(tmp_path / "DIV2K_train_HR.zip", div2k("train", range(1, 801)))
    val = write_zip(tmp_path / "DIV2K_valid_HR.zip", div2k("valid", range(801, 901)))
    run("div2k", "--train", train, "--output", out)
    said = run("div2k", "--train", train, "--val", val, "--output", out).splitlines()
    assert said[0].startswith("train/DIV2K  800 images") and said[0].endswith("; was there")
    assert said[1].startswith("val/DIV2K    100 images")
    archive = shared_data("set5.tar.gz")
    assert run("set5", "--archive", archive, "--output", out).startswith(
        "val/Set5     5 images, 85"
    )
    expected = {f"train/DIV2K/{n:04}.png": PNGS[n] for n in range(1, 801)}
    expected |= {f"val/DIV2K/{n:04}.png": PNGS[n] for n in range(801, 901)}
    with tarfile.open(archive) as opened:
        for name in SET5:
            file = opened.extractfile(f"Set5/HR/{name}.png")
            expected[f"val/Set5/{name}.png"] = file.read()  # type: ignore[union-attr]
    assert contents(out) == expected
    train.unlink()  # what is there is not read again
    assert "800 images" in run("div2k", "--train", train, "--output", out)


@pytest.mark.parametrize(
    ("numbers", "says"),
    [
        (range(1, 800), "no DIV2K_train_HR/0800.png in it; 800 images are expected"),
        (range(2, 795), "no DIV2K_train_HR/0001.png and 6 more in it; 800 images are expected"),
    ],
)
def test_div2k_that_lacks_images(refused, tmp_path, numbers, says):
    train = write_zip(tmp_path / "a.zip", div2k("train", numbers))
    assert says in refused("div2k", "--train", train, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert "name the archives" in refused("div2k", "--output", tmp_path / "out")


def self_ex(scale: int, numbers: range, top: str = "") -> Files:
    """SelfExSR's folder of large images, small ones, and results of methods."""
    return [
        (f"{top}image_SRF_{scale}/img_{n:03}_SRF_{scale}_{kind}.png", PNGS[100 * scale + n + more])
        for n in numbers
        for more, kind in ((0, "HR"), (300, "LR"), (400, "SRCNN"))
    ]


HUNDRED = range(1, 101)


@pytest.mark.parametrize(
    ("name", "files", "options", "folder", "expected"),
    [
        ("set5", [(f"Set5/{n}.png", PNGS[i]) for i, n in enumerate(SET5)], (), "Set5", SET5),
        (
            "set5",
            [
                (f"x/Set5/{f}/{n}{end}.png", PNGS[i + more])
                for more, f, end in ((9, "LR", ""), (0, "original", ""), (20, "GTmod12", ""))
                for i, n in enumerate(SET5)
            ],
            (),
            "Set5",
            SET5,
        ),
        ("set14", numbered("Set14_HR", range(14), "{}.png"), (), "Set14", map(str, range(14))),
        (
            "set14",
            numbered("CUrban100", range(14, 114), "{}.png")
            + numbered("CSet14", range(14), "{}.png"),
            (),
            "Set14",
            map(str, range(14)),
        ),
        (
            "b100",
            numbered("BSDS300/images/train", range(200, 400), "{}.png")
            + numbered("BSDS300/images/test", range(100), "{}.png"),
            (),
            "B100",
            map(str, range(100)),
        ),
        (
            "urban100",
            self_ex(2, HUNDRED, "Urban100/") + self_ex(4, HUNDRED, "Urban100/"),
            ("--scale", 4),
            "Urban100",
            [f"img_{n:03}" for n in HUNDRED],
        ),
    ],
)
def test_layouts_of_test_sets(run, tmp_path, name, files, options, folder, expected):
    archive = write_zip(tmp_path / "a.zip", files)
    run(name, "--archive", archive, "--output", tmp_path / "out", *options)
    first = {"urban100": 401}.get(name, 0)
    assert contents(tmp_path / "out") == {
        f"val/{folder}/{name}.png": PNGS[first + place] for place, name in enumerate(expected)
    }


def test_a_bitmap_becomes_png(run, tmp_path):
    files = []
    for name in SET5:
        made = io.BytesIO()
        Image.new("RGB", (3, 2), (1, 2, 250)).save(made, "BMP")
        files.append((f"Set5/{name}.bmp", made.getvalue()))
    run("set5", "--archive", write_zip(tmp_path / "a.zip", files), "--output", tmp_path / "out")
    made = contents(tmp_path / "out")
    assert set(made) == {f"val/Set5/{name}.png" for name in SET5}
    assert (pixels(made["val/Set5/bird.png"]) == [1, 2, 250]).all()


@pytest.mark.parametrize(
    ("name", "files", "says"),
    [
        (
            "set5",
            [(f"Set5/HR/{n}.png", PNGS[0]) for n in SET5[1:]],
            "4 images in Set5/HR (bird, butterfly, head, woman); Set5 has 5",
        ),
        (
            "urban100",
            self_ex(2, range(3, 101)),
            "98 images in image_SRF_2, without number 1 and 1 more; Urban100 has 100",
        ),
        ("b100", numbered("BSD100", range(1, 102), "{}.png"), "101 images in BSD100; B100 has 100"),
        (
            "set14",
            numbered("Set14/LR_bicubic/X2", range(14), "{}x2.png"),
            "no large images of Set14; expected Set14/, or in it HR/, GTmod12/ or original/",
        ),
    ],
)
def test_another_number_of_images(refused, tmp_path, name, files, says):
    archive = write_zip(tmp_path / "a.zip", files)
    assert says in refused(name, "--archive", archive, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()
