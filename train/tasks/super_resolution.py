"""Images in, images out: a larger image from a smaller one (Dong et al. 2014, Lim et al. 2017)."""

from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from data_pipelines.images.batch import Batch
from data_pipelines.images.bicubic import shrink, to_levels
from data_pipelines.settings import AugmentSection, DataSection
from tpp.common.errors import UserError
from tpp.models.architecture import Architecture
from tpp.models.settings import ModelSection
from train.tasks.base import Forward, Metric, Settings, Task
from train.tasks.image_quality import luma, psnr, ssim

PSNR = Metric("psnr", "PSNR", "PSNR", unit=" dB")
SSIM = Metric("ssim", "SSIM", "SSIM", digits=4)
L1 = Metric("loss", "Loss", "loss", digits=4)


class SuperResolutionSettings(Settings):
    """Images are made smaller on the device, and the network is to give them back as they were.

    Attributes:
        scale: how much larger the image that comes out is, along each side.

    Example:
        {scale: 4}
    """

    scale: Literal[2, 3, 4] = 2


class SuperResolution(Task):
    """The loader's image from one made ``scale`` times smaller, by the mean absolute difference.

    The smaller image is made on the device as MATLAB's bicubic makes the published ones
    (:mod:`data_pipelines.images.bicubic`), of an image whose sides ``scale`` divides: what is over
    is cut off at the bottom and on the right. Outputs are judged as papers do it: rounded to 8
    bits, on Y alone, without ``scale`` pixels at every edge.
    """

    kind = "super_resolution"
    metrics = (PSNR, SSIM, L1)
    told = (PSNR, SSIM)
    settings_type: ClassVar[type[Settings]] = SuperResolutionSettings

    def check_data(self, data: DataSection, augment: AugmentSection, key: str) -> None:
        """Pixels between 0 and 1, a side that ``scale`` divides, and no mixing of images."""
        scale = self.settings.scale
        if any(data.mean) or any(value != 1 for value in data.std):
            raise ValueError(
                f"data.mean and data.std: super_resolution takes pixels in 0..1 as they are: mean "
                f"{[0] * data.channels} and std {[1] * data.channels}"
            )
        for size_key, size in (("image_size", data.image_size), ("train_size", data.train_size)):
            if size is not None and size % scale:
                raise ValueError(
                    f"data.{size_key} ({size}) must be a multiple of task.scale ({scale})"
                )
        if data.crop_mode == "whole" and data.augmentation == "none":
            raise ValueError(
                "data.augmentation: none, with crop_mode: whole, would train on images of any "
                "size, which make no batch; use patch"
            )
        for name in ("mixup", "cutmix"):
            if getattr(augment, name):
                raise ValueError(f"{key}.{name}: mixes labels, and super_resolution has none")
        if augment.progressive is not None:
            raise ValueError(f"{key}.progressive: does not go with super_resolution")

    def architecture(
        self, model: ModelSection, classes: int | None = None, place: str = ""
    ) -> Architecture | None:
        """A network with images out, of this scale."""
        if model.num_classes is not None:
            raise UserError("model.num_classes: super_resolution has no classes; leave it out")
        scale = self.settings.scale
        if model.args.get("scale", scale) != scale:
            raise UserError(f"model.args.scale is {model.args['scale']}, but task.scale is {scale}")
        return Architecture(model.network, None, {**model.args, "scale": scale})

    def inputs(self, images: Tensor) -> Tensor:
        """The images (n, c, h, w), ``scale`` times smaller, 8-bit levels over 255."""
        return shrink(self._whole_blocks(images), self.settings.scale)

    def loss(self, forward: Forward, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean absolute difference (Lim et al. 2017, section 4.2)."""
        wanted = self._wanted(batch)
        outputs = forward(self.inputs(batch[0]))
        return F.l1_loss(outputs, wanted), outputs

    def training_sums(self, batch: Batch, outputs: Tensor) -> dict[Metric, Tensor]:
        """PSNR of the training images."""
        return {PSNR: psnr(*self._judged(outputs.detach(), self._wanted(batch))).sum()}

    def sums(self, forward: Forward, batch: Batch) -> dict[Metric, Tensor]:
        """PSNR, SSIM and mean absolute difference of every image.

        Raises:
            UserError: an image is too small.
        """
        wanted, scale = self._wanted(batch), self.settings.scale
        if min(wanted.shape[2:]) <= 2 * scale:
            height, width = batch[0].shape[2:]
            raise UserError(
                f"super_resolution: an image of {height}x{width} pixels, of which {scale} at every "
                "edge do not count, is too small to be judged"
            )
        outputs = forward(self.inputs(batch[0]))
        pair = self._judged(outputs, wanted)
        return {
            PSNR: psnr(*pair).sum(),
            SSIM: ssim(*pair).sum(),
            L1: (outputs - wanted).abs().mean((1, 2, 3)).sum(),
        }

    def _whole_blocks(self, images: Tensor) -> Tensor:
        height, width = (side - side % self.settings.scale for side in images.shape[2:])
        return images[:, :, :height, :width]

    def _wanted(self, batch: Batch) -> Tensor:
        """What is to come out: 8-bit levels over 255, also of images in half precision."""
        return (to_levels(self._whole_blocks(batch[0])) / 255).float()

    def _judged(self, *images: Tensor) -> list[Tensor]:
        """Y of images, (n, 1, h, w), float64, without the edge."""
        edge = slice(self.settings.scale, -self.settings.scale)
        return [luma(to_levels(one))[:, :, edge, edge] for one in images]
