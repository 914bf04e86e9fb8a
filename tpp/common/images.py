"""What is said of how images become what a network takes."""

from typing import Any, Literal

from pydantic import model_validator

from tpp.common.settings import PositiveFloat, PositiveInt, Section

# Beside what a configuration says, checkpoints of public weights may say these; the first of each
# is what is done where nothing is said.
INTERPOLATIONS = ("bilinear", "bicubic")
CROP_MODES = ("center", "squash")


class ImagesSection(Section):
    """How images become what a network takes, in evaluation and after training.

    Attributes:
        image_size: side of the square that the network sees, in pixels.
        resize: shorter side before the centre crop of evaluation; null for no resize.
        mean, std: per channel, of values in 0..1.
        channels: 3 for RGB, 1 for grey.
    """

    image_size: PositiveInt = 224
    resize: PositiveInt | None = 256
    mean: list[float] = [0.485, 0.456, 0.406]
    std: list[PositiveFloat] = [0.229, 0.224, 0.225]
    channels: Literal[1, 3] = 3

    @model_validator(mode="after")
    def _one_value_per_channel(self) -> "ImagesSection":
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise ValueError(f"mean and std need {self.channels} values, one per channel")
        if self.resize is not None and self.resize < self.image_size:
            raise ValueError(
                f"resize ({self.resize}) must not be smaller than image_size ({self.image_size})"
            )
        return self

    def preprocessing(self) -> dict[str, Any]:
        """What a user of the trained network must do to an image; kept in every checkpoint."""
        return self.model_dump(include={"image_size", "resize", "mean", "std", "channels"})
