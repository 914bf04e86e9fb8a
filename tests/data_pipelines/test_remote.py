"""Images in an object store: the batches of a disk to the bit, whatever happens on the way."""

import io
import multiprocessing.forkserver
import pickle
import shutil
import tarfile
import time
from pathlib import Path

import pytest
import torch
from object_service import BUCKET, ObjectService, object_service
from tiny_run import make_tiny_data

import tpp.common.object_storage
from data_pipelines import index as index_command
from data_pipelines.images import remote
from data_pipelines.images.batch import Batch, LoaderSettings
from data_pipelines.images.image_index import INDEX_FILE, ImageIndex, open_images
from data_pipelines.images.order import Steps
from data_pipelines.images.remote import keep_shards, open_remote
from data_pipelines.images.source import BadImages
from data_pipelines.loaders import eval_batches, train_batches, training_order
from data_pipelines.loading.augment import ImageTransform
from data_pipelines.sets.shard_writer import write_shards
from tpp.common.errors import UserError
from tpp.common.object_storage import AwayError, Store

pytest.importorskip("s3fs")
pytest.importorskip("moto.server")

TRANSFORM = ImageTransform(32, None, "cifar", (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), 3)
LOADERS = ["dali", "torchvision"]
SHARD_BYTES = 60_000


@pytest.fixture(scope="module")
def running():
    with object_service() as service:
        yield service


@pytest.fixture
def service(running: ObjectService, monkeypatch, tmp_path):
    monkeypatch.setattr(tpp.common.object_storage, "_PAUSES", (0.05, 0.1))
    monkeypatch.setattr(remote, "_LOOK_EVERY", 0.05)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield running
    running.mend()
    running.requests.clear()


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Training images in a few shards."""
    folder = tmp_path_factory.mktemp("shards")
    data = make_tiny_data(folder / "tiny")
    write_shards(open_images(data / "train"), folder / "train", shard_bytes=SHARD_BYTES)
    assert len([*(folder / "train").glob("*.tar")]) > 3
    return folder / "train"


def upload(folder: Path, url: str) -> str:
    for path in folder.rglob("*"):
        if path.is_file():
            Store(url).write(path.relative_to(folder).as_posix(), path.read_bytes())
    return url


@pytest.fixture(scope="module")
def url(running: ObjectService, shards: Path) -> str:
    return upload(shards, f"s3://{BUCKET}/set/train")


def train(index: ImageIndex, loader: str, window: int | None = None, **more) -> list[Batch]:
    order = training_order(index, 3, window=window)
    settings = LoaderSettings(loader, more.pop("threads", 0), torch.device("cpu"))
    steps = Steps(16, 1, 5, 4)  # across the end of the epoch of 96 images
    return list(train_batches(index, TRANSFORM, order, steps, settings, **more))


def same(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) and all(
        a.equal(b) and m.equal(n) for (a, m), (b, n) in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("loader", LOADERS)
def test_batches_are_those_of_a_disk_to_the_bit(service, shards, url, loader, tmp_path):
    there, here = open_images(shards), open_remote(url)
    assert here.fingerprint == there.fingerprint and here.url == url
    for window in (None, 30):
        assert same(train(here, loader, window), train(there, loader, window))
    settings = LoaderSettings(loader, 0, torch.device("cpu"))
    evaluated = [[*eval_batches(index, TRANSFORM, 20, settings)] for index in (here, there)]
    assert len(evaluated[0]) == 5 and same(*evaluated)
    asked = [line for line in service.requests if ".tar " in line]
    assert len(asked) >= 2 * 4 * 16 + 96
    # As a worker process has it.
    assert pickle.loads(pickle.dumps(here)).location(5) == here.location(5)
    assert here.location(5).path.startswith(f"{url}/")


@pytest.fixture
def fresh_workers(service) -> None:
    """Workers come from a server process, whose environment is that of the first test with any."""
    multiprocessing.forkserver._forkserver._stop()


@pytest.mark.processes
def test_a_worker_process_hands_over_that_the_store_is_gone(service, fresh_workers, url):
    index = open_remote(url)
    service.break_("refuse", at=r"^GET .*\.tar")
    with pytest.raises(AwayError, match=r"\.tar: cannot be reached"):
        train(index, "torchvision", threads=1)


@pytest.mark.processes
def test_worker_processes_read_too(service, fresh_workers, shards, url):
    assert same(
        train(open_remote(url), "torchvision", threads=1), train(open_images(shards), "torchvision")
    )


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("fault", ["503", "cut", "refuse"])
def test_faults_that_pass_change_nothing(service, shards, url, loader, fault):
    index = open_remote(url)
    service.break_(fault, at=r"^GET .*\.tar", times=6)
    assert same(train(index, loader), train(open_images(shards), loader))
    assert service.times == 0


@pytest.mark.parametrize("loader", LOADERS)
def test_a_store_that_is_gone_ends_the_run_and_no_image_is_called_bad(service, url, loader):
    index = open_remote(url)
    bad = BadImages(index, on_error="skip", limit=0.9)
    service.break_("refuse", at=r"^GET .*\.tar")
    with pytest.raises(AwayError, match=rf"^{url}/[^ ]*\.tar: cannot be reached \(.*\)$"):
        train(index, loader, bad=bad)
    assert bad.take_new() == []


def test_shards_are_kept_here_once_and_read_from_here(service, shards, url, tmp_path):
    index = open_remote(url, tmp_path)
    keep_shards([index], None)
    keep_shards([index], None)  # of another rank
    wait_until(lambda: all((index.root / name).exists() for name in index.containers))
    fetched = [line for line in service.requests if line.startswith("GET") and ".tar " in line]
    assert len(fetched) == len(index.containers)
    for name in index.containers:
        assert (index.root / name).read_bytes() == (shards / name).read_bytes()
    service.break_("refuse")
    for loader in LOADERS:
        assert same(train(index, loader), train(open_images(shards), loader))


def test_a_full_cache_keeps_what_it_has_and_the_rest_is_read(
    service, shards, url, tmp_path, capsys
):
    index = open_remote(url, tmp_path)
    index_size = sum(path.stat().st_size for path in index.root.iterdir())
    room = index_size + int(index.marks[:2].sum())
    leftover = index.root / f".{index.containers[0]}.1.tmp"
    leftover.write_bytes(b"x" * SHARD_BYTES)
    keep_shards([index], room / 1e9)
    wait_until(lambda: "there is no room for the other" in capsys.readouterr().out)
    assert [(index.root / name).exists() for name in index.containers[:3]] == [True, True, False]
    assert not leftover.exists()
    service.requests.clear()
    assert same(train(index, "torchvision"), train(open_images(shards), "torchvision"))
    asked = [line for line in service.requests if ".tar " in line]
    assert asked and not any(index.containers[0] in line for line in asked)


def test_fetching_goes_on_when_the_store_is_back(service, url, tmp_path, capsys):
    index = open_remote(url, tmp_path)
    service.break_("refuse", at=r"^GET .*\.tar")
    keep_shards([index], None)
    wait_until(lambda: "its images are read one by one" in capsys.readouterr().out)
    service.mend()
    wait_until(lambda: all((index.root / name).exists() for name in index.containers))


def test_tars_of_others_and_class_folders_with_an_index(service, tmp_path, capsys):
    data = make_tiny_data(tmp_path / "tiny") / "train"
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    with tarfile.open(foreign / "a.tar", "w") as tar:
        for label, folder in enumerate(sorted(data.iterdir())):
            for path in sorted(folder.iterdir())[:6]:
                for name, content in ((path.name, path.read_bytes()), ("cls", b"%d" % label)):
                    ending = name.rpartition(".")[2]
                    member = tarfile.TarInfo(f"{folder.name}-{path.stem}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    for folder, name in ((foreign, "foreign"), (data, "folders")):
        index_command.main([str(folder)])
        there = f"s3://{BUCKET}/{name}"
        with pytest.raises(UserError, match=rf"^{there}/.index.safetensors: no such object or b"):
            open_remote(there)
        here = open_remote(upload(folder, there))
        assert same(train(here, "dali"), train(open_images(folder), "dali"))
        assert here.name(0).startswith(f"{there}/")
    capsys.readouterr()


def test_an_index_of_other_shards_is_refused(service, shards, url, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(shards, other)
    tar = sorted(other.glob("*.tar"))[1]
    tar.write_bytes(tar.read_bytes() + bytes(512))
    there = upload(other, f"s3://{BUCKET}/other")
    size = tar.stat().st_size
    with pytest.raises(
        UserError, match=rf"{there}/{tar.name} has {size:,} bytes instead of {size - 512:,}; copy"
    ):
        open_remote(there)
    Store(there).delete([tar.name])
    with pytest.raises(UserError, match=rf"{there}/{tar.name} is not there; copy the shards"):
        open_remote(there)
    Store(there).write(INDEX_FILE, b"x" * 100)
    with pytest.raises(UserError, match="damaged index"):
        open_remote(there)


def wait_until(true, seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "it never came"
        time.sleep(0.02)
