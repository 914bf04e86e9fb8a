"""Images in, images out: a larger image from a smaller one (Dong et al. 2014, Lim et al. 2017)."""

from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from data_pipelines.images.batch import Batch
from data_pipelines.settings import AugmentSection, DataSection
from tpp.common.errors import UserError
from tpp.models.architecture import Architecture
from tpp.models.settings import ModelSection
from train.tasks.base import Forward, Metric, Settings, Task

PSNR = Metric("psnr", "PSNR", "PSNR", unit=" dB")
L1 = Metric("loss", "Loss", "loss", digits=4)


class SuperResolutionSettings(Settings):
    """Settings of super-resolution.

    Attributes:
        scale: how much larger the image that comes out is.
    """

    scale: Literal[2, 3, 4] = 2


class SuperResolution(Task):
    """The loader's image from one made ``scale`` times smaller, by the mean absolute difference.

    The smaller image is made on the device by bicubic interpolation without aliasing, and rounded
    to 8 bits as a stored one is.
    """

    kind = "super_resolution"
    metrics = (PSNR, L1)
    told = (PSNR, L1)
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
        return Architecture(model.name, None, {**model.args, "scale": scale})

    def inputs(self, images: Tensor) -> Tensor:
        """The images (n, c, h, w), ``scale`` times smaller."""
        side = (images.shape[2] // self.settings.scale, images.shape[3] // self.settings.scale)
        small = F.interpolate(images.float(), side, mode="bicubic", antialias=True)
        return (small.clamp(0, 1) * 255).round() / 255

    def loss(self, forward: Forward, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean absolute difference (Lim et al. 2017, section 4.2)."""
        images, _ = batch
        outputs = forward(self.inputs(images))
        return F.l1_loss(outputs, images), outputs

    def training_sums(self, batch: Batch, outputs: Tensor) -> dict[Metric, Tensor]:
        """PSNR of the training images."""
        return {PSNR: self._psnr(outputs.detach(), batch[0]).sum()}

    def sums(self, forward: Forward, batch: Batch) -> dict[Metric, Tensor]:
        """PSNR and mean absolute difference of every image."""
        images, _ = batch
        outputs = forward(self.inputs(images))
        return {
            PSNR: self._psnr(outputs, images).sum(),
            L1: (outputs - images).abs().mean((1, 2, 3)).sum(),
        }

    def _psnr(self, outputs: Tensor, images: Tensor) -> Tensor:
        """In dB, (n,); over all channels, but for ``scale`` pixels at every edge."""
        edge = self.settings.scale
        off = (outputs.clamp(0, 1) - images)[:, :, edge:-edge, edge:-edge]
        # Of images alike to the last bit it would be infinite.
        return -10 * off.double().square().mean((1, 2, 3)).clamp(min=1e-10).log10()
