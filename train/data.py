"""The images of a run: opened once for all ranks, and fed to its stages."""

from collections.abc import Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from data_pipelines.images.batch import Batch, LoaderSettings
from data_pipelines.images.image_index import ImageIndex, load_index, open_images
from data_pipelines.images.order import SampleOrder, Steps
from data_pipelines.images.source import BadImages
from data_pipelines.loaders import (
    eval_batches,
    resolve_loader,
    train_batches,
    training_order,
)
from data_pipelines.loading.augment import ImageTransform
from tpp.common.errors import UserError, printable
from tpp.models.preparation import changed
from train.config.config import Config
from train.distributed.collectives import led_by_main_rank

if TYPE_CHECKING:
    from accelerate import Accelerator


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
        self.train = self._open(config.data.train)
        self.val = self._open(config.data.val)
        _check_same_classes(config, self.train.index, self.val.index)
        training_order(self.train.index, config.seed, window=config.data.shuffle_window)

    def _open(self, name: str) -> Images:
        data, accelerator = self._config.data, self._accelerator
        index = open_for_all_ranks(*image_place(self._config, name), accelerator)
        bad = BadImages(
            index,
            on_error=data.on_error,
            limit=data.max_skipped,
            world_size=accelerator.num_processes,
        )
        if not accelerator.is_main_process:
            bad.take_new()  # what the index knows, the main rank knows as well
        return Images(index, bad)

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

    def images_of(self, stage: str, step: int) -> list[str]:
        """Paths of the images of a training step, on all ranks; in shards with the member's name.

        In place of a bad image that is skipped, the loader takes a later one, which is not told.
        """
        batch = self._config.training.batch_size
        samples = np.arange(step * batch, (step + 1) * batch)
        images = self._order(stage).images(samples).tolist()
        return [self.train.index.name(image) for image in images]

    def _order(self, stage: str) -> SampleOrder:
        """Which image each sample of a training stage is."""
        config = self._config
        return training_order(
            self.train.index,
            config.seed,
            repeats=config.stage_augment(stage).repeats,
            window=config.data.shuffle_window,
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


def look_at_images(config: Config) -> ImageIndex:
    """Open the images as a run does, on one rank; returns the training images.

    Raises:
        UserError: as :class:`RunData` does.
    """
    data = config.data
    resolve_loader(data.loader)
    train, val = (open_images(*image_place(config, name)) for name in (data.train, data.val))
    for index in (train, val):
        BadImages(index, on_error=data.on_error, limit=data.max_skipped, world_size=1)
    _check_same_classes(config, train, val)
    training_order(train, config.seed, window=data.shuffle_window)
    return train


def _check_same_classes(config: Config, train: ImageIndex, val: ImageIndex) -> None:
    if config.make_task().has_classes and train.classes != val.classes:
        odd = min({*train.classes} ^ {*val.classes})
        raise UserError(
            f"data.root: {config.data.root}: class folder {odd!r} is in only one of "
            f"{config.data.train!r} and {config.data.val!r}"
        )


def image_transform(config: Config, image_size: int | None = None) -> ImageTransform:
    """How images are prepared for the network, at the run's size or at another one."""
    values = preprocessing_at(config, image_size)
    return ImageTransform.prepared(values, augmentation=config.data.augmentation)


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


def stage_transform(config: Config, stage: str) -> ImageTransform:
    """How the training images of a stage are augmented and prepared."""
    transform, augment = image_transform(config), config.stage_augment(stage)
    if config.data.train_size is None:
        return replace(transform, augment=augment)
    # A window of any size is scaled to the square: evaluation's resize has no say in it.
    return replace(transform, image_size=config.data.train_size, resize=None, augment=augment)


def image_place(config: Config, name: str) -> tuple[Path, Path | None]:
    """Where the images called ``name`` lie, and their index if the configuration says where."""
    data = config.data
    file = Path(data.index) / f"{name}.safetensors" if data.index is not None else None
    return Path(data.root) / name, file


def open_for_all_ranks(
    folder: Path, index_file: Path | None, accelerator: "Accelerator"
) -> ImageIndex:
    """The index of a folder, the same on every rank, with one rank looking through the folder.

    Where there is an index file, each rank maps it and the main rank alone compares it with the
    folder; else the main rank lists the folder and tells the others. What the folder holds besides
    is said.

    Raises:
        UserError: on all ranks, if any of them meets a mistake or has another index file.
    """

    def look() -> tuple[ImageIndex | tuple[Path, str], ImageIndex]:
        index = open_images(folder, index_file)
        rest = index.said_of_the_rest()
        if rest:
            print(printable(rest), flush=True)
        return (index if index.file is None else (index.file, index.fingerprint)), index

    _, index = led_by_main_rank(
        accelerator,
        look,
        lambda told: told if isinstance(told, ImageIndex) else _same_index(folder, *told),
    )
    return index


def _same_index(folder: Path, file: Path, fingerprint: str) -> ImageIndex:
    index = load_index(file, folder)
    if index.fingerprint != fingerprint:
        raise UserError(
            f"{file}: this node's index is of other images ({index.fingerprint}) than the main "
            f"rank's ({fingerprint}); give every node the same data"
        )
    return index
