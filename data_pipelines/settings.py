"""The settings of the images: where they are, and how they become tensors."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from tpp.common.images import ImagesSection
from tpp.common.object_storage import check_url, is_url
from tpp.common.settings import (
    MAY_DIFFER,
    OF_TRAINING,
    PositiveFloat,
    PositiveInt,
    Ratio,
    Section,
    UserPath,
)

MOST_OPERATIONS = 4
Loader = Literal["auto", "dali", "torchvision"]
OnError = Literal["fail", "skip"]
# The loaders keep these as long as a stage lasts: nothing changes under them.
_FROZEN = ConfigDict(frozen=True)


class DemoData(Section):
    """The embedded data set of drawn images, which a run generates into ``data.root``.

    Attributes:
        classes: number of classes; there are ten.
        train_per_class (images): number of training images of each class.
        val_per_class (images): number of validation images of each class.
        seed: seed of everything random in the images.

    Example:
        {classes: 4, train_per_class: 100, val_per_class: 20, seed: 1}
    """

    model_config = _FROZEN

    classes: Annotated[int, Field(ge=2)] = 10
    train_per_class: PositiveInt = 400
    val_per_class: PositiveInt = 100
    seed: int = 0


class ColorJitter(Section):
    """How far colours may change; the ranges of torchvision's ColorJitter.

    Attributes:
        brightness: how far the brightness may change: its factor is drawn from [max(0, 1 - x), 1 +
            x] for a value of x.
        contrast: how far the contrast may change, in the same way.
        saturation: how far the saturation may change, in the same way.
        hue (turns of the colour circle): how far the colours may be turned, in either direction.

    Example:
        {brightness: 0.4, contrast: 0.4, saturation: 0.4, hue: 0.1}
    """

    model_config = _FROZEN

    brightness: Annotated[float, Field(ge=0)] = 0.0
    contrast: Annotated[float, Field(ge=0)] = 0.0
    saturation: Annotated[float, Field(ge=0)] = 0.0
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0


class RandAugment(Section):
    """A few of 14 operations on each image, all of one strength (Cubuk et al., "RandAugment",
    NeurIPS 2020).

    Attributes:
        operations: how many operations are applied, one after the other.
        magnitude: strength of the operations, from 0 (none) to ``bins`` - 1 (the strongest).
        bins: number of steps into which the range of each operation is divided.

    Example:
        {operations: 1, magnitude: 5, bins: 11}
    """

    model_config = _FROZEN

    operations: Annotated[int, Field(ge=1, le=MOST_OPERATIONS)] = 2
    magnitude: Annotated[int, Field(ge=0)] = 9
    bins: Annotated[int, Field(ge=2)] = 31

    @model_validator(mode="after")
    def _magnitude_is_a_level(self) -> "RandAugment":
        if self.magnitude >= self.bins:
            raise ValueError(f"magnitude ({self.magnitude}) must be below bins ({self.bins})")
        return self


class ProgressiveResizing(Section):
    """Training on small images first, as FFCV's ImageNet recipe does (Leclerc et al., CVPR 2023).

    Attributes:
        start_size (pixels): side of the square that the network sees up to ``start_epoch``.
        start_epoch (epochs): where in the stage the side begins to grow.
        end_epoch (epochs): where it has reached the side of training. Between the two it grows
            evenly, in multiples of 32.

    Example:
        {start_size: 128, start_epoch: 5, end_epoch: 70}
    """

    model_config = _FROZEN

    start_size: PositiveInt
    start_epoch: Annotated[float, Field(ge=0)] = 0.0
    end_epoch: PositiveFloat

    @model_validator(mode="after")
    def _grows(self) -> "ProgressiveResizing":
        if self.end_epoch <= self.start_epoch:
            raise ValueError(
                f"end_epoch ({self.end_epoch}) must come after start_epoch ({self.start_epoch})"
            )
        return self


class AugmentSection(Section):
    """Augmentation of the training images beyond ``data.augmentation``; all of it is off by default
    (docs/data.md). A stage may have an ``augment`` of its own, which replaces this one as a whole.

    Attributes:
        color_jitter: random changes of the colours of the cut and scaled image; null for none.
        rand_augment: random operations on the cut and scaled image, before ``color_jitter``; null
            for none.
        trivial_augment: whether each image gets one operation of random strength, in place of
            ``rand_augment`` (Müller & Hutter, "TrivialAugment", ICCV 2021; with its wide ranges, as
            in torchvision's TrivialAugmentWide).
        random_erasing: probability that a box of the image is erased, filled with 0 after
            normalisation, which is the mean (Zhong et al., "Random Erasing Data Augmentation", AAAI
            2020).
        mixup: averages images in pairs, with shares drawn from Beta(alpha, alpha); this is alpha
            (Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018). 0: no mixup.
        cutmix: lays a box of one image over another, the area of the box drawn from Beta(alpha,
            alpha); this is alpha (Yun et al., "CutMix", ICCV 2019). 0: no CutMix. With mixup too,
            each batch takes one or the other, evenly drawn.
        repeats: how many times each image comes in a row, augmented differently (Hoffer et al.
            2020).
        progressive: smaller images first, with ``data.augmentation: imagenet``; null for one size
            throughout.

    Example:
        {trivial_augment: true, random_erasing: 0.25, mixup: 0.2, cutmix: 1.0, repeats: 3}
    """

    model_config = _FROZEN

    color_jitter: ColorJitter | None = None
    rand_augment: RandAugment | None = None
    trivial_augment: bool = False
    random_erasing: Annotated[float, Field(ge=0, le=1)] = 0.0
    mixup: Annotated[float, Field(ge=0)] = 0.0
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    repeats: PositiveInt = 1
    progressive: ProgressiveResizing | None = None

    @model_validator(mode="after")
    def _one_draws_operations(self) -> "AugmentSection":
        if self.rand_augment is not None and self.trivial_augment:
            raise ValueError("rand_augment and trivial_augment: one takes the place of the other")
        return self


class EpisodesSection(Section):
    """Training on a few classes at a time, an episode after the other (docs/data.md).

    Attributes:
        classes (classes): how many an episode is about; outputs for the others have no part in the
            loss.
        steps (optimiser steps): length of an episode.

    Example:
        {classes: 5, steps: 8}
    """

    model_config = _FROZEN

    classes: Annotated[int, Field(ge=2)]
    steps: PositiveInt = 8


class DataSection(ImagesSection):
    """The images: class folders, shards, or what others have made, below ``root``, and how they
    become tensors (docs/data.md).

    Attributes:
        root: folder that holds the ``train`` and ``val`` folders; or their URL in an object store,
            such as ``s3://bucket/set``, to which they were copied with their indices
            (docs/object_storage.md).
        train: name of the folder of training images in ``root``, or a path of its own: class
            folders, shards, or tars made for WebDataset. Also one tar, several by a pattern, or a
            list such as ``train.csv``.
        val: the same of the validation images.
        train_list: list of the training images and their classes, a CSV file or a ``path label`` in
            each line, in ``root`` or by a path of its own; its paths are those of images in
            ``train`` or relative to the list. null where ``train`` says it all.
        val_list: likewise, of the validation images; one of labels alone is of the images in
            ``val`` by their names.
        class_names: file with the classes in their order, in ``root`` or by a path of its own: a
            name in each line, or JSON; needed where labels are numbers that not all images
            together explain. null for the classes that the images are of.
        path_key: name of the column of paths in a list; null to find it.
        label_key: name of the column of labels in a list, or of the label in the ``json`` of a
            WebDataset sample; null to find it.
        loader: what reads and decodes images: ``dali``, ``torchvision``, or ``auto`` for DALI where
            it is installed.
        train_size (pixels): side of the square in training; null for ``image_size``. Only with
            ``augmentation: imagenet``, which shows as much of an image at any side.
        augmentation: how training images are cut: ``imagenet`` (RandomResizedCrop, flip), ``cifar``
            (padded crop, flip), ``patch`` (a square that is cut from anywhere and not scaled, flip,
            quarter turns; a smaller image is a bad one), ``none`` (as in evaluation).
        threads: number of decoding threads (DALI) or worker processes (torchvision) of each rank.
        demo: settings of the embedded data set, which is then generated in ``root``; null to read
            what is there.
        index: folder with the indices, ``train.safetensors`` and so on, that ``python -m
            data_pipelines.index --output`` wrote; null for those in the image folders themselves,
            or none.
        on_error: what to do about an image that cannot be read: ``fail`` ends the run and names it;
            ``skip`` replaces it with the next one of the order, and leaves it out of evaluations.
        max_skipped: share of the images that ``skip`` may skip before the run ends.
        shuffle_window (images): how shards are shuffled: null shuffles whole epochs; a number
            shuffles the shards, and the images within windows of that size, so that reading stays
            local.
        prefetch (batches): number of batches made ahead (torchvision: by each worker).
        cache: folder on a disk of the node, in which shards of a ``root`` in an object store are
            kept, as many as have room; null to keep none.
        cache_gb (GB): what that folder may hold; null for nine tenths of what is free on its disk.
        augment: augmentation beyond ``augmentation``; the ``augment`` of a stage replaces it.

    Example:
        {root: /data/imagenet, train: training, val: validation, loader: dali, image_size: 288,
        resize: 320, train_size: 176, threads: 8, index: ~/imagenet-index, on_error: skip,
        max_skipped: 0.0001, shuffle_window: 50000, prefetch: 3, interpolation: bicubic}

        {root: "s3://bucket/imagenet-shards", cache: /local/cache, cache_gb: 200}

        {root: /data/birds, train: "train-{000..019}.tar", val: val, val_list: val.csv, path_key:
        photo, label_key: species, class_names: classes.txt}

        {root: /data/leaves, train: images, train_list: train.csv, val: images, val_list: val.csv}

        {root: /data/photos, augmentation: patch, image_size: 96, resize: null, crop_mode: whole,
        mean: [0, 0, 0], std: [1, 1, 1]}

        {root: /data/digits, augmentation: none, image_size: 28, resize: null, crop_share: 0.875,
        channels: 1, mean: [0.1307], std: [0.3081]}
    """

    root: Annotated[UserPath, MAY_DIFFER]
    train: UserPath = "train"
    val: UserPath = "val"
    train_list: Annotated[UserPath | None, MAY_DIFFER] = None
    val_list: UserPath | None = None
    class_names: Annotated[UserPath | None, MAY_DIFFER] = None
    path_key: Annotated[str | None, MAY_DIFFER] = None
    label_key: Annotated[str | None, MAY_DIFFER] = None
    loader: Loader = "auto"
    augmentation: Annotated[Literal["imagenet", "cifar", "patch", "none"], OF_TRAINING] = "imagenet"
    train_size: Annotated[PositiveInt | None, OF_TRAINING] = None
    threads: Annotated[int, Field(ge=1, le=256), MAY_DIFFER] = 4
    demo: DemoData | None = None
    index: Annotated[UserPath | None, MAY_DIFFER] = None
    on_error: Annotated[OnError, MAY_DIFFER] = "fail"
    max_skipped: Annotated[Ratio, MAY_DIFFER] = 0.001
    shuffle_window: Annotated[PositiveInt | None, OF_TRAINING] = None
    prefetch: Annotated[int, Field(ge=1, le=64), MAY_DIFFER] = 2
    cache: Annotated[UserPath | None, MAY_DIFFER] = None
    cache_gb: Annotated[PositiveFloat | None, MAY_DIFFER] = None
    augment: AugmentSection = AugmentSection()

    @field_validator("root")
    @classmethod
    def _url_is_one(cls, root: str) -> str:
        return check_url(root) if is_url(root) else root

    @model_validator(mode="after")
    def _fits_an_object_store(self) -> "DataSection":
        if not is_url(self.root):
            if self.cache is not None or self.cache_gb is not None:
                raise ValueError(
                    "cache goes with a root in an object store, such as s3://bucket/set"
                )
            return self
        if self.cache_gb is not None and self.cache is None:
            raise ValueError("cache_gb goes with cache, the folder that it is a bound of")
        if self.demo or self.train_list or self.val_list:
            raise ValueError(
                "root: in an object store there are neither demo nor lists; copy shards there, "
                "with their indices (docs/object_storage.md)"
            )
        for name in (self.train, self.val):
            if not all(part not in ("", ".", "..") for part in name.split("/")) or "{" in name:
                raise ValueError(
                    f"root: in an object store train and val are folders in it, not {name!r}"
                )
        return self

    @property
    def training_side(self) -> int:
        """Of the square that the network sees in training, in pixels."""
        return self.train_size or self.image_size
