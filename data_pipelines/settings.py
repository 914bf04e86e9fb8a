"""The settings of the images: where they are, and how they become tensors."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator

from tpp.common.images import ImagesSection
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
    """The embedded data set, which a run generates into ``data.root``.

    Attributes:
        classes: how many of :data:`data_pipelines.demo.CLASSES`.
        train_per_class, val_per_class: images.
        seed: of everything random.
    """

    model_config = _FROZEN

    classes: Annotated[int, Field(ge=2)] = 10
    train_per_class: PositiveInt = 400
    val_per_class: PositiveInt = 100
    seed: int = 0


class ColorJitter(Section):
    """How far colours may change; the ranges of torchvision's ColorJitter.

    Attributes:
        brightness, contrast, saturation: each factor is drawn from [max(0, 1 - x), 1 + x].
        hue: the turn of the colour circle is drawn from [-hue, hue]; 1 is a whole turn.
    """

    model_config = _FROZEN

    brightness: Annotated[float, Field(ge=0)] = 0.0
    contrast: Annotated[float, Field(ge=0)] = 0.0
    saturation: Annotated[float, Field(ge=0)] = 0.0
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0


class RandAugment(Section):
    """Cubuk et al., "RandAugment", NeurIPS 2020: a few of 14 operations, all of one strength.

    Attributes:
        operations: how many are applied, one after the other.
        magnitude: their strength, a bin from 0 (none) to bins - 1 (the strongest).
        bins: number of steps into which each operation's range is divided.
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
        start_size: side of the square fed to the network up to ``start_epoch``, in pixels.
        start_epoch, end_epoch: of the stage; between them the side grows evenly to
            the side of training, in multiples of 32.
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
    """Augmentation of the training images beyond ``data.augmentation``; all off by default.

    Attributes:
        color_jitter, rand_augment: of the cut and scaled image, ``rand_augment`` before the other.
        trivial_augment: in the place of ``rand_augment`` one of the same operations, of random
            strength (Müller & Hutter, "TrivialAugment", ICCV 2021; its wide ranges, as
            torchvision's TrivialAugmentWide has them).
        random_erasing: probability that a box of the image is erased, filled with 0 after
            normalisation, which is the mean (Zhong et al., "Random Erasing Data Augmentation",
            AAAI 2020).
        mixup: alpha of Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018: images
            are averaged in pairs, the shares drawn from Beta(alpha, alpha). 0: no mixup.
        cutmix: alpha of Yun et al., "CutMix", ICCV 2019: a box of one image is laid over the other,
            the box's area drawn from Beta(alpha, alpha). 0: no CutMix. With both, each batch takes
            one or the other, evenly drawn.
        repeats: times that an image comes in a row, augmented differently (Hoffer et al. 2020).
        progressive: smaller images first, with the 'imagenet' augmentation.
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


class DataSection(ImagesSection):
    """The images: class folders or shards below ``root``, and how they become tensors.

    Attributes beyond those of :class:`tpp.common.images.ImagesSection`:
        root: folder that holds the ``train`` and ``val`` folders.
        train, val: names of these two folders.
        loader: ``dali``, ``torchvision``, or ``auto`` for DALI where it is installed.
        train_size: side of the square in training, in pixels; null for ``image_size``. With the
            ``imagenet`` augmentation, which shows as much of an image at any side.
        augmentation: ``imagenet`` (RandomResizedCrop, flip), ``cifar`` (padded crop, flip),
            ``patch`` (a square that is cut from anywhere and not scaled, flip, quarter turns; an
            image that is smaller is a bad one), ``none``.
        threads: decoding threads (DALI) or worker processes (torchvision) per rank.
        demo: generate the embedded data set.
        index: folder that holds the indices, ``train.safetensors`` and so on, that
            ``python -m data_pipelines.index --out`` wrote; null for those in the image folders
            themselves, or none.
        on_error: what becomes of an image that cannot be read: ``fail`` ends the run and names
            it, ``skip`` replaces it by the next one of the order, and leaves it out of
            evaluations.
        max_skipped: the share of the images that may be skipped.
        shuffle_window: of shards: null shuffles whole epochs, a number the shards, and the images
            within windows of so many.
        prefetch: batches made ahead (torchvision: by each worker).
        augment: augmentation beyond ``augmentation``; a stage's ``augment`` replaces it.
    """

    root: Annotated[UserPath, MAY_DIFFER]
    train: UserPath = "train"
    val: UserPath = "val"
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
    augment: AugmentSection = AugmentSection()

    @property
    def training_side(self) -> int:
        """Of the square that the network sees in training, in pixels."""
        return self.train_size or self.image_size
