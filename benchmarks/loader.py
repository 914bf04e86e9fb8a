"""How fast images arrive: our loaders beside bare DALI, torchvision and timm.

speed  images per second of every contestant. All do the ImageNet training recipe on the same
       photos: a random window scaled to 224 x 224 (bilinear, antialiased), a flip, normalised
       float32 batches
wait   a training step that takes 1.5 times as long as the loader needs for a batch, and leaves the
       CPU alone as a GPU's would: the share of the time that it waits for the loader
start  from a fresh process to the first batch, and the memory of each process, with an index of the
       photos and one of 1.3 million entries, in one process and in two at once; beside it,
       torchvision's ImageFolder and our own scan listing as many files as is quick
agree  the pixels of our two loaders for the same samples: how many values are equal, and how far
       the others differ, in levels of 255

Every contestant lives in processes of its own, which are stopped while another has its turn. They
take turns pass by pass, since a machine's speed varies; a ratio is that of the passes of one round,
and its median is shown. A pass is all photos, rounded up to a number of batches that the workers
share evenly; it starts after as many batches as a loader can have made ahead. The photos are in the
page cache. Nothing starts or ends within a pass: all streams are endless.

--only names parts, or contestants of speed and wait. Results go to benchmarks/results/loader.json.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import platform
import signal
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from data_pipelines.images.batch import Batch, LoaderSettings
from data_pipelines.images.folders import folder_mark
from data_pipelines.images.image_index import (
    ImageIndex,
    check_fits,
    load_index,
    open_images,
    save_index,
    scan_class_folders,
)
from data_pipelines.images.order import Steps
from data_pipelines.loaders import eval_batches, train_batches, training_order
from data_pipelines.loading.augment import ImageTransform
from tpp.common.command_line import Parser, at_least_one
from tpp.common.errors import UserError, run_command
from tpp.common.files import write_whole
from tpp.common.options import share

RESULTS = Path(__file__).parent / "results" / "loader.json"
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
PARTS = ("speed", "wait", "start", "agree")
SIDE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
RECIPE = ImageTransform(SIDE, 256, "imagenet", MEAN, STD)
STEP_OVER_BATCH = 1.5
# Small enough that the sample makes several shards, as a data set does.
SHARD_BYTES = 16_000_000
SHORTER_SIDE, QUALITY = 400, 90
MODULES = {"dali": "dali", "torchvision": "torch_loader"}
DALI = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")
LIBRARIES = ("torch", "torchvision", *DALI, "timm", "pillow", "numpy")

Result = dict[str, Any]
Batches = Generator[Batch, None, None]
Item = TypeVar("Item")
# A fork would copy the locks of DALI's threads in whatever state they are.
SPAWN = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Setup:
    """What all contestants are given: the photos, as files and in shards, and the settings."""

    folder: Path
    shards: Path
    small_shards: Path
    batch: int
    threads: int
    device: str

    @property
    def ahead(self) -> int:
        """Batches to drop before a pass: what worker processes make ahead; DALI makes fewer."""
        return 2 * max(self.threads, 1)


def _ours(index: ImageIndex, loader: str, setup: Setup) -> Batches:
    return train_batches(
        index,
        RECIPE,
        training_order(index, 0),
        Steps(setup.batch, accumulation=1, start=0, count=2**31),
        LoaderSettings(loader, setup.threads, torch.device(setup.device)),
    )


def _ours_dali(setup: Setup) -> Batches:
    return _ours(open_images(setup.folder), "dali", setup)


def _ours_torchvision(setup: Setup) -> Batches:
    return _ours(open_images(setup.folder), "torchvision", setup)


def _ours_shards(setup: Setup) -> Batches:
    return _ours(open_images(setup.shards), "dali", setup)


def _ours_small_shards(setup: Setup) -> Batches:
    return _ours(open_images(setup.small_shards), "dali", setup)


def _bare_dali(setup: Setup, read: Callable[[], Any]) -> Batches:
    """DALI's own reader and random crop, with the decoder's settings that ours has."""
    from nvidia.dali import Pipeline, fn
    from nvidia.dali.data_node import DataNode
    from nvidia.dali.plugin.pytorch import DALIGenericIterator
    from nvidia.dali.types import DALIDataType, DALIImageType

    pipeline = Pipeline(
        batch_size=setup.batch,
        num_threads=setup.threads,
        device_id=None,
        seed=0,
        prefetch_queue_depth=2,
        exec_dynamic=True,
    )
    with pipeline:
        encoded, labels = read()
        images = fn.decoders.image_random_crop(
            encoded,
            device="cpu",
            output_type=DALIImageType.RGB,
            random_area=list(AREA),
            random_aspect_ratio=list(RATIO),
            num_attempts=10,
            adjust_orientation=False,
            jpeg_fancy_upsampling=True,
        )
        images = cast(DataNode, fn.resize(images, size=(SIDE, SIDE), antialias=True))
        images = fn.crop_mirror_normalize(
            images,
            dtype=DALIDataType.FLOAT,
            output_layout="CHW",
            mean=[255 * mean for mean in MEAN],
            std=[255 * std for std in STD],
            mirror=fn.random.coin_flip(probability=0.5),
        )
        pipeline.set_outputs(images, labels)
    for (made,) in DALIGenericIterator([pipeline], ["images", "labels"]):
        yield made["images"], made["labels"]


def _dali_files(setup: Setup) -> Batches:
    def read() -> Any:
        from nvidia.dali import fn

        return fn.readers.file(file_root=str(setup.folder), random_shuffle=True)

    return _bare_dali(setup, read)


def _dali_shards(setup: Setup) -> Batches:
    def read() -> Any:
        from nvidia.dali import fn

        shards = sorted(setup.shards.glob("*.tar"))
        read_pair: Any = fn.readers.webdataset
        encoded, digits = read_pair(
            paths=[str(shard) for shard in shards],
            index_paths=[str(shard.with_suffix(".idx")) for shard in shards],
            ext=["jpg;png", "cls"],
            random_shuffle=True,
        )
        # Labels are decimal text. Made as long as the longest, they are a tensor.
        return encoded, fn.pad(digits)

    return _bare_dali(setup, read)


def _data_loader(dataset: Any, setup: Setup) -> Batches:
    """A DataLoader over one permutation after the other, so that no epoch ends for its workers."""
    from torch.utils.data import DataLoader, RandomSampler

    yield from DataLoader(
        dataset,
        setup.batch,
        sampler=RandomSampler(dataset, num_samples=2**40),
        num_workers=setup.threads,
    )


def _torchvision_v1(setup: Setup) -> Batches:
    from torchvision import transforms as v1
    from torchvision.datasets import ImageFolder

    transform = v1.Compose(
        [
            v1.RandomResizedCrop(SIDE, AREA, RATIO),
            v1.RandomHorizontalFlip(),
            v1.ToTensor(),
            v1.Normalize(MEAN, STD),
        ]
    )
    return _data_loader(ImageFolder(str(setup.folder), transform), setup)


def _v2(*, tensors: bool) -> Callable[[Any], Any]:
    """The recipe in torchvision's transforms v2, of PIL images or of uint8 tensors."""
    from torchvision.transforms import v2

    return v2.Compose(
        [
            v2.RandomResizedCrop(SIDE, AREA, RATIO, antialias=True),
            v2.RandomHorizontalFlip(),
            *([] if tensors else [v2.PILToTensor()]),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )


def _torchvision_v2(setup: Setup) -> Batches:
    from torchvision.datasets import ImageFolder

    return _data_loader(ImageFolder(str(setup.folder), _v2(tensors=False)), setup)


def _torchvision_decode(setup: Setup) -> Batches:
    from torchvision.datasets import ImageFolder
    from torchvision.io import ImageReadMode, decode_image

    decode = partial(decode_image, mode=ImageReadMode.RGB)
    return _data_loader(ImageFolder(str(setup.folder), _v2(tensors=True), loader=decode), setup)


def _timm(setup: Setup, *, prefetcher: bool) -> Batches:
    from timm.data import create_dataset, create_loader

    loader = create_loader(
        create_dataset("", root=str(setup.folder), is_training=True),
        input_size=(3, SIDE, SIDE),
        batch_size=setup.batch,
        is_training=True,
        scale=AREA,
        ratio=RATIO,
        hflip=0.5,
        color_jitter=0.0,
        interpolation="bilinear",
        mean=MEAN,
        std=STD,
        num_workers=setup.threads,
        device=torch.device("cpu"),
        use_prefetcher=prefetcher,
        persistent_workers=setup.threads > 0,
        # Its workers go on from one epoch to the next.
        use_multi_epochs_loader=True,
    )
    while True:
        yield from loader


@dataclass(frozen=True)
class Contestant:
    """A way to read the photos: what it is, its endless batches, and whether it is ours."""

    label: str
    batches: Callable[[Setup], Batches]
    ours: bool = False
    reads: str = "folder"


CONTESTANTS = {
    "ours": Contestant("ours, DALI, class folders", _ours_dali, True),
    "ours-shards": Contestant("ours, DALI, shards", _ours_shards, True, "shards"),
    "ours-shards-400": Contestant(
        f"ours, DALI, shards at {SHORTER_SIDE} pixels", _ours_small_shards, True, "small_shards"
    ),
    "ours-torchvision": Contestant("ours, torchvision, class folders", _ours_torchvision, True),
    "dali": Contestant("bare DALI, class folders", _dali_files),
    "dali-shards": Contestant("bare DALI, shards", _dali_shards, reads="shards"),
    "torchvision-v1": Contestant("torchvision, PIL, transforms v1", _torchvision_v1),
    "torchvision-v2": Contestant("torchvision, PIL, transforms v2", _torchvision_v2),
    "torchvision-decode": Contestant("torchvision, decode_image, v2", _torchvision_decode),
    "timm": Contestant("timm", partial(_timm, prefetcher=False)),
    "timm-prefetcher": Contestant("timm, its prefetcher", partial(_timm, prefetcher=True)),
}


def describe(stream: Batches) -> Result:
    """What one batch looks like; all contestants' should look alike."""
    images, _ = next(stream)
    return {
        "shape": list(images.shape),
        "dtype": str(images.dtype).removeprefix("torch."),
        "mean": images.float().mean((0, 2, 3)).tolist(),
        "std": images.float().std((0, 2, 3)).tolist(),
    }


def seconds(stream: Batches, setup: Setup, batches: int) -> float:
    """The time of a number of batches at full speed."""
    for _ in range(setup.ahead):
        next(stream)
    _finish(setup)
    started = time.perf_counter()
    for _ in range(batches):
        next(stream)
    _finish(setup)
    return time.perf_counter() - started


def waiting(stream: Batches, setup: Setup, batches: int, steps: int) -> Result:
    """How long a training step waits that takes longer than the loader needs for a batch."""
    step = STEP_OVER_BATCH * seconds(stream, setup, batches) / batches
    # At full speed nothing was made ahead. In a long run, what can be is.
    time.sleep(setup.ahead * step)
    waits = []
    for _ in range(setup.ahead + steps):
        before = time.perf_counter()
        next(stream)
        _finish(setup)
        waits.append(time.perf_counter() - before)
        time.sleep(step)
    waits = waits[setup.ahead :]
    return {
        "step_ms": 1e3 * step,
        "share": sum(waits) / (sum(waits) + steps * step),
        "longest_ms": 1e3 * max(waits),
    }


def _finish(setup: Setup) -> None:
    if setup.device == "cuda":
        torch.cuda.synchronize()


def _serve(name: str, setup: Setup, connection: Connection) -> None:
    """A contestant's process: measure what is asked for until the other end is closed."""
    os.setpgid(0, 0)
    # A spawned process spawns in turn; workers of DataLoader are forked, unless it is told.
    multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(setup.threads)
    try:
        stream = CONTESTANTS[name].batches(setup)
        connection.send(describe(stream))
        while True:
            measure, arguments = connection.recv()
            connection.send(measure(stream, setup, *arguments))
    except (EOFError, BrokenPipeError):
        if CONTESTANTS[name].ours:
            stream.close()
            return
        # Workers of DataLoader that are ended within an epoch may abort, noisily. All that is left
        # of this group is killed next.
        os._exit(0)
    except UserError as error:
        connection.send(error)
    except ImportError as error:
        connection.send(UserError(f"{name}: {error}; install it, or name others with --only"))


class Turns:
    """A contestant in a process group of its own, which is stopped except when it is asked.

    Attributes:
        batch: what its batches look like, see :func:`describe`.
    """

    def __init__(self, name: str, setup: Setup) -> None:
        self.name = name
        self.connection, theirs = SPAWN.Pipe()
        self.process = SPAWN.Process(target=_serve, args=(name, setup, theirs))
        self.process.start()
        theirs.close()
        try:
            self.batch: Result = self._answer()
            self._signal(signal.SIGSTOP)
        except BaseException:
            self.close()
            raise

    def ask(self, measure: Callable[..., Any], *arguments: Any) -> Any:
        """Have it measure something, alone."""
        self._signal(signal.SIGCONT)
        self.connection.send((measure, arguments))
        answer = self._answer()
        self._signal(signal.SIGSTOP)
        return answer

    def close(self) -> None:
        """End its processes."""
        self._signal(signal.SIGCONT)
        self.connection.close()
        self.process.join(10)
        # Whatever is left of them.
        self._signal(signal.SIGKILL)
        self.process.join()

    def _answer(self) -> Any:
        try:
            answer = self.connection.recv()
        except EOFError:
            raise RuntimeError(f"{self.name}: its process ended, see above") from None
        if isinstance(answer, UserError):
            raise answer
        return answer

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid or 0, number)


def unpack(archive: Path, target: Path) -> Path:
    """Unpack a tar of class folders (or of a folder that holds them); where the folders are.

    Raises:
        UserError: it cannot be read, or holds no files in folders.
    """
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(target, filter="data")
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"{archive}: cannot unpack the photos ({error})") from None
    photo = next((path for path in sorted(target.rglob("*")) if path.is_file()), target)
    if len(photo.relative_to(target).parts) < 2:
        raise UserError(f"{archive}: no class folders; expected <class>/<photo>.JPEG in it")
    return photo.parent.parent


def find_archive(name: str) -> Path:
    """The photos' archive: a path, or a file of the folder of shared data.

    Raises:
        UserError: it is in neither place.
    """
    folder = Path(os.environ.get("TPP_SHARED_DATA", SHARED))
    for path in (Path(name), folder / name):
        if path.is_file():
            return path
    raise UserError(
        f"--data: no {name} here nor in {folder}; name a tar of class folders, or set "
        "TPP_SHARED_DATA to the folder that holds it"
    )


def prepare(folder: Path, names: Iterable[str], work: Path, options: argparse.Namespace) -> Setup:
    """Make the shards that the named contestants read."""
    shards = {"shards": work / "shards", "small_shards": work / "small_shards"}
    scaling: dict[str, Result] = {
        "shards": {"resize": None},
        "small_shards": {"resize": SHORTER_SIDE},
    }
    for kind in sorted({CONTESTANTS[name].reads for name in names} - {"folder"}):
        from data_pipelines.sets.shard_writer import write_shards

        write_shards(
            scan_class_folders(folder),
            shards[kind],
            shard_bytes=SHARD_BYTES,
            seed=0,
            quality=QUALITY,
            threads=options.threads,
            **scaling[kind],
        )
    return Setup(folder, **shards, batch=options.batch_size, threads=options.threads, device="cpu")


def measure_contestants(
    names: list[str], setup: Setup, device: str, images: int, options: argparse.Namespace
) -> Result:
    """Parts speed and wait, of which ``options.parts`` may name one or both."""
    # As many of every worker, each of which makes whole batches.
    batches = -(-images // (setup.batch * setup.threads)) * setup.threads
    rounds = options.passes if "speed" in options.parts else 0
    found: Result = {name: {"images_per_second": []} for name in names}
    with ExitStack() as stack:
        turns: dict[str, Turns] = {}
        for name in _progress(names, "starting"):
            ours = CONTESTANTS[name].ours
            given = replace(setup, device=device if ours else "cpu")
            turns[name] = Turns(name, given)
            stack.callback(turns[name].close)
            found[name]["batch"] = turns[name].batch
        for turn in _progress(range(rounds + 1) if rounds else (), "passes"):
            for name in names:
                taken = turns[name].ask(seconds, batches)
                if turn:  # the first one warms up
                    found[name]["images_per_second"].append(batches * setup.batch / taken)
        if "wait" in options.parts:
            waits = {
                name: turns[name].ask(waiting, batches, options.steps)
                for name in _progress(names, "waiting")
            }
    sizes = {"images": images, "batch": setup.batch, "threads": setup.threads, "device": device}
    results: Result = {}
    if rounds:
        results["speed"] = {**sizes, "contestants": _with_ratios(found)}
    if "wait" in options.parts:
        results["wait"] = {**sizes, "steps": options.steps, "contestants": waits}
    return results


def _with_ratios(found: Result) -> Result:
    """Medians, and median ratios to bare DALI and, of ours, to the best of those without DALI."""
    for row in found.values():
        row["median"] = statistics.median(row["images_per_second"])
    others = [name for name in found if not CONTESTANTS[name].ours and "dali" not in name]
    best = max(others, key=lambda name: found[name]["median"], default=None)
    for name, row in found.items():
        row["to_dali"] = _ratio(row, found.get("dali"))
        if CONTESTANTS[name].ours and best:
            row["best_other"] = best
            row["to_best_other"] = _ratio(row, found[best])
    return found


def _ratio(row: Result, other: Result | None) -> float | None:
    if other is None:
        return None
    passes = zip(row["images_per_second"], other["images_per_second"], strict=True)
    return statistics.median(a / b for a, b in passes)


def large_index(folder: Path, entries: int) -> ImageIndex:
    """An index of that many entries, each photo's name as often as it takes, in the usual order."""
    index = scan_class_folders(folder)
    # Entry e is photo e * n // entries, so the order stays that of classes and names.
    photos = np.arange(entries, dtype=np.int64) * len(index) // entries
    paths = [folder / name for name in index.files]
    shapes = []
    for path in paths:
        with Image.open(path) as image:
            shapes.append((image.height, image.width))
    names = list(index.files)
    return ImageIndex.of(
        folder,
        (names[photo] for photo in photos),
        index.labels[photos],
        index.classes,
        byte_sizes=np.array([path.stat().st_size for path in paths], np.int64)[photos],
        sizes=np.array(shapes, np.int32)[photos],
        marks=np.array([folder_mark(folder / name) for name in index.classes], np.int64),
    )


def memory() -> dict[str, float]:
    """Memory of this process group in MB: resident, its share of what is shared, and its own.

    A loader's worker processes are in the group.
    """
    kinds = {"Rss": "rss_mb", "Pss": "pss_mb", "Private_Dirty": "private_dirty_mb"}
    found = dict.fromkeys(kinds.values(), 0.0)
    for folder in Path("/proc").glob("[0-9]*"):
        # A process may end while it is looked at.
        with suppress(OSError):
            if os.getpgid(int(folder.name)) != os.getpgrp():
                continue
            for line in (folder / "smaps_rollup").read_text().splitlines()[1:]:
                kind, size = line.split()[:2]
                if (key := kinds.get(kind.removesuffix(":"))) is not None:
                    found[key] += int(size) * 1024 / 1e6
    return found


@dataclass(frozen=True)
class Start:
    """One of the processes that start at the same moment."""

    loader: str
    index_file: Path
    rank: int
    world_size: int
    launched: float


def _start(start: Start, setup: Setup, barrier: Barrier, connection: Connection) -> None:
    """Go from nothing to the first batch; the processes wait for each other at every stage."""
    os.setpgid(0, 0)
    # What a run's loader imports, before the clock for its first batch starts.
    importlib.import_module(f"data_pipelines.loading.{MODULES[start.loader]}")
    took = {"imports": time.monotonic() - start.launched}
    marks = [_memory_together(barrier)]

    begun = time.monotonic()
    index = load_index(start.index_file, setup.folder)
    took["index"] = time.monotonic() - begun
    begun = time.monotonic()
    check_fits(index)
    took["check"] = time.monotonic() - begun
    marks.append(_memory_together(barrier))

    begun = time.monotonic()
    stream = train_batches(
        index,
        RECIPE,
        training_order(index, 0),
        Steps(setup.batch * start.world_size, accumulation=1, start=0, count=1_000_000),
        LoaderSettings(
            start.loader, setup.threads, torch.device("cpu"), start.rank, start.world_size
        ),
    )
    next(stream)
    took["first_batch"] = time.monotonic() - begun
    marks.append(_memory_together(barrier))
    stream.close()
    grown = {
        stage: {key: mark[key] - marks[0][key] for key in mark}
        for stage, mark in (("after_index", marks[1]), ("after_first_batch", marks[2]))
    }
    connection.send({"seconds": took, "grown": grown})


def _memory_together(barrier: Barrier) -> dict[str, float]:
    barrier.wait()
    found = memory()
    barrier.wait()
    return found


def _list_files(kind: str, folder: Path, connection: Connection) -> None:
    """List a folder: seconds, and the memory that the list takes."""
    from torchvision.datasets import ImageFolder

    os.setpgid(0, 0)
    before, begun = memory(), time.monotonic()
    listed = ImageFolder(str(folder)) if kind == "ImageFolder" else scan_class_folders(folder)
    took = time.monotonic() - begun
    grown = memory()["private_dirty_mb"] - before["private_dirty_mb"]
    connection.send({"seconds": took, "files": len(listed), "private_dirty_mb": grown})


def in_processes(target: Callable[..., None], each: list[tuple[Any, ...]]) -> list[Result]:
    """Run a function in a fresh process for each of the arguments, all at once; their answers.

    Raises:
        RuntimeError: one of them ended without an answer.
    """
    pipes = [SPAWN.Pipe(duplex=False) for _ in each]
    processes = [
        SPAWN.Process(target=target, args=(*arguments, theirs))
        for arguments, (_, theirs) in zip(each, pipes, strict=True)
    ]
    try:
        for process in processes:
            process.start()
        for _, theirs in pipes:
            theirs.close()
        answers = [ours.recv() for ours, _ in pipes]
        for process in processes:
            process.join()
        return answers
    except EOFError:
        raise RuntimeError("a process ended without an answer, see above") from None
    finally:
        for process in processes:
            process.kill()


def measure_start(setup: Setup, work: Path, options: argparse.Namespace) -> Result:
    """The way to the first batch, by loader, entries of the index and number of processes."""
    photos = len(scan_class_folders(setup.folder))
    files = {}
    for entries in (options.entries,) if options.tiny else (photos, options.entries):
        files[entries] = work / f"{entries}.safetensors"
        save_index(large_index(setup.folder, entries), files[entries])
    cases = [
        (loader, entries, processes)
        for loader in (("dali",) if options.tiny else MODULES)
        for entries in files
        for processes in (1, 2)
    ]
    runs: dict[tuple[str, int, int], list[Result]] = {case: [] for case in cases}
    for _ in _progress(range(options.passes), "starts"):
        for loader, entries, processes in cases:
            barrier = SPAWN.Barrier(processes, timeout=300)
            # The processes share the cores, as a node's ranks do.
            threads = max(setup.threads // processes, 1)
            given = replace(setup, threads=threads)
            launched = time.monotonic()
            starts = [
                Start(loader, files[entries], rank, processes, launched)
                for rank in range(processes)
            ]
            answers = in_processes(_start, [(start, given, barrier) for start in starts])
            runs[loader, entries, processes].append(_worst(answers))
    return {
        "rows": [
            {
                "loader": loader,
                "entries": entries,
                "processes": processes,
                "file_mb": files[entries].stat().st_size / 1e6,
                **_medians(found),
            }
            for (loader, entries, processes), found in runs.items()
        ],
        "listing": _listing(work, options.files, options.entries),
    }


def _worst(answers: list[Result]) -> Result:
    """Key by key the largest value of the processes: the slowest rank is what a run waits for."""
    return _combined(max, answers)


def _medians(answers: list[Result]) -> Result:
    return _combined(statistics.median, answers)


def _combined(function: Callable[[Any], Any], answers: list[Any]) -> Any:
    if isinstance(answers[0], dict):
        return {key: _combined(function, [a[key] for a in answers]) for key in answers[0]}
    return function(answers)


def _listing(work: Path, files: int, entries: int) -> Result:
    folder = work / "listed"
    for label in range(max(files // 100, 1)):
        (folder / f"{label:08}").mkdir(parents=True)
    for number in range(files):
        # os.open is several times faster than Path.touch.
        path = folder / f"{number * max(files // 100, 1) // files:08}" / f"{number:08}.JPEG"
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
    result: Result = {}
    for kind in ("ImageFolder", "scan_class_folders"):
        (found,) = in_processes(_list_files, [(kind, folder)])
        rate = found["files"] / found["seconds"]
        result[kind] = {**found, "files_per_second": rate, "entries_would_take": entries / rate}
    return result


def _progress(items: Iterable[Item], what: str) -> Iterable[Item]:
    console = Console(stderr=True)
    return track(items, what, console=console, disable=not console.is_terminal, transient=True)


def measure_agreement(setup: Setup, images: int) -> Result:
    """How far our loaders' pixels differ, over all photos, in levels of 255."""
    index, scale = scan_class_folders(setup.folder), 255 * torch.tensor(STD)[:, None, None]
    steps = Steps(setup.batch, accumulation=1, start=0, count=images // setup.batch)
    found = {}
    for name in ("training", "evaluation"):
        streams = [
            train_batches(index, RECIPE, training_order(index, 0), steps, settings)
            if name == "training"
            else eval_batches(index, RECIPE, setup.batch, settings)
            for settings in (
                LoaderSettings("dali", setup.threads, torch.device("cpu")),
                LoaderSettings("torchvision", 0, torch.device("cpu")),
            )
        ]
        pairs = zip(*streams, strict=True)
        apart = torch.cat([((one - other) * scale).abs() for (one, _), (other, _) in pairs])
        found[name] = {
            "images": len(apart),
            "equal": (apart < 0.01).double().mean().item(),
            "above_1": (apart > 1.01).double().mean().item(),
            "largest": apart.max().item(),
            "largest_mean_of_an_image": apart.mean((1, 2, 3)).max().item(),
        }
    return found


def show(results: Result) -> None:
    """The results as tables."""
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    if "speed" in results:
        _show_speed(results["speed"], console)
    if "wait" in results:
        found = results["wait"]
        table = _table(
            f"waiting for the loader, steps of {STEP_OVER_BATCH} times a batch",
            ["share of the time", "longest, ms", "step, ms"],
        )
        for name, row in found["contestants"].items():
            cells = (f"{row['share']:.2%}", f"{row['longest_ms']:.1f}", f"{row['step_ms']:.0f}")
            table.add_row(CONTESTANTS[name].label, *cells)
        console.print(table, "")
    if "start" in results:
        _show_start(results["start"], console)
    if "agree" in results:
        headings = [
            "images",
            "values equal",
            "beyond 1 level",
            "largest",
            "an image's mean, at most",
        ]
        table = _table("our loaders' pixels, in levels of 255", headings)
        for name, row in results["agree"].items():
            shares = (f"{row['equal']:.3%}", f"{row['above_1']:.1e}", f"{row['largest']:.1f}")
            mean = f"{row['largest_mean_of_an_image']:.2f}"
            table.add_row(name, str(row["images"]), *shares, mean)
        console.print(table)


def _table(title: str, headings: list[str]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    for heading in headings:
        table.add_column(heading, justify="right", vertical="bottom")
    return table


def _show_speed(found: Result, console: Console) -> None:
    title = (
        f"images/s, {found['images']} photos, batch {found['batch']}, {found['threads']} threads "
        "or workers"
    )
    table = _table(title, ["median", "lowest", "highest", "to bare DALI", "to the best without"])
    for name, row in found["contestants"].items():
        passes = row["images_per_second"]
        cells = [f"{value:.0f}" for value in (row["median"], min(passes), max(passes))]
        ratios = (row["to_dali"], row.get("to_best_other"))
        cells += ["" if ratio is None else f"{ratio:.3f}" for ratio in ratios]
        table.add_row(CONTESTANTS[name].label, *cells)
    console.print(table)
    best = {row["best_other"] for row in found["contestants"].values() if "best_other" in row}
    for name in best:
        console.print(f"the best without DALI: {CONTESTANTS[name].label}")
    console.print()


def _show_start(found: Result, console: Console) -> None:
    table = _table(
        "seconds to the first batch, of the slower process; memory grown since the imports, MB",
        ["imports", "index", "check", "first batch"]
        + [f"{kind} {after}" for after in ("index", "batch") for kind in ("RSS", "PSS", "own")],
    )
    for row in found["rows"]:
        several = "es" if row["processes"] > 1 else ""
        name = f"{row['loader']}, {row['entries']:,} entries, {row['processes']} process{several}"
        stages = (row["grown"]["after_index"], row["grown"]["after_first_batch"])
        table.add_row(
            name,
            *(f"{value:.2f}" for value in row["seconds"].values()),
            *(f"{value:.0f}" for stage in stages for value in stage.values()),
        )
    console.print(table)
    for kind, listed in found["listing"].items():
        console.print(
            f"{kind}: {listed['files_per_second']:,.0f} files/s, list of {listed['files']:,} takes "
            f"{listed['private_dirty_mb']:.1f} MB"
        )
    console.print()


def _chosen(only: list[str]) -> tuple[list[str], list[str]]:
    """Parts and contestants that --only names; contestants alone stand for part speed.

    Raises:
        UserError: a name is neither.
    """
    for name in only:
        if name not in PARTS and name not in CONTESTANTS:
            raise UserError(
                f"--only: no {name!r}; there are the parts {', '.join(PARTS)} and the contestants "
                f"{', '.join(CONTESTANTS)}"
            )
    names = [name for name in CONTESTANTS if name in only]
    parts = [part for part in PARTS if part in only]
    if names and not {"speed", "wait"} & set(parts):
        parts.insert(0, "speed")
    return parts or list(PARTS), names or list(CONTESTANTS)


def _options() -> argparse.Namespace:
    parser = Parser.of_script(
        "python -m benchmarks.loader",
        __doc__,
        ["--data photos.tar --tiny --only speed --output /tmp/loader.json"],
    )
    share(parser, "--data", ", as a tar file", metavar="FILE", default="imagenet-sample-500.tar")
    share(parser, "--threads", ", or workers, of each", default=2)
    share(parser, "--batch-size", default=64)
    parser.add_argument(
        "--passes",
        type=at_least_one,
        default=5,
        metavar="N",
        help="timed, of each (default: 5)",
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="parts, or contestants"
    )
    share(parser, "--device", ", for ours", default="cpu")
    share(parser, "--tiny")
    share(parser, "--output", default=RESULTS)
    parser.renamed("--batch", "--batch-size")
    parser.renamed("--quick", "--tiny")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here")
    options.steps, options.entries, options.files = 30, 1_300_000, 100_000
    if options.tiny:
        options.steps, options.entries, options.files = 4, 20_000, 1_000
    options.parts, options.names = _chosen(options.only)
    return options


def _is_there(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def main() -> None:
    """Measure what is asked for and write it down."""
    options = _options()
    archive = find_archive(options.data)
    output = options.output
    results = json.loads(output.read_text()) if output.exists() else {}
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        # Killed processes leave their sockets behind: with this, in a place that is removed.
        os.environ["TMPDIR"] = temporary
        folder = unpack(archive, work / "photos")
        images = len(scan_class_folders(folder))
        if images < options.batch_size:
            raise UserError(
                f"--batch-size {options.batch_size}: {archive} holds only {images} photos"
            )
        compared = {"speed", "wait"} & set(options.parts)
        setup = prepare(folder, options.names if compared else (), work, options)
        found: Result = {}
        if compared:
            found |= measure_contestants(options.names, setup, options.device, images, options)
        if "start" in options.parts:
            found["start"] = measure_start(setup, work, options)
        if "agree" in options.parts:
            found["agree"] = measure_agreement(setup, images)
    on = {
        "date": date.today().isoformat(),
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{name: version(name) for name in LIBRARIES if name not in DALI or _is_there(name)},
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output, json.dumps({**results, **found, "on": on}, indent=1) + "\n")
    show(found)


if __name__ == "__main__":
    run_command(main)
