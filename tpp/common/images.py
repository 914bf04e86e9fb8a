"""What is said of how images become what a network takes."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from tpp.common.settings import PositiveFloat, PositiveInt, Section

# Beside what a configuration says, checkpoints of public weights may say these; the first of each
# is what is done where nothing is said.
INTERPOLATIONS = ("bilinear", "bicubic")
CROP_MODES = ("center", "squash", "whole")


class ImagesSection(Section):
    """How images become what a network takes, in evaluation and after training.

    Attributes:
        image_size (pixels): side of the square that the network sees. Parameters, MACs, latency and
            checkpoints refer to it.
        resize (pixels): the shorter side is scaled to this before the centre crop of evaluation;
            null for no scaling.
        crop_share: in place of ``resize``: ``image_size / resize``, from which ``resize`` follows,
            rounded down as in timm; null where ``resize`` is given.
        interpolation: how images are scaled, always antialiased.
        crop_mode: how images are cut in evaluation: ``center`` takes the square of ``image_size``
            in the middle; ``whole`` takes images of any size as they are, one by one, where the
            network accepts such, and needs ``resize: null``.
        mean: mean of each channel, of values in 0..1, that is subtracted from images.
        std: standard deviation of each channel, by which images are divided after that.
        channels: number of channels of the images: 3 for RGB, 1 for grey.

    Example:
        {image_size: 176, resize: 232, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5], channels: 3,
        interpolation: bicubic}

        {image_size: 224, resize: null, crop_share: 0.95}

        {resize: null, crop_mode: whole}
    """

    image_size: PositiveInt = 224
    resize: PositiveInt | None = 256
    mean: list[float] = [0.485, 0.456, 0.406]
    std: list[PositiveFloat] = [0.229, 0.224, 0.225]
    channels: Literal[1, 3] = 3
    crop_share: Annotated[float, Field(gt=0, le=1)] | None = None
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    crop_mode: Literal["center", "whole"] = "center"

    @model_validator(mode="before")
    @classmethod
    def _resize_follows(cls, values: Any) -> Any:
        """From ``crop_share``, where ``resize`` is null or not there."""
        if not isinstance(values, dict) or values.get("resize") is not None:
            return values
        share, side = values.get("crop_share"), values.get("image_size", 224)
        if isinstance(share, int | float) and 0 < share <= 1 and isinstance(side, int):
            return {**values, "resize": int(side / share)}
        return values

    @model_validator(mode="after")
    def _resize_agrees(self) -> "ImagesSection":
        if self.crop_share is not None:
            resize = int(self.image_size / self.crop_share)
            if resize != self.resize:
                raise ValueError(
                    f"resize ({self.resize}) is another than crop_share {self.crop_share} of "
                    f"image_size {self.image_size} asks for, {resize}: say one of them, and null "
                    "of the other"
                )
        return self

    @model_validator(mode="after")
    def _one_value_per_channel(self) -> "ImagesSection":
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise ValueError(f"mean and std need {self.channels} values, one per channel")
        if self.crop_mode == "whole" and self.resize is not None:
            raise ValueError(f"resize ({self.resize}): with crop_mode: whole it must be null")
        if self.resize is not None and self.resize < self.image_size:
            raise ValueError(
                f"resize ({self.resize}) must not be smaller than image_size ({self.image_size})"
            )
        return self

    def completed(self, wanted: Mapping[str, Any]) -> Self:
        """These settings, and where nothing was said, those that ``wanted`` has.

        Args:
            wanted: the preprocessing of a network, see :mod:`tpp.models.preparation`. Where another
                ``image_size`` was said, its ``resize`` changes along.
        """
        said, values = self.model_fields_set, dict(wanted)
        if self.channels != values["channels"]:
            return self
        if "image_size" in said and values["resize"] is not None:
            values["resize"] = round(self.image_size * values["resize"] / values["image_size"])
        taken = {"image_size", "mean", "std", "interpolation"}
        if "resize" not in said:
            taken |= {"resize"}
        update = {key: values[key] for key in taken if key in values and key not in said}
        if not update:
            return self
        if self.crop_share is not None:
            update["resize"] = None  # follows from the side, which may be another now
        return type(self)(**{**dict(self), **update})

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of an image that the network sees, (channels, height, width)."""
        return self.channels, self.image_size, self.image_size

    def preprocessing(self) -> dict[str, Any]:
        """What a user of the trained network must do to an image; kept in every checkpoint."""
        said = self.model_dump(include={"image_size", "resize", "mean", "std", "channels"})
        for key, usual in (("interpolation", INTERPOLATIONS[0]), ("crop_mode", CROP_MODES[0])):
            if getattr(self, key) != usual:
                said[key] = getattr(self, key)
        return said
