"""The loaders' benchmark compares the same work, one contestant at a time, and the script runs."""

import itertools
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import RandomResizedCrop

import benchmarks.loader
from benchmarks.loader import (
    CONTESTANTS,
    PARTS,
    Setup,
    Turns,
    _chosen,
    _with_ratios,
    find_archive,
    large_index,
    prepare,
    seconds,
    unpack,
    waiting,
)
from data_pipelines.images.image_index import check_fits, load_index, save_index
from tpp.common.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
PHOTOS = 48


@pytest.fixture(scope="module")
def archive(shared_data, tmp_path_factory) -> Path:
    """The first photos of the real archive, in an archive of their own."""
    path = tmp_path_factory.mktemp("archive") / "photos.tar"
    with tarfile.open(shared_data("imagenet-sample-500.tar")) as whole:
        members = list(itertools.islice((m for m in whole if m.isfile()), PHOTOS))
        with tarfile.open(path, "w") as part:
            for member in members:
                part.addfile(member, whole.extractfile(member))
    return path


@pytest.fixture(scope="module")
def setup(archive, tmp_path_factory) -> Setup:
    work = tmp_path_factory.mktemp("work")
    folder = unpack(archive, work / "photos")
    return prepare(folder, CONTESTANTS, work, SimpleNamespace(batch_size=PHOTOS, threads=1))


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.loader", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=400)


def figures(images: torch.Tensor) -> list[float]:
    """Brightness and contrast of each channel."""
    return [*images.mean((0, 2, 3)).tolist(), *images.std((0, 2, 3)).tolist()]


def movement(first: torch.Tensor, second: torch.Tensor) -> float:
    """How much a photo differs from one pass to the next, coarsely.

    Which photo is which, and which one is mirrored, nobody says: it is the nearest.
    """
    coarse = [F.avg_pool2d(images.mean(1), 14).double() for images in (first, second)]
    ways = (coarse[1], coarse[1].flip(-1))
    distances = [torch.cdist(coarse[0].flatten(1), way.flatten(1)) for way in ways]
    return torch.stack(distances).amin((0, 2)).median().item()


@pytest.fixture(scope="module")
def expected(setup) -> torch.Tensor:
    """Three passes by PIL and NumPy, with torchvision's draw of the windows."""
    torch.manual_seed(0)
    made = []
    for path in [*sorted(setup.folder.glob("*/*"))] * 3:
        with Image.open(path) as image:
            photo = image.convert("RGB")
        shape = torch.empty(3, photo.height, photo.width)
        top, left, height, width = RandomResizedCrop.get_params(shape, [0.08, 1], [3 / 4, 4 / 3])
        box = (left, top, left + width, top + height)
        pixels = np.asarray(photo.crop(box).resize((224, 224), Image.Resampling.BILINEAR)) / 255
        made.append((pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225])
    return torch.tensor(np.stack(made)).permute(0, 3, 1, 2).float()


@pytest.mark.parametrize("name", CONTESTANTS)
def test_every_contestant_follows_the_recipe(name, setup, expected):
    workers = "torchvision" in name or "timm" in name
    # Worker processes are left out: forking this process, which runs DALI, is not safe.
    given_ = SimpleNamespace(**{**vars(setup), "threads": 0 if workers else 1})
    torch.manual_seed(1)
    stream = CONTESTANTS[name].batches(given_)
    made = [next(stream)[0] for _ in range(3)]
    stream.close()
    for images in made:
        assert images.shape == (PHOTOS, 3, 224, 224) and images.dtype == torch.float32
    assert figures(torch.cat(made)) == pytest.approx(figures(expected), abs=0.15)
    # Windows are drawn anew, from as wide a range.
    found, reference = (
        np.mean([movement(*pair) for pair in itertools.combinations(passes, 2)])
        for passes in (made, expected.split(PHOTOS))
    )
    assert found == pytest.approx(reference, rel=0.25)


def states(group: int) -> dict[int, str]:
    """State of each process of a group that is not a zombie."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found[int(folder.name)] = fields[0]
    return found


def reached(group: int, wanted: set[str]) -> bool:
    """Whether the group's processes come to be in these states; a signal takes a moment."""
    for _ in range(1000):
        if set(states(group).values()) == wanted:
            return True
        time.sleep(0.01)
    return False


@pytest.mark.processes
def test_a_contestant_is_stopped_except_in_its_turn(setup):
    turns = Turns("timm", Setup(**{**vars(setup), "batch": 8, "threads": 2}))
    group = turns.process.pid
    try:
        assert turns.batch["shape"] == [8, 3, 224, 224]
        assert reached(group, {"T"}) and len(states(group)) == 3
        assert turns.ask(seconds, 1) > 0
        assert reached(group, {"T"})
    finally:
        turns.close()
    assert reached(group, set())


@pytest.mark.processes
def test_a_mistake_in_a_contestant_arrives(setup, tmp_path):
    with pytest.raises(UserError, match="no class folders"):
        Turns("ours", Setup(**{**vars(setup), "folder": tmp_path})).close()


class Clock:
    """Time that passes only when somebody sleeps."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, length: float) -> None:
        self.now += length


def test_waiting_is_the_share_of_time_without_a_batch(setup, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(benchmarks.loader, "time", clock)

    def idle_loader():
        """Makes a batch in 2 s, when it is asked and not before."""
        while True:
            clock.sleep(2)
            yield None

    def busy_loader():
        """Makes a batch in 2 s whatever happens, and keeps them all."""
        begun = clock.now
        for made in itertools.count(1):
            clock.now = max(clock.now, begun + 2.0 * made)
            yield None

    found = waiting(idle_loader(), setup, 5, 10)
    assert found == {"step_ms": 3000, "share": pytest.approx(2 / 5), "longest_ms": 2000}
    assert waiting(busy_loader(), setup, 5, 10)["share"] == 0


def test_ratios_are_those_of_one_round():
    passes = {
        "ours": [100.0, 20.0, 300.0],
        "dali": [50.0, 40.0, 100.0],
        "dali-shards": [900.0, 900.0, 900.0],
        "timm": [10.0, 60.0, 400.0],
        "ours-shards": [1.0, 6.0, 40.0],
    }
    found = _with_ratios({name: {"images_per_second": list(p)} for name, p in passes.items()})
    assert [found[name]["median"] for name in passes] == [100, 50, 900, 60, 6]
    assert found["ours"]["to_dali"] == 2 and found["dali"]["to_dali"] == 1
    # timm's median is the higher one; ratios 10, 1/3, 3/4 and 1/10 each.
    assert found["ours"]["best_other"] == "timm" and found["ours"]["to_best_other"] == 3 / 4
    assert found["ours-shards"]["to_best_other"] == 1 / 10
    assert "best_other" not in found["dali"]


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(entries=st.integers(1, 5 * PHOTOS))
def test_a_large_index_is_of_real_files(setup, tmp_path, entries):
    index = large_index(setup.folder, entries)
    assert len(index) == entries
    counts = np.unique_counts(list(index.files)).counts
    assert counts.max() - counts.min() <= 1
    assert list(index.files) == sorted(index.files)
    for number in range(0, entries, 7):
        path = setup.folder / index.files[number]
        assert path.parent.name == index.classes[index.labels[number]]
        assert path.stat().st_size == index.byte_sizes[number]
        with Image.open(path) as image:
            assert (image.height, image.width) == tuple(index.sizes[number])
    save_index(index, tmp_path / "index")
    check_fits(load_index(tmp_path / "index", setup.folder))


def test_memory_is_that_of_the_process_group():
    script = """
import os, json, numpy as np
from benchmarks.loader import memory
os.setpgid(0, 0)
before = memory()
held = np.ones(5_000_000)
private = memory()["private_dirty_mb"] - before["private_dirty_mb"]
ready, go = os.pipe(), os.pipe()
if not os.fork():
    more = np.ones(10_000_000)
    os.write(ready[1], b"1")
    os.read(go[0], 1)
    os._exit(0)
os.read(ready[0], 1)
after = memory()
os.write(go[1], b"1")
print(json.dumps({"private": private} | {kind: after[kind] - before[kind] for kind in after}))
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=100)
    assert done.returncode == 0, done.stderr
    grown = json.loads(done.stdout)
    assert grown["private"] == pytest.approx(40, abs=10)
    # 40 MB before the fork and 80 after it, in the other; PSS counts the 40 once, RSS twice.
    assert grown["pss_mb"] == pytest.approx(120, abs=30)
    assert grown["rss_mb"] > grown["pss_mb"] + 35


def test_every_part_runs_at_tiny_sizes(archive, tmp_path):
    output = tmp_path / "loader.json"
    output.write_text('{"kept": 1}')
    names = ("ours", "torchvision-v2")
    sizes = ("--batch-size", 20, "--passes", 1, "--tiny", "--output", output)
    done = run("--data", archive, "--only", *PARTS, *names, *sizes)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    results = json.loads(output.read_text())
    assert list(results) == ["kept", *PARTS, "on"]
    speed = results["speed"]
    assert speed["images"] == PHOTOS and list(speed["contestants"]) == list(names)
    for row in speed["contestants"].values():
        assert len(row["images_per_second"]) == 1 and row["median"] > 0
    assert all(0 <= row["share"] <= 1 for row in results["wait"]["contestants"].values())
    rows = results["start"]["rows"]
    assert [(row["loader"], row["processes"]) for row in rows] == [("dali", 1), ("dali", 2)]
    for row in rows:
        assert row["entries"] == 20_000
        assert list(row["seconds"]) == ["imports", "index", "check", "first_batch"]
        # A batch of 20 images in float32 is 12 MB.
        assert row["grown"]["after_first_batch"]["private_dirty_mb"] > 12
    assert {listed["files"] for listed in results["start"]["listing"].values()} == {1000}
    for row in results["agree"].values():
        assert row["images"] > 0 and row["equal"] > 0.9 and row["largest"] < 3
    assert (
        "ours, DALI, class folders" in done.stdout
        and "the best without DALI: torchvision" in done.stdout
    )


def test_names_of_parts_and_contestants():
    everything = list(CONTESTANTS)
    assert _chosen([]) == (list(PARTS), everything)
    assert _chosen(["timm", "ours"]) == (["speed"], ["ours", "timm"])
    assert _chosen(["wait"]) == (["wait"], everything)
    assert _chosen(["dali", "wait"]) == (["wait"], ["dali"])
    assert _chosen(["start", "dali"]) == (["speed", "start"], ["dali"])


def test_mistakes_are_one_line(archive, tmp_path, monkeypatch):
    output = tmp_path / "results" / "loader.json"
    done = run("--data", archive, "--only", "ours", "--batch-size", PHOTOS + 1, "--output", output)
    assert done.returncode == 2 and not output.exists()
    assert (
        done.stderr == f"error: --batch-size {PHOTOS + 1}: {archive} holds only {PHOTOS} photos\n"
    )
    with pytest.raises(UserError, match="--only: no 'dally'; there are the parts speed, wait"):
        _chosen(["ours", "dally"])
    monkeypatch.setenv("TPP_SHARED_DATA", str(archive.parent))
    assert find_archive(archive.name) == archive
    with pytest.raises(UserError, match=r"--data: no photo\.tar here nor in "):
        find_archive("photo.tar")
    (tmp_path / "text.tar").write_text("no tar")
    with pytest.raises(UserError, match=r"text\.tar: cannot unpack"):
        unpack(tmp_path / "text.tar", tmp_path / "out")
    with tarfile.open(tmp_path / "flat.tar", "w") as tar:
        tar.add(tmp_path / "text.tar", os.fspath("photo.JPEG"))
    with pytest.raises(UserError, match=r"flat\.tar: no class folders"):
        unpack(tmp_path / "flat.tar", tmp_path / "out")
