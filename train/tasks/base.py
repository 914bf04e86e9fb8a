"""What a network is trained for: its loss, and the figures by which it is judged."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from data_pipelines.images.batch import Batch
from data_pipelines.settings import AugmentSection, DataSection
from tpp.common.class_names import Labels
from tpp.common.settings import Section
from tpp.models.architecture import Architecture
from tpp.models.settings import ModelSection

# From what the network takes to its outputs in float32.
Forward = Callable[[Tensor], Tensor]


class Settings(Section):
    """Base of a task's settings; an unknown key is an error."""


@dataclass(frozen=True)
class Metric:
    """A figure of a network, a mean over images.

    Attributes:
        name: in logs and results.
        title: in tables; ``word`` within a sentence.
        unit: as it follows a number: ``%``, `` dB``.
        digits: behind the point.
        factor: what a mean over images is multiplied by, 100 for per cent.
        noun: of what it is a kind, where ``word`` alone does not say: ``accuracy``.
    """

    name: str
    title: str
    word: str
    unit: str = ""
    digits: int = 2
    factor: float = 1.0
    noun: str = ""

    @property
    def column(self) -> str:
        """Heading of a column: ``Top-1 %``."""
        return f"{self.title} {self.unit.strip()}".strip()

    def number(self, value: float | None) -> str:
        """A value without its unit; ``-`` for none."""
        return "-" if value is None else f"{value:.{self.digits}f}"

    def say(self, value: float, digits: int | None = None) -> str:
        """A value with its name and unit: ``top-1 76.13%``."""
        return f"{self.word} {value:.{self.digits if digits is None else digits}f}{self.unit}"


LOSS = Metric("loss", "Loss", "loss", digits=4)


@dataclass(frozen=True)
class Scores:
    """What an evaluation found.

    Attributes:
        values: by the metrics' names, in their order.
        images: how many were looked at, over all ranks.
        folders: the same of each folder of images, where that was asked for.
    """

    values: dict[str, float]
    images: int
    folders: "dict[str, Scores]" = field(default_factory=dict)

    def to_dict(self) -> dict[str, float]:
        """As plain data, flat; without the folders."""
        return {**self.values, "images": self.images}


class Task:
    """A task; one file under ``train/tasks/`` each.

    Nothing else in ``train/`` knows what a network's outputs mean.

    Attributes:
        kind: in configurations.
        settings_type: class of its settings.
        metrics: what an evaluation finds. The first is the score: the best checkpoint has the best
            of it, and reports draw it.
        told: those of them that a line in the terminal has.
        higher_is_better: of the score.
        has_classes: whether the outputs are logits of classes, which the labels are.
    """

    kind: ClassVar[str]
    settings_type: ClassVar[type[Settings]] = Settings
    metrics: ClassVar[tuple[Metric, ...]]
    told: ClassVar[tuple[Metric, ...]]
    higher_is_better: ClassVar[bool] = True
    has_classes: ClassVar[bool] = False

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    @property
    def score(self) -> Metric:
        """The metric that leads."""
        return self.metrics[0]

    def is_better(self, one: float, other: float) -> bool:
        """Whether the score ``one`` is better than ``other``."""
        return one > other if self.higher_is_better else one < other

    def say(self, values: dict[str, Any]) -> str:
        """An evaluation's figures in a line."""
        return ", ".join(metric.say(values[metric.name]) for metric in self.told)

    def check_data(self, data: DataSection, augment: AugmentSection, key: str) -> None:
        """Raise ValueError, naming the key, if the images are not prepared for this task.

        Args:
            data: the images' settings.
            augment: augmentation of a stage, or of all.
            key: of ``augment``.
        """

    def with_loss(
        self, loss: str, *, label_smoothing: float = 0.0, bce_threshold: float | None = None
    ) -> Self:
        """This task with another loss in training; asked of tasks that have classes."""
        raise NotImplementedError

    def in_episodes(self, classes_of: Callable[[int], list[int]]) -> Self:
        """This task for a few classes at a time; asked of tasks that have classes.

        Args:
            classes_of: those of a 0-based step, as many in each.
        """
        raise NotImplementedError

    def before_step(self, step: int, device: torch.device) -> None:
        """Write what depends on the 0-based training step into tensors on the device."""

    def architecture(
        self, model: ModelSection, classes: int | None = None, place: str = ""
    ) -> Architecture | None:
        """The dense network; None as long as that takes the number of class folders.

        Args:
            model: what the configuration says of it.
            classes: how many class folders there are; None where nobody has looked yet.
            place: where they are, for messages.

        Raises:
            UserError: the network is none for this task, or not for so many classes.
        """
        raise NotImplementedError

    def file_extra(self, classes: list[str]) -> dict[str, Any]:
        """What a model file says about this task beside the network; JSON-ready."""
        return {"task": {"kind": self.kind, **self.settings.model_dump()}}

    def labels(
        self,
        classes: list[str],
        architecture: Architecture,
        names: list[str] | None,
        order: str | None,
        *,
        file: str,
        place: str,
    ) -> Labels | None:
        """Which output of a network is which class folder; None where there are no classes.

        Args:
            classes: names of the class folders, sorted as text.
            architecture: of the network.
            names: of its outputs; None where its file does not say.
            order: see :func:`tpp.common.class_names.match_classes`.
            file: the network's, for messages.
            place: the folder of images, for messages.

        Raises:
            UserError: the network is none for these images, or there is no sure way to tell.
        """
        return None

    def inputs(self, images: Tensor) -> Tensor:
        """What the network takes, made from the loader's images (n, c, h, w) on their device."""
        return images

    def loss(self, forward: Forward, batch: Batch) -> tuple[Tensor, Tensor]:
        """The mean loss of a training batch, and the network's outputs for it."""
        raise NotImplementedError

    def training_sums(self, batch: Batch, outputs: Tensor) -> dict[Metric, Tensor]:
        """Sums over a training batch's images, before the metric's factor; nothing that costs."""
        return {}

    def sums(self, forward: Forward, batch: Batch) -> dict[Metric, Tensor]:
        """Sums over the images of a validation batch of every metric, before its factor."""
        raise NotImplementedError

    @torch.no_grad()
    def evaluate(
        self,
        forward: Forward,
        batches: Iterable[Batch],
        *,
        device: torch.device,
        over_ranks: Callable[[Tensor], Tensor] = lambda sums: sums,
        folders: Sequence[str] = (),
    ) -> Scores:
        """Evaluate a network, each image counted exactly once.

        Args:
            forward: of a network in evaluation mode; ranks may hold different numbers of batches,
                so nothing in it may communicate.
            batches: this rank's share, on ``device``.
            device: where sums are kept, in float64.
            over_ranks: adds them up over the ranks.
            folders: names of the folders that labels are numbers of, to evaluate each by itself
                too, as test sets in one folder are; batches are of one image each then.
        """
        sums = torch.zeros(1 + len(folders), len(self.metrics) + 1, device=device).double()
        for batch in batches:
            found = self.sums(forward, batch)
            row = torch.stack([found[metric].double() for metric in self.metrics])
            rows = [0, 1 + int(batch[1])] if folders else [0]
            sums[rows, :-1] += row
            sums[rows, -1] += len(batch[0])
        whole, *parts = over_ranks(sums)
        # A folder whose images can all not be read has no mean.
        seen = {name: part for name, part in zip(folders, parts, strict=True) if part[-1] > 0}
        found_there = {name: self._scores(part) for name, part in seen.items()}
        return replace(self._scores(whole), folders=found_there)

    def _scores(self, sums: Tensor) -> Scores:
        *totals, count = sums.tolist()
        values = {
            metric.name: metric.factor * total / count
            for metric, total in zip(self.metrics, totals, strict=True)
        }
        return Scores(values, int(count))
