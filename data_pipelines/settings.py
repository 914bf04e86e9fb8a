"""The settings of the images: where they are, and how they become tensors."""

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tpp.common.errors import UserError
from tpp.common.settings import MAY_DIFFER, PositiveFloat, PositiveInt, Ratio, Section

MOST_OPERATIONS = 4


@dataclass(frozen=True)
class ColorJitter:
    """How far colours may change; the ranges of torchvision's ColorJitter.

    Attributes:
        brightness, contrast, saturation: each factor is drawn from [max(0, 1 - x), 1 + x].
        hue: the turn of the colour circle is drawn from [-hue, hue]; 1 is a whole turn.

    Raises:
        UserError: a value lies outside its range.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(
                    f"color_jitter: {name} must be at least 0, not {getattr(self, name)}"
                )
        if not 0 <= self.hue <= 0.5:
            raise UserError(f"color_jitter: hue must lie between 0 and 0.5 turns, not {self.hue}")


@dataclass(frozen=True)
class RandAugment:
    """Cubuk et al., "RandAugment", NeurIPS 2020: a few of 14 operations, all of one strength.

    Attributes:
        operations: how many are applied, one after the other.
        magnitude: their strength, a bin from 0 (none) to bins - 1 (the strongest).
        bins: number of steps into which each operation's range is divided.

    Raises:
        UserError: a value lies outside its range.
    """

    operations: int = 2
    magnitude: int = 9
    bins: int = 31

    def __post_init__(self) -> None:
        if not 1 <= self.operations <= MOST_OPERATIONS:
            raise UserError(
                f"rand_augment: operations must lie between 1 and {MOST_OPERATIONS}, "
                f"not {self.operations}"
            )
        if self.bins < 2:
            raise UserError(f"rand_augment: bins must be at least 2, not {self.bins}")
        if not 0 <= self.magnitude < self.bins:
            raise UserError(
                f"rand_augment: magnitude must lie between 0 and {self.bins - 1} "
                f"with {self.bins} bins, not {self.magnitude}"
            )


@dataclass(frozen=True)
class ProgressiveResizing:
    """Training on small images first, as FFCV's ImageNet recipe does (Leclerc et al., CVPR 2023).

    Attributes:
        start_size: side of the square fed to the network up to ``start_epoch``, in pixels.
        start_epoch, end_epoch: between them the side grows evenly, up to the transform's
            image_size.
        multiple: between them the side is rounded to multiples of this, in pixels.

    Raises:
        UserError: a value lies outside its range.
    """

    start_size: int
    start_epoch: float
    end_epoch: float
    multiple: int = 32

    def __post_init__(self) -> None:
        for name in ("start_size", "multiple"):
            if getattr(self, name) < 1:
                raise UserError(
                    f"progressive resizing: {name} must be at least 1, not {getattr(self, name)}"
                )
        if not 0 <= self.start_epoch < self.end_epoch < math.inf:
            raise UserError(
                "progressive resizing: end_epoch must come after start_epoch, and that not before "
                f"0, not {self.end_epoch} and {self.start_epoch}"
            )


class DemoData(Section):
    """Generate the embedded data set into ``data.root`` before the run."""

    classes: Annotated[int, Field(ge=2)] = 10
    train_per_class: PositiveInt = 400
    val_per_class: PositiveInt = 100
    seed: int = 0


class ColorJitterSection(Section):
    """Random changes of colour, as torchvision's ColorJitter draws them.

    Attributes:
        brightness, contrast, saturation: factors between 1 - value and 1 + value.
        hue: turns of the colour wheel, between -value and value.
    """

    brightness: Annotated[float, Field(ge=0)] = 0.0
    contrast: Annotated[float, Field(ge=0)] = 0.0
    saturation: Annotated[float, Field(ge=0)] = 0.0
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0


class RandAugmentSection(Section):
    """RandAugment (Cubuk et al. 2020).

    Attributes:
        operations: how many are applied to each image.
        magnitude: of each one, of ``bins`` levels.
        bins: number of levels.
    """

    operations: Annotated[int, Field(ge=1, le=MOST_OPERATIONS)] = 2
    magnitude: Annotated[int, Field(ge=0)] = 9
    bins: Annotated[int, Field(ge=2)] = 31

    @model_validator(mode="after")
    def _magnitude_is_a_level(self) -> "RandAugmentSection":
        if self.magnitude >= self.bins:
            raise ValueError(f"magnitude ({self.magnitude}) must be below bins ({self.bins})")
        return self


class ProgressiveSection(Section):
    """Progressive resizing: smaller images first, with the 'imagenet' augmentation.

    Attributes:
        start_size: side of the images up to ``start_epoch``, in pixels.
        start_epoch, end_epoch: of the stage; between them the side grows to ``data.image_size``,
            in multiples of 32.
    """

    start_size: PositiveInt
    start_epoch: Annotated[float, Field(ge=0)] = 0.0
    end_epoch: PositiveFloat

    @model_validator(mode="after")
    def _grows(self) -> "ProgressiveSection":
        if self.end_epoch <= self.start_epoch:
            raise ValueError(
                f"end_epoch ({self.end_epoch}) must come after start_epoch ({self.start_epoch})"
            )
        return self


class AugmentSection(Section):
    """Augmentation of the training images beyond ``data.augmentation``; all off by default.

    Attributes:
        color_jitter: random colours.
        rand_augment: random operations.
        random_erasing: probability that a box of the image is erased (Zhong et al. 2020).
        mixup, cutmix: alpha of the Beta distribution that pairs of images are mixed by (Zhang et
            al. 2018, Yun et al. 2019); 0 for off. With both, each batch takes one of them.
        repeats: times that an image comes in a row, augmented differently (Hoffer et al. 2020).
        progressive: smaller images first.
    """

    color_jitter: ColorJitterSection | None = None
    rand_augment: RandAugmentSection | None = None
    random_erasing: Annotated[float, Field(ge=0, le=1)] = 0.0
    mixup: Annotated[float, Field(ge=0)] = 0.0
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    repeats: PositiveInt = 1
    progressive: ProgressiveSection | None = None


class DataSection(Section):
    """The images: class folders or shards below ``root``, and how they become tensors.

    Attributes:
        root: folder that holds the ``train`` and ``val`` folders.
        train, val: names of these two folders.
        loader: ``dali``, ``torchvision``, or ``auto`` for DALI where it is installed.
        augmentation: ``imagenet`` (RandomResizedCrop, flip), ``cifar`` (padded crop, flip),
            ``none``.
        image_size: side of the square that the network sees, in pixels.
        resize: shorter side before the centre crop of evaluation; null for no resize.
        mean, std: per channel, of values in 0..1.
        channels: 3 for RGB, 1 for grey.
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

    root: Annotated[str, MAY_DIFFER]
    train: str = "train"
    val: str = "val"
    loader: Literal["auto", "dali", "torchvision"] = "auto"
    augmentation: Literal["imagenet", "cifar", "none"] = "imagenet"
    image_size: PositiveInt = 224
    resize: PositiveInt | None = 256
    mean: list[float] = [0.485, 0.456, 0.406]
    std: list[PositiveFloat] = [0.229, 0.224, 0.225]
    channels: Literal[1, 3] = 3
    threads: Annotated[int, Field(ge=1, le=256), MAY_DIFFER] = 4
    demo: DemoData | None = None
    index: Annotated[str | None, MAY_DIFFER] = None
    on_error: Annotated[Literal["fail", "skip"], MAY_DIFFER] = "fail"
    max_skipped: Annotated[Ratio, MAY_DIFFER] = 0.001
    shuffle_window: PositiveInt | None = None
    prefetch: Annotated[int, Field(ge=1, le=64), MAY_DIFFER] = 2
    augment: AugmentSection = AugmentSection()

    @model_validator(mode="after")
    def _one_value_per_channel(self) -> "DataSection":
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise ValueError(f"mean and std need {self.channels} values, one per channel")
        if self.resize is not None and self.resize < self.image_size:
            raise ValueError(
                f"resize ({self.resize}) must not be smaller than image_size ({self.image_size})"
            )
        return self

    def check_augment(self, augment: AugmentSection, key: str) -> None:
        """Check that augmentations go with the recipe; ValueError names what does not."""
        if self.augmentation == "none" and augment != AugmentSection(repeats=augment.repeats):
            raise ValueError(f"{key}: with augmentation: none there is no augmentation to add to")
        if self.channels == 1 and (augment.color_jitter or augment.rand_augment):
            raise ValueError(f"{key}: color_jitter and rand_augment need 3 channels")
        if augment.progressive is None:
            return
        if self.augmentation != "imagenet":
            raise ValueError(f"{key}.progressive: goes with augmentation: imagenet only")
        if augment.progressive.start_size > self.image_size:
            raise ValueError(
                f"{key}.progressive.start_size ({augment.progressive.start_size}) must not be "
                f"larger than image_size ({self.image_size})"
            )

    def preprocessing(self) -> dict[str, Any]:
        """What a user of the trained network must do to an image; kept in every checkpoint."""
        return self.model_dump(include={"image_size", "resize", "mean", "std", "channels"})
