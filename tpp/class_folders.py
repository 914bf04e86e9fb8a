"""Batches of training images for a command: class folders, read by torchvision.

A run of ``train/`` has loaders of its own; this is for ``tpp prune``, which knows nothing of them.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode, v2

from tpp.common.class_names import match_classes
from tpp.common.errors import UserError, reason_of
from tpp.models.architecture import plain_copy
from tpp.selection.criteria import Along, differentiable_twice, loss_gradients


class ClassFolders:
    """Images in class folders, in a random order that follows from the seed alone.

    Args:
        folder: of class folders.
        preprocessing: how images are prepared, see :mod:`tpp.models.preparation`.
        outputs: how many classes the network tells apart.
        names: of these, in order; None where nobody says.
        file: the network's, for messages.
        batch_size: images of a batch, at least 1; fewer where there are fewer in all.
        seed: of the order.
        device: where networks run and batches go.

    Attributes:
        note: what to know of how folders were taken for classes; None for nothing.

    Raises:
        UserError: there are no images, or the class folders cannot be told from each other.
    """

    def __init__(
        self,
        folder: Path,
        preprocessing: Mapping[str, Any],
        *,
        outputs: int,
        names: Sequence[str] | None,
        file: str,
        batch_size: int,
        seed: int,
        device: str = "cpu",
    ) -> None:
        if batch_size < 1:
            raise UserError(f"--batch-size must be at least 1, not {batch_size}")
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: PyTorch finds no CUDA GPU on this machine; use cpu")
        if preprocessing.get("crop_mode") == "whole":
            raise UserError("--data: the network takes images whole, of which no two make a batch")
        if not folder.is_dir():
            raise UserError(f"--data {folder}: there is no such folder")
        try:
            self._images = ImageFolder(str(folder), _transform(preprocessing))
        except (OSError, RuntimeError) as error:
            raise UserError(f"{folder}: no folder of class folders: {reason_of(error)}") from None
        labels = match_classes(self._images.classes, outputs, names, file=file, place=str(folder))
        self.note, self._outputs = labels.note, labels.outputs
        self._batch = min(batch_size, len(self._images))
        generator = torch.Generator().manual_seed(seed)
        self._order = torch.randperm(len(self._images), generator=generator).tolist()
        self._device = device

    def batches_of(self, wanted: int) -> int:
        """How many full batches there are, at most ``wanted``: each image comes once."""
        return min(wanted, len(self._images) // self._batch)

    def __call__(self, wanted: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images, float32 (b, channels, h, w), and classes, int64 (b,), of so many batches at most.

        Raises:
            UserError: an image cannot be read; names it.
        """
        for number in range(self.batches_of(wanted)):
            part = self._order[number * self._batch : (number + 1) * self._batch]
            images, labels = zip(*map(self._read, part), strict=True)
            yield torch.stack(images).to(self._device), torch.tensor(labels, device=self._device)

    def gradients(
        self,
        model: nn.Module,
        parameters: Sequence[str],
        batches: int,
        along: Along | None = None,
    ) -> Iterator[Sequence[Tensor]]:
        """Of the cross entropy, see :class:`tpp.selection.criteria.Gradients`."""
        network = self.network(model)
        tensors = [network.get_parameter(name).requires_grad_(True) for name in parameters]
        for number, (images, labels) in enumerate(self(batches)):
            with differentiable_twice(asked=along is not None):
                loss = F.cross_entropy(network(images), labels)
                found = loss_gradients(loss, tensors, along and along(number, tensors))
            yield found

    def network(self, model: nn.Module) -> nn.Module:
        """A copy in evaluation mode, in float32 on the device, without gradients."""
        return plain_copy(model).float().to(self._device).eval().requires_grad_(False)

    def _read(self, number: int) -> tuple[Tensor, int]:
        path, folder = self._images.samples[number]
        try:
            image, _ = self._images[number]
        except Exception as error:  # PIL's readers raise whatever comes
            raise UserError(f"{path}: cannot read this image ({reason_of(error)})") from None
        return image, self._outputs[folder]


def _transform(values: Mapping[str, Any]) -> v2.Transform:
    """As evaluation prepares images."""
    mode = InterpolationMode(values.get("interpolation", "bilinear"))
    steps: list[nn.Module] = [v2.Grayscale()] if values["channels"] == 1 else []
    resize = values["resize"]
    if resize is not None:
        size = [resize, resize] if values.get("crop_mode") == "squash" else resize
        steps.append(v2.Resize(size, interpolation=mode, antialias=True))
    steps += [
        v2.CenterCrop(values["image_size"]),
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([*values["mean"]], [*values["std"]]),
    ]
    return v2.Compose(steps)
