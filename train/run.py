"""A run's folder: done markers that let stages be skipped, and results.json."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from tpp.masks import Sparsity, sparsity_of
from tpp.measure.counts import Counts
from tpp.models.architecture import Architecture
from train.config.config import Config
from train.copies import RunCopies
from train.data import RunData
from train.distributed.stopping import StopRequest
from train.distributed.watchdog import Watchdog
from train.tasks.base import Task

# Bad images, or settings that differ, that are named at once; log.jsonl has all of the images.
MOST_NAMED = 10
# In a stage's results: what is left of a network that is sparse.
LEFT = ("nonzero_parameters", "nonzero_macs", "sparsity")


@dataclass
class Run:
    """A run under way: its configuration, data, ranks and folder.

    Attributes:
        on_open: told the name of a stage whose log has been opened, on the main rank.
    """

    config: Config
    accelerator: Accelerator
    watchdog: Watchdog
    stop: StopRequest
    images: RunData | None
    architecture: Architecture
    dense: Counts
    copies: RunCopies | None = None  # on the main rank alone
    done: dict[str, dict[str, Any]] = field(default_factory=dict)
    step: int = 0
    on_open: Callable[[str], None] = lambda stage: None

    @functools.cached_property
    def task(self) -> Task:
        """What the network is trained for, as it is evaluated."""
        return self.config.make_task()

    @property
    def data(self) -> RunData:
        """The images; there for all but the removal of filters alone."""
        assert self.images is not None
        return self.images

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.output)

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes."""
        return bool(self.accelerator.is_main_process)

    def at(self, phase: str, step: int | None = None) -> None:
        """Let the watchdog know where this rank is; all ranks say so at the same places."""
        self.step = self.step if step is None else step
        self.watchdog.at(self.step, phase)

    def stage_folder(self, stage: str) -> Path:
        """Where a stage keeps its files."""
        return self.folder / stage

    def count_fields(
        self, counts: Counts, mask: Mapping[str, Tensor], left: Sparsity | None = None
    ) -> dict[str, Any]:
        """A network's size, and its speedup over the dense one, for its stage's results.

        Masked weights are counted in, and beside these figures stand those without them, or what
        a method says is left (:meth:`tpp.methods.base.Method.left`).
        """
        fields: dict[str, Any] = {
            "parameters": counts.parameters,
            "macs": counts.macs,
            "speedup": self.dense.macs / counts.macs,
        }
        if mask:
            left = sparsity_of(counts, mask)
        if left is not None:
            fields |= zip(LEFT, (left.parameters, left.macs, left.sparsity), strict=True)
        return fields


def say_bad_images(new: list[tuple[str, str]], tell: Callable[[str], None]) -> None:
    """Name images that are skipped; of many, the first ones."""
    for path, reason in new[:MOST_NAMED]:
        tell(f"skipped: {path} ({reason})")
    if len(new) > MOST_NAMED:
        tell(f"skipped: {len(new) - MOST_NAMED:,} more images")
