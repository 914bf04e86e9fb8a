"""A teacher beside the network that a stage trains."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tpp.common.errors import UserError, reason_of
from train.distillation.features import Attention, choose_layers, look_inside
from train.distillation.losses import at_least_float32, attention_transfer, soft_labels
from train.distillation.settings import DistillSection


class Distillation:
    """The teacher's term of a stage's loss.

    The loss of a micro-batch is ``task_share`` times the task's and :meth:`term`, each a mean over
    this rank's images of it. The teacher runs without gradients, in evaluation mode, on the very
    images that the network gets, mixed ones among them.

    Args:
        settings: of the stage.
        student: the network, on its device; gets hooks where features are compared.
        teacher: on the same device, in evaluation mode, its parameters without gradients.
        example: one image as the network takes it, (1, c, h, w).
        preprocessing: how the run prepares images; where the teacher carries another mean and
            deviation, the images are normalised anew for it. Everything else is as the run has it:
            it gets the same pixels, whatever size it was made for.
        key: of the settings in the configuration.

    Raises:
        UserError: the two do not go together: other channels, another number of outputs, images of
            a size that the teacher does not take, layers that are not in both.
    """

    def __init__(
        self,
        settings: DistillSection,
        student: nn.Module,
        teacher: nn.Module,
        *,
        example: Tensor,
        preprocessing: Mapping[str, Any],
        key: str,
    ) -> None:
        self._settings, self._teacher = settings, teacher
        self.task_share = settings.task_share
        device = next(student.parameters()).device
        self._renormalized = _renormalization(preprocessing, teacher, device, key)
        # Two, since in some networks windows of an image count as images.
        images = example.to(device).expand(2, -1, -1, -1)
        with torch.no_grad():
            try:
                answers = teacher(self._for_teacher(images))
            except (RuntimeError, AssertionError, ValueError) as error:
                height, width = images.shape[2:]
                raise UserError(
                    f"{key}.teacher: takes no images of {height}x{width} ({reason_of(error)})"
                ) from None
        if settings.kind == "logits":
            _check_outputs(student, answers, images, key)
            return
        my_outputs = look_inside(student, images)
        its_outputs = look_inside(teacher, self._for_teacher(images))
        pairs = choose_layers(
            student, my_outputs, teacher, its_outputs, settings.layers, f"{key}.layers"
        )
        mine, its = (
            {name: seen[name].channels or 0 for name in names}
            for seen, names in zip((my_outputs, its_outputs), zip(*pairs, strict=True), strict=True)
        )
        self.layers = tuple(mine)
        self._mine = Attention(student, mine, training=True)
        self._its = Attention(teacher, its, training=False)

    def term(self, images: Tensor, outputs: Tensor) -> Tensor:
        """The term of a micro-batch, a mean over its images; to be asked after its forward pass.

        Args:
            images: (n, c, h, w), as the network got them.
            outputs: the network's logits (n, classes), float32 or more.
        """
        with torch.no_grad():
            answers = self._teacher(self._for_teacher(images))
        if self._settings.kind == "logits":
            answers = at_least_float32(answers)
            distance = soft_labels(outputs, answers, self._settings.degree)
        else:
            pairs = zip(self._mine.take(), self._its.take(), strict=True)
            distance = torch.stack([attention_transfer(*pair) for pair in pairs]).sum()
        return self._settings.factor * distance

    def _for_teacher(self, images: Tensor) -> Tensor:
        if self._renormalized is None:
            return images
        scale, shift = self._renormalized
        return at_least_float32(images) * scale + shift


def _renormalization(
    mine: Mapping[str, Any], teacher: nn.Module, device: torch.device, key: str
) -> tuple[Tensor, Tensor] | None:
    """Scale and shift (1, c, 1, 1) that make the teacher's images of the run's; None for none.

    (x s + m - m') / s', of a pixel x that was normalised by mean m and deviation s.
    """
    its: Mapping[str, Any] = getattr(teacher, "preprocessing", None) or {}
    channels = its.get("channels", mine["channels"])
    if channels != mine["channels"]:
        raise UserError(
            f"{key}.teacher: takes images of {channels} channels, the run's have "
            f"{mine['channels']} (data.channels)"
        )
    mean, std = (its.get(name, mine[name]) for name in ("mean", "std"))
    if [*mean] == [*mine["mean"]] and [*std] == [*mine["std"]]:
        return None
    m, s, m_, s_ = (_per_channel(v) for v in (mine["mean"], mine["std"], mean, std))
    scale, shift = s / s_, (m - m_) / s_
    return scale.float().to(device), shift.float().to(device)


def _per_channel(values: Sequence[float]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64)[None, :, None, None]


def _check_outputs(student: nn.Module, answers: Any, images: Tensor, key: str) -> None:
    architecture = getattr(student, "architecture", None)
    wanted = (len(images), architecture.num_classes) if architecture is not None else None
    found = tuple(answers.shape) if isinstance(answers, Tensor) else None
    if found is None or len(found) != 2 or (wanted is not None and found != wanted):
        theirs = f"{found[1]} classes" if found is not None and len(found) == 2 else "no classes"
        raise UserError(
            f"{key}.teacher: tells {theirs} apart, the network "
            f"{wanted[1] if wanted else 'others'}; take a teacher of the same classes, or kind: "
            "features"
        )
