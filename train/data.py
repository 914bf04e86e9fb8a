"""The images of a run: opened once for all ranks, and fed to its stages."""

from collections.abc import Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.distributed as dist

from data_pipelines.images.batch import Batch, LoaderSettings
from data_pipelines.images.episodes import EpisodeOrder
from data_pipelines.images.image_index import ImageIndex, load_index
from data_pipelines.images.order import SampleOrder, Steps
from data_pipelines.images.remote import fetch_index, keep_shards
from data_pipelines.images.source import BadImages
from data_pipelines.loaders import (
    eval_batches,
    resolve_loader,
    train_batches,
    training_order,
)
from data_pipelines.loading.augment import ImageTransform
from data_pipelines.sets.inputs import Input, open_input, where_class_is
from tpp.common.errors import UserError, printable
from tpp.common.object_storage import is_url
from tpp.models.preparation import changed
from train.config.config import Config
from train.distributed.collectives import led_by_main_rank
from train.tasks.base import Task

if TYPE_CHECKING:
    from accelerate import Accelerator

Side = Literal["train", "val"]
SIDES: tuple[Side, ...] = get_args(Side)
# Where there are more folders, they are none that anyone wants a figure of each of.
_MOST_TEST_SETS = 20


@dataclass(frozen=True)
class Images:
    """The images of one side of a data set, and what is known of bad ones on this rank."""

    index: ImageIndex
    bad: BadImages


class RunData:
    """The training and validation images of a run, on every rank.

    Args:
        config: the run's configuration.
        accelerator: the ranks.

    Attributes:
        train, val: the images.
        loader: 'dali' or 'torchvision'.
        skipped: on the main rank, the bad images that were handed out, and why each is bad.

    Raises:
        UserError: on all ranks alike, whichever found it: there are no images, an index does not
            fit its folder, the ranks see different images, more images are broken than may be.
    """

    def __init__(self, config: Config, accelerator: "Accelerator") -> None:
        self._config, self._accelerator = config, accelerator
        self.skipped: dict[str, str] = {}
        self.loader = resolve_loader(config.data.loader)
        self.train = self._open("train")
        self.val = self._open("val", self.train.index)
        if config.data.cache is not None:
            keep_shards([self.val.index, self.train.index], config.data.cache_gb)
        _check_orders(config, self.train.index)

    def _open(self, side: Side, train: ImageIndex | None = None) -> Images:
        data, accelerator = self._config.data, self._accelerator
        index = open_for_all_ranks(input_of(self._config, side), accelerator)
        if train is not None:
            index = _of_same_classes(self._config, train, index)
        bad = BadImages(
            index,
            on_error=data.on_error,
            limit=data.max_skipped,
            world_size=accelerator.num_processes,
        )
        if not accelerator.is_main_process:
            bad.take_new()  # what the index knows, the main rank knows as well
        return Images(index, bad)

    def task(self, stage: str) -> Task:
        """The task as a stage trains for it; in episodes it is of their classes."""
        task, order = self._config.stage_task(stage), self._order(stage)
        if not isinstance(order, EpisodeOrder):
            return task
        steps = order.length // self._config.training.batch_size
        return task.in_episodes(lambda step: order.classes_of(step // steps).tolist())

    def train_batches(
        self, stage: str, start_step: int, steps: int
    ) -> Generator[Batch, None, None]:
        """This rank's batches of a training stage."""
        training = self._config.training
        return train_batches(
            self.train.index,
            stage_transform(self._config, stage),
            self._order(stage),
            Steps(training.batch_size, training.accumulation, start_step, steps),
            self._settings(),
            bad=self.train.bad,
        )

    def calibration_batches(self, steps: int) -> Generator[Batch, None, None]:
        """This rank's batches of the first steps of training, of images as evaluation has them.

        Where those are of any size, squares of them, as in training.
        """
        training, transform = self._config.training, image_transform(self._config)
        if not transform.plain().recipe.one_by_one:
            transform = transform.plain()
        window = self._config.data.shuffle_window
        return train_batches(
            self.train.index,
            transform,
            training_order(self.train.index, self._config.seed, window=window),
            Steps(training.batch_size, training.accumulation, 0, steps),
            self._settings(),
            bad=self.train.bad,
        )

    def images_of(self, stage: str, step: int) -> list[str]:
        """Paths of the images of a training step, on all ranks; in shards with the member's name.

        In place of a bad image that is skipped, the loader takes a later one, which is not told.
        """
        batch = self._config.training.batch_size
        samples = np.arange(step * batch, (step + 1) * batch)
        images = self._order(stage).images(samples).tolist()
        return [self.train.index.name(image) for image in images]

    def _order(self, stage: str) -> SampleOrder | EpisodeOrder:
        """Which image each sample of a training stage is."""
        config = self._config
        return training_order(
            self.train.index,
            config.seed,
            repeats=config.stage_augment(stage).repeats,
            window=config.data.shuffle_window,
            episodes=config.stages[stage].episodes,
            batch=config.training.batch_size,
        )

    def eval_batches(
        self, batch_size: int, image_size: int | None = None
    ) -> Generator[Batch, None, None]:
        """This rank's share of the validation images, at the run's size or at another one."""
        return eval_batches(
            self.val.index,
            image_transform(self._config, image_size),
            batch_size,
            self._settings(),
            bad=self.val.bad,
        )

    def take_new_bad(self) -> list[tuple[str, str]]:
        """Path and reason of the bad images that any rank has found since the last call.

        All ranks have to call it; each image is handed out once, on the main rank.
        """
        if self._config.data.on_error == "fail":
            return []
        mine = self.train.bad.take_new() + self.val.bad.take_new()
        everyones = [mine]
        if self._accelerator.num_processes > 1:
            everyones = [[] for _ in range(self._accelerator.num_processes)]
            dist.all_gather_object(everyones, mine)
        if not self._accelerator.is_main_process:
            return []
        new = {path: reason for found in everyones for path, reason in found}
        fresh = [(path, reason) for path, reason in new.items() if path not in self.skipped]
        self.skipped |= new
        return fresh

    def _settings(self) -> LoaderSettings:
        accelerator, training = self._accelerator, self._config.training
        on_gpu = accelerator.device.type == "cuda"
        return LoaderSettings(
            loader=self.loader,
            threads=self._config.data.threads,
            device=accelerator.device,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            # Autocast on a GPU rounds the images in its first convolution anyway.
            dtype=torch.float16 if on_gpu and training.precision != "fp32" else torch.float32,
            channels_last=training.channels_last,
            prefetch=self._config.data.prefetch,
        )


def look_at_images(config: Config) -> tuple[ImageIndex, ImageIndex]:
    """Open the images as a run does, on one rank; returns those of training and of validation.

    Raises:
        UserError: as :class:`RunData` does.
    """
    data = config.data
    resolve_loader(data.loader)
    train, val = (open_input(input_of(config, side)) for side in SIDES)
    val = _of_same_classes(config, train, val)
    for index in (train, val):
        BadImages(index, on_error=data.on_error, limit=data.max_skipped, world_size=1)
    _check_orders(config, train)
    return train, val


def _of_same_classes(config: Config, train: ImageIndex, val: ImageIndex) -> ImageIndex:
    """The validation images, of the classes of training in their order.

    Raises:
        UserError: a class is known to one side only.
    """
    if not config.make_task().has_classes or train.classes == val.classes:
        return val
    data = config.data
    sides = f"{data.train_list or data.train!r} and {data.val_list or data.val!r}"
    listed = train.labels_from or val.labels_from
    advice = "; data.class_names may name those of both" if listed else ""
    # What only validation has comes first: a label that is mistyped there is the likelier mistake,
    # and training's own class may lack images for want of that one.
    sides_in_turn: tuple[tuple[Side, ImageIndex, ImageIndex], ...]
    sides_in_turn = ("val", val, train), ("train", train, val)
    for side, one, other in sides_in_turn:
        for odd in sorted({*one.classes} - {*other.classes}):
            where = where_class_is(one, odd, input_of(config, side))
            if one.labels_from and other.labels_from:
                place = other.place if other.containers else other.labels_from
                raise UserError(f"{where}: class {odd!r} is not in {place}{advice}")
            raise UserError(
                f"data.root: {data.root}: class {'' if listed else 'folder '}{odd!r} is in only "
                f"one of {sides}{advice}; it is found at {where}"
            )
    places = {name: place for place, name in enumerate(train.classes)}
    return val.with_classes(train.classes, [places[name] for name in val.classes])


def _check_orders(config: Config, index: ImageIndex) -> None:
    """Raise UserError if these images cannot come in the order that a stage asks for."""
    window = config.data.shuffle_window
    training_order(index, config.seed, window=window)
    for name, stage in config.stages.items():
        try:
            training_order(index, config.seed, window=window, episodes=stage.episodes)
        except UserError as error:
            raise UserError(f"stages.{name}.{error}") from None


def image_transform(config: Config, image_size: int | None = None) -> ImageTransform:
    """How images are prepared for the network, at the run's size or at another one."""
    values = preprocessing_at(config, image_size)
    return ImageTransform.prepared(values, augmentation=config.data.augmentation)


def test_sets(task: Task, index: ImageIndex, crop_mode: str) -> list[str]:
    """The folders of images to be evaluated each by itself: a few, of whole images, no classes."""
    several = not task.has_classes and 1 < len(index.classes) <= _MOST_TEST_SETS
    return index.classes if several and crop_mode == "whole" else []


def preprocessing_at(config: Config, image_size: int | None) -> dict[str, Any]:
    """How images are prepared at another size: as much of each is seen as at the run's own.

    Where images are not scaled, they are taken to be of the run's size, and are seen whole.

    Args:
        config: of the run.
        image_size: side of the square that the network sees, in pixels; None: the run's own.

    Raises:
        UserError: there are no such images.
    """
    values = config.data.preprocessing()
    if image_size is None or image_size == values["image_size"]:
        return values
    if values["resize"] is None:
        values["resize"] = values["image_size"]
    return changed(values, image_size=image_size)


def smaller_sizes(config: Config, stage: str) -> tuple[list[int], list[int]]:
    """The ``image_sizes`` of a stage that are smaller than the run's own, and the others.

    Configurations for large images name sizes that are no smaller where ``data.image_size`` is
    changed: larger images say nothing of a network at lower cost.
    """
    sizes, side = config.stages[stage].image_sizes or [], config.data.image_size
    return [size for size in sizes if size < side], [size for size in sizes if size >= side]


def stage_transform(config: Config, stage: str) -> ImageTransform:
    """How the training images of a stage are augmented and prepared."""
    transform, augment = image_transform(config), config.stage_augment(stage)
    if config.data.train_size is None:
        return replace(transform, augment=augment)
    # A window of any size is scaled to the square: evaluation's resize has no say in it.
    return replace(transform, image_size=config.data.train_size, resize=None, augment=augment)


def input_of(config: Config, side: Side) -> Input:
    """Where the images of one side are, and how they are read."""
    data, root = config.data, Path(config.data.root)
    if is_url(data.root):
        name = getattr(data, side)
        return Input(
            Path(name),
            url=f"{data.root}/{name}",
            cache=Path(data.cache) if data.cache is not None else None,
            index_file=Path(data.index) / f"{name}.safetensors" if data.index is not None else None,
            class_names=Path(data.class_names) if data.class_names is not None else None,
        )
    name, listing = getattr(data, side), getattr(data, f"{side}_list")
    indexed = data.index is not None and listing is None
    return Input(
        root / name,
        listing=root / listing if listing is not None else None,
        index_file=Path(data.index or "") / f"{name}.safetensors" if indexed else None,
        class_names=root / data.class_names if data.class_names is not None else None,
        path_key=data.path_key,
        label_key=data.label_key,
    )


def open_for_all_ranks(source: Input, accelerator: "Accelerator") -> ImageIndex:
    """The index of a set of images, the same on every rank, with one rank looking through it.

    Where there is an index file, each rank maps it and the main rank alone compares it with the
    folder; else the main rank lists the folder and tells the others. What the folder holds besides
    is said.

    Raises:
        UserError: on all ranks, if any of them meets a mistake or has another index file.
    """

    def look() -> tuple[ImageIndex | _Mapped, ImageIndex]:
        index = open_input(source)
        rest = index.said_of_the_rest()
        if rest:
            print(printable(rest), flush=True)
        if index.file is None:
            return index, index
        told = index.file, index.root, index.url, index.fingerprint, index.classes
        return _Mapped(*told), index

    _, index = led_by_main_rank(
        accelerator,
        look,
        lambda told: told if isinstance(told, ImageIndex) else _same_index(told),
    )
    return index


class _Mapped(NamedTuple):
    """An index that is in a file, as one rank tells the others of it."""

    file: Path
    root: Path
    url: str
    fingerprint: str
    classes: list[str]


def _same_index(told: _Mapped) -> ImageIndex:
    if told.url and not told.file.exists():  # on a node of its own
        fetch_index(told.url, told.file)
    index = load_index(told.file, told.root, told.url)
    if index.fingerprint != told.fingerprint:
        raise UserError(
            f"{told.file}: this node's index is of other images ({index.fingerprint}) than the "
            f"main rank's ({told.fingerprint}); give every node the same data"
        )
    return index.with_classes(told.classes, range(len(told.classes)))
