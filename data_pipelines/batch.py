"""What a loader is asked for and what it makes; and how one image file is read."""

from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from data_pipelines.order import Float64s, Int64s
from tpp.errors import UserError

Batch = tuple[Tensor, Tensor]
"""Images, float32 (b, c, h, w), normalised; labels, int64 (b,). Both on the device asked for."""


@dataclass(frozen=True, eq=False)
class Request:
    """One batch for a loader to make.

    Attributes:
        paths: the image files, b of them.
        labels: int64, shape (b,).
        uniforms: random numbers of each sample's augmentation, shape (b, UNIFORMS), or (b, 0)
            for evaluation.
    """

    paths: list[str]
    labels: Int64s
    uniforms: Float64s


def open_image(path: str, channels: int) -> Image.Image:
    """Decode an image file with PIL, as RGB (3 channels) or grey (1); EXIF rotation is ignored.

    Raises:
        UserError: the file cannot be read or decoded.
    """
    try:
        with Image.open(path) as image:
            grey16 = image.mode.startswith("I")
            # PIL's own conversion clips 16-bit grey at 255.
            decoded = image.point(lambda value: value / 257) if grey16 else image
            return decoded.convert("L" if channels == 1 else "RGB")
    # PIL reports a damaged file by any of these, depending on the format.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot read this image ({error})") from None
